"""One run of llama.cpp's own server, in process: `python serve_llamacpp.py REQUEST_FILE`. Model and adapters are GGUF files."""

# pyright: reportMissingImports=false

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import serving
import xllamacpp

asked = serving.request()
settings = xllamacpp.CommonParams()
settings.model.path = asked.model
settings.n_parallel = asked.most
settings.n_ctx = asked.most * asked.context_tokens
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.cache_ram_mib = 0
settings.verbosity = 0


def adapter(path: str) -> Any:
    """An adapter that is loaded and that a request has to ask for."""
    loaded = xllamacpp.CommonAdapterLoraInfo()
    loaded.path, loaded.scale = path, 0.0
    return loaded


settings.lora_adapters = [adapter(path) for path in asked.adapters]
settings.lora_init_without_apply = bool(asked.adapters)
server = xllamacpp.Server(settings)


def answer_one(number: int, prompt: list[int], new_tokens: int) -> float:
    """Seconds to the first token."""
    began = time.perf_counter()
    arrived: list[float] = []
    last: dict[str, Any] = {}

    def take(chunk: dict[str, Any]) -> bool:
        arrived.append(time.perf_counter())
        last.update(chunk)
        return False  # go on

    asked_for: dict[str, Any] = {
        "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
        "stream": True,
    }  # fmt: skip
    if asked.adapters:
        asked_for["lora"] = [{"id": number % len(asked.adapters), "scale": 1.0}]
    server.handle_completions(asked_for, take)
    if last.get("usage", {}).get("completion_tokens") != new_tokens:
        raise RuntimeError(f"not all tokens were generated: {last}")
    return arrived[0] - began


def answer(prompts: list[list[int]], new_tokens: int) -> list[float]:
    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(answer_one, range(len(prompts)), prompts, [new_tokens] * len(prompts)))


serving.measure(asked, answer)
