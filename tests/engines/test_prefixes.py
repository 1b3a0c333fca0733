"""Reuse of what was computed: the right numbers are in the right slots, and only for whom they belong to."""

import random
from pathlib import Path

import pytest
import torch

from tests.engines.engine_worker import generate_request
from tunewright.engines import prefixes
from tunewright.engines.adapter_shelf import Key
from tunewright.engines.answer_text import AnswerText
from tunewright.engines.batch import make_batch
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.prefixes import MIN_TOKENS
from tunewright.engines.rows import Row, RunningRows
from tunewright.engines.sampling import Sampler
from tunewright.engines.tickets import Ticket
from tunewright.rendering.renderer import Renderer

LAYERS = 2


class World:
    """Rows without a model: what a layer "computes" for a token is the number of all tokens so far, so that a wrong or a
    moved beginning shows everywhere behind it."""

    def __init__(self, renderer: Renderer, slots: int, context: int) -> None:
        self.cache = SlotCache(slots=slots, context_tokens=context)
        self.running = RunningRows(self.cache)
        self._renderer = renderer
        self._numbers = 0

    def add(self, prompt: list[int], max_tokens: int, tenant: str | None, key: Key | None = None) -> Row:
        self._numbers += 1
        request = generate_request(prompt_ids=prompt, max_tokens=max_tokens, tenant=tenant)
        row = Row(
            Ticket(request, lambda reply: None, self._numbers, key),
            request,
            None,
            Sampler(temperature=0.0, top_p=1.0, top_k=0, seed=None),
            AnswerText(self._renderer.stream_decoder(), []),
            frozenset(),
        )
        self.running.add(row)
        return row

    def step(self, next_token: int) -> None:
        chosen = self.running.parts(5, 11)
        self.running.reserve(chosen)
        batch = make_batch([part for _, part in chosen], "cpu")
        marks: list[float] = []
        by_start = sorted(((i, row, part) for i, (row, part) in enumerate(chosen)), key=lambda item: item[0])
        for _, row, part in by_start:
            tokens = row.request.prompt_ids + row.answer
            marks += [mark_of(tokens[: part.offset + n + 1]) for n in range(len(part.tokens))]
        new_THD = torch.tensor(marks)[:, None, None]
        for layer in range(LAYERS):
            self.cache.write(layer, new_THD + layer, -new_THD - layer, batch)
        for row, part in chosen:
            self.running.advance(row, len(part.tokens))
        for row, part in chosen:
            if part.wants_logits:
                row.accept(next_token)
                if row.finished:
                    self.running.remove(row)

    def check(self) -> None:
        """Every running row, and every kept one, lies where it is said to lie."""
        lying = [
            (slot, (row.request.prompt_ids + row.answer)[: row.cached]) for slot, row in enumerate(self.running.rows)
        ]
        kept = self.running.prefixes._kept
        assert all(slot >= len(self.running.rows) for slot in kept)
        assert all(slot < self.cache.slots for slot in kept)
        lying += [(slot, entry.tokens) for slot, entry in kept.items()]
        for slot, tokens in lying:
            expected = torch.tensor([mark_of(tokens[: n + 1]) for n in range(len(tokens))])
            for layer in range(LAYERS if tokens else 0):
                assert torch.equal(self.cache._keys[layer][slot, 0, : len(tokens), 0], expected + layer)
                assert torch.equal(self.cache._values[layer][slot, 0, : len(tokens), 0], -expected - layer)


def mark_of(tokens: list[int]) -> float:
    number = 7
    for token in tokens:
        number = (number * 31 + token) % 9973
    return float(number)


@pytest.fixture(scope="module")
def renderer(tiny_base: Path) -> Renderer:
    return Renderer(tiny_base)


@pytest.mark.parametrize("seed", range(12))
def test_numbers_are_where_they_should_be(seed: int, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random arrivals of prompts that have beginnings in common, ends, departures and idle moments, with much or little room."""
    rng = random.Random(seed)
    monkeypatch.setattr(prefixes, "KEEP_IDLE_BYTES", rng.choice([0, 5_000, 20_000, 200_000]))
    world = World(renderer, slots=rng.choice([1, 2, 3, 5]), context=600)
    stems = [[rng.randrange(300) for _ in range(rng.randint(10, 90))] for _ in range(3)]
    said: list[list[int]] = []
    longest_common = 0
    for _ in range(400):
        if rng.random() < 0.25 and len(world.running.rows) < world.cache.max_slots:
            begin = rng.choice([*stems, *said[-6:]])
            begin = begin[: rng.choice([len(begin), rng.randint(1, len(begin))])]
            prompt = [*begin, *(rng.randrange(300) for _ in range(rng.randint(1, 20)))][:560]
            tenant = rng.choice(["a", "a", "b", None])
            key = rng.choice([None, None, Key("x", "1"), Key("x", "2")])
            row = world.add(prompt, rng.randint(1, 12), tenant, key)
            assert row.reused < len(prompt)
            assert row.reused == 0 or (tenant is not None and row.reused >= MIN_TOKENS)
            longest_common = max(longest_common, row.reused)
            world.check()
        if world.running.rows:
            rows = list(world.running.rows)
            world.step(rng.randrange(300))
            world.check()
            said += [row.request.prompt_ids + row.answer for row in rows if row.finished]
            left = [row for row in rows if not row.finished]
            if left and rng.random() < 0.1:
                world.running.remove(rng.choice(left), poisoned=rng.random() < 0.5)
                world.check()
        if not world.running.rows:
            world.running.prefixes.release_memory()
            world.check()
        if rng.random() < 0.02:
            world.running.prefixes.forget("x")
    assert longest_common >= 16 or prefixes.KEEP_IDLE_BYTES < 20_000 or world.cache.max_slots == 1


def finish(world: World, row: Row) -> list[int]:
    while not row.finished:
        world.step(5)
    return row.request.prompt_ids + row.answer


def test_a_follow_up_reuses_the_answer_too(renderer: Renderer) -> None:
    world = World(renderer, slots=4, context=300)
    said = finish(world, world.add(list(range(40)), 20, "a"))
    follow_up = world.add([*said, 9, 9, 9], 5, "a")
    assert follow_up.reused == 59  # all but the last token, which was never read
    assert world.running.prefixes.hits == 1


@pytest.mark.parametrize(
    ("tenant", "key"),
    [("b", Key("x", "1")), (None, Key("x", "1")), ("a", Key("x", "2")), ("a", Key("y", "1")), ("a", None)],
)
def test_nobody_else_gets_it(renderer: Renderer, tenant: str | None, key: Key | None) -> None:
    """Not another tenant, nor other bytes of the adapter, nor another adapter, nor the base: ended or still running."""
    world = World(renderer, slots=4, context=300)
    prompt = list(range(40))
    finish(world, world.add(prompt, 20, "a", Key("x", "1")))
    running = world.add(prompt, 20, "a", Key("x", "1"))
    assert running.reused == 39
    world.step(5)
    assert running.answer
    hits = world.running.prefixes.hits
    assert world.add(prompt, 5, tenant, key).reused == 0
    assert world.running.prefixes.hits == hits


def test_what_is_not_known_to_be_sound_is_not_used(renderer: Renderer) -> None:
    """A row whose numbers ran out of range, one that left in the middle of its prompt, one that still reads it."""
    world = World(renderer, slots=4, context=300)
    prompt = list(range(40))
    world.add(prompt, 20, "a")
    world.step(5)
    reader = world.add(prompt, 20, "a")
    assert reader.reused == 0
    world.running.remove(reader)
    world.running.remove(world.running.rows[0])
    row = world.add(prompt, 20, "a")
    assert row.reused == 0
    while not row.answer:
        world.step(5)
    world.running.remove(row, poisoned=True)
    assert world.add(prompt, 20, "a").reused == 0


def test_what_prompts_that_come_together_begin_with_is_read_once(renderer: Renderer) -> None:
    """As of the choices of one request. The first row reads, its tenant's others wait for it, and one that leaves is replaced."""
    world = World(renderer, slots=8, context=300)
    prompt = list(range(40))
    leaver = world.add(prompt, 4, "a")
    rows = [world.add(prompt, 4, "a") for _ in range(4)]
    rows += [world.add([*prompt[:30], *[7] * 10], 4, "a"), world.add(prompt, 4, "b"), world.add(prompt, 4, None)]
    world.step(5)
    read = leaver.cached
    assert read and not any(row.cached for row in rows)
    world.running.remove(leaver)
    while world.running.rows:
        read += sum(len(part.tokens) for _, part in world.running.parts(5, 11) if not part.decoding)
        world.step(5)
        world.check()
    assert [row.reused for row in rows] == [0, 39, 39, 39, 30, 0, 0]
    assert read == leaver.cached + 40 + 3 * 1 + 10 + 40 + 40
    assert world.running.prefixes.hits == 4
    assert world.running.prefixes.tokens_reused == 3 * 39 + 30


def test_one_of_one_token_leaves_its_prompt_to_the_others(renderer: Renderer) -> None:
    world = World(renderer, slots=3, context=300)
    rows = [world.add(list(range(40)), 1, "a") for _ in range(3)]
    while world.running.rows:
        world.step(5)
        world.check()
    assert [row.reused for row in rows] == [0, 39, 39]


def test_a_forgotten_adapter_leaves_nothing(renderer: Renderer) -> None:
    world = World(renderer, slots=4, context=300)
    prompt = list(range(40))
    finish(world, world.add(prompt, 2, "a", Key("x", "1")))
    finish(world, world.add(prompt, 2, "a"))
    world.running.prefixes.forget("x")
    assert world.add(prompt, 2, "a", Key("x", "1")).reused == 0
    assert world.add(prompt, 2, "a").reused == 39


def test_idle_memory_is_bounded_and_the_newest_stay(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(renderer, slots=8, context=2000)
    prompts = [[n] * 100 for n in range(6)]
    for row in [world.add(prompt, 2 + n, "a") for n, prompt in enumerate(prompts)]:
        finish(world, row)
    per_row = world.cache.size_bytes(1, 256)
    monkeypatch.setattr(prefixes, "KEEP_IDLE_BYTES", 3 * per_row)
    world.running.prefixes.release_memory()
    world.check()
    assert world.cache.size_bytes(world.cache.slots, world.cache.tokens) == 3 * per_row
    found = [world.add(prompt, 2, "a").reused for prompt in reversed(prompts)]
    assert found == [99, 99, 99, 0, 0, 0]
    world.check()
