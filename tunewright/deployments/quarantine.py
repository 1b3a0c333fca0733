"""Requests that kill engine workers: who was aboard when one died, and who is not let aboard again.

Nobody can tell which of a dead worker's requests killed it, so all of them are suspects at first. From then on the suspects of
a base go aboard one at a time (beside requests that nobody suspects). One that is answered, or gets well past the place where
it was when the worker died, is cleared; one during which the worker dies again is quarantined. So a deadly request costs two
deaths, and those that were aboard with it wait for their turn and are answered.
"""

import asyncio
import threading
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256

import msgspec

from tunewright.clock import mono_s
from tunewright.deployments.ports import Generate
from tunewright.deployments.workers import engine_busy
from tunewright.errors import TunewrightError
from tunewright.i18n import mark

QUARANTINE_S = 600.0
"""How long a request is not let aboard, and how long a suspicion lasts."""
_TOKENS_PAST = 8
"""A suspect that has so many tokens more than at the death is cleared. What came of them may have been on its way."""
_NOBODY_KNOWS = 1 << 62
_TURN_POLL_S = 0.05


@dataclass(eq=False)
class Passenger:
    """One try of one request. Whoever boarded sets `worker` (its pid) and keeps `n_tokens`; `suspect` is read only."""

    base_code: str
    fingerprint: str
    suspect: bool
    worker: int = 0
    n_tokens: int = 0
    left_s: float | None = None


class _Record(msgspec.Struct):
    """What is known of a fingerprint that was aboard at a death."""

    deaths: int = 0
    n_tokens: int = 0
    last_s: float = 0.0


class Quarantine:
    """The requests of all workers of this server. Thread-safe; the `async` methods may run on any event loop.

    A caller who leaves may leave a worker that hangs: for `linger_s` the request still counts as aboard.
    """

    def __init__(self, linger_s: float) -> None:
        self._linger_s = linger_s
        self._lock = threading.Lock()
        self._passengers: set[Passenger] = set()
        self._lingering: list[Passenger] = []
        self._records: dict[str, _Record] = {}

    async def board(self, base_code: str, fingerprint: str, limit_s: float | None = None) -> Passenger:
        """A place aboard; a suspect waits for its turn. Raises TunewrightError (`request_quarantined`), and Unavailable
        (`engine_busy`) if its turn does not come within `limit_s`."""
        try:
            async with asyncio.timeout(limit_s):
                while (passenger := self._try_to_board(base_code, fingerprint)) is None:
                    await asyncio.sleep(_TURN_POLL_S)
        except TimeoutError:
            raise engine_busy() from None
        return passenger

    def leave(self, passenger: Passenger, *, answered: bool) -> None:
        """The try is over. `answered`: the worker has said all there was to say."""
        with self._lock:
            self._passengers.discard(passenger)
            if answered:
                self._clear(passenger)
            elif passenger.worker:
                passenger.left_s = mono_s()
                self._lingering.append(passenger)

    def progress(self, suspect: Passenger) -> None:
        """A suspect has more tokens than before."""
        with self._lock:
            record = self._records.get(suspect.fingerprint)
            if record is None or suspect.n_tokens > record.n_tokens + _TOKENS_PAST:
                self._clear(suspect)

    def died(self, worker: int, running: Collection[str] | None = None) -> None:
        """The worker with this pid is no more. Suspects are all that were aboard, or `running` if it could still say what it
        was at."""
        with self._lock:
            self._forget_old()
            aboard = [one for one in (*self._passengers, *self._lingering) if one.worker == worker]
            places = {one.fingerprint: one.n_tokens for one in aboard}
            for fingerprint in places if running is None else running:
                record = self._records.setdefault(fingerprint, _Record())
                record.deaths += 1
                record.n_tokens = max(record.n_tokens, places.get(fingerprint, _NOBODY_KNOWS))
                record.last_s = mono_s()
            for one in aboard:
                one.worker = 0  # it need not linger
            self._lingering = [one for one in self._lingering if one.worker]

    def check(self, fingerprint: str) -> None:
        """Raises TunewrightError (`request_quarantined`)."""
        record = self._records.get(fingerprint)
        if record is not None and record.deaths > 1 and mono_s() - record.last_s < QUARANTINE_S:
            raise TunewrightError(
                "request_quarantined",
                mark("This request has stopped the engine twice; it is refused for {minutes} minutes."),
                minutes=round(QUARANTINE_S / 60),
            )

    def _try_to_board(self, base_code: str, fingerprint: str) -> Passenger | None:
        """None while another suspect is aboard."""
        with self._lock:
            self._forget_old()
            self.check(fingerprint)
            suspect = fingerprint in self._records
            if suspect and any(
                one.suspect and one.base_code == base_code for one in (*self._passengers, *self._lingering)
            ):
                return None
            passenger = Passenger(base_code, fingerprint, suspect)
            self._passengers.add(passenger)
            return passenger

    def _clear(self, passenger: Passenger) -> None:
        passenger.suspect = False
        record = self._records.get(passenger.fingerprint)
        if record is not None and record.deaths == 1:
            del self._records[passenger.fingerprint]

    def _forget_old(self) -> None:
        now = mono_s()
        if self._lingering:
            self._lingering = [one for one in self._lingering if now - (one.left_s or now) < self._linger_s]
        if self._records:
            self._records = {name: seen for name, seen in self._records.items() if now - seen.last_s < QUARANTINE_S}


def fingerprint_of(base_code: str, request: Generate) -> str:
    """Equal for requests that make a worker do the same: base, adapter, prompt and sampling, whoever asks."""
    same = msgspec.structs.replace(request, secret="", request_id="", fingerprint="", priority=0, tenant=None)
    return sha256(base_code.encode() + b"\0" + msgspec.json.encode(same)).hexdigest()
