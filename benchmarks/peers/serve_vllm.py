"""One run of vLLM's CPU build, its engine in this process: `python serve_vllm.py REQUEST_FILE`."""

# pyright: reportMissingImports=false

import os
import time

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1",
)  # fmt: skip

import serving
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

asked = serving.request()
lora = {"enable_lora": True, "max_loras": len(asked.adapters), "max_lora_rank": 16} if asked.adapters else {}
engine = LLM(
    model=asked.model, dtype=asked.weights, max_model_len=asked.context_tokens, max_num_seqs=asked.most,
    enable_prefix_caching=False, enforce_eager=asked.kind == "eager", **lora,
).llm_engine  # fmt: skip
adapters = [LoRARequest(f"a{i}", i + 1, path) for i, path in enumerate(asked.adapters)]
answered = 0


def answer(prompts: list[list[int]], new_tokens: int) -> list[float]:
    global answered
    began = time.perf_counter()
    wanted = SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=0)
    places: dict[str, int] = {}
    for number, prompt in enumerate(prompts):
        answered += 1
        adapter = adapters[number % len(adapters)] if adapters else None
        engine.add_request(str(answered), {"prompt_token_ids": prompt}, wanted, lora_request=adapter)
        places[str(answered)] = number
    firsts, tokens = [0.0] * len(prompts), [0] * len(prompts)
    while engine.has_unfinished_requests():
        for output in engine.step():
            number = places[output.request_id]
            firsts[number] = firsts[number] or time.perf_counter() - began
            tokens[number] = len(output.outputs[0].token_ids)
    if set(tokens) != {new_tokens}:
        raise RuntimeError(f"not all tokens were generated: {tokens}")
    return firsts


serving.measure(asked, answer)
