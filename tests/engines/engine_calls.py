"""Engines in this process for tests, and what is asked of them."""

import queue
import time
from pathlib import Path
from typing import Any

from tests.engines.adapters import Reference
from tests.engines.engine_worker import worker_spec
from tunewright.deployments.ports import Embed, EngineReply, Generate, Prove, TokenScore, TokenText, Unload
from tunewright.engines.constraints import Constraint, Constraints
from tunewright.engines.decoder import Decoder
from tunewright.engines.placement import Placement, choose_placement
from tunewright.engines.serving import ServingEngine
from tunewright.engines.tickets import Ticket
from tunewright.engines.torch import Engine
from tunewright.rendering.renderer import Renderer

CPU = choose_placement(cuda=False, cuda_bfloat16=False)
SMALL_STEPS = Placement("cpu", "float32", 5, 11)


class Call:
    """One request and what came back."""

    def __init__(
        self,
        engine: ServingEngine,
        request: Generate | Prove | Embed | Unload,
        constraint: Constraint | None = None,
    ) -> None:
        self.replies: queue.SimpleQueue[EngineReply] = queue.SimpleQueue()
        self.ticket: Ticket = engine.submit(request, self.replies.put, constraint)
        self.text = ""
        self.scores: list[TokenScore] = []

    def last(self, limit_s: float = 60.0) -> EngineReply:
        while isinstance(reply := self.replies.get(timeout=limit_s), TokenText):
            self.text += reply.text
            self.scores += reply.scores
        return reply


class Factory:
    """Makes engines that are stopped at the end of the test."""

    def __init__(self, base: Path, renderer: Renderer) -> None:
        self._base, self._renderer = base, renderer
        self.engines: list[Engine] = []

    def __call__(
        self, decoder: Decoder, placement: Placement = CPU, *, constrained: bool = False, **spec: Any
    ) -> Engine:
        renderer, folder = self._renderer, self._base
        constraints = Constraints(
            folder / "tokenizer.json", renderer.stop_ids, renderer.vocabulary_size, renderer.stream_decoder
        )
        engine = Engine(
            decoder,
            self._renderer.stream_decoder,
            worker_spec(self._base, **spec),
            vocabulary=self._renderer.vocabulary_size,
            placement=placement,
            constraints=constraints if constrained else None,
        )
        self.engines.append(engine)
        engine.start()
        return engine


def expected(
    reference: Reference, renderer: Renderer, path: Path | None, prompt: list[int], n: int, stops: frozenset[int]
) -> tuple[str, int, str]:
    tokens = reference.greedy(path, prompt, n, stops)
    stopped = tokens[-1] in stops
    decoder = renderer.stream_decoder()
    text = "".join(decoder.push(token) for token in tokens[: len(tokens) - stopped]) + decoder.flush()
    return text, len(tokens), "stop" if stopped else "length"


def wait_until(condition: Any, limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
