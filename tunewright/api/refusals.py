"""Parameters that are refused by name, whatever their value."""

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from tunewright.errors import InvalidRequest, quote
from tunewright.i18n import mark

NEVER = frozenset(
    {"trust_remote_code", "model_path", "output_dir", "api_base", "chat_template", "chat_template_kwargs"}
)
"""They would choose code, files, servers or templates, which are the operator's to choose."""
NOT_ON_CREATE = NEVER | {"status", "id", "tenant_id", "project_id", "fine_tuned_model"}
"""Also those that the server decides."""


def refuse(body: Any, names: frozenset[str]) -> Any:
    """`body` as it came. Raises InvalidRequest (`unknown_parameter`) if it holds one of `names`."""
    if isinstance(body, dict) and not names.isdisjoint(body):
        raise _unknown(min(names.intersection(body)))
    return body


def refuse_others(body: Any, known: Collection[str]) -> Any:
    """`body` as it came. Raises InvalidRequest (`unknown_parameter`) if it holds a name that is not `known`."""
    if isinstance(body, dict) and (others := body.keys() - known):
        raise _unknown(quote(min(others)))
    return body


class StrictBody(BaseModel):
    """A body whose names must mean something and whose values must have their type."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, body: Any) -> Any:
        return refuse_others(body, cls.model_fields)


def _unknown(name: str) -> InvalidRequest:
    return InvalidRequest("unknown_parameter", mark("The parameter {field} is not taken here."), param=name, field=name)


def unsupported(name: str, param: str | None = None) -> InvalidRequest:
    """A parameter of the dialect that this server can't honour, so that ignoring it would change the answer."""
    return InvalidRequest(
        "unsupported_parameter",
        mark("The parameter {field} is not supported by this server; leave it out."),
        param=param or name,
        field=name,
    )
