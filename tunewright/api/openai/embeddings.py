"""Embeddings in the OpenAI dialect."""

from tunewright.api.embeddings import embedding_router
from tunewright.api.openai.errors import PREFIX

router = embedding_router(PREFIX, "openai")
