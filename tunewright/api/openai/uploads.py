"""Uploads in parts in the OpenAI dialect."""

from tunewright.api.openai.errors import PREFIX
from tunewright.api.uploads import UploadRoutes

router = UploadRoutes().router(PREFIX)
