"""Batches in the OpenAI dialect."""

from tunewright.api.batches import BatchRoutes
from tunewright.api.openai.errors import PREFIX

router = BatchRoutes("openai").router(PREFIX)
