"""JSON answers."""

from typing import Any

import msgspec
from starlette.responses import Response


class Json(Response):
    """A JSON body on one line in UTF-8. Floats that JSON can't say become null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)
