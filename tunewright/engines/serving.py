"""What the worker asks of an engine, ours or vLLM's."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from tunewright.deployments.ports import Embed, EngineReply, EngineRequest, Generate, Prove, State, Unload
from tunewright.engines.tickets import Ticket

if TYPE_CHECKING:
    from tunewright.engines.constraints import Constraint


class ServingEngine(Protocol):
    """Answers requests on a thread of its own; all calls return at once, but `constraint` may take a moment."""

    @property
    def alive(self) -> bool:
        """Whether it can still answer."""
        ...

    def state(self) -> State:
        """A snapshot for `Health`."""
        ...

    def constraint(self, request: EngineRequest) -> "Constraint | None":
        """What `submit` needs of a request with a grammar. Raises InvalidRequest(`invalid_schema`)."""
        ...

    def submit(
        self,
        request: Generate | Prove | Embed | Unload,
        deliver: Callable[[EngineReply], None],
        constraint: "Constraint | None" = None,
    ) -> Ticket:
        """Queue a request; replies come through `deliver` on the engine's thread.

        Raises InvalidRequest for what can never be served and Unavailable when the queue is full.
        """
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants this request any more."""
        ...
