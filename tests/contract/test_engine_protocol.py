"""What every engine owes to the gateway, over the worker's socket. vLLM's part runs where TUNEWRIGHT_VLLM_PYTHON names it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.engines import real_vllm
from tests.engines.adapters import Reference, make_adapter, request_values
from tests.engines.engine_calls import expected
from tests.engines.engine_worker import (
    SECRET,
    WorkerRun,
    exchange,
    generate,
    generate_request,
    health,
    one,
    worker_spec,
)
from tests.engines.families import family, linears_of
from tunewright.deployments.ports import Done, Proof, Prove, State, TokenScore, TokenText, Trouble, Unload
from tunewright.models.whole_models import seal
from tunewright.rendering.renderer import Renderer


class Served:
    """A GLM with adapters on its fused projections, served by one engine."""

    def __init__(self, engine: str, folder: Path) -> None:
        # In nats, of a token that was chosen. On a GPU vLLM computes in 16 bits.
        self.noise = 1e-3 if engine == "torch" or real_vllm.is_of_processors() else 0.3
        self.base = family("glm4", folder / "base", head_dim=32)  # no less is known to vLLM's attention
        self.store = folder / "store"
        self.adapters = [
            make_adapter(self.base, self.store / f"a{n}", seed=n, rank=8, target_modules=linears_of("glm4"))
            for n in (1, 2)
        ]
        self.reference = Reference(self.base)
        spec = worker_spec(
            self.base, engine=engine, python=real_vllm.PYTHON, store_path=str(self.store), slots=8, context_tokens=256
        )
        self.run = WorkerRun(folder / "worker", spec)


@pytest.fixture(scope="module", params=["torch", "vllm"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "vllm":
        real_vllm.needs_vllm()
        limit_s, environment = real_vllm.START_LIMIT_S, real_vllm.mended(folder / "mended")
    else:
        limit_s, environment = 60.0, {}
    served = Served(request.param, folder)
    served.run.start(limit_s, **environment)
    yield served
    served.run.kill()


def test_a_build_that_mixes_rows_up_does_not_start(tmp_path: Path) -> None:
    """vLLM's CPU build as it is: rows of the base get the adapter in the last slot, be there 2 slots or 8."""
    python = real_vllm.needs_vllm()
    if not real_vllm.is_of_processors():
        pytest.skip("no such fault is known of this build")
    base = family("glm4", tmp_path / "base", head_dim=32)
    for adapters in (2, 32):
        run = WorkerRun(tmp_path / str(adapters), worker_spec(base, engine="vllm", python=python, adapters=adapters))
        with pytest.raises(RuntimeError, match="exit code 78"):
            run.start(real_vllm.START_LIMIT_S)
        assert "vllm_mixes_adapters" in run.log() and "adapter 1 differs" not in run.log()


@pytest.mark.parametrize("engine", ["torch", "vllm"])
async def test_weights_of_its_own_need_no_adapters(engine: str, tmp_path: Path) -> None:
    """A model with its adapter merged in is served by any build of vLLM: there is nothing to mix up."""
    python = real_vllm.needs_vllm() if engine == "vllm" else None
    base, model = (family("glm4", tmp_path / name, head_dim=32) for name in ("base", "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= -1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    own = {"weights_path": str(model), "weights_sha256": seal(model, base, "tiny")}
    run = WorkerRun(tmp_path / "worker", worker_spec(base, engine=engine, python=python, **own))
    try:
        run.start(real_vllm.START_LIMIT_S)
        text, done = await generate(run.port, prompt_ids=[5, 6, 7], max_tokens=12)
    finally:
        run.kill()
    wanted, of_base = (
        expected(Reference(folder), Renderer(base), None, [5, 6, 7], 12, frozenset()) for folder in (model, base)
    )
    assert (text, done.completion_tokens, done.reason) == wanted != of_base


async def answer(
    served: Served, path: Path | None, prompt: list[int], n: int, **more: Any
) -> tuple[list[TokenScore], Done]:
    scores: list[TokenScore] = []
    values = {"prompt_ids": prompt, "max_tokens": n, "top_logprobs": 2} | request_values(path) | more
    async for reply in exchange(served.run.port, generate_request(**values)):
        assert not isinstance(reply, Trouble), reply
        if isinstance(reply, TokenText):
            scores += reply.scores
        elif isinstance(reply, Done):
            return scores, reply
    raise RuntimeError("the connection closed early")


async def test_mixed_rows_are_scored_as_their_solo_references(served: Served) -> None:
    """Base rows by the base, others by their adapters, all at once; what was chosen is near the likeliest."""
    paths = [None, *served.adapters] * 4
    prompts = [[10 + n, 7, 30 + n] for n in range(len(paths))]
    answers = await asyncio.gather(*(answer(served, path, ids, 6) for path, ids in zip(paths, prompts, strict=True)))
    for path, ids, (scores, done) in zip(paths, prompts, answers, strict=True):
        assert (done.reason, done.prompt_tokens, done.completion_tokens) == ("length", 3, 6)
        said = list(ids)
        for score in scores:
            expected_V = served.reference.logits(path, said)[-1].double().log_softmax(-1)
            assert abs(score.logprob - float(expected_V[score.token_id])) < served.noise
            assert float(expected_V.max()) - float(expected_V[score.token_id]) < served.noise
            said.append(score.token_id)


async def test_a_stop_string_and_a_stop_token_end_an_answer(served: Served) -> None:
    whole, _ = await generate(served.run.port, prompt_ids=[40, 41], max_tokens=30)
    cut, done = await generate(served.run.port, prompt_ids=[40, 41], max_tokens=30, stop=[whole[5:8]])
    assert (cut, done.reason) == (whole[: whole.index(whole[5:8])], "stop")
    (first, *_), _ = await answer(served, None, [40, 41], 3)
    text, done = await generate(served.run.port, prompt_ids=[40, 41], max_tokens=30, stop_ids=[first.token_id])
    assert (text, done.reason, done.completion_tokens) == ("", "stop", 1)


async def test_leaving_frees_the_slot(served: Served) -> None:
    async for reply in exchange(served.run.port, generate_request(prompt_ids=[6, 7], max_tokens=200)):
        assert isinstance(reply, TokenText)
        break
    for _ in range(100):
        if not (await health(served.run.port)).active:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("still active")


async def test_a_tenant_reads_its_prompt_once(served: Served) -> None:
    prompt = list(range(100, 300))
    cached = [
        (await answer(served, None, prompt, 2, tenant=tenant))[1].cached_tokens for tenant in ("a", "a", "b", None)
    ]
    assert cached[0] == cached[2] == cached[3] == 0
    assert 0 < cached[1] < len(prompt)


async def test_a_proof_of_effect(served: Served, tmp_path: Path) -> None:
    prove = Prove(secret=SECRET, prompts=[[5, 6, 7], [8, 9]], **request_values(served.adapters[0]))
    proof = await one(served.run.port, prove)
    assert isinstance(proof, Proof)
    assert proof.tensors == proof.tensors_applied == 24 and proof.max_logit_shift > 0.01
    nothing = make_adapter(served.base, served.store / "nothing", seed=5, strength=0, target_modules=["gate_up_proj"])
    trouble = await one(served.run.port, Prove(secret=SECRET, prompts=[[5, 6, 7]], **request_values(nothing)))
    assert isinstance(trouble, Trouble) and trouble.code == "no_effect"


async def test_adapters_from_elsewhere_and_changed_ones_are_refused(served: Served, tmp_path: Path) -> None:
    outside = make_adapter(served.base, tmp_path / "outside", seed=9, target_modules=["q_proj"])
    through = {"adapter_path": str(served.store / ".." / "store" / ".." / "base")}
    changed = {"adapter_sha256": "0" * 64}
    for values in (
        request_values(outside),
        request_values(served.adapters[0]) | through,
        request_values(served.adapters[1]) | {"adapter_id": "other"} | changed,
    ):
        trouble = await one(served.run.port, generate_request(prompt_ids=[1], **values))
        assert isinstance(trouble, Trouble)
        assert (trouble.kind, trouble.code) == ("invalid_request", "adapter_invalid")


async def test_unload(served: Served) -> None:
    await answer(served, served.adapters[0], [1, 2], 2)
    assert "a1" in (await health(served.run.port)).adapters
    assert isinstance(await one(served.run.port, Unload(secret=SECRET, adapter_id="a1")), State)
    for _ in range(100):
        if "a1" not in (await health(served.run.port)).adapters:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("still loaded")
