"""The vLLM engine without vLLM: what is pure, and the rest over a stand-in. With it: tests/contract/test_engine_protocol.py."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.engines.adapters import Reference, load_reference, make_adapter, old_names_allowed, request_values, sha256
from tests.engines.engine_calls import Call, expected, wait_until
from tests.engines.engine_worker import generate_request, worker_spec
from tests.engines.fake_vllm import FakeVllm
from tests.engines.families import family, linears_of
from tunewright.deployments.ports import Done, Embed, Proof, Prove, State, Trouble, Unload
from tunewright.engines import vllm_adapters
from tunewright.engines.adapter_files import Pair, read_adapter
from tunewright.engines.mixed_batch import Step, faults
from tunewright.engines.vllm import VllmEngine, sampling_values
from tunewright.errors import InvalidRequest, Misconfigured, Unavailable
from tunewright.rendering.renderer import Renderer


def test_a_fused_projection_comes_apart() -> None:
    """A copied, B halved: what the two parts add, side by side, is what the one added. All else stays."""
    generator = torch.Generator().manual_seed(0)
    fused = Pair(torch.randn(3, 8, generator=generator), torch.randn(12, 3, generator=generator), 0.5)
    other = Pair(torch.randn(3, 6, generator=generator), torch.randn(8, 3, generator=generator), 0.5)
    apart = vllm_adapters.unfused({"a.mlp.gate_up_proj": fused, "a.mlp.down_proj": other})
    assert set(apart) == {"a.mlp.gate_proj", "a.mlp.up_proj", "a.mlp.down_proj"}
    assert apart["a.mlp.down_proj"] is other
    parts = [apart["a.mlp.gate_proj"], apart["a.mlp.up_proj"]]
    assert all(torch.equal(part.down, fused.down) and part.scale == fused.scale for part in parts)
    assert torch.equal(torch.cat([part.up @ part.down for part in parts]), fused.up @ fused.down)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_exported_adapter_is_the_same_adapter(rslora: bool, tmp_path: Path) -> None:
    """GLM's is written anew with rank and scale as they were; what has nothing fused is taken from where it lies."""
    base = family("glm4", tmp_path / "base")
    linears = vllm_adapters.linears_of(base)
    assert linears["model.layers.1.mlp.gate_up_proj"] == (32, 96)
    adapter = make_adapter(
        base, tmp_path / "adapter", seed=1, rank=4, target_modules=linears_of("glm4"), use_rslora=rslora
    )
    folder, rank, tensors = vllm_adapters.exported(adapter, sha256(adapter), "tiny", linears, tmp_path / "made")
    assert (rank, tensors) == (4, 24)
    apart = dict(linears)
    for layer in range(2):
        for part in ("gate_proj", "up_proj"):
            apart[f"model.layers.{layer}.mlp.{part}"] = (32, 48)
    found, _ = read_adapter(folder, sha256(folder), "tiny", apart)
    wanted, _ = read_adapter(adapter, sha256(adapter), "tiny", linears)
    for name, pair in vllm_adapters.unfused(wanted).items():
        assert torch.equal(found[name].down, pair.down) and torch.equal(found[name].up, pair.up)
        assert found[name].scale == pytest.approx(pair.scale)
    plain = make_adapter(base, tmp_path / "plain", seed=1, target_modules=["q_proj", "down_proj"])
    assert vllm_adapters.exported(plain, sha256(plain), "tiny", linears, tmp_path / "made")[0] == plain
    with pytest.raises(InvalidRequest):
        vllm_adapters.exported(adapter, "0" * 64, "tiny", linears, tmp_path / "made")


def test_a_written_adapter_is_one_for_peft(tiny_base: Path, adapters: list[Path], tmp_path: Path) -> None:
    linears = vllm_adapters.linears_of(tiny_base)
    pairs, _ = read_adapter(adapters[1], sha256(adapters[1]), "tiny", linears)
    vllm_adapters.write_adapter(tmp_path / "again", pairs, "tiny")
    ids = torch.tensor([[5, 6, 7]])
    with old_names_allowed(), torch.inference_mode():
        one, other = (
            PeftModel.from_pretrained(load_reference(tiny_base), path).eval()(input_ids=ids).logits
            for path in (adapters[1], tmp_path / "again")
        )
    torch.testing.assert_close(one, other)


def answer(*steps: tuple[int, float]) -> list[Step]:
    return [{token: logprob, token + 1: logprob - 3.0} for token, logprob in steps]


BASE, FIRST, SECOND = (answer((n, -0.1), (9, -0.2)) for n in (5, 7, 30))
SOLO = {"base": BASE, "first": FIRST, "second": SECOND}


@pytest.mark.parametrize(
    ("mixed", "words"),
    [
        ({"base": [BASE, BASE], "first": [FIRST], "second": [SECOND]}, []),
        ({"base": [answer((5, -0.2), (9, -0.1))], "first": [FIRST], "second": [SECOND]}, []),
        ({"base": [BASE, FIRST], "first": [FIRST], "second": [SECOND]}, ["base differs"]),
        ({"base": [BASE], "first": [SECOND], "second": [SECOND]}, ["first differs"]),
        ({"base": [answer((5, -0.1), (9, -0.9))], "first": [FIRST], "second": [SECOND]}, ["base differs by 0.70"]),
        ({"base": [answer((5, float("nan")), (9, -0.2))], "first": [FIRST], "second": [SECOND]}, ["base differs"]),
        ({"base": [BASE[:1]], "first": [FIRST], "second": [SECOND]}, ["base differs"]),
        ({"base": [[]], "first": [FIRST], "second": [SECOND]}, ["base differs"]),
        ({"base": [BASE], "first": [FIRST]}, ["second was not answered"]),
    ],
)
def test_faults_of_mixed_batches_are_seen(mixed: dict[str, list[list[Step]]], words: list[str]) -> None:
    found = faults(SOLO, mixed, "base")
    assert len(found) == len(words)
    assert all(found[place].startswith(text) for place, text in enumerate(words))


def test_a_check_that_could_see_nothing_is_a_fault() -> None:
    found = faults({"base": BASE, "first": BASE}, {"base": [BASE], "first": [BASE]}, "base")
    assert found == ["first hardly differs from base: nothing could be seen"]


def test_sampling_asks_nothing_of_prompts() -> None:
    request = generate_request(
        prompt_ids=[1],
        temperature=0.7,
        top_p=0.9,
        top_k=4,
        seed=2**63 + 5,
        stop=["x"],
        stop_ids=[2],
        logit_bias={3: 1.0},
    )
    values = sampling_values(request)
    assert values["prompt_logprobs"] is None and values["detokenize"] is False and "stop" not in values
    assert (values["temperature"], values["top_p"], values["top_k"], values["seed"]) == (0.7, 0.9, 4, 5)
    assert (values["stop_token_ids"], values["ignore_eos"], values["logit_bias"]) == ([2], True, {3: 1.0})


Make = Callable[..., tuple[VllmEngine, FakeVllm]]


@pytest.fixture
def vllm_engine(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    made: list[VllmEngine] = []

    def make(
        version: str = "0.32.0", mixes: bool = False, device_type: str = "cuda", **spec: object
    ) -> tuple[VllmEngine, FakeVllm]:
        fake = FakeVllm(version, mixes, device_type)
        for name, module in fake.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        engine = VllmEngine(worker_spec(tiny_base, engine="vllm", **spec), Renderer(tiny_base), tmp_path / "worker")
        made.append(engine)
        engine.start()
        return engine, fake

    yield make
    for engine in made:
        engine.stop()


def test_base_and_adapters_answer_as_they_should(
    vllm_engine: Make, tiny_base: Path, adapters: list[Path], reference: Reference
) -> None:
    engine, fake = vllm_engine(slots=4, queue=16)
    assert engine.state().adapters == [] and len(fake.made[0].removed) == 2  # those of the check at the start are gone
    renderer = Renderer(tiny_base)
    paths = [None, *adapters] * 2
    calls = [
        Call(
            engine,
            generate_request(
                prompt_ids=[10 + i, 3], max_tokens=9, stop_ids=[0, 2], top_logprobs=2, **request_values(path)
            ),
        )
        for i, path in enumerate(paths)
    ]
    for i, (call, path) in enumerate(zip(calls, paths, strict=True)):
        done = call.last()
        assert isinstance(done, Done), done
        answer = (call.text, done.completion_tokens, done.reason)
        assert answer == expected(reference, renderer, path, [10 + i, 3], 9, frozenset({0, 2}))
        assert done.cached_tokens == 3
        for score in call.scores:
            assert len(score.top) == 2 and score.top[0] == (score.token_id, pytest.approx(score.logprob))
    assert engine.state().adapters == sorted(path.name for path in adapters)
    assert (engine.state().active, engine.state().adapter_loads) == (0, 3)


def test_salts_are_of_tenants(vllm_engine: Make) -> None:
    engine, fake = vllm_engine()
    fake.made[0].salts.clear()
    for tenant in ("a", "a", "b", None, None):
        Call(engine, generate_request(prompt_ids=[1], max_tokens=1, tenant=tenant)).last()
    salts = fake.made[0].salts
    assert salts[0] == salts[1] and len(set(salts)) == 4


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"mixes": True}, "vllm_mixes_adapters"),
        ({"mixes": True, "adapters": 1}, "vllm_mixes_adapters"),
        ({"mixes": True, "adapters": 32}, "vllm_mixes_adapters"),
        ({"version": "0.31.0"}, "vllm_version"),
    ],
)
def test_what_cannot_be_trusted_does_not_start(vllm_engine: Make, change: dict[str, object], code: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        vllm_engine(**change)
    assert caught.value.code == code
    assert caught.value.text("zh") != caught.value.text("en")


@pytest.mark.parametrize("adapters", [1, 3, 32])
def test_the_check_fills_all_slots(adapters: int, vllm_engine: Make) -> None:
    """An adapter in the last slot is what rows of the base would be answered with."""
    _, fake = vllm_engine(adapters=adapters)
    assert fake.made[0].arguments.max_loras == min(adapters, 8) == len(fake.made[0].removed)


def test_a_processor_is_asked_for_little(vllm_engine: Make) -> None:
    """Without it vLLM takes nine tenths of the memory and half an hour to compile, and computes in emulated 16 bits."""
    found = []
    for device_type, precision in (("cpu", "auto"), ("cpu", "bfloat16"), ("cuda", "auto"), ("cuda", "float32")):
        _, fake = vllm_engine(device_type=device_type, precision=precision)
        arguments = fake.made[0].arguments
        found.append((arguments.dtype, arguments.enforce_eager, arguments.kv_cache_memory_bytes))
    assert found == [
        ("float32", True, 2**30), ("bfloat16", True, 2**30), ("auto", False, None), ("float32", False, None),
    ]  # fmt: skip


def test_processes_of_vllm_end_with_the_worker() -> None:
    """Also when that is killed, and though they look after nobody: they would keep a GPU's memory."""
    code = (
        "import subprocess, time; from tunewright.engines import vllm; vllm.end_group_with_this_process();"
        "child = subprocess.Popen(['sleep', '600']);"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    with worker:
        assert worker.stdout is not None
        pid = worker.stdout.readline().strip()
        assert Path(f"/proc/{pid}").exists()
        worker.kill()
        assert worker.wait(10) == -signal.SIGKILL

    def gone() -> bool:
        try:
            return "(sleep) Z" in Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_until(gone)


def test_leaving_ends_the_work(vllm_engine: Make, adapters: list[Path]) -> None:
    engine, fake = vllm_engine(slots=2, queue=1)
    fake.made[0].pause_s = 0.1  # twenty seconds for each
    calls = [
        Call(engine, generate_request(prompt_ids=[1], max_tokens=200, fingerprint=f"f{i}", **request_values(path)))
        for i, path in enumerate([None, adapters[0], None])
    ]
    wait_until(lambda: len(fake.made[0].running) == 3)
    state = engine.state()
    assert (state.active, state.waiting, state.running) == (2, 1, ["f0", "f1", "f2"])
    with pytest.raises(Unavailable):
        Call(engine, generate_request(prompt_ids=[1]))
    for call in calls:
        engine.cancel(call.ticket)
    wait_until(lambda: not fake.made[0].running and not engine.state().active, 10.0)
    assert engine.alive


def test_stop_strings_and_proofs_and_unloading(
    vllm_engine: Make, tiny_base: Path, adapters: list[Path], reference: Reference, tmp_path: Path
) -> None:
    engine, fake = vllm_engine()
    whole, _, _ = expected(reference, Renderer(tiny_base), None, [40, 41], 30, frozenset())
    call = Call(engine, generate_request(prompt_ids=[40, 41], max_tokens=30, stop=[whole[6:9]]))
    done = call.last()
    assert isinstance(done, Done) and done.reason == "stop" and call.text == whole[: whole.index(whole[6:9])]

    proof = Call(engine, Prove(secret="s", prompts=[[5, 6, 7], [8]], **request_values(adapters[1]))).last()
    assert isinstance(proof, Proof) and proof.tensors == proof.tensors_applied == 28 and proof.max_logit_shift > 0.01
    nothing = make_adapter(tiny_base, tmp_path / "nothing", seed=4, strength=0)
    trouble = Call(engine, Prove(secret="s", prompts=[[5, 6, 7]], **request_values(nothing))).last()
    assert isinstance(trouble, Trouble) and trouble.code == "no_effect"

    removed = len(fake.made[0].removed)
    assert isinstance(Call(engine, Unload(secret="s", adapter_id="middle")).last(), State)
    wait_until(lambda: engine.state().adapters == ["nothing"] and len(fake.made[0].removed) == removed + 1)


def test_what_is_refused(vllm_engine: Make, adapters: list[Path], tiny_base: Path, tmp_path: Path) -> None:
    engine, _ = vllm_engine(store_path=str(adapters[0].parent))
    outside = make_adapter(tiny_base, tmp_path / "outside", seed=4)
    large = make_adapter(tiny_base, adapters[0].parent / "larger", seed=4, rank=65)
    for request, code in (
        (generate_request(prompt_ids=[1], **request_values(outside)), "adapter_invalid"),
        (generate_request(prompt_ids=[1], grammar="{}"), "invalid_schema"),
        (generate_request(prompt_ids=[600]), "invalid_prompt"),
        (generate_request(prompt_ids=[1] * 250, max_tokens=7), "context_length_exceeded"),
        (Embed(secret="s", request_id="r", texts=[[1]], pooling="mean"), "embeddings_not_served"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            Call(engine, request)
        assert caught.value.code == code
    for values in (request_values(large), request_values(adapters[0]) | {"adapter_sha256": "0" * 64}):
        reply = Call(engine, generate_request(prompt_ids=[1], **values)).last()
        assert isinstance(reply, Trouble) and reply.code == "adapter_invalid"
    assert isinstance(Call(engine, generate_request(prompt_ids=[1], **request_values(adapters[0]))).last(), Done)
