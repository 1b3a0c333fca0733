"""An engine worker without a model: `python -m tests.fake_worker WORKER_FOLDER`, started as the pool starts the real one.

The connections are those of the product; only the engine is a stand-in, which costs next to nothing. It gives every running
request a token in each step. Token n is the text "n ", so what is lost, doubled or out of order is seen. The seed of a request
says what it does to the worker (below). `fake.json` in the home's folder `workers` says how long a step takes (`step_s`), and how
many blanks follow each token (`padding`).
"""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tunewright.clock import mono_s
from tunewright.deployments.ports import (
    Done,
    EngineReply,
    EngineRequest,
    Generate,
    Proof,
    Prove,
    State,
    TokenText,
    Unload,
    WorkerProcess,
    WorkerSpec,
)
from tunewright.engines.connections import Connections
from tunewright.engines.tickets import Ticket
from tunewright.engines.worker import _own_start_ticks
from tunewright.errors import Unavailable
from tunewright.files_on_disk import write_atomically

KILLS = 666
"""The seed of a request that ends the process at its first step."""
KILLS_LATE = 667
"""The same after LATE tokens."""
HANGS = 668
"""The seed of a request whose first step never ends."""
LATE = 20


class FakeEngine:
    """What `Connections` asks of an engine. One thread, one step for all."""

    def __init__(self, spec: WorkerSpec, step_s: float = 0.005, padding: int = 0) -> None:
        self._spec = spec
        self._step_s = step_s
        self._padding = " " * padding
        self._lock = threading.Lock()
        self._waiting: list[Ticket] = []
        self._rows: list[tuple[Ticket, list[int]]] = []
        self._began_s: float | None = None
        threading.Thread(target=self._loop, daemon=True).start()

    def constraint(self, request: EngineRequest) -> None:
        return None

    def submit(
        self, request: Generate | Prove | Unload, deliver: Callable[[EngineReply], None], constraint: None = None
    ) -> Ticket:
        with self._lock:
            if len(self._waiting) >= self._spec.queue:
                raise Unavailable("engine_overloaded", "The engine has too many requests waiting; try again soon.")
            ticket = Ticket(request, deliver, 0, None)
            self._waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        ticket.cancelled = True

    def state(self) -> State:
        return State(
            worker_id=self._spec.worker_id,
            base_code=self._spec.base_code,
            active=len(self._rows),
            waiting=len(self._waiting),
            slots=self._spec.slots,
            adapters=[],
            step_s=0.0 if (began := self._began_s) is None else mono_s() - began,
            running=[ticket.request.fingerprint for ticket, _ in self._rows if isinstance(ticket.request, Generate)],
        )

    def _loop(self) -> None:
        next_s = time.monotonic()
        while True:
            next_s = max(next_s + self._step_s, time.monotonic() - self._step_s)
            time.sleep(max(0.0, next_s - time.monotonic()))
            self._began_s = mono_s()
            with self._lock:
                self._waiting = [ticket for ticket in self._waiting if not ticket.cancelled]
                self._rows = [row for row in self._rows if not row[0].cancelled and not row[0].closed]
                while self._waiting and len(self._rows) < self._spec.slots:
                    self._rows.append((self._waiting.pop(0), [0]))
            for ticket, count in self._rows:
                self._advance(ticket, count)
            self._began_s = None

    def _advance(self, ticket: Ticket, count: list[int]) -> None:
        request = ticket.request
        if isinstance(request, Prove):
            ticket.reply(Proof(tensors=2, tensors_applied=2, max_logit_shift=1.0, mean_logit_shift=0.1, load_ms=1.0))
            ticket.closed = True
            return
        if not isinstance(request, Generate):
            raise TypeError(request)
        if request.seed == KILLS or (request.seed == KILLS_LATE and count[0] >= LATE):
            os._exit(1)
        while request.seed == HANGS:
            time.sleep(1)
        ticket.reply(TokenText(text=f"{count[0]} {self._padding}", n_tokens=count[0] + 1))
        count[0] += 1
        if count[0] >= request.max_tokens:
            ticket.reply(Done(reason="length", prompt_tokens=len(request.prompt_ids), completion_tokens=count[0]))
            ticket.closed = True


async def serve(folder: Path) -> None:
    spec = msgspec.json.decode((folder / "spec.json").read_bytes(), type=WorkerSpec)
    told = folder.parent / "fake.json"
    options = json.loads(told.read_text()) if told.exists() else {}
    connections = Connections(FakeEngine(spec, **options), spec.secret)  # type: ignore[arg-type]
    server = await connections.listen()
    port = server.sockets[0].getsockname()[1]
    process = WorkerProcess(pid=os.getpid(), start_ticks=_own_start_ticks(), port=port, worker_id=spec.worker_id)
    write_atomically(folder / "worker.json", msgspec.json.encode(process))
    parent = os.getppid()
    while os.getppid() == parent or connections.n_open or mono_s() - connections.last_open_s < spec.idle_exit_s:
        await asyncio.sleep(0.2)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
