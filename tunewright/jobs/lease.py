"""One active control loop: the lease in the database, held by renewing it."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tunewright.clock import mono_s, wall_ms
from tunewright.files_on_disk import write_atomically
from tunewright.ids import random_text
from tunewright.settings import HomeFolder

if TYPE_CHECKING:
    from tunewright.storage import Storage

TTL_S = 5.0
_RENEW_S = 1.0


class Lease:
    """Renewed at most once a second. Its expiry in the database is wall time, which machines share; whether *this* holder
    still trusts it is judged by the monotonic clock."""

    def __init__(self, storage: "Storage", name: str, holder: str | Callable[[], str], ttl_s: float = TTL_S) -> None:
        """`holder` may be something that will be known by the time that the lease is taken."""
        self._storage = storage
        self._name = name
        self._ttl_s = ttl_s
        self._holder = holder
        self._renewed_s: float | None = None

    def held(self) -> bool:
        """Take or renew if it is time to. Raises Unavailable if the database can't say."""
        now_s = mono_s()
        if self._renewed_s is not None and now_s - self._renewed_s < min(_RENEW_S, self._ttl_s / 3):
            return True
        with self._storage.write() as tx:
            token = tx.leases.take(self._name, self._holder_name(), now_ms=wall_ms(), ttl_ms=round(self._ttl_s * 1000))
        self._renewed_s = None if token is None else now_s
        return token is not None

    def release(self) -> None:
        """Let the next one have it at once."""
        if self._renewed_s is not None:
            self._renewed_s = None
            with self._storage.write() as tx:
                tx.leases.release(self._name, self._holder_name())

    def _holder_name(self) -> str:
        return self._holder if isinstance(self._holder, str) else self._holder()


def home_id(home: HomeFolder) -> str:
    """What tells this home from others. It is kept in the home."""
    path = home.root / "server.id"
    try:
        return path.read_text("ascii")
    except FileNotFoundError:
        made = random_text(20)
        write_atomically(path, made.encode("ascii"))
        return made


def holder_of(home: HomeFolder) -> str:
    """The name under which this server of the home takes leases: a server that comes back after a kill is the same holder and
    need not wait for its own lease to expire. Locks in the home keep a second one of the same number out."""
    return holder_name(home, home.server)


def holder_name(home: HomeFolder, number: int) -> str:
    """The same of the server with that number."""
    return home_id(home) if number == 1 else f"{home_id(home)}-{number}"
