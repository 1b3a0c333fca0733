"""What the loop needs of a dialect: how it reads a request of some kind, and how it writes answers and errors."""

from typing import Any, Protocol

from tunewright.accounts.records import Caller
from tunewright.errors import TunewrightError

CHAT = "chat"
EMBEDDINGS = "embeddings"
ENDPOINTS = {
    "/v1/chat/completions": CHAT,
    "/v4/chat/completions": CHAT,
    "/api/paas/v4/chat/completions": CHAT,
    "/v1/embeddings": EMBEDDINGS,
    "/v4/embeddings": EMBEDDINGS,
    "/api/paas/v4/embeddings": EMBEDDINGS,
}
"""What a batch may name as its endpoint -> the kind of its requests."""

ASYNC_PRIORITY = 1
BATCH_PRIORITY = 2
"""Of `Generate.priority`."""


class Speech(Protocol):
    """Requests of one kind in one dialect."""

    def check(self, caller: Caller, body: dict[str, Any], request_id: str) -> str:
        """The model that is asked. Raises InvalidRequest for a body that can't be answered, NotFound(`model_not_found`)."""
        ...

    async def answer(
        self, caller: Caller, body: dict[str, Any], request_id: str, *, priority: int, endpoint: str
    ) -> dict[str, Any]:
        """The body of the answer. Raises what the completion service raises, and InvalidRequest."""
        ...

    def failure(self, error: TunewrightError | None, request_id: str) -> tuple[int, dict[str, Any]]:
        """Status and body of the answer that an error is; None is a bug."""
        ...
