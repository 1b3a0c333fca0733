"""A request on its way through an engine, for those who know no more of engines than that."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from tunewright.deployments.ports import Embed, EngineReply, Generate, Prove, Trouble, Unload
from tunewright.engines.adapter_shelf import Key
from tunewright.errors import TunewrightError

if TYPE_CHECKING:
    from tunewright.engines.constraints import Constraint


@dataclass(eq=False)
class Ticket:
    """One request on its way through the engine. `deliver` is called on the engine's thread and must not raise."""

    request: Generate | Prove | Embed | Unload
    deliver: Callable[[EngineReply], None]
    number: int
    key: Key | None
    constraint: "Constraint | None" = None
    cancelled: bool = False
    answered: bool = False
    closed: bool = False

    @property
    def priority(self) -> int:
        """0 for what somebody waits for."""
        return self.request.priority if isinstance(self.request, Generate | Embed) else 0

    def reply(self, *replies: EngineReply) -> None:
        """Hand replies over, unless nobody wants them any more."""
        for reply in replies:
            if not self.cancelled:
                self.deliver(reply)

    def fail(self, error: TunewrightError) -> None:
        """End the request with an error."""
        self.reply(trouble_of(error))
        self.closed = True


def trouble_of(error: TunewrightError) -> Trouble:
    """The error as a line of the protocol; values that JSON has no word for go as text."""
    values = {name: msgspec.to_builtins(value, enc_hook=str) for name, value in error.values.items()}
    return Trouble(kind=error.kind, code=error.code, message=error.message, values=values)
