"""What a request is counted as, from its first token to its end however that comes."""

import asyncio

import msgspec

from tunewright.accounts.records import Caller
from tunewright.accounts.usage import ERROR, INTERRUPTED, OK, UsageLedger, UsageRow
from tunewright.clock import mono_s, wall_s
from tunewright.completions.embeddings import EmbeddingRequest
from tunewright.completions.metrics import Series, ServingMetrics
from tunewright.completions.vocabulary import ChatRequest, Usage
from tunewright.deployments.serving import Target
from tunewright.ids import new_id

_MOST_WAIT_S = 1.0
"""For the ledger, before the first token."""


class Meter:
    """Counts one request. Tokens count as delivered when the next ones are asked for; those of a whole answer at its end."""

    def __init__(
        self,
        ledger: UsageLedger,
        metrics: ServingMetrics,
        series: Series,
        row: UsageRow,
        *,
        begun_s: float,
        whole: bool,
    ) -> None:
        self._ledger = ledger
        self._metrics = metrics
        self._series = series
        self._opened = ledger.begin(row)
        series.prompt_tokens.inc(row.prompt_tokens)
        series.running.inc()
        self._begun_s = begun_s
        self._whole = whole
        self._produced: dict[int, tuple[int, float]] = {}
        """Choice -> (tokens so far, when the last came)."""
        self._first_s: float | None = None
        self._ended = False

    async def stored(self) -> None:
        """Return once the row is on the disk, or after a second: whoever gets a token is in the ledger."""
        begun = self._opened.begun
        if not begun.done():
            await asyncio.wait({asyncio.wrap_future(begun)}, timeout=_MOST_WAIT_S)

    def produced(self, choice: int, tokens: int) -> None:
        """So many tokens of a choice have come from the engine by now."""
        now_s = mono_s()
        before, at_s = self._produced.get(choice, (0, now_s))
        new = tokens - before
        if new > 0:
            self._series.completion_tokens.inc(new)
            if before:
                self._series.gap.observe((now_s - at_s) / new)
            self._produced[choice] = (tokens, now_s)

    def again(self) -> None:
        """The engine was lost, and the answer begins anew: what came of it is nobody's."""
        self._produced.clear()

    def first(self) -> None:
        """The first piece of the answer is there."""
        if self._first_s is None:
            self._first_s = mono_s()
            self._series.first.observe(self._first_s - self._begun_s)

    def delivered(self) -> None:
        """All that was produced is with the caller."""
        if not self._whole:
            self._opened.delivered = sum(tokens for tokens, _ in self._produced.values())

    def end(self, usage: Usage | None = None, *, error: str | None = None) -> None:
        """Close the row: as answered with `usage`, as failed with the code `error`, else as interrupted. Once."""
        if self._ended:
            return
        self._ended = True
        row = self._opened.row
        changes = {"completion_tokens": self._opened.delivered}
        if usage is not None:
            changes = {"completion_tokens": usage.completion_tokens, "cached_tokens": usage.cached_tokens}
        status = OK if usage is not None else ERROR if error else INTERRUPTED
        self._series.running.dec()
        self._series.cached_tokens.inc(changes.get("cached_tokens", 0))
        self._metrics.ended(self._series, row.endpoint, status)
        self._ledger.end(
            self._opened,
            msgspec.structs.replace(
                row,
                **changes,
                status=status,
                error_code=error,
                ttft_ms=None if self._first_s is None else round((self._first_s - self._begun_s) * 1000),
                duration_ms=round((mono_s() - self._begun_s) * 1000),
            ),
        )


class Metering:
    """Makes the meters of all requests of this server."""

    def __init__(self, ledger: UsageLedger, metrics: ServingMetrics) -> None:
        self._ledger = ledger
        self._metrics = metrics

    def refused(self, code: str) -> None:
        """A request that no engine was asked."""
        self._metrics.refused(code)

    def begin(
        self,
        caller: Caller,
        request: ChatRequest | EmbeddingRequest,
        target: Target,
        *,
        prompt_tokens: int,
        begun_s: float,
        whole: bool,
    ) -> Meter:
        """A meter for a request that nothing is wrong with; `begun_s` is when it came, `whole` if it is answered at once."""
        row = UsageRow(
            id=new_id("usage"),
            project_id=caller.project_id,
            key_id=caller.key_id,
            model=request.model,
            base_code=target.base.code,
            tuned_id=target.tuned and target.tuned.id,
            deployment_id=target.deployment and target.deployment.id,
            request_id=request.request_id or "",
            dialect=request.dialect,
            endpoint=request.endpoint,
            prompt_tokens=prompt_tokens,
            created_at=wall_s(),
            server=self._ledger.server,
        )
        series = self._metrics.of(target.base.code, target.tuned.name if target.tuned else "")
        return Meter(self._ledger, self._metrics, series, row, begun_s=begun_s, whole=whole)
