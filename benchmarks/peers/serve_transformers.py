"""One run of transformers' own generation: `python serve_transformers.py REQUEST_JSON`; prints one line of figures.

`static`: `generate` on all prompts as one batch, adapters through PEFT's mixed batches. `continuous`: transformers' own
continuous batching, which knows no adapters.
"""

import json
import os
import sys
import time
import warnings
from typing import Any

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


def static(model: Any, asked: dict[str, Any], names: list[str]) -> float:
    """Seconds to the first token."""
    first, began = FirstToken(), time.perf_counter()
    ids = torch.tensor(asked["prompts"])
    mixed = {"adapter_names": [names[i % len(names)] for i in range(len(ids))]} if names else {}
    new = asked["new_tokens"]
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        logits_processor=[first], pad_token_id=0, **mixed,
    )  # fmt: skip
    if out.shape[1] != ids.shape[1] + new:
        raise RuntimeError("not all tokens were generated")
    return first.at_s - began


def continuous(model: Any, asked: dict[str, Any]) -> float:
    """Seconds to the first token are not told."""
    config = GenerationConfig(max_new_tokens=asked["new_tokens"], do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(inputs=asked["prompts"], generation_config=config)
    if len(results) != len(asked["prompts"]):
        raise RuntimeError("not all requests were answered")
    return float("nan")


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    disable_progress_bar()
    dtype = getattr(torch, asked["dtype"])
    attention = {"attn_implementation": "paged|sdpa"} if asked["kind"] == "continuous" else {}
    model: Any = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=dtype, **attention).eval()
    names = [f"a{i}" for i in range(len(asked["adapters"]))]
    for name, folder in zip(names, asked["adapters"], strict=True):
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name).eval()
    with torch.inference_mode():
        timed(model, asked | {"prompts": asked["prompts"][:1], "new_tokens": 2}, names)  # warm up
        print(json.dumps(timed(model, asked, names)))


def timed(model: Any, asked: dict[str, Any], names: list[str]) -> dict[str, float]:
    """The figures of a run."""
    began, busy = time.perf_counter(), time.process_time()
    first_s = continuous(model, asked) if asked["kind"] == "continuous" else static(model, asked, names)
    tokens = len(asked["prompts"]) * asked["new_tokens"]
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - busy
    return {"tokens_per_s": tokens / wall_s, "tokens_per_cpu_s": tokens / cpu_s, "ttft_ms": 1000 * first_s}


if __name__ == "__main__":
    main()
