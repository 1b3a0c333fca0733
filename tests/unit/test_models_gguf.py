"""A GGUF file becomes the same model in Hugging Face's layout."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from benchmarks.peers.gguf_files import write_base
from tests.tiny_gguf import CONTEXT, tiny_weights, write_tiny_gguf
from tests.tiny_models import CHATML
from tunewright.errors import Misconfigured, StorageFull
from tunewright.models.gguf_conversion import convert_gguf

QUANTISED = "model.layers.0.mlp.up_proj.weight"
"""The one matrix that the tiny file has in Q8_0."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    gguf_file = write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    convert_gguf(gguf_file, folder)
    return folder


def test_weights_come_back_in_hugging_face_order(converted: Path) -> None:
    found, expected = load_file(converted / "model.safetensors"), tiny_weights()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        if name == QUANTISED:
            assert found[name].dtype == np.float16
            assert 0 < np.abs(found[name] - weight).max() < 0.01
        else:
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(found[name], weight)


def test_config_says_what_transformers_reads(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_parameters"] == {"rope_theta": 50000.0, "rope_type": "default"}
    assert config["rms_norm_eps"] == 1e-5
    assert (config["max_position_embeddings"], config["num_key_value_heads"]) == (CONTEXT, 2)
    assert (config["tie_word_embeddings"], config["dtype"]) == (True, "float32")
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((converted / "tokenizer_config.json").read_text())["chat_template"] == CHATML


def test_tokenizer_merges_and_splits_digits_singly(converted: Path) -> None:
    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    assert tokenizer.encode("hello world 12<|im_end|>").tokens == [
        *("hello", "Ġw", "o", "r", "l", "d", "Ġ", "1", "2", "<|im_end|>")
    ]
    text = "naïve 12  你好 🙂\n\tx=3.14"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_what_the_benchmarks_write_for_peers_is_the_same_model(converted: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    convert_gguf(write_base(converted, tmp_path / "again.gguf", "F32"), again)
    found, expected = load_file(again / "model.safetensors"), load_file(converted / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (again / name).read_text() == (converted / name).read_text()


def test_logits_are_those_of_transformers_own_loader(converted: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    write_tiny_gguf(tmp_path / "tiny.gguf")
    ours = AutoModelForCausalLM.from_pretrained(converted)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    assert ours.dtype == torch.float32
    rounded = theirs.get_parameter(QUANTISED)
    rounded.data = rounded.half().float()
    # Their loader leaves pad and the like alone, but the numbers that decide the logits must be the same.
    for key in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(ours.config, key) == pytest.approx(getattr(theirs.config, key))
    tokenizer = AutoTokenizer.from_pretrained(converted)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello 12"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        difference = (ours(**prompt).logits - theirs(**prompt).logits).abs().max()
    assert prompt["input_ids"].shape[1] > 50
    assert difference < 1e-4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architecture": "qwen3"}, "architecture"),
        ({"pre": "qwen2"}, "qwen2"),
        ({"leave_out": "blk.1.attn_k.weight"}, "k_proj"),
    ],
)
def test_what_could_be_converted_wrongly_is_refused(tmp_path: Path, changes: dict[str, str], named: str) -> None:
    gguf_file = write_tiny_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(Misconfigured) as caught:
        convert_gguf(gguf_file, tmp_path)
    assert caught.value.code == "unsupported_gguf"
    assert named in caught.value.text()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 100])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tiny.gguf").write_bytes(content)
    with pytest.raises(Misconfigured) as caught:
        convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    assert caught.value.code == "unsupported_gguf"


def test_a_full_disk_is_found_before_the_weights_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_file = write_tiny_gguf(tmp_path / "tiny.gguf")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(StorageFull):
        convert_gguf(gguf_file, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
