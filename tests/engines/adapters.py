"""Adapters made by PEFT itself, with random B so that they change answers, and PEFT's own answers to compare with."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from tunewright.files_on_disk import sha256_of

BASE_CODE = "tiny"
ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@contextmanager
def old_names_allowed() -> Iterator[None]:
    """PEFT uses a name that transformers gives up; nothing that we could call differently."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def load_reference(base: Path) -> PreTrainedModel:
    """The base in float32 through plain transformers."""
    return AutoModelForCausalLM.from_pretrained(base, local_files_only=True, dtype=torch.float32).eval()


def make_adapter(base: Path, folder: Path, *, seed: int, rank: int = 8, strength: float = 0.3, **config: Any) -> Path:
    """Write an adapter as PEFT writes it. `strength` 0 gives one without effect."""
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, **({"target_modules": ATTENTION_AND_MLP, "task_type": "CAUSAL_LM"} | config)
    )
    with old_names_allowed(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(load_reference(base), lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=strength) if strength else torch.nn.init.zeros_(parameter)
    model.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": BASE_CODE}))
    return folder


def sha256(adapter: Path) -> str:
    return sha256_of(adapter / "adapter_model.safetensors")


def request_values(adapter: Path | None) -> dict[str, Any]:
    """The adapter fields of a request."""
    if adapter is None:
        return {}
    return {"adapter_id": adapter.name, "adapter_path": str(adapter), "adapter_sha256": sha256(adapter)}


class Reference:
    """Greedy answers of the base and of adapters, one prompt at a time, by transformers and PEFT."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._models: dict[Path | None, Any] = {}

    def _model(self, adapter: Path | None) -> Any:
        if adapter not in self._models:
            model = load_reference(self._base)
            with old_names_allowed():
                self._models[adapter] = model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()
        return self._models[adapter]

    @torch.inference_mode()
    def logits(self, adapter: Path | None, ids: list[int]) -> torch.Tensor:
        """Logits [T, vocabulary] of one prompt."""
        return self._model(adapter)(input_ids=torch.tensor([ids])).logits[0]

    def greedy(self, adapter: Path | None, prompt: list[int], n: int, stop_ids: frozenset[int]) -> list[int]:
        """Up to `n` tokens, computed without any cache; a stop token is the last one."""
        ids = list(prompt)
        for _ in range(n):
            ids.append(int(self.logits(adapter, ids)[-1].argmax()))
            if ids[-1] in stop_ids:
                break
        return ids[len(prompt) :]
