"""Embeddings in the Zhipu dialect."""

from tunewright.api.embeddings import embedding_router
from tunewright.api.zhipu.errors import PREFIX

router = embedding_router(PREFIX, "zhipu")
