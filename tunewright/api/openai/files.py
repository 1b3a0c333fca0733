"""Files in the OpenAI dialect."""

from tunewright.api.files import FileRoutes
from tunewright.api.openai.errors import PREFIX

router = FileRoutes(page_size=10_000).router(PREFIX)
