"""The servers of one home: one on SQLite, several side by side on PostgreSQL.

Those that run side by side share all that lies in the home and what runs there (engine workers, trainers), so they are on one
machine. Each has a number, which is its own while it lives: that of a killed one is the next to be taken, with the leases and the
ledger rows that go with it.
"""

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from tunewright.clock import mono_s
from tunewright.errors import Misconfigured, TunewrightError
from tunewright.files_on_disk import write_atomically
from tunewright.i18n import mark
from tunewright.jobs.lease import TTL_S, Lease, holder_name, home_id
from tunewright.settings import HomeFolder

if TYPE_CHECKING:
    from tunewright.storage import Storage

log = structlog.get_logger()

MOST = 32
"""Servers of one home."""
_RENEW_S = TTL_S / 4
_LOOK_S = 0.2


class Servers:
    """What this server knows of the others. Locks of files say it, which a death sets free; the database has the rest."""

    def __init__(self, storage: "Storage", home: HomeFolder, database_url: str) -> None:
        """`database_url` of PostgreSQL lets several servers in, any other only one."""
        self.shared = database_url.startswith("postgresql")
        self._storage = storage
        self._home = home
        self._database = hashlib.sha256(database_url.encode()).digest()
        self._folder = home.root / "servers"
        self._held: list[int] = []
        self._stays: int | None = None
        self._claim: Lease | None = None
        self._left = threading.Event()

    @property
    def joined(self) -> bool:
        """Whether this is one of the servers now."""
        return bool(self._held)

    @contextmanager
    def joining(self) -> Iterator[bool]:
        """Become one of the servers. Inside the block none begins or ends; it is told whether there is no other.

        Raises Misconfigured (`home_in_use`, `database_differs`).
        """
        self._hold(self._home.server_lock, shared=self.shared)
        if not self.shared:
            yield True
            return
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with self._door():
            self._home.server = self._take_number()
            alone = not self._others(".lock")
            self._compare_database(alone)
            self._stays = _locked(self._folder / f"{self._home.server}.stays")
            yield alone

    def claim_database(self) -> None:
        """Keep servers with other homes, or on other machines, away from a database that several may use.

        Raises Misconfigured (`database_in_use`). Waits some seconds for one that has died.
        """
        if not self.shared:
            return
        claim = Lease(self._storage, "home", f"{home_id(self._home)}@{_machine()}")
        deadline_s = mono_s() + TTL_S + 1.0
        while not claim.held():
            if mono_s() > deadline_s:
                raise Misconfigured(
                    "database_in_use",
                    mark(
                        "A server with another home, or on another machine, uses this database; servers of one database"
                        " share one --home on one machine."
                    ),
                )
            self._left.wait(_LOOK_S)
        self._claim = claim
        threading.Thread(target=self._keep_claim, args=(claim,), name="home-claim", daemon=True).start()

    def dead(self) -> list[str]:
        """The names of servers of this home that are no more. Ask while you are `joining`."""
        numbers = [int(path.stem) for path in self._folder.glob("*.lock") if path.stem.isdecimal()]
        return [
            holder_name(self._home, number)
            for number in numbers
            if number != self._home.server and _is_free(self._folder / f"{number}.lock")
        ]

    def leave(self) -> bool:
        """Say that this server is about to end; whether others stay, to whom everything that runs is left."""
        if not self.shared or not self._held:
            return False
        with self._door():
            if self._stays is not None:
                os.close(self._stays)
                self._stays = None
            return self._others(".stays")

    def close(self) -> None:
        """Not one of the servers any more. Safe to call twice."""
        self._left.set()
        if self._claim is not None and not self._others(".lock"):
            try:
                self._claim.release()
            except TunewrightError as error:
                log.warning("home_claim_kept", code=error.code)
        self._claim = None
        for descriptor in (*self._held, *([] if self._stays is None else [self._stays])):
            os.close(descriptor)
        self._held, self._stays = [], None

    def _keep_claim(self, claim: Lease) -> None:
        while not self._left.wait(_RENEW_S):
            try:
                if not claim.held():
                    log.error("database_claimed_by_another_home")
            except TunewrightError as error:
                log.warning("home_claim_not_renewed", code=error.code)

    @contextmanager
    def _door(self) -> Iterator[None]:
        with (self._folder / "door.lock").open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _hold(self, path: Path, *, shared: bool) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise self._in_use() from None
        self._held.append(descriptor)

    def _take_number(self) -> int:
        for number in range(1, MOST + 1):
            descriptor = _locked(self._folder / f"{number}.lock")
            if descriptor is not None:
                self._held.append(descriptor)
                return number
        raise self._in_use()

    def _others(self, suffix: str) -> bool:
        """Whether another server holds a lock of this kind."""
        for path in self._folder.glob(f"*{suffix}"):
            if path.stem.isdecimal() and path.stem != str(self._home.server) and not _is_free(path):
                return True
        return False

    def _compare_database(self, alone: bool) -> None:
        path = self._folder / "database"
        if alone:
            write_atomically(path, self._database)
        elif path.read_bytes() != self._database:
            raise Misconfigured(
                "database_differs",
                mark("Another server of {home} runs with another TUNEWRIGHT_DATABASE_URL; give all of them the same."),
                home=self._home.root,
            )

    def _in_use(self) -> Misconfigured:
        return Misconfigured(
            "home_in_use",
            mark("Another server runs on {home}; stop it, or choose another --home."),
            home=self._home.root,
        )


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a file until it is closed; None if somebody has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_free(path: Path) -> bool:
    descriptor = _locked(path)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


def _machine() -> str:
    """Differs where one server would not see the processes of the other."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
