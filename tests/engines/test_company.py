"""Rows in company get what they get alone: whatever is mixed, arrives, leaves, is evicted or was computed before."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines.adapters import Reference, make_adapter, request_values
from tests.engines.engine_calls import CPU, SMALL_STEPS, Call, Factory
from tests.engines.engine_worker import generate_request
from tests.engines.families import family, linears_of
from tests.tiny_glm import tiny_glm
from tests.tiny_models import tiny_llama
from tunewright.deployments.ports import Done, TokenScore, Trouble
from tunewright.engines import loading
from tunewright.engines.batch import Batch
from tunewright.engines.decode_attention import by_numpy
from tunewright.engines.decoder import Decoder
from tunewright.engines.general import GeneralDecoder
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.loading import load_decoder
from tunewright.engines.own_code import load_model
from tunewright.engines.torch import Engine
from tunewright.rendering.renderer import Renderer

NOISE = 2e-4
STOPS = frozenset({0, 2})


class World:
    """A tiny base with adapters of several ranks, what transformers and PEFT say of each, and engines that serve it."""

    def __init__(self, kind: str, folder: Path, n_adapters: int = 3) -> None:
        base = folder / "base"
        if kind.startswith("llama"):
            tiny_llama(base)
        elif kind == "glm4_moe":
            tiny_glm(base, kind)
        else:
            family(kind.removesuffix("-general"), base)
        linears = linears_of(kind)[: 4 if kind == "glm4_moe" else None]
        self.base = base
        self.adapters = [
            make_adapter(
                base,
                folder / f"adapter-{n}",
                seed=n,
                rank=(2, 8, 16, 3)[n % 4],
                target_modules=linears if n % 3 else linears[::2],
                use_rslora=n % 2 == 1,
                strength=0.15,
            )
            for n in range(n_adapters)
        ]
        self.reference = Reference(base)
        self.decoder = decoder_of(kind, base)
        self.renderer = Renderer(base)
        self._solo: dict[tuple[Path | None, tuple[int, ...], int], list[TokenScore]] = {}

    def solo(self, path: Path | None, prompt: list[int], n: int) -> list[TokenScore]:
        """The greedy answer, computed alone and without any cache."""
        key = (path, tuple(prompt), n)
        if key not in self._solo:
            ids, scores = list(prompt), []
            for _ in range(n):
                logprobs_V = self.reference.logits(path, ids)[-1].double().log_softmax(-1)
                token = int(logprobs_V.argmax())
                scores.append(TokenScore(token, float(logprobs_V[token])))
                ids.append(token)
                if token in STOPS:
                    break
            self._solo[key] = scores
        return self._solo[key]

    def compare(self, call: Call, path: Path | None, prompt: list[int], n: int) -> Done:
        """Tokens, log-probabilities, text and counts of an answer are those of its solo run."""
        done = call.last()
        assert isinstance(done, Done), done
        solo = self.solo(path, prompt, n)
        shown = [score for score in solo if score.token_id not in STOPS]
        assert [score.token_id for score in call.scores] == [score.token_id for score in shown]
        for found, expected in zip(call.scores, shown, strict=True):
            assert abs(found.logprob - expected.logprob) < NOISE
        decoder = self.renderer.stream_decoder()
        assert call.text == "".join(decoder.push(score.token_id) for score in shown) + decoder.flush()
        assert (done.prompt_tokens, done.completion_tokens) == (len(prompt), len(solo))
        assert done.reason == ("length" if len(shown) == len(solo) else "stop")
        return done


def decoder_of(kind: str, base: Path) -> Decoder:
    """By transformers' own code, by the fast path, or by that with numpy's attention, which large models may get."""
    if "general" in kind:
        return GeneralDecoder(load_model(base, CPU))
    with pytest.MonkeyPatch.context() as patch:
        if "numpy" in kind:
            patch.setattr(loading, "_MEASURED_FROM", 0)
            patch.setattr(loading, "fastest_attention", lambda *_: by_numpy)
        return load_decoder(base, CPU, 256)


@pytest.fixture(
    scope="module", params=["llama", "llama-numpy", "llama-general", "glm", "glm4", "glm4-general", "glm4_moe", "qwen3"]
)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(request.param, tmp_path_factory.mktemp("company"))


@pytest.fixture
def engine_of(world: World) -> Iterator[Factory]:
    yield from engines(world)


def engines(world: World) -> Iterator[Factory]:
    factory = Factory(world.base, world.renderer)
    yield factory
    for engine in factory.engines:
        engine.stop()


@pytest.mark.parametrize("seed", [0, 1])
def test_random_company_changes_no_answer(seed: int, world: World, engine_of: Factory) -> None:
    """Base and three adapters (two places), three tenants and none, prompts with beginnings in common and follow-ups of answers,
    any lengths, staggered arrivals, departures, tiny prompt pieces."""
    rng = random.Random(seed)
    engine = engine_of(world.decoder, SMALL_STEPS, slots=6, adapters=2, queue=200)
    stems = [[rng.randrange(600) for _ in range(n)] for n in (20, 33, 50)]
    cached = 0
    for wave in range(3):
        calls: list[tuple[Call, Path | None, list[int], int]] = []
        own = [None, world.adapters[0], world.adapters[1]][wave]
        opening = request_values(own) | {"tenant": "a"}
        assert isinstance(Call(engine, generate_request(prompt_ids=stems[0], max_tokens=2, **opening)).last(), Done)
        for place in range(14):
            path = rng.choice([own, None, *world.adapters]) if place else own
            stem = rng.choice([[], stems[0], stems[0], *stems]) if place else stems[0]
            prompt = [*stem, *(rng.randrange(600) for _ in range(rng.choice([1, 2, 5, 6, 17])))]
            n = rng.randint(1, 12)
            values = request_values(path) | {"tenant": rng.choice(["a", "a", "a", "b", None]) if place else "a"}
            request = generate_request(
                prompt_ids=prompt, max_tokens=n, stop_ids=sorted(STOPS), top_logprobs=1, **values
            )
            calls.append((Call(engine, request), path, prompt, n))
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.02)
            if rng.random() < 0.2:
                engine.cancel(rng.choice([*calls[1:], calls[-1]])[0].ticket)
        done = [asked for asked in calls if not asked[0].ticket.cancelled]
        assert len(done) >= 5
        for call, path, prompt, n in done:
            cached += world.compare(call, path, prompt, n).cached_tokens
            stems.append([*prompt, *(score.token_id for score in call.scores)])
        stems = [*stems[:3], *(stem for stem in stems[-4:] if len(stem) < 200)]
    state = engine.state()
    assert len(state.adapters) <= 2
    assert state.prefix_hits >= 3 and cached >= 60
    assert state.prefix_tokens_reused >= cached


def test_what_was_computed_before_changes_no_answer(world: World, engine_of: Factory) -> None:
    """A conversation of four turns: each prompt has all that was said before, which is read once."""
    engine = engine_of(world.decoder, slots=2, adapters=1)
    for path in (None, world.adapters[1]):
        rng = random.Random(5)
        prompt = [rng.randrange(600) for _ in range(30)]
        for turn in range(4):
            values = request_values(path) | {"tenant": "a"}
            request = generate_request(prompt_ids=prompt, max_tokens=8, top_logprobs=1, **values)
            call = Call(engine, request)
            done = call.last()
            assert isinstance(done, Done)
            solo = world.solo(path, prompt, 8)
            said = [score.token_id for score in call.scores]
            assert said[: len(solo)] == [score.token_id for score in solo]
            assert done.cached_tokens == (
                len(prompt) - 5 - 1 if turn else 0
            )  # the last token of the answer was never read
            prompt = [*prompt, *said, *(rng.randrange(600) for _ in range(5))]
    assert engine.state().prefix_hits == 6


def test_choices_read_their_prompt_once_and_are_what_each_would_be_alone(
    world: World, engine_of: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four seeds of one prompt, at once: the texts of separate requests, and a quarter of their reading."""
    engine = engine_of(world.decoder, slots=4, adapters=1)
    read: list[int] = []
    logits = world.decoder.logits

    def counting(batch: Batch, cache: SlotCache) -> torch.Tensor:
        read.append(len(batch.input_ids_T))
        return logits(batch, cache)

    monkeypatch.setattr(world.decoder, "logits", counting)
    for path in (None, world.adapters[1]):
        common = {
            "prompt_ids": [n * 7 % 600 for n in range(60)],
            "max_tokens": 6,
            "temperature": 1.0,
            "top_logprobs": 0,
        }
        seeds = [common | request_values(path) | {"seed": seed} for seed in range(4)]
        alone = [Call(engine, generate_request(**values)) for values in seeds]
        separate = [(call.last(), call.text) for call in alone]
        assert sum(read) == 4 * (60 + 5)
        assert len({text for _, text in separate}) == 4
        read.clear()
        with engine._changed:  # all four are there before the engine looks
            calls = [Call(engine, generate_request(**values, tenant="a")) for values in seeds]
        done = [call.last() for call in calls]
        assert [call.text for call in calls] == [text for _, text in separate]
        for call, other in zip(calls, alone, strict=True):
            for one, same in zip(call.scores, other.scores, strict=True):
                assert one.token_id == same.token_id and abs(one.logprob - same.logprob) < NOISE
        assert sum(read) == 60 + 3 + 4 * 5
        assert [reply.cached_tokens for reply in done if isinstance(reply, Done)] == [0, 59, 59, 59]
        read.clear()


def test_reuse_is_for_one_tenant_and_one_adapter(world: World, engine_of: Factory, tmp_path: Path) -> None:
    """Nothing to be seen of what others asked; an adapter with other bytes under the same id begins anew."""
    engine = engine_of(world.decoder, slots=4, adapters=3)
    prompt = list(range(40, 80))
    again = make_adapter(world.base, tmp_path / world.adapters[0].name, seed=77, target_modules=["q_proj", "o_proj"])
    first = request_values(world.adapters[0])

    def cached(path: Path | None, tenant: str | None, values: dict[str, Any]) -> int:
        request = generate_request(
            prompt_ids=prompt, max_tokens=4, stop_ids=sorted(STOPS), top_logprobs=1, tenant=tenant, **values
        )
        return world.compare(Call(engine, request), path, prompt, 4).cached_tokens

    assert cached(world.adapters[0], "a", first) == 0
    assert cached(world.adapters[0], "b", first) == 0
    assert cached(world.adapters[0], None, first) == 0
    assert cached(None, "a", {}) == 0
    assert cached(again, "a", request_values(again)) == 0
    assert cached(world.adapters[0], "a", first) == 39
    assert cached(world.adapters[0], None, first) == 0
    assert engine.state().prefix_hits == 1


@pytest.fixture(scope="module")
def pool_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World("glm4", tmp_path_factory.mktemp("pool"), n_adapters=6)


def spoil(good: Path, folder: Path, fault: str) -> dict[str, Any]:
    """A copy of an adapter with something wrong; returns what a request for it says."""
    folder.mkdir()
    config = json.loads((good / "adapter_config.json").read_text())
    tensors = load_file(good / "adapter_model.safetensors")
    name = next(name for name in sorted(tensors) if "self_attn" in name)
    if fault == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    elif fault == "nan":
        tensors[name][0, 0] = torch.nan
    elif fault == "missing":
        del tensors[name]
    elif fault == "unknown":
        tensors[name.replace("self_attn", "other_attn")] = tensors.pop(name)
    elif fault == "base":
        config["base_model_name_or_path"] = "another"
    elif fault == "kind":
        config["use_dora"] = True
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    if fault == "cut":
        data = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    values = request_values(folder)
    return values | {"adapter_sha256": "0" * 64} if fault == "sha256" else values


def one_by_one(engine: Engine, paths: list[Path | None]) -> list[tuple[str, list[TokenScore]]]:
    found = []
    for path in paths:
        values = request_values(path)
        call = Call(engine, generate_request(prompt_ids=[9, 8, 7], max_tokens=12, top_logprobs=2, **values))
        assert isinstance(call.last(), Done)
        found.append((call.text, call.scores))
    return found


def test_bad_adapters_leave_the_others_as_they_are(pool_world: World, tmp_path: Path) -> None:
    """R-23: each is refused with `adapter_invalid`, and what others answer before and after is the same to the last bit."""
    world = pool_world
    faults = ["shape", "nan", "missing", "unknown", "base", "kind", "cut", "sha256"]
    bad = [spoil(world.adapters[0], tmp_path / fault, fault) for fault in faults]
    paths = [None, *world.adapters[:3]]
    for factory in engines(world):
        engine = factory(world.decoder, slots=4, adapters=4)
        before = one_by_one(engine, paths)
        busy = [
            Call(engine, generate_request(prompt_ids=[5, 6, n], max_tokens=60, top_logprobs=1, **request_values(path)))
            for n, path in enumerate(paths[:3])
        ]
        for values in bad:
            reply = Call(engine, generate_request(prompt_ids=[1], **values)).last()
            assert isinstance(reply, Trouble)
            assert (reply.kind, reply.code) == ("invalid_request", "adapter_invalid")
        for n, (call, path) in enumerate(zip(busy, paths, strict=False)):
            assert isinstance(call.last(), Done)
            solo = world.solo(path, [5, 6, n], 20)
            assert [score.token_id for score in call.scores][: len(solo)] == [score.token_id for score in solo]
        assert one_by_one(engine, paths) == before
        assert len(engine.state().adapters) == 3


def crowd(world: World, requests: int, slots: int, seed: int) -> None:
    """Every adapter is asked `requests` times at once, with a pool of four: all answers are those of solo runs."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(600) for _ in range(rng.choice([3, 20, 40]))] for _ in range(5)]
    wanted = [(path, rng.choice(prompts), rng.choice([2, 6])) for path in world.adapters for _ in range(requests)]
    rng.shuffle(wanted)
    for factory in engines(world):
        engine = factory(world.decoder, slots=slots, adapters=4, queue=len(wanted))
        calls = []
        for path, prompt, n in wanted:
            values = request_values(path) | {"tenant": rng.choice(["a", "b"])}
            request = generate_request(
                prompt_ids=prompt, max_tokens=n, stop_ids=sorted(STOPS), top_logprobs=1, **values
            )
            calls.append(Call(engine, request))
        for call, (path, prompt, n) in zip(calls, wanted, strict=True):
            world.compare(call, path, prompt, n)
        state = engine.state()
        assert len(state.adapters) <= 4
        assert state.adapter_loads > 4  # some were evicted and came back
        assert (state.active, state.waiting) == (0, 0)


def test_six_adapters_in_a_pool_of_four(pool_world: World) -> None:
    """R-24 in small: 72 requests at once."""
    crowd(pool_world, requests=12, slots=8, seed=1)


@pytest.mark.soak
def test_twenty_adapters_in_a_pool_of_four(tmp_path: Path) -> None:
    """R-24: a thousand requests at once."""
    crowd(World("glm4", tmp_path, n_adapters=20), requests=50, slots=16, seed=2)
