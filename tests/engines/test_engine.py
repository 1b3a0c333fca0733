"""The engine in process: rows in company get what they get alone, and no request harms another."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines.adapters import Reference, make_adapter, request_values
from tests.engines.engine_calls import CPU, SMALL_STEPS, Call, Factory, expected, wait_until
from tests.engines.engine_worker import generate_request
from tunewright.deployments.ports import (
    Done,
    Proof,
    Prove,
    State,
    Trouble,
    Unload,
)
from tunewright.engines.batch import Batch
from tunewright.engines.decoder import Decoder
from tunewright.engines.general import GeneralDecoder
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.own_code import load_model
from tunewright.errors import InvalidRequest, Unavailable
from tunewright.rendering.answer_grammar import json_grammar
from tunewright.rendering.renderer import Renderer

DEADLY = 599


class Fragile:
    """A decoder that fails on one token, answers NaN to another, and can be made slow."""

    def __init__(self, inner: Decoder) -> None:
        self._inner = inner
        self.device = inner.device
        self.precision = inner.precision
        self.n_embeddings = inner.n_embeddings
        self.linears = inner.linears
        self.prepare = inner.prepare
        self.states = inner.states
        self.pause_s = 0.0
        self.steps = 0

    def logits(self, batch: Batch, cache: SlotCache) -> torch.Tensor:
        time.sleep(self.pause_s)
        self.steps += 1
        ids = batch.input_ids_T.tolist()
        if DEADLY in ids:
            raise RuntimeError("a kernel failed")
        logits_WV = self._inner.logits(batch, cache)
        for place, index in enumerate(batch.wanted_W.tolist()):
            if ids[index] == DEADLY - 1:
                logits_WV[place, 3] = torch.nan
                for memory in (*cache._keys.values(), *cache._values.values()):
                    for chunk in batch.chunks:
                        if chunk.start <= index < chunk.end:
                            memory[chunk.slot] = torch.nan
        return logits_WV


def test_a_seed_gives_the_same_text_in_any_company(
    tiny_decoder: Decoder, adapters: list[Path], engine_of: Factory
) -> None:
    engine = engine_of(tiny_decoder, slots=4, adapters=2, queue=50)
    wanted = generate_request(
        prompt_ids=[5, 6, 7], max_tokens=30, temperature=1.3, top_p=0.95, seed=11, **request_values(adapters[0])
    )
    alone = Call(engine, wanted)
    alone.last()
    crowd = [
        Call(engine, generate_request(prompt_ids=[i, 3], max_tokens=20, temperature=1.0, **request_values(path)))
        for i, path in enumerate([None, adapters[1], None, adapters[0]])
    ]
    again = Call(engine, wanted)
    again.last()
    assert [isinstance(call.last(), Done) for call in crowd] == [True] * 4
    assert alone.text == again.text
    assert alone.text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_those_of_the_model(
    temperature: float, tiny_decoder: Decoder, reference: Reference, adapters: list[Path], engine_of: Factory
) -> None:
    """Whatever was drawn, and whatever penalties did to the draw, beside a row with an adapter."""
    engine = engine_of(tiny_decoder, slots=4)
    paths = [None, adapters[0], None]
    calls = [
        Call(
            engine,
            generate_request(
                prompt_ids=[5, 6, 7 + i],
                max_tokens=6,
                temperature=temperature,
                seed=3,
                presence_penalty=0.5,
                logit_bias={9: 2.0},
                top_logprobs=3,
                **request_values(path),
            ),
        )
        for i, path in enumerate(paths)
    ]
    for i, (call, path) in enumerate(zip(calls, paths, strict=True)):
        done = call.last()
        assert isinstance(done, Done) and len(call.scores) == done.completion_tokens
        ids = [5, 6, 7 + i]
        for score in call.scores:
            expected_V = reference.logits(path, ids)[-1].double().log_softmax(-1)
            assert abs(score.logprob - expected_V[score.token_id].item()) < 1e-4
            values, tokens = expected_V.topk(3)
            assert [token for token, _ in score.top] == tokens.tolist()
            assert np.allclose([value for _, value in score.top], values, atol=1e-4)
            ids.append(score.token_id)


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["red", "green"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "n"],
    "additionalProperties": False,
}


def test_answers_are_held_to_a_schema_beside_free_ones(
    tiny_base: Path,
    tiny_decoder: Decoder,
    renderer: Renderer,
    reference: Reference,
    adapters: list[Path],
    engine_of: Factory,
) -> None:
    """A model that knows nothing answers by the schema, at any temperature; its free neighbour says what it says alone."""
    stops = renderer.stop_ids
    engine = engine_of(tiny_decoder, slots=8, constrained=True)
    free = Call(engine, generate_request(prompt_ids=[5, 6, 7], max_tokens=20, stop_ids=sorted(stops)))
    calls = []
    for seed in range(6):
        request = generate_request(
            prompt_ids=[5, 6, 7 + seed],
            max_tokens=80,
            temperature=float(seed),
            seed=seed,
            stop_ids=sorted(stops),
            grammar=json_grammar(SCHEMA),
            **request_values(adapters[0] if seed % 2 else None),
        )
        calls.append(Call(engine, request, engine.constraint(request)))
    kinds = set()
    for call in calls:
        done = call.last()
        assert isinstance(done, Done) and done.reason == "stop"
        answer = json.loads(call.text)
        assert set(answer) == {"kind", "n"} and answer["kind"] in ("red", "green") and 0 <= answer["n"] <= 99
        kinds.add(answer["kind"])
    assert kinds == {"red", "green"}
    free.last()
    assert free.text == expected(reference, renderer, None, [5, 6, 7], 20, stops)[0]


def test_a_constraint_waits_for_the_end_of_the_reasoning(
    tiny_decoder: Decoder, renderer: Renderer, engine_of: Factory
) -> None:
    engine = engine_of(tiny_decoder, constrained=True)
    spoken = Call(engine, generate_request(prompt_ids=[5, 6, 7], max_tokens=30))
    spoken.last()
    after = next(word for word in spoken.text.split() if word.isascii() and len(word) > 2)
    free = spoken.text[: spoken.text.index(after) + len(after)]
    request = generate_request(
        prompt_ids=[5, 6, 7],
        max_tokens=60,
        grammar=json_grammar({"enum": ["yes"]}),
        grammar_after=after,
        stop_ids=sorted(renderer.stop_ids),
    )
    call = Call(engine, request, engine.constraint(request))
    assert isinstance(call.last(), Done)
    assert call.text.startswith(free) and call.text.endswith('"yes"')
    assert len(call.text) <= len(free) + len('"yes"') + 8  # the token that completed the word may say a little more


def test_stop_strings_end_the_answer(
    tiny_decoder: Decoder, reference: Reference, renderer: Renderer, engine_of: Factory
) -> None:
    engine = engine_of(tiny_decoder)
    prompt = [40, 41, 42]
    whole, _, _ = expected(reference, renderer, None, prompt, 30, frozenset())
    stop = whole[6:9]
    call = Call(engine, generate_request(prompt_ids=prompt, max_tokens=30, stop=[stop, "never"]))
    done = call.last()
    assert isinstance(done, Done)
    assert done.reason == "stop"
    assert done.completion_tokens < 30
    assert call.text == whole[: whole.index(stop)]


def test_a_query_of_death_ends_alone(
    tiny_decoder: Decoder, reference: Reference, renderer: Renderer, engine_of: Factory
) -> None:
    engine = engine_of(Fragile(tiny_decoder), slots=4)
    prompts = [[7, 8, 9], [5, DEADLY, 6], [4, DEADLY - 1], [10, 11]]
    calls = [Call(engine, generate_request(prompt_ids=prompt, max_tokens=12)) for prompt in prompts]
    replies = [call.last() for call in calls]
    for place, code in ((1, "engine_error"), (2, "not_finite")):
        reply = replies[place]
        assert isinstance(reply, Trouble)
        assert (reply.kind, reply.code) == ("internal", code)
    for place in (0, 3):
        assert calls[place].text == expected(reference, renderer, None, prompts[place], 12, frozenset())[0]
    late = [Call(engine, generate_request(prompt_ids=prompts[place], max_tokens=12)) for place in (0, 3, 0, 3)]
    assert all(isinstance(call.last(), Done) for call in late)
    assert late[2].text == calls[0].text  # the slots that held NaN give right answers again
    assert engine.state().active == 0


def test_the_queue_is_bounded(tiny_decoder: Decoder, engine_of: Factory) -> None:
    fragile = Fragile(tiny_decoder)
    fragile.pause_s = 0.05
    engine = engine_of(fragile, slots=1, queue=2)
    request = generate_request(prompt_ids=[1], max_tokens=100)
    running = Call(engine, request)
    wait_until(lambda: engine.state().active == 1)
    waiting = [Call(engine, request), Call(engine, request)]
    with pytest.raises(Unavailable) as caught:
        Call(engine, request)
    assert caught.value.code == "engine_overloaded"
    fragile.pause_s = 0.0
    assert all(isinstance(call.last(), Done) for call in (running, *waiting))


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"prompt_ids": []}, "invalid_prompt"),
        ({"prompt_ids": [600]}, "invalid_prompt"),
        ({"prompt_ids": [-1]}, "invalid_prompt"),
        ({"prompt_ids": [1], "max_tokens": 0}, "invalid_max_tokens"),
        ({"prompt_ids": [1] * 250, "max_tokens": 7}, "context_length_exceeded"),
        ({"prompt_ids": [1], "adapter_id": "x"}, "adapter_invalid"),
    ],
)
def test_impossible_requests(tiny_decoder: Decoder, engine_of: Factory, values: dict[str, Any], code: str) -> None:
    engine = engine_of(tiny_decoder)
    with pytest.raises(InvalidRequest) as caught:
        Call(engine, generate_request(**values))
    assert caught.value.code == code
    assert caught.value.text("zh") != caught.value.text("en")
    assert isinstance(Call(engine, generate_request(prompt_ids=[1] * 250, max_tokens=6)).last(), Done)


def prove_request(path: Path, prompts: list[list[int]] | None = None) -> Prove:
    return Prove(secret="s", prompts=prompts or [[5, 6, 7] * 9, [8], [1, 2]], **request_values(path))


def test_proof_measures_the_effect(
    tiny_decoder: Decoder, adapters: list[Path], reference: Reference, engine_of: Factory
) -> None:
    engine = engine_of(tiny_decoder, SMALL_STEPS, slots=2, adapters=2)
    neighbour = Call(engine, generate_request(prompt_ids=[3, 4], max_tokens=60))
    request = prove_request(adapters[1])
    proof = Call(engine, request).last()
    assert isinstance(proof, Proof)
    shifts = [
        (reference.logits(adapters[1], ids)[-1] - reference.logits(None, ids)[-1]).abs() for ids in request.prompts
    ]
    assert (proof.tensors, proof.tensors_applied) == (28, 28)
    assert proof.max_logit_shift == pytest.approx(max(float(shift.max()) for shift in shifts), rel=1e-3)
    assert proof.mean_logit_shift == pytest.approx(sum(float(shift.mean()) for shift in shifts) / 3, rel=1e-3)
    assert proof.load_ms > 0
    assert isinstance(neighbour.last(), Done)
    assert engine.state().active == 0


@pytest.mark.parametrize("kind", ["general", "llama"])
def test_proof_refuses_what_has_no_effect(
    kind: str, tiny_base: Path, tiny_decoder: Decoder, tmp_path: Path, engine_of: Factory
) -> None:
    decoder = tiny_decoder if kind == "llama" else GeneralDecoder(load_model(tiny_base, CPU))
    folder = make_adapter(tiny_base, tmp_path / "nothing", seed=4, strength=0)
    reply = Call(engine_of(decoder), prove_request(folder)).last()
    assert isinstance(reply, Trouble)
    assert (reply.kind, reply.code) == ("invalid_request", "no_effect")
    assert reply.values["applied"] == reply.values["tensors"] == 28


def test_proof_refuses_numbers_out_of_range(
    tiny_base: Path, tiny_decoder: Decoder, tmp_path: Path, engine_of: Factory
) -> None:
    folder = make_adapter(tiny_base, tmp_path / "huge", seed=4, strength=1e37)
    reply = Call(engine_of(tiny_decoder), prove_request(folder)).last()
    assert isinstance(reply, Trouble)
    assert (reply.kind, reply.code) == ("invalid_request", "adapter_invalid")


def test_unload_lets_users_end_first(tiny_decoder: Decoder, adapters: list[Path], engine_of: Factory) -> None:
    fragile = Fragile(tiny_decoder)
    fragile.pause_s = 0.1  # the first answer is under way until all is asked
    engine = engine_of(fragile)
    request = generate_request(prompt_ids=[1, 2], max_tokens=30, **request_values(adapters[0]))
    user = Call(engine, request)
    wait_until(lambda: engine.state().active == 1)
    answer = Call(engine, Unload(secret="s", adapter_id=adapters[0].name)).last()
    assert isinstance(answer, State)
    assert answer.adapters == [adapters[0].name]  # still in use
    later = Call(engine, request)
    fragile.pause_s = 0.0
    assert isinstance(user.last(), Done)
    assert isinstance(later.last(), Done)
    assert isinstance(Call(engine, Unload(secret="s", adapter_id=adapters[0].name)).last(), State)
    wait_until(lambda: engine.state().adapters == [])


def test_cancelling_frees_slots_at_once(tiny_decoder: Decoder, engine_of: Factory) -> None:
    fragile = Fragile(tiny_decoder)
    fragile.pause_s = 0.02
    engine = engine_of(fragile, slots=2)
    calls = [Call(engine, generate_request(prompt_ids=[1], max_tokens=200)) for _ in range(4)]
    wait_until(lambda: engine.state().active == 2)
    before = fragile.steps
    for call in calls:
        engine.cancel(call.ticket)
    wait_until(lambda: (state := engine.state()).active == state.waiting == 0)
    steps = fragile.steps
    assert steps - before < 100, "of 400 that all of them would take"
    time.sleep(0.1)
    assert fragile.steps == steps  # and nothing computes any more


def test_loading_does_not_hold_up_decoding(
    tiny_decoder: Decoder, adapters: list[Path], engine_of: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_decoder)
    loading, go_on = threading.Event(), threading.Event()
    prepare = tiny_decoder.prepare

    def slow(pairs: Any) -> Any:
        loading.set()
        go_on.wait(30)
        return prepare(pairs)

    monkeypatch.setattr(tiny_decoder, "prepare", slow)
    waiting = Call(engine, generate_request(prompt_ids=[1], **request_values(adapters[0])))
    assert loading.wait(10)
    assert isinstance(Call(engine, generate_request(prompt_ids=[1], max_tokens=50)).last(), Done)
    go_on.set()
    assert isinstance(waiting.last(), Done)
