"""Requests that somebody waits for are not held up by those that nobody does."""

import queue
import random
import threading
import time
from pathlib import Path

import torch

from tests.engines.adapters import Reference, request_values
from tests.engines.engine_calls import SMALL_STEPS, Call, Factory, expected, wait_until
from tests.engines.engine_worker import generate_request
from tunewright.deployments.ports import Done, EngineReply, TokenText, Trouble
from tunewright.engines.batch import Batch
from tunewright.engines.decoder import Decoder
from tunewright.engines.kv_cache import SlotCache
from tunewright.rendering.renderer import Renderer


class Slow:
    """A decoder whose steps can be counted, and overtaken. It makes none while `goes_on` is not set."""

    def __init__(self, inner: Decoder) -> None:
        self._inner = inner
        self.device = inner.device
        self.precision = inner.precision
        self.n_embeddings = inner.n_embeddings
        self.linears = inner.linears
        self.prepare = inner.prepare
        self.states = inner.states
        self.steps = 0
        self.pause_s = 0.005
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.shapes: list[tuple[int, int]] = []
        """Of each step, how many rows decoded and how many prompts were read."""

    def logits(self, batch: Batch, cache: SlotCache) -> torch.Tensor:
        assert self.goes_on.wait(60)
        time.sleep(self.pause_s)
        self.steps += 1
        self.shapes.append((len(batch.lengths), len(batch.chunks)))
        return self._inner.logits(batch, cache)


STOPS = frozenset({0, 2})
PROMPT = 40
STEPS_ALONE = -(-PROMPT // SMALL_STEPS.prompt_tokens_alone)


def test_an_urgent_request_waits_for_one_step_at_most(
    tiny_decoder: Decoder,
    adapters: list[Path],
    reference: Reference,
    renderer: Renderer,
    engine_of: Factory,
) -> None:
    """All slots are taken by background work, read and answered, and more of it waits."""
    rng = random.Random(3)
    slow = Slow(tiny_decoder)
    engine = engine_of(slow, SMALL_STEPS, slots=4, adapters=3, queue=100)

    def prompt() -> list[int]:
        return [rng.randrange(3, renderer.vocabulary_size) for _ in range(PROMPT)]

    background = []
    for number in range(16):
        path = adapters[number % 3] if number % 2 else None
        request = generate_request(
            prompt_ids=prompt(), max_tokens=40, stop_ids=[0, 2], priority=2, **request_values(path)
        )
        background.append((Call(engine, request), request, path))
    for _ in range(6):
        time.sleep(rng.random() * 0.1)
        wanted = prompt()
        request = generate_request(prompt_ids=wanted, max_tokens=3, stop_ids=[0, 2])
        replies: queue.SimpleQueue[tuple[EngineReply, int]] = queue.SimpleQueue()
        # Steps are counted by the thread that makes them: this one may be woken late.
        before = slow.steps
        engine.submit(request, lambda reply, replies=replies: replies.put((reply, slow.steps)))
        late = slow.steps - before  # steps that may have ended before the request was there
        first, at = replies.get(timeout=60)
        text = ""
        if isinstance(first, TokenText):  # one step may have been under way
            text = first.text
            assert at - before <= STEPS_ALONE + 1 + late
            while isinstance(reply := replies.get(timeout=60)[0], TokenText):
                text += reply.text
            assert isinstance(reply, Done)
        assert text == expected(reference, renderer, None, wanted, 3, STOPS)[0]
    yielded = 0
    for call, request, path in background:
        done = call.last()
        while isinstance(done, Trouble):
            assert done.code == "engine_yielded"
            yielded += 1
            call = Call(engine, request)
            done = call.last()
        answer = (call.text, done.completion_tokens, done.reason)  # type: ignore[union-attr]
        assert answer == expected(reference, renderer, path, request.prompt_ids, 40, STOPS)
    assert yielded, "slots were given up, or the test did not fill them"
    wait_until(lambda: engine.state().active == 0)


def test_the_lowest_priority_begins_last(tiny_decoder: Decoder, engine_of: Factory) -> None:
    slow = Slow(tiny_decoder)
    engine = engine_of(slow, SMALL_STEPS, slots=1, adapters=1, queue=100)
    ends: list[int] = []

    def submit(priority: int) -> None:
        request = generate_request(prompt_ids=[5] * 12, max_tokens=2, priority=priority)
        engine.submit(request, lambda reply: ends.append(priority) if isinstance(reply, Done) else None)

    slow.goes_on.clear()
    submit(2)
    wait_until(lambda: engine.state().active == 1)
    for priority in (2, 1, 1, 2):
        submit(priority)
    slow.goes_on.set()
    wait_until(lambda: len(ends) == 5)
    assert ends == [2, 1, 1, 2, 2], "the first was under way"


def test_background_answers_pause_while_an_urgent_prompt_is_read(
    tiny_decoder: Decoder, reference: Reference, renderer: Renderer, engine_of: Factory
) -> None:
    """Also beside an urgent answer, which goes on."""
    rng = random.Random(4)
    slow = Slow(tiny_decoder)
    slow.pause_s = 0.03  # all answers are under way until the last is asked for
    engine = engine_of(slow, SMALL_STEPS, slots=4, adapters=1, queue=100)

    def ask(n_prompt: int, n: int, priority: int) -> tuple[Call, list[int], int]:
        prompt = [rng.randrange(3, renderer.vocabulary_size) for _ in range(n_prompt)]
        return Call(engine, generate_request(prompt_ids=prompt, max_tokens=n, priority=priority)), prompt, n

    calls = [ask(4, 100, 2) for _ in range(3)]
    wait_until(lambda: (3, 0) in slow.shapes)
    calls.append(ask(4, 60, 0))
    wait_until(lambda: (4, 0) in slow.shapes)
    seen = len(slow.shapes)
    calls.append(ask(PROMPT, 3, 0))
    slow.pause_s = 0.0
    answers = [(call, call.last(), prompt, n) for call, prompt, n in calls]
    assert (1, 1) in slow.shapes[seen:], "one urgent row decoded while the prompt was read, and no other"
    yielded = [done.code for _, done, _, _ in answers if isinstance(done, Trouble)]
    assert yielded == ["engine_yielded"], "the one that made room"
    for call, done, prompt, n in answers:
        if isinstance(done, Done):
            answer = (call.text, done.completion_tokens, done.reason)
            assert answer == expected(reference, renderer, None, prompt, n, frozenset())


def test_an_urgent_adapter_does_not_wait_for_one_of_background(
    tiny_decoder: Decoder, adapters: list[Path], reference: Reference, renderer: Renderer, engine_of: Factory
) -> None:
    """There is a place for one adapter, and background work uses it."""
    slow = Slow(tiny_decoder)
    slow.pause_s = 0.03
    engine = engine_of(slow, SMALL_STEPS, slots=4, adapters=1, queue=100)
    ours, theirs = request_values(adapters[1]), request_values(adapters[0])
    background = [
        Call(engine, generate_request(prompt_ids=[5, 6, n], max_tokens=200, priority=2, **theirs)) for n in (7, 8)
    ]
    wait_until(lambda: (2, 0) in slow.shapes)
    urgent = Call(engine, generate_request(prompt_ids=[9, 10], max_tokens=5, **ours))
    slow.pause_s = 0.005
    assert isinstance(urgent.last(), Done)
    assert urgent.text == expected(reference, renderer, adapters[1], [9, 10], 5, frozenset())[0]
    for call in background:
        trouble = call.last()
        assert isinstance(trouble, Trouble) and trouble.code == "engine_yielded"
