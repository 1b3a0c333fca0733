"""One run of transformers' own generation: `python serve_transformers.py REQUEST_FILE`.

`static`: `generate` on all prompts as one batch, adapters through PEFT's mixed batches. `continuous`: transformers' own
continuous batching, which knows no adapters and does not tell when the first token came.
"""

import os
import time
import warnings
from typing import Any

import serving

warnings.simplefilter("ignore")
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402


class FirstToken:
    """A logits processor that only looks at the clock when it is called first."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.at_s = self.at_s or time.perf_counter()
        return scores


asked = serving.request()
torch.set_num_threads(1)
disable_progress_bar()
attention = {"attn_implementation": "paged|sdpa"} if asked.kind == "continuous" else {}
model: Any = AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, asked.weights), **attention).eval()
names = [f"a{i}" for i in range(len(asked.adapters))]
for name, folder in zip(names, asked.adapters, strict=True):
    if isinstance(model, PeftModel):
        model.load_adapter(folder, adapter_name=name)
    else:
        model = PeftModel.from_pretrained(model, folder, adapter_name=name).eval()


def static(prompts: list[list[int]], new_tokens: int) -> list[float]:
    first, began = FirstToken(), time.perf_counter()
    ids = torch.tensor(prompts)
    mixed = {"adapter_names": [names[i % len(names)] for i in range(len(ids))]} if names else {}
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, logits_processor=[first], pad_token_id=0, **mixed,
    )  # fmt: skip
    if out.shape[1] != ids.shape[1] + new_tokens:
        raise RuntimeError("not all tokens were generated")
    return [first.at_s - began] * len(prompts)


def continuous(prompts: list[list[int]], new_tokens: int) -> list[float]:
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(inputs=prompts, generation_config=config)
    if len(results) != len(prompts):
        raise RuntimeError("not all requests were answered")
    return []


with torch.inference_mode():
    serving.measure(asked, continuous if asked.kind == "continuous" else static)
