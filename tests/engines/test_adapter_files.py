"""Adapters that must be refused, each with the offender's name, and those that must not."""

import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines.adapters import BASE_CODE, make_adapter, sha256
from tunewright.engines.adapter_files import read_adapter
from tunewright.engines.general import GeneralDecoder
from tunewright.engines.own_code import load_model
from tunewright.engines.placement import choose_placement
from tunewright.errors import InvalidRequest

Linears = dict[str, tuple[int, int]]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def linears(tiny_base: Path) -> Linears:
    return GeneralDecoder(load_model(tiny_base, choose_placement(cuda=False, cuda_bfloat16=False))).linears


@pytest.fixture
def adapter(adapters: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapters[1], tmp_path / "adapter"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_bytes(folder: Path, change: Callable[[bytes], bytes]) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(change(path.read_bytes()))


def refusal(folder: Path, linears: Linears, digest: str | None = None) -> str:
    with pytest.raises(InvalidRequest) as caught:
        weights = folder / "adapter_model.safetensors"
        read_adapter(folder, digest or (sha256(folder) if weights.is_file() else "0" * 64), BASE_CODE, linears)
    assert caught.value.code == "adapter_invalid"
    return caught.value.text()


def test_what_peft_writes_is_accepted(adapters: list[Path], linears: Linears) -> None:
    for path, pairs_expected in zip(adapters, (14, 14, 4), strict=True):
        pairs, tensors = read_adapter(path, sha256(path), BASE_CODE, linears)
        assert (len(pairs), tensors) == (pairs_expected, 2 * pairs_expected)
    pairs, _ = read_adapter(adapters[2], sha256(adapters[2]), BASE_CODE, linears)
    assert pairs["model.layers.0.self_attn.q_proj"].scale == pytest.approx(32 / math.sqrt(16))


@pytest.mark.parametrize(
    ("changes", "offender"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"r": 10**9}, "r must be"),
        ({"r": 257}, "r must be"),
        ({"r": 0}, "r must be"),
        ({"r": True}, "r must be"),
        ({"r": "8"}, "r must be"),
        ({"lora_alpha": 1e30}, "lora_alpha"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}, "auto_mapping"),
        ({"auto_map": {"AutoModel": "evil.py"}}, "auto_map"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"something_new": 1}, "something_new"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"base_model_name_or_path": "other"}, "belongs to the base other, not to tiny"),
        ({"base_model_name_or_path": "../../etc"}, "base ../../etc"),
        ({"base_model_name_or_path": "https://evil.test/x"}, "https://evil.test/x"),
        ({"base_model_name_or_path": None}, "base null"),
        ({"target_modules": "(a+)+$", "r": 10**9}, "r must be"),
    ],
)
def test_configuration_is_not_trusted(
    adapter: Path, linears: Linears, changes: dict[str, object], offender: str
) -> None:
    edit_config(adapter, **changes)
    assert offender in refusal(adapter, linears)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"r": 8, "r": 8}', '{"lora_alpha": NaN}', '{"lora_alpha": 1e999}', "[" * 100_000],
)
def test_configuration_must_be_plain_json(adapter: Path, linears: Linears, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refusal(adapter, linears)


def test_configuration_missing_or_huge(adapter: Path, linears: Linears) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text() + " " * 10_000_000)
    assert "larger than" in refusal(adapter, linears)
    config.unlink()
    assert "adapter_config.json is missing" in refusal(adapter, linears)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:-4],
        lambda data: data + b"tail",
        lambda data: (2**40).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"\xff" * 8 + data[16:],
        lambda data: pickle.dumps({"a": 1}),
    ],
    ids=["empty", "truncated", "tail", "huge header", "not utf-8", "pickle"],
)
def test_weights_must_be_safetensors(adapter: Path, linears: Linears, change: Callable[[bytes], bytes]) -> None:
    edit_bytes(adapter, change)
    assert "not a valid safetensors file" in refusal(adapter, linears)


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    ("change", "offender"),
    [
        (lambda t: rename(t, f"{FIRST}.lora_A.weight", f"{FIRST}.lora_C.weight"), "lora_C"),
        (lambda t: rename(t, f"{FIRST}.lora_A.weight", "model.q.lora_A.weight"), "model.q.lora_A.weight"),
        (lambda t: rename(t, f"{FIRST}.lora_A.weight", f"{FIRST}.lora_A.default.weight"), "lora_A.default.weight"),
        (lambda t: t.pop(f"{FIRST}.lora_A.weight"), f"missing tensor {FIRST}.lora_A.weight"),
        (lambda t: t.pop(f"{FIRST}.lora_B.weight"), f"missing tensor {FIRST}.lora_B.weight"),
        (lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(4, 32)}), "shape [4, 32] instead of [8, 32]"),
        (lambda t: t.update({f"{FIRST}.lora_B.weight": torch.ones(32)}), "shape [32]"),
        (lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(8, 32, dtype=torch.int32)}), "int32"),
        (lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(8, 32, dtype=torch.float64)}), "float64"),
        (lambda t: t[f"{FIRST}.lora_B.weight"][0].fill_(torch.nan), f"{FIRST}.lora_B.weight: not all numbers"),
        (lambda t: t[f"{FIRST}.lora_B.weight"][0].fill_(torch.inf), f"{FIRST}.lora_B.weight: not all numbers"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(600, 32)}), "lm_head.weight"),
        (lambda t: t.update({f"{FIRST.replace('0', '7')}.lora_A.weight": torch.ones(8, 32)}), "layers.7"),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_tensors_must_fit_the_base(
    adapter: Path, linears: Linears, change: Callable[[dict[str, torch.Tensor]], object], offender: str
) -> None:
    edit_tensors(adapter, change)
    assert offender in refusal(adapter, linears)


def test_all_offenders_are_named_at_once(adapter: Path, linears: Linears) -> None:
    edit_config(adapter, use_dora=True)
    edit_tensors(adapter, lambda t: (t.pop(f"{FIRST}.lora_A.weight"), t.update({"extra": torch.ones(1)})))
    (adapter / "optimizer.pt").write_bytes(b"")
    sentence = refusal(adapter, linears)
    assert all(part in sentence for part in ("4 problems", "use_dora", "extra", "missing tensor", "optimizer.pt"))


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "x.pt", "x.pth", "x.pkl", "x.npy", "x.h5", "x.gguf", "x.py", "x.SO"]
)
def test_unsafe_files_are_refused_unread(adapter: Path, linears: Linears, name: str) -> None:
    (adapter / name).write_bytes(b"")
    assert name in refusal(adapter, linears)


def test_weights_other_than_published_are_refused(adapter: Path, linears: Linears) -> None:
    published = sha256(adapter)
    edit_bytes(adapter, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    assert "sha256" in refusal(adapter, linears, published)


def test_links_are_not_followed(adapter: Path, adapters: list[Path], linears: Linears) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(adapters[1] / "adapter_model.safetensors")
    assert "adapter_model.safetensors" in refusal(adapter, linears, sha256(adapters[1]))


def test_tokenizer_files_of_an_adapter_are_never_looked_at(adapter: Path, linears: Linears) -> None:
    (adapter / "tokenizer.json").write_text("{broken")
    (adapter / "tokenizer_config.json").write_text('{"chat_template": "{{ 1 / 0 }}"}')
    assert read_adapter(adapter, sha256(adapter), BASE_CODE, linears)[0]


def test_a_missing_folder_is_refused(tmp_path: Path, linears: Linears) -> None:
    assert "missing" in refusal(tmp_path / "nowhere", linears)


def test_half_precision_weights_are_accepted(tiny_base: Path, tmp_path: Path, linears: Linears) -> None:
    folder = make_adapter(tiny_base, tmp_path / "half", seed=5)
    edit_tensors(folder, lambda t: t.update({name: tensor.to(torch.bfloat16) for name, tensor in t.items()}))
    pairs, _ = read_adapter(folder, sha256(folder), BASE_CODE, linears)
    assert all(pair.down.dtype == pair.up.dtype == torch.float32 for pair in pairs.values())
