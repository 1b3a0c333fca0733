"""Models in the OpenAI dialect."""

from tunewright.api.models import model_router
from tunewright.api.openai.errors import PREFIX

router = model_router(PREFIX)
