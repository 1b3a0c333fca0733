"""Every family that must be trainable: it learns, is saved and resumed to the bit, loaded by PEFT, and served alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.recipes.job_folder import losses, next_attempt, train_here, write_job
from tests.recipes.test_text import finished, peft_model
from tests.tiny_glm import KINDS, tiny_glm
from tests.tiny_models import tiny_llama
from tunewright.engines.adapter_files import Adapter, read_adapter
from tunewright.engines.batch import Part, make_batch
from tunewright.engines.decoder import Decoder
from tunewright.engines.general import GeneralDecoder
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.loading import load_decoder
from tunewright.engines.placement import choose_placement
from tunewright.files_on_disk import sha256_of
from tunewright.recipes import adapters
from tunewright.recipes.base_model import load_model

PLACEMENT = choose_placement(cuda=False, cuda_bfloat16=False)
TARGETS = {
    "llama": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "glm": ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"],
    "glm4": ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"],
    "glm4_moe": ["k_proj", "o_proj", "q_proj", "v_proj"],
}


@pytest.fixture(scope="module", params=["llama", *KINDS])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families") / kind
    return tiny_llama(folder) if kind == "llama" else tiny_glm(folder, kind)


@pytest.fixture(scope="module")
def tuned(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a training that was stopped on its way: the same as one that was not, to the last bit."""
    folder = tmp_path_factory.mktemp("jobs")
    wanted: dict[str, Any] = {"n_epochs": 8, "batch_size": 4, "learning_rate": 3e-2, "seed": 3}
    whole = train_here(write_job(folder / "whole", family, **wanted))
    spec = write_job(folder / "stopped", family, **wanted)
    first = train_here(spec, stop_at=5)
    second = train_here(next_attempt(spec))
    assert losses(first) | losses(second) == losses(whole)
    assert finished(second) == finished(whole)
    numbers = [loss for loss in losses(whole).values() if loss is not None]
    assert numbers[-1] < 0.7 * numbers[0], numbers
    return folder / "whole" / "result"


def test_peft_gives_the_logits_of_the_trained_model(kind: str, family: Path, tuned: Path) -> None:
    assert json.loads((tuned / adapters.CONFIG).read_text())["target_modules"] == TARGETS[kind]
    ours = load_model(family, torch.float32)
    rank, alpha, targets, tensors = adapters.read_adapter(tuned, "tiny", None)
    adapters.add_lora(ours, rank=rank, alpha=alpha, targets=targets, seed=0)
    adapters.load_adapter(adapters.adapter_parameters(ours), tensors)
    plain = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32).eval()
    tokens = torch.arange(5, 60)[None]
    with torch.no_grad():
        before = plain(input_ids=tokens).logits
        after = peft_model(plain, tuned)(input_ids=tokens).logits
        trained = ours(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(after, trained, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 0.1


@torch.inference_mode()
def test_the_engine_gives_the_same_logits_beside_rows_of_the_base(kind: str, family: Path, tuned: Path) -> None:
    decoder: Decoder = load_decoder(family, PLACEMENT, 64)
    assert isinstance(decoder, GeneralDecoder) == (kind == "glm4_moe")
    sha256 = sha256_of(tuned / adapters.WEIGHTS)
    pairs, n_tensors = read_adapter(tuned, sha256, "tiny", decoder.linears)
    adapter = Adapter("a", n_tensors, decoder.prepare(pairs), used=set())
    rows = [[7, 8, 9, 10, 11], [20, 21, 22], [30, 31, 32, 33, 34, 35, 36]]
    worn: list[Adapter | None] = [None, adapter, adapter]
    plain = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32).eval()
    expected = [plain(input_ids=torch.tensor([rows[0]])).logits[0]]
    with_peft = peft_model(plain, tuned)
    expected += [with_peft(input_ids=torch.tensor([row])).logits[0] for row in rows[1:]]

    cache = SlotCache(slots=3, context_tokens=16)
    cache.reserve(3, 16)
    for decoding in (False, True):  # the prompts but their last token, then that one
        parts = [
            Part(slot, len(row) - 1, row[-1:], worn[slot], True, True)
            if decoding
            else Part(slot, 0, row[:-1], worn[slot], True, False)
            for slot, row in enumerate(rows)
        ]
        batch = make_batch(parts, decoder.device)
        found = decoder.logits(batch, cache)
        for place, slot in enumerate(batch.wanted_order):
            wanted = expected[slot][-1 if decoding else -2]
            torch.testing.assert_close(found[place], wanted, rtol=1e-4, atol=2e-4)
    assert adapter.used and adapter.seat.stack.tensors(adapter.used) == n_tensors


def test_experts_and_their_router_are_left_as_they_are(tmp_path: Path) -> None:
    model = load_model(tiny_glm(tmp_path / "moe", "glm4_moe"), torch.float32)
    adapters.add_lora(model, rank=2, alpha=4, targets=adapters.linear_names(model), seed=1)
    assert len(adapters.adapter_parameters(model)) == 2 * 4 * 2  # two layers, four linear layers, A and B
    assert all(".self_attn." in name for name in adapters.adapter_parameters(model))
