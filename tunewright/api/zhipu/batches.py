"""Batches in the Zhipu dialect."""

from tunewright.api.batches import BatchRoutes
from tunewright.api.zhipu.errors import PREFIX

router = BatchRoutes("zhipu").router(PREFIX)
