"""Vectors beside decoding rows are those of transformers, however they are cut."""

import random
import struct
from pathlib import Path

import pytest
import torch

from tests.engines.adapters import load_reference
from tests.engines.engine_calls import SMALL_STEPS, Call, Factory, wait_until
from tests.engines.engine_worker import SECRET, generate_request
from tunewright.deployments.ports import Done, Embed, EngineReply, Trouble, Vector
from tunewright.engines.decoder import Decoder
from tunewright.engines.general import GeneralDecoder
from tunewright.engines.own_code import load_model
from tunewright.engines.torch import Engine
from tunewright.errors import InvalidRequest
from tunewright.rendering.renderer import Renderer


def embed(engine: Engine, texts: list[list[int]], pooling: str, priority: int = 0) -> list[EngineReply]:
    request = Embed(secret=SECRET, request_id="e", texts=texts, pooling=pooling, priority=priority)
    call = Call(engine, request)  # type: ignore[arg-type]
    found = [call.replies.get(timeout=60)]
    while isinstance(found[-1], Vector):
        found.append(call.replies.get(timeout=60))
    return found


def vectors(replies: list[EngineReply]) -> list[torch.Tensor]:
    made = {
        r.index: torch.tensor(struct.unpack(f"<{len(r.data) // 4}f", r.data)) for r in replies if isinstance(r, Vector)
    }
    return [made[index] for index in range(len(made))]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("kind", ["general", "fast"])
def test_vectors_are_those_of_transformers(
    kind: str,
    pooling: str,
    tiny_base: Path,
    tiny_decoder: Decoder,
    renderer: Renderer,
    engine_of: Factory,
) -> None:
    rng = random.Random(1)
    decoder = tiny_decoder if kind == "fast" else GeneralDecoder(load_model(tiny_base, SMALL_STEPS))
    engine = engine_of(decoder, SMALL_STEPS, slots=4, adapters=2, queue=100)
    answers = [Call(engine, generate_request(prompt_ids=[5, 6, n], max_tokens=30)) for n in range(3)]
    texts = [[rng.randrange(renderer.vocabulary_size) for _ in range(n)] for n in (1, 3, 30, 2, 2, 11, 5, 60, 1)]
    *found, done = embed(engine, texts, pooling)
    assert isinstance(done, Done), done
    assert (done.prompt_tokens, done.completion_tokens) == (sum(map(len, texts)), 0)
    model = load_reference(tiny_base)
    for text, vector in zip(texts, vectors(found), strict=True):
        with torch.inference_mode():
            states_TE = model.model(input_ids=torch.tensor([text])).last_hidden_state[0]
        pooled_E = states_TE.mean(dim=0) if pooling == "mean" else states_TE[-1]
        torch.testing.assert_close(vector, pooled_E / pooled_E.norm(), atol=2e-5, rtol=1e-4)
    assert all(isinstance(answer.last(), Done) for answer in answers)
    wait_until(lambda: engine.state().active == 0)


def test_several_take_turns_and_background_waits(tiny_decoder: Decoder, engine_of: Factory) -> None:
    engine = engine_of(tiny_decoder, SMALL_STEPS, slots=2, adapters=1, queue=100)
    busy = Call(engine, generate_request(prompt_ids=[5], max_tokens=60))
    for replies in (embed(engine, [[5, 6]] * 40, "mean"), embed(engine, [[5, 6]] * 3, "last", priority=2)):
        assert isinstance(replies[-1], Done), replies[-1]
    assert isinstance(busy.last(), Done)


def test_what_can_not_be_embedded_is_refused(tiny_decoder: Decoder, engine_of: Factory) -> None:
    engine = engine_of(tiny_decoder, SMALL_STEPS, slots=2, adapters=1, queue=100)
    for texts in ([], [[]], [[10**6]], [[5] * 10**5]):
        with pytest.raises(InvalidRequest):
            embed(engine, texts, "mean")


def test_numbers_out_of_range_end_the_request(tiny_decoder: Decoder, engine_of: Factory) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            return getattr(tiny_decoder, name)

        def states(self, batch: object, cache: object) -> torch.Tensor:
            return tiny_decoder.states(batch, cache) * torch.nan  # type: ignore[arg-type]

    engine = engine_of(Broken(), SMALL_STEPS, slots=2, adapters=1, queue=100)  # type: ignore[arg-type]
    (trouble,) = embed(engine, [[5, 6]], "mean")
    assert isinstance(trouble, Trouble) and trouble.code == "not_finite"
    wait_until(lambda: engine.state().active == 0)
