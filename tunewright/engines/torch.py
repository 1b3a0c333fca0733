"""The embedded engine: continuous batching of the base and any number of adapters on one thread.

Every step takes one token of each decoding row and some prompt tokens of newcomers through the model together. Requests come
in and replies go out through `submit` and the ticket's `deliver`; nothing else crosses the thread's border.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from tunewright.clock import mono_s
from tunewright.deployments.ports import (
    Embed,
    EngineReply,
    EngineRequest,
    Generate,
    Prove,
    State,
    TokenScore,
    Unload,
    WorkerSpec,
)
from tunewright.engines.adapter_files import Adapter, read_adapter
from tunewright.engines.adapter_shelf import AdapterShelf, Key, Want
from tunewright.engines.admission import check_request
from tunewright.engines.answer_text import AnswerText, StreamDecoder
from tunewright.engines.batch import Part, make_batch
from tunewright.engines.constraints import Constraint, Constraints
from tunewright.engines.decoder import Decoder
from tunewright.engines.embedding import Embedding
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.placement import Placement
from tunewright.engines.proof import Probe
from tunewright.engines.rows import Row, RunningRows
from tunewright.engines.sampling import Sampler
from tunewright.engines.tickets import Ticket
from tunewright.errors import TunewrightError, Unavailable
from tunewright.i18n import mark

_log = logging.getLogger(__name__)


class Engine:
    """Serves one base. `vocabulary` is the number of token ids that the renderer can decode."""

    def __init__(
        self,
        decoder: Decoder,
        stream_decoder: Callable[[], StreamDecoder],
        spec: WorkerSpec,
        *,
        vocabulary: int,
        placement: Placement,
        constraints: Constraints | None = None,
    ) -> None:
        self._decoder = decoder
        self._constraints = constraints
        self._stream_decoder = stream_decoder
        self._vocabulary = vocabulary
        self._worker_id, self._base_code = spec.worker_id, spec.base_code
        self._own_weights = spec.weights_path is not None
        self._store = spec.store_path
        self._slots = spec.slots
        self._queue = spec.queue
        self._context_tokens = spec.context_tokens
        self._threads = spec.threads
        self._placement = placement
        self._cache = SlotCache(slots=spec.slots, context_tokens=spec.context_tokens)
        self._running = RunningRows(self._cache)
        self._shelf: AdapterShelf[Adapter] = AdapterShelf(spec.adapters)
        self._probes: list[Probe | Embedding] = []
        self._changed = threading.Condition()
        self._waiting: list[Ticket] = []  # guarded by _changed, oldest first
        self._loaded: list[tuple[Key, Adapter | TunewrightError]] = []  # guarded by _changed
        self._wake = False  # guarded by _changed
        self._stopping = False
        self._step_began_s: float | None = None
        self._numbers = 0
        self._adapter_uses = self._adapter_loads = 0
        self._adapter_load_ms = 0.0
        self._loader = ThreadPoolExecutor(1, "adapter-loader")
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """End after the current step; open requests get no further reply."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        self._loader.shutdown(cancel_futures=True)

    def constraint(self, request: EngineRequest) -> Constraint | None:
        """What `submit` needs of a request with a grammar. Slow: not for a thread that others wait for.
        Raises InvalidRequest(`invalid_schema`)."""
        if self._constraints is None or not isinstance(request, Generate) or request.grammar is None:
            return None
        return self._constraints.begin(request.grammar, request.grammar_after, request.grammar_begun)

    def submit(
        self,
        request: Generate | Prove | Embed | Unload,
        deliver: Callable[[EngineReply], None],
        constraint: Constraint | None = None,
    ) -> Ticket:
        """Queue a request; replies come through `deliver` on the engine's thread.

        Raises InvalidRequest for what can never be served and Unavailable when the queue is full.
        """
        key = check_request(
            request,
            tokens=range(min(self._vocabulary, self._decoder.n_embeddings)),
            context_tokens=self._context_tokens,
            own_weights=self._own_weights,
            store=self._store,
        )
        with self._changed:
            if not isinstance(request, Unload) and len(self._waiting) >= self._queue:
                raise Unavailable(
                    "engine_overloaded", mark("The engine has too many requests waiting; try again soon.")
                )
            self._numbers += 1
            ticket = Ticket(request, deliver, self._numbers, key, constraint)
            self._waiting.append(ticket)
            self._notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants this request any more: its slot is free after the current step."""
        with self._changed:
            ticket.cancelled = True
            self._notify()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread still runs; without it the process is of no use."""
        return self._thread.is_alive()

    def state(self) -> State:
        """A snapshot for `Health`."""
        return State(
            worker_id=self._worker_id,
            base_code=self._base_code,
            active=len(self._running.rows) + len(self._probes),
            waiting=len(self._waiting),
            slots=self._slots,
            adapters=self._shelf.ids(),
            precision=self._decoder.precision,
            threads=self._threads,
            adapter_hits=max(0, self._adapter_uses - self._adapter_loads),
            adapter_loads=self._adapter_loads,
            adapter_load_ms=self._adapter_load_ms,
            step_s=0.0 if (began := self._step_began_s) is None else mono_s() - began,
            running=[row.request.fingerprint for row in tuple(self._running.rows)],
            prefix_hits=self._running.prefixes.hits,
            prefix_tokens_reused=self._running.prefixes.tokens_reused,
            prefix_tokens_total=self._running.prefixes.tokens_total,
        )

    def _notify(self) -> None:
        self._wake = True
        self._changed.notify()

    def _loop(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while not self._stopping:
                with self._changed:
                    while not (self._wake or self._stopping or self._running.rows or self._probes):
                        self._step_began_s = None
                        self._changed.wait()
                    self._wake = False
                    self._step_began_s = mono_s()
                try:
                    self._drop_cancelled()
                    self._admit()
                    self._step()
                except Exception:
                    _log.exception("the engine's loop failed; all running requests end")
                    self._fail_everything()

    def _drop_cancelled(self) -> None:
        with self._changed:
            self._waiting = [t for t in self._waiting if isinstance(t.request, Unload) or not t.cancelled]
        for row in [row for row in self._running.rows if row.ticket.cancelled]:
            self._end(row)
        for probe in [probe for probe in self._probes if probe.ticket.cancelled]:
            self._end_probe(probe)

    def _admit(self) -> None:
        self._take_loaded()
        self._make_way()
        with self._changed:
            waiting = sorted(self._waiting, key=lambda ticket: ticket.priority)
        barriers = self._unload(waiting)
        candidates = [
            ticket
            for ticket in waiting
            if not isinstance(ticket.request, Unload)
            and not ticket.closed
            and not (ticket.key and barriers.get(ticket.key.adapter_id, math.inf) < ticket.number)
        ]
        if self._is_urgent(candidates):
            candidates = [ticket for ticket in candidates if not ticket.priority]
        wants = [Want(ticket.key, isinstance(ticket.request, Generate)) for ticket in candidates]
        decision = self._shelf.decide(wants, self._slots - len(self._running.rows))
        for index in decision.admit:
            self._begin(candidates[index])
        for key in decision.evict:
            self._shelf.evict(key)
        for key in decision.load:
            self._shelf.begin_load(key)
            request = next(ticket.request for ticket in candidates if ticket.key == key)
            if isinstance(request, Generate | Prove) and request.adapter_path is not None:
                self._loader.submit(self._load, key, Path(request.adapter_path))
        gone = {id(candidates[index]) for index in decision.admit}
        with self._changed:
            self._waiting = [ticket for ticket in self._waiting if id(ticket) not in gone and not ticket.closed]

    def _is_urgent(self, waiting: list[Ticket]) -> bool:
        """Whether somebody waits for the first token of an answer."""
        reading = self._running.rows[self._running.n_decoding :]
        return any(not row.ticket.priority for row in reading) or any(not ticket.priority for ticket in waiting)

    def _make_way(self) -> None:
        """Take from work of low priority what requests that somebody waits for need: the turn of its prompts, slots, and
        places of adapters."""
        with self._changed:
            urgent = [t for t in self._waiting if not t.priority and isinstance(t.request, Generate) and not t.closed]
        if not urgent:
            return
        back = self._running.to_put_back()
        for row in back:
            self._end(row)
        with self._changed:
            self._waiting = sorted([*self._waiting, *(row.ticket for row in back)], key=lambda ticket: ticket.number)
        for row in self._running.to_give_up(len(urgent) - (self._slots - len(self._running.rows))):
            self._give_up(row)
        self._give_up_adapters({ticket.key for ticket in urgent if ticket.key})

    def _give_up_adapters(self, wanted: set[Key]) -> None:
        """End rows of low priority whose adapters are in the way of those that are wanted."""
        lacking = self._shelf.lacks(wanted)
        users: dict[Key, list[Row]] = {}
        for row in self._running.rows if lacking else ():
            if row.ticket.key:
                users.setdefault(row.ticket.key, []).append(row)
        for key, rows in users.items():
            if lacking > 0 and key not in wanted and all(row.ticket.priority for row in rows):
                lacking -= 1
                for row in rows:
                    self._give_up(row)

    def _give_up(self, row: Row) -> None:
        sentence = mark("The engine had to make room for more urgent requests; try again.")
        row.ticket.fail(Unavailable("engine_yielded", sentence))
        self._end(row)

    def _unload(self, waiting: list[Ticket]) -> dict[str, int]:
        """Forget adapters whose users have all ended; returns adapter id -> number of the `Unload` that still waits.

        The answer goes out at once, for the caller need not wait; newer requests for the adapter do.
        """
        barriers: dict[str, int] = {}
        for ticket in waiting:
            if not isinstance(ticket.request, Unload) or ticket.closed:
                continue
            adapter_id = ticket.request.adapter_id
            older = any(t.key and t.key.adapter_id == adapter_id and t.number < ticket.number for t in waiting)
            ticket.closed = not older and self._shelf.forget(adapter_id)
            self._running.prefixes.forget(adapter_id)
            if not ticket.closed:
                barriers.setdefault(adapter_id, ticket.number)
            if not ticket.answered:
                ticket.answered = True
                ticket.reply(self.state())
        return barriers

    def _load(self, key: Key, folder: Path) -> None:
        """On the loader's thread."""
        started = time.perf_counter()
        result: Adapter | TunewrightError
        try:
            pairs, tensors = read_adapter(folder, key.sha256, self._base_code, self._decoder.linears)
            result = Adapter(key.adapter_id, tensors, self._decoder.prepare(pairs))
            result.load_ms = (time.perf_counter() - started) * 1000
        except TunewrightError as error:
            result = error
        except Exception:
            _log.exception("loading an adapter failed")
            result = _engine_error()
        with self._changed:
            self._loaded.append((key, result))
            self._notify()

    def _take_loaded(self) -> None:
        with self._changed:
            loaded, self._loaded = self._loaded, []
            waiting = list(self._waiting)
        for key, result in loaded:
            self._shelf.end_load(key, result if isinstance(result, Adapter) else None)
            if isinstance(result, Adapter):
                self._adapter_loads += 1
                self._adapter_load_ms += result.load_ms
            if isinstance(result, TunewrightError):
                for ticket in waiting:
                    if ticket.key == key:
                        ticket.fail(result)

    def _begin(self, ticket: Ticket) -> None:
        adapter = self._shelf.take(ticket.key) if ticket.key else None
        self._adapter_uses += adapter is not None
        request = ticket.request
        try:
            if isinstance(request, Prove) and adapter is not None:
                self._probes.append(Probe(ticket, request, adapter))
            elif isinstance(request, Embed):
                self._probes.append(Embedding(ticket, request))
            elif isinstance(request, Generate):
                self._running.add(self._row(ticket, request, adapter))
        except Exception:
            _log.exception("a request could not begin")
            ticket.fail(_engine_error())
            if ticket.key:
                self._shelf.give_back(ticket.key)

    def _row(self, ticket: Ticket, request: Generate, adapter: Adapter | None) -> Row:
        sampler = Sampler(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=request.logit_bias,
            constraint=ticket.constraint,
        )
        text = AnswerText(self._stream_decoder(), request.stop)
        return Row(ticket, request, adapter, sampler, text, frozenset(request.stop_ids))

    def _end(self, row: Row, *, poisoned: bool = False) -> None:
        self._running.remove(row, poisoned=poisoned)
        if row.ticket.key:
            self._shelf.give_back(row.ticket.key)
        if not self._running.rows:
            self._running.prefixes.release_memory()

    def _end_probe(self, probe: Probe | Embedding) -> None:
        self._probes.remove(probe)
        if probe.ticket.key:
            self._shelf.give_back(probe.ticket.key)

    def _step(self) -> None:
        if self._probes:
            self._step_probe(self._next_probe())
        chosen = self._running.parts(self._placement.prompt_tokens_beside_decode, self._placement.prompt_tokens_alone)
        if not chosen:
            return
        try:
            self._run(chosen)
        except Exception:
            _log.exception("a step failed; its %d rows run one by one to find the culprit", len(chosen))
            for row, part in chosen:
                self._run_alone(row, len(part.tokens))
        finally:
            if not self._running.rows or self._waiting:
                self._wake = True  # slots or adapters may have become free

    def _run_alone(self, row: Row, n_tokens: int) -> None:
        if row not in self._running.rows:
            return
        try:
            self._run([(row, row.next_part(self._running.rows.index(row), n_tokens))])
        except Exception:
            _log.exception("request %s failed", row.request.request_id)
            row.ticket.fail(_engine_error())
            self._end(row, poisoned=True)

    def _run(self, chosen: list[tuple[Row, Part]]) -> None:
        """One forward pass; rows take their tokens and those that are done leave. Raises before any row has changed."""
        self._running.reserve(chosen)
        batch = make_batch([part for _, part in chosen], self._decoder.device)
        logits_WV = self._decoder.logits(batch, self._cache)[:, : self._vocabulary]
        best_W, ids_W = likeliest(logits_WV) if batch.wanted_order else ([], [])
        tokens: dict[int, tuple[int, TokenScore | None] | TunewrightError] = {}
        for place, index in enumerate(batch.wanted_order):
            row = chosen[index][0]
            if not math.isfinite(best_W[place]):
                tokens[index] = _not_finite()
                continue
            token = ids_W[place]
            try:
                if not row.sampler.takes_likeliest:
                    token = row.sampler.choose(logits_WV[place].cpu().numpy())
            except TunewrightError as error:  # no reason to run its neighbours again: their samplers have moved on
                tokens[index] = error
                continue
            n_top = row.request.top_logprobs
            tokens[index] = token, None if n_top is None else score_of(logits_WV[place], token, n_top)
        for row, part in chosen:
            self._running.advance(row, len(part.tokens))
        for index, token in tokens.items():
            self._take_token(chosen[index][0], token)

    def _take_token(self, row: Row, token: tuple[int, TokenScore | None] | TunewrightError) -> None:
        if isinstance(token, TunewrightError):
            row.ticket.fail(token)
            return self._end(row, poisoned=True)
        try:
            row.accept(*token)
        except Exception:
            _log.exception("request %s failed", row.request.request_id)
            row.ticket.fail(_engine_error())
            row.finished = True
        if row.finished:
            self._end(row)
        return None

    def _next_probe(self) -> Probe | Embedding | None:
        """They take turns; one that nobody waits for has none while there is anything else."""
        urgent = [probe for probe in self._probes if not probe.ticket.priority]
        if not urgent and any(not row.ticket.priority for row in self._running.rows):
            return None
        chosen = (urgent or self._probes)[0]
        self._probes.remove(chosen)
        self._probes.append(chosen)
        return chosen

    def _step_probe(self, probe: Probe | Embedding | None) -> None:
        if probe is None:
            return
        busy = bool(self._running.rows)
        budget = self._placement.prompt_tokens_beside_decode if busy else self._placement.prompt_tokens_alone
        try:
            proof = probe.advance(self._decoder, budget)
        except TunewrightError as error:
            probe.ticket.fail(error)
        except Exception:
            _log.exception("a proof or an embedding failed")
            probe.ticket.fail(_engine_error())
        else:
            if proof is None:
                return
            probe.ticket.reply(proof)
        self._end_probe(probe)
        self._wake = True

    def _fail_everything(self) -> None:
        for row in list(self._running.rows):
            row.ticket.fail(_engine_error())
            self._end(row, poisoned=True)
        self._running.prefixes.forget()
        for probe in list(self._probes):
            probe.ticket.fail(_engine_error())
            self._end_probe(probe)


def likeliest(logits_WV: torch.Tensor) -> tuple[list[float], list[int]]:
    """The largest logit of each row (one that is not a number counts as largest), and its token."""
    if logits_WV.is_cuda:
        best_W, ids_W = logits_WV.max(dim=-1)
        return best_W.tolist(), ids_W.tolist()
    rows_WV = logits_WV.numpy()  # numpy looks at many numbers at once, torch's kernel at one: a tenth of the time
    places_W = rows_WV.argmax(axis=1)
    return rows_WV[np.arange(len(rows_WV)), places_W].tolist(), places_W.tolist()


def score_of(logits_V: torch.Tensor, token: int, n_top: int) -> TokenScore:
    """What the model thought of a token that was chosen from its logits, and of the `n_top` likeliest."""
    logprobs_V = logits_V.double().log_softmax(-1)
    values, ids = logprobs_V.topk(min(n_top, len(logprobs_V)))
    return TokenScore(token, logprobs_V[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))


def _not_finite() -> TunewrightError:
    return TunewrightError("not_finite", mark("The model's numbers ran out of range; this request was stopped."))


def _engine_error() -> TunewrightError:
    return TunewrightError("engine_error", mark("The engine failed on this request; other requests are not affected."))
