"""Models in the Zhipu dialect."""

from tunewright.api.models import model_router
from tunewright.api.zhipu.errors import PREFIX

router = model_router(PREFIX)
