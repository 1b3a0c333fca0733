"""The dialect of the OpenAI SDK, under /v1."""
