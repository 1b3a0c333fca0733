"""Proof of effect: does an adapter change the base's answers, and is every tensor of it in use?"""

import torch

from tunewright.deployments.ports import Proof, Prove
from tunewright.engines.adapter_files import Adapter, adapter_invalid
from tunewright.engines.batch import Part, make_batch
from tunewright.engines.decoder import Decoder
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.tickets import Ticket
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark


class Probe:
    """A `Prove` under way, a piece of a prompt at a time so that its neighbours keep decoding.

    Each prompt goes through the base and through the adapter in passes of the same shape, alone: where the adapter
    changes nothing the logits are the same to the last bit.
    """

    def __init__(self, ticket: Ticket, request: Prove, adapter: Adapter) -> None:
        self.ticket = ticket
        self._prompts = request.prompts
        self._original = adapter
        self._used: set[str] = set()
        self._adapter = Adapter(adapter.adapter_id, adapter.tensors, adapter.seat, used=self._used)
        self._cache = SlotCache(slots=1, context_tokens=max(len(prompt) for prompt in request.prompts))
        self._place = 0
        self._offset = 0
        self._base_V: torch.Tensor | None = None
        self._max_shift = 0.0
        self._shift_sums: list[float] = []

    def advance(self, decoder: Decoder, budget: int) -> Proof | None:
        """Do at most `budget` tokens. Returns the proof at the end; raises InvalidRequest if there is none."""
        prompt = self._prompts[self._place]
        tokens = prompt[self._offset : self._offset + budget]
        last = self._offset + len(tokens) == len(prompt)
        adapter = None if self._base_V is None else self._adapter
        self._cache.reserve(1, len(prompt))
        batch = make_batch([Part(0, self._offset, tokens, adapter, last, False)], decoder.device)
        logits_WV = decoder.logits(batch, self._cache)
        self._offset += len(tokens)
        if not last:
            return None
        self._offset = 0
        if self._base_V is None:
            self._base_V = logits_WV[0].clone()
            return None
        self._measure(self._base_V, logits_WV[0])
        self._base_V = None
        self._place += 1
        return self._conclude() if self._place == len(self._prompts) else None

    def _measure(self, base_V: torch.Tensor, tuned_V: torch.Tensor) -> None:
        shift_V = (tuned_V - base_V).abs()
        if not torch.isfinite(shift_V).all():
            raise adapter_invalid(["its logits are not finite"])
        self._max_shift = max(self._max_shift, float(shift_V.max()))
        self._shift_sums.append(float(shift_V.mean()))

    def _conclude(self) -> Proof:
        tensors = self._original.tensors
        applied = self._original.seat.stack.tensors(self._used)
        if applied < tensors or self._max_shift == 0:
            raise InvalidRequest(
                "no_effect",
                mark(
                    "The adapter does not change the model's answers: {applied} of {tensors} tensors are applied and "
                    "the largest change of a logit is {shift}."
                ),
                applied=applied,
                tensors=tensors,
                shift=self._max_shift,
            )
        return Proof(
            tensors=tensors,
            tensors_applied=applied,
            max_logit_shift=self._max_shift,
            mean_logit_shift=sum(self._shift_sums) / len(self._shift_sums),
            load_ms=self._original.load_ms,
        )
