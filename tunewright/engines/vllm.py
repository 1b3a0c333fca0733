"""vLLM behind our protocol, for GPUs: its asynchronous engine on a loop and a thread of its own.

It runs in an environment of its own (`TUNEWRIGHT_VLLM_PYTHON`), with the version named here. vLLM batches, samples and holds
adapters; text, stop strings and what is told of each token are ours, as in `torch.py`. Never asked of it: log-probabilities of
prompts (a burst of them once killed it), echoes, its own tokenizer, code or generation settings from a model's folder.
"""

import asyncio
import importlib
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import torch

from tunewright.clock import mono_s
from tunewright.deployments.ports import (
    Embed,
    EngineReply,
    EngineRequest,
    Generate,
    Proof,
    Prove,
    State,
    TokenScore,
    Unload,
    WorkerSpec,
)
from tunewright.engines.adapter_files import Pair, adapter_invalid
from tunewright.engines.adapter_shelf import Key
from tunewright.engines.admission import check_request
from tunewright.engines.answer_text import AnswerText
from tunewright.engines.constraints import Constraint
from tunewright.engines.mixed_batch import Step, faults
from tunewright.engines.rows import Row
from tunewright.engines.sampling import Sampler
from tunewright.engines.tickets import Ticket
from tunewright.engines.vllm_adapters import RANKS, exported, linears_of, write_adapter
from tunewright.errors import InvalidRequest, Misconfigured, TunewrightError, Unavailable
from tunewright.i18n import mark
from tunewright.rendering.renderer import Renderer

VERSION = "0.32.0"
MAX_RANK = 64
"""Larger ones would cost memory for every adapter; they are for our own engine."""
_MOST_LORAS_IN_A_STEP = 8
_KEYS_AND_VALUES_BYTES = 2**30
"""On a processor, which is for trying it out."""
_CHECK_TOKENS = 6
_CHECK_ROUNDS = 2
_log = logging.getLogger(__name__)
_guard: "subprocess.Popen[bytes] | None" = None
"""Its input closes with this process."""


class VllmEngine:
    """Serves one base, or weights of its own. `folder` is the worker's: split adapters lie in it."""

    def __init__(self, spec: WorkerSpec, renderer: Renderer, folder: Path) -> None:
        self._spec = spec
        self._renderer = renderer
        self._folder = folder / "adapters"
        self._model = Path(spec.weights_path or spec.base_path)
        self._loras_in_a_step = min(spec.adapters, _MOST_LORAS_IN_A_STEP)
        self._linears: dict[str, tuple[int, int]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._vllm: Any = None
        self._engine: Any = None
        self._numbers = 0
        self._open: dict[Ticket, None] = {}
        """In the order in which they came; written by the loop of connections, read by all."""
        self._tasks: dict[Ticket, asyncio.Task[None]] = {}
        self._users: Counter[Key] = Counter()
        self._loras: dict[Key, tuple[Any, int]] = {}
        """Adapter -> vLLM's request for it, tensors of its file."""
        self._forgotten: set[str] = set()
        self._loading = asyncio.Lock()
        self._last_news_s = mono_s()
        self._loads = self._uses = self._cached = self._hits = self._read = 0

    def start(self) -> None:
        """Load the model and check that mixed batches are answered right.

        Raises Misconfigured (`vllm_missing`, `vllm_version`, `vllm_mixes_adapters`).
        """
        try:
            self._vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise Misconfigured(
                "vllm_missing",
                mark("vLLM can't be imported by {python}; install vLLM {wanted} there."),
                python=sys.executable,
                wanted=VERSION,
            ) from error
        if self._vllm.__version__.split("+")[0] != VERSION:
            raise Misconfigured(
                "vllm_version",
                mark("This release works with vLLM {wanted}; in its environment there is {found}."),
                wanted=VERSION,
                found=self._vllm.__version__,
            )
        self._linears = linears_of(self._model)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._begin(), self._loop).result()

    def stop(self) -> None:
        """End; open requests get no further reply."""
        if self._engine is not None:
            self._engine.shutdown()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    @property
    def alive(self) -> bool:
        """Whether the engine can still answer; without it the process is of no use."""
        return self._thread.is_alive() and not self._engine.errored

    def constraint(self, request: EngineRequest) -> Constraint | None:
        """None: what must follow a grammar is refused by `submit`."""
        return None

    def state(self) -> State:
        """A snapshot for `Health`."""
        tickets = [ticket for ticket in list(self._open) if not isinstance(ticket.request, Unload)]
        return State(
            worker_id=self._spec.worker_id,
            base_code=self._spec.base_code,
            active=min(len(tickets), self._spec.slots),
            waiting=max(0, len(tickets) - self._spec.slots),
            slots=self._spec.slots,
            adapters=sorted({key.adapter_id for key in list(self._loras)}),
            adapter_hits=max(0, self._uses - self._loads),
            adapter_loads=self._loads,
            step_s=mono_s() - self._last_news_s if tickets else 0.0,
            running=[ticket.request.fingerprint for ticket in tickets if isinstance(ticket.request, Generate)],
            prefix_hits=self._hits,
            prefix_tokens_reused=self._cached,
            prefix_tokens_total=self._read,
        )

    def submit(
        self,
        request: Generate | Prove | Embed | Unload,
        deliver: Callable[[EngineReply], None],
        constraint: Constraint | None = None,
    ) -> Ticket:
        """Begin a request; replies come through `deliver` on the engine's thread.

        Raises InvalidRequest for what can never be served and Unavailable when too many wait.
        """
        key = check_request(
            request,
            tokens=range(self._renderer.vocabulary_size),
            context_tokens=self._spec.context_tokens,
            own_weights=self._spec.weights_path is not None,
            store=self._spec.store_path,
        )
        if isinstance(request, Embed):
            raise InvalidRequest("embeddings_not_served", mark("This engine makes no vectors."))
        if isinstance(request, Generate) and request.grammar is not None:
            raise InvalidRequest("invalid_schema", mark("This engine does not hold answers to a schema."))
        if not isinstance(request, Unload) and len(self._open) >= self._spec.slots + self._spec.queue:
            raise Unavailable("engine_overloaded", mark("The engine has too many requests waiting; try again soon."))
        self._numbers += 1
        ticket = Ticket(request, deliver, self._numbers, key)
        if not self._open:
            self._last_news_s = mono_s()
        self._open[ticket] = None
        self._loop.call_soon_threadsafe(self._spawn, ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants this request any more: vLLM drops it."""
        ticket.cancelled = True
        if not isinstance(ticket.request, Unload):
            self._loop.call_soon_threadsafe(self._drop, ticket)

    # -- on the engine's thread ---------------------------------------------------------------------------------------

    def _spawn(self, ticket: Ticket) -> None:
        self._tasks[ticket] = self._loop.create_task(self._answer(ticket))

    def _drop(self, ticket: Ticket) -> None:
        if ticket in self._tasks:
            self._tasks[ticket].cancel()

    async def _begin(self) -> None:
        spec = self._spec
        own = spec.weights_path is not None
        processor = importlib.import_module("vllm.platforms").current_platform.device_type == "cpu"
        adapters = {} if own else {
            "enable_lora": True,
            "max_loras": self._loras_in_a_step,
            "max_cpu_loras": spec.adapters,
            "max_lora_rank": MAX_RANK,
        }  # fmt: skip
        # Compiling takes a processor half an hour, and vLLM would take nine tenths of the machine's memory.
        sparing = {"enforce_eager": True, "kv_cache_memory_bytes": _KEYS_AND_VALUES_BYTES} if processor else {}
        arguments = self._vllm.AsyncEngineArgs(
            model=str(self._model),
            dtype=number_format(spec.precision, processor=processor),
            skip_tokenizer_init=True,
            trust_remote_code=False,
            load_format="safetensors",
            generation_config="vllm",
            max_model_len=spec.context_tokens,
            max_num_seqs=spec.slots,
            max_logprobs=-1,
            logprobs_mode="raw_logprobs",
            enable_prefix_caching=True,
            scheduling_policy="priority",
            disable_log_stats=True,
            enable_log_requests=False,
            **adapters,
            **sparing,
        )
        engine_class = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
        self._engine = engine_class.from_engine_args(arguments)
        if not own:
            await self._check_mixed_batches()

    async def _check_mixed_batches(self) -> None:
        """Adapters of random numbers and the base, each alone and then all together. Fails closed.

        As many adapters as vLLM has slots for: its CPU build answers the base with what lies in the last slot, and an empty
        one changes nothing.
        """
        prompt = [token % self._renderer.vocabulary_size for token in range(11, 43)]
        rows: dict[str, Any] = {"base": None}
        for number in range(1, self._loras_in_a_step + 1):
            folder = self._folder / f".check-{number}"
            write_adapter(folder, _random_pairs(self._linears, number), self._spec.base_code)
            rows[f"adapter {number}"] = self._lora(f"check-{number}", folder)
        solo = {name: await self._greedy(prompt, lora) for name, lora in rows.items()}
        mixed: dict[str, list[list[Step]]] = {name: [] for name in rows}
        mixed["base"].append(await self._greedy(prompt, None))  # alone, with all adapters in their slots
        for _ in range(_CHECK_ROUNDS):
            order = [*rows, *reversed(rows)]
            answers = await asyncio.gather(*(self._greedy(prompt, rows[name]) for name in order))
            for name, answer in zip(order, answers, strict=True):
                mixed[name].append(answer)
        for lora in rows.values():
            if lora is not None:
                await self._engine.remove_lora(lora.lora_int_id)
                shutil.rmtree(lora.lora_path)
        found = faults(solo, mixed, "base")
        if found:
            raise Misconfigured(
                "vllm_mixes_adapters",
                mark("vLLM does not answer the rows of a mixed batch as it answers them alone: {faults}."),
                faults="; ".join(dict.fromkeys(found)),
            )

    async def _greedy(self, prompt: list[int], lora: Any) -> list[Step]:
        request = Generate(secret="", request_id="", prompt_ids=prompt, temperature=0, max_tokens=_CHECK_TOKENS)
        steps: list[Step] = []
        async for output in self._outputs(request, lora, logprobs=5):
            completion = output.outputs[0]
            for token, found in zip(completion.token_ids, completion.logprobs, strict=True):
                steps.append({token: found[token].logprob} | {other: each.logprob for other, each in found.items()})
        return steps

    def _lora(self, name: str, folder: Path) -> Any:
        self._numbers += 1
        lora = importlib.import_module("vllm.lora.request").LoRARequest
        return lora(lora_name=name, lora_int_id=self._numbers, lora_path=str(folder))

    async def _outputs(self, request: Generate, lora: Any, logprobs: int | None) -> AsyncGenerator[Any, None]:
        self._numbers += 1
        name = f"{request.request_id}-{self._numbers}"  # never the caller's alone: two with one name would be mixed up
        params = self._vllm.SamplingParams(
            **sampling_values(request),
            logprobs=logprobs,
            output_kind=importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA,
        )
        # Without a tenant nothing is shared: the salt is this request's own.
        prompt = {
            "prompt_token_ids": request.prompt_ids,
            "cache_salt": f"tenant {request.tenant}" if request.tenant else name,
        }
        outputs = self._engine.generate(prompt, params, name, lora_request=lora, priority=request.priority)
        try:
            async for output in outputs:
                self._last_news_s = mono_s()
                yield output
        finally:
            await outputs.aclose()

    async def _answer(self, ticket: Ticket) -> None:
        try:
            if isinstance(ticket.request, Unload):
                ticket.reply(self.state())
                self._forgotten.add(ticket.request.adapter_id)
                await self._forget()
            elif isinstance(ticket.request, Prove):
                ticket.reply(await self._prove(ticket, ticket.request))
            elif isinstance(ticket.request, Generate):
                await self._generate(ticket, ticket.request)
        except TunewrightError as error:
            ticket.fail(error)
        except Exception:
            _log.exception("a request failed")
            ticket.fail(
                TunewrightError(
                    "engine_error", mark("The engine failed on this request; other requests are not affected.")
                )
            )
        finally:
            self._open.pop(ticket, None)
            self._tasks.pop(ticket, None)

    async def _generate(self, ticket: Ticket, request: Generate) -> None:
        text = AnswerText(self._renderer.stream_decoder(), request.stop)
        drawn_by_vllm = Sampler(temperature=0, top_p=1, top_k=0, seed=None)
        row = Row(ticket, request, None, drawn_by_vllm, text, frozenset(request.stop_ids))
        lora, _ = await self._take(ticket.key, request.adapter_path)
        try:
            async for output in self._outputs(request, lora, request.top_logprobs):
                if output.num_cached_tokens and not row.reused:
                    row.reused = output.num_cached_tokens
                for token, score in scored_tokens(output.outputs[0], request.top_logprobs):
                    row.accept(token, score)
                    if row.finished:
                        return
            raise RuntimeError("vLLM ended an answer before its time")
        finally:
            self._read += len(request.prompt_ids)
            self._cached += row.reused
            self._hits += row.reused > 0
            await self._give_back(ticket.key)

    async def _prove(self, ticket: Ticket, request: Prove) -> Proof:
        """Shifts are of log-probabilities: vLLM tells no logits. It loads an adapter as a whole or not at all."""
        began = mono_s()
        lora, tensors = await self._take(ticket.key, request.adapter_path)
        try:
            load_ms = 1000 * (mono_s() - began)
            shifts = [await self._shift(prompt, lora) for prompt in request.prompts]
        finally:
            await self._give_back(ticket.key)
        largest = max(float(shift.max()) for shift in shifts)
        if largest == 0:
            raise InvalidRequest(
                "no_effect",
                mark(
                    "The adapter does not change the model's answers: {applied} of {tensors} tensors are applied and "
                    "the largest change of a logit is {shift}."
                ),
                applied=tensors,
                tensors=tensors,
                shift=largest,
            )
        if not torch.isfinite(torch.stack(shifts)).all():
            raise adapter_invalid(["its logits are not finite"])
        mean = float(torch.stack(shifts).mean())
        return Proof(
            tensors=tensors, tensors_applied=tensors, max_logit_shift=largest, mean_logit_shift=mean, load_ms=load_ms
        )

    async def _shift(self, prompt: list[int], lora: Any) -> torch.Tensor:
        found = []
        for each in (None, lora):
            request = Generate(secret="", request_id="prove", prompt_ids=prompt, temperature=0, max_tokens=1)
            async for output in self._outputs(request, each, logprobs=-1):
                (step,) = output.outputs[0].logprobs
                found.append(torch.tensor([step[token].logprob for token in sorted(step)], dtype=torch.float64))
        return (found[1] - found[0]).abs()

    async def _take(self, key: Key | None, path: str | None) -> tuple[Any, int]:
        if key is None or path is None:
            return None, 0
        self._users[key] += 1
        self._uses += 1
        self._forgotten.discard(key.adapter_id)
        async with self._loading:
            if key not in self._loras:
                try:
                    self._loras[key] = await self._load(key, Path(path))
                except BaseException:
                    await self._give_back(key)
                    raise
        return self._loras[key]

    async def _load(self, key: Key, path: Path) -> tuple[Any, int]:
        folder, rank, tensors = await asyncio.to_thread(
            exported, path, key.sha256, self._spec.base_code, self._linears, self._folder
        )
        if rank > MAX_RANK:
            raise adapter_invalid([f"r is {rank}; this engine takes {MAX_RANK} at most"])
        self._loads += 1
        return self._lora(f"{key.adapter_id}:{key.sha256}", folder), tensors

    async def _give_back(self, key: Key | None) -> None:
        if key is not None:
            self._users[key] -= 1
            await self._forget()

    async def _forget(self) -> None:
        """Drop adapters that are to be forgotten and that nobody uses any more."""
        for key in [key for key in self._loras if key.adapter_id in self._forgotten and not self._users[key]]:
            lora, _ = self._loras.pop(key)
            await self._engine.remove_lora(lora.lora_int_id)
            shutil.rmtree(self._folder / key.sha256, ignore_errors=True)


def end_group_with_this_process() -> None:
    """To be called once in the worker's process, before vLLM starts its own.

    Those outlive a killed one that started them, and hold its memory for good: a shell that notices the end of this process ends
    the whole group. Without a group of its own (a start by hand) there is none.
    """
    global _guard
    if os.getpgrp() == os.getpid():
        _guard = subprocess.Popen(["/bin/sh", "-c", "trap '' TERM INT HUP; read _; kill -9 0"], stdin=subprocess.PIPE)


def number_format(precision: str, *, processor: bool) -> str:
    """A setting of `TUNEWRIGHT_ENGINE_PRECISION` in vLLM's words; its `auto` is the model's format, but 16 bits for one in 32."""
    if precision in ("float32", "bfloat16"):
        return precision
    return "float32" if processor else "auto"


def sampling_values(request: Generate) -> dict[str, Any]:
    """A request in vLLM's words. Stop strings and the text are ours; nothing is asked of the prompt's tokens."""
    return {
        "n": 1,
        "temperature": 0.0 if request.temperature < 1e-4 else request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "seed": None if request.seed is None else request.seed % 2**63,
        "max_tokens": request.max_tokens,
        "stop_token_ids": request.stop_ids,
        "ignore_eos": True,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "logit_bias": request.logit_bias or None,
        "prompt_logprobs": None,
        "detokenize": False,
    }


def scored_tokens(completion: Any, n_top: int | None) -> list[tuple[int, TokenScore | None]]:
    """The new tokens of vLLM's output, with what the model thought of them if it was asked for."""
    if n_top is None:
        return [(token, None) for token in completion.token_ids]
    found = []
    for token, step in zip(completion.token_ids, completion.logprobs, strict=True):
        likeliest = sorted(((other, each.logprob) for other, each in step.items()), key=lambda item: -item[1])
        found.append((token, TokenScore(token, step[token].logprob, likeliest[:n_top])))
    return found


def _random_pairs(linears: dict[str, tuple[int, int]], seed: int) -> dict[str, Pair]:
    """An adapter that turns answers into others, of attention's queries and values (of all layers, where none is called so)."""
    rank = RANKS[0]
    generator = torch.Generator().manual_seed(seed)
    chosen = [name for name in linears if name.endswith(("q_proj", "v_proj"))] or list(linears)
    pairs = {}
    for name in chosen:
        into, out = linears[name]
        down = torch.randn(rank, into, generator=generator) / into**0.5
        pairs[name] = Pair(down, torch.randn(out, rank, generator=generator), scale=2.0)
    return pairs
