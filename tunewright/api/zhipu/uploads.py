"""Uploads in parts in the Zhipu dialect."""

from tunewright.api.uploads import UploadRoutes
from tunewright.api.zhipu.errors import PREFIX

router = UploadRoutes().router(PREFIX)
