"""HTTP: the only user of FastAPI and Starlette. `zhipu/` and `openai/` are two renderings of the same services."""
