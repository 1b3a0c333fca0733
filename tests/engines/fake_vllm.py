"""A stand-in for vLLM with its names and manners, for one process without it: a model that answers token by token.

Arguments are those of version 0.32.0, anything else is a TypeError as there. With `mixes` it has the fault of the real build for
processors: rows of the base are answered by the adapter in the last slot, as soon as there is one.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from tests.engines.adapters import Reference


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    output_kind: Any = None

    def __post_init__(self) -> None:
        assert self.prompt_logprobs is None, "vLLM dies of them"
        assert not self.detokenize and self.output_kind == "delta"


@dataclass
class AsyncEngineArgs:
    model: str
    skip_tokenizer_init: bool
    trust_remote_code: bool
    load_format: str
    generation_config: str
    max_model_len: int
    max_num_seqs: int
    max_logprobs: int
    logprobs_mode: str
    enable_prefix_caching: bool
    scheduling_policy: str
    disable_log_stats: bool
    enable_log_requests: bool
    dtype: str = "auto"
    enforce_eager: bool = False
    kv_cache_memory_bytes: int | None = None
    enable_lora: bool = False
    max_loras: int = 1
    max_cpu_loras: int | None = None
    max_lora_rank: int = 16


@dataclass(eq=False)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


class AsyncLLM:
    mixes = False
    pause_s = 0.001
    """Before each token."""

    def __init__(self, arguments: AsyncEngineArgs) -> None:
        assert not arguments.trust_remote_code and arguments.load_format == "safetensors"
        self.arguments = arguments
        self._reference = Reference(Path(arguments.model))
        self._slots: list[LoRARequest | None] = [None] * arguments.max_loras
        self.errored = False
        self.running: dict[str, Any] = {}
        self.removed: list[int] = []
        self.salts: list[str] = []

    @classmethod
    def from_engine_args(cls, arguments: AsyncEngineArgs) -> "AsyncLLM":
        return cls(arguments)

    def shutdown(self) -> None:
        self.errored = True

    async def remove_lora(self, lora_id: int) -> bool:
        self.removed.append(lora_id)
        self._slots = [None if lora and lora.lora_int_id == lora_id else lora for lora in self._slots]
        return True

    def _load(self, lora: LoRARequest) -> None:
        """Into the first free slot, or one that nobody uses now; where all are used the real one would have it wait."""
        if lora not in self._slots:
            free = [place for place, other in enumerate(self._slots) if other is None]
            unused = [place for place, other in enumerate(self._slots) if other not in self.running.values()]
            self._slots[(free or unused or [0])[0]] = lora

    async def generate(
        self,
        prompt: dict[str, Any],
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Any, None]:
        assert set(prompt) == {"prompt_token_ids", "cache_salt"} and request_id not in self.running
        assert sampling_params.temperature == 0, "the stand-in takes the likeliest"
        self.salts.append(prompt["cache_salt"])
        if lora_request is not None:
            self._load(lora_request)
        self.running[request_id] = lora_request
        try:
            ids = list(prompt["prompt_token_ids"])
            for _ in range(sampling_params.max_tokens or 0):
                await asyncio.sleep(self.pause_s)
                lora = self._slots[-1] if self.mixes and lora_request is None else lora_request
                path = None if lora is None else Path(lora.lora_path)
                logprobs_V = self._reference.logits(path, ids)[-1].log_softmax(-1)
                token = int(logprobs_V.argmax())
                ids.append(token)
                yield self._output(logprobs_V, token, sampling_params.logprobs)
                if token in (sampling_params.stop_token_ids or []):
                    return
        finally:
            del self.running[request_id]

    def _output(self, logprobs_V: torch.Tensor, token: int, n: int | None) -> Any:
        step = None
        if n is not None:
            values, tokens = logprobs_V.topk(len(logprobs_V) if n < 0 else n)
            pairs = {**dict(zip(tokens.tolist(), values.tolist(), strict=True)), token: float(logprobs_V[token])}
            step = [{other: SimpleNamespace(logprob=value) for other, value in pairs.items()}]
        completion = SimpleNamespace(token_ids=[token], logprobs=step)
        return SimpleNamespace(outputs=[completion], num_cached_tokens=3)


@dataclass
class FakeVllm:
    """Its modules, for `sys.modules`."""

    version: str = "0.32.0"
    mixes: bool = False
    device_type: str = "cuda"
    made: list[AsyncLLM] = field(default_factory=list)

    def modules(self) -> dict[str, ModuleType]:
        fake = self

        class Llm(AsyncLLM):
            mixes = fake.mixes

            def __init__(self, arguments: AsyncEngineArgs) -> None:
                super().__init__(arguments)
                fake.made.append(self)

        def module(name: str, **values: Any) -> ModuleType:
            made = ModuleType(name)
            made.__dict__.update(values)
            return made

        return {
            "vllm": module(
                "vllm", __version__=self.version, AsyncEngineArgs=AsyncEngineArgs, SamplingParams=SamplingParams
            ),
            "vllm.platforms": module("vllm.platforms", current_platform=SimpleNamespace(device_type=self.device_type)),
            "vllm.v1.engine.async_llm": module("vllm.v1.engine.async_llm", AsyncLLM=Llm),
            "vllm.lora.request": module("vllm.lora.request", LoRARequest=LoRARequest),
            "vllm.sampling_params": module(
                "vllm.sampling_params", RequestOutputKind=SimpleNamespace(DELTA="delta", CUMULATIVE="all")
            ),
        }
