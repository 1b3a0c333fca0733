"""Files in the Zhipu dialect."""

from tunewright.api.files import FileRoutes
from tunewright.api.zhipu.errors import PREFIX

router = FileRoutes(page_size=20).router(PREFIX)
