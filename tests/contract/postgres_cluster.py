"""A throw-away PostgreSQL: a cluster in a temporary folder that listens on a Unix socket only."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_LIMIT_S = 60


class NoPostgres(Exception):
    """Why there is none here."""


@contextmanager
def postgres_cluster() -> Iterator[str]:
    """The SQLAlchemy URL of an empty database. Raises NoPostgres."""
    programs = _programs()
    account = _account()
    # Socket paths are limited to 107 bytes, too short for pytest's folders.
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    data = folder / "data"
    try:
        if account is not None:
            os.chown(folder, account.pw_uid, account.pw_gid)
        _run(
            [programs / "initdb", "-D", data, "-A", "trust", "-U", "tester", "--no-sync", "-E", "UTF8"], folder, account
        )
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(folder),
            "shared_buffers": "16MB",
            "max_connections": "80",
            "fsync": "off",  # PostgreSQL's own durability is not under test
        }
        command: list[str | Path] = [programs / "postgres", "-D", data]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **_as(account))
        try:
            _wait_until_ready(folder, server)
            yield f"postgresql+psycopg://tester@/postgres?host={folder}"
        finally:
            server.send_signal(signal.SIGQUIT)  # "immediate": nothing here needs to last
            server.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path:
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise NoPostgres("no initdb and postgres on PATH or in /usr/lib/postgresql (Debian: apt-get install postgresql)")


def _account() -> pwd.struct_passwd | None:
    """Who runs the server: None for ourselves, someone without rights if we are root, whom PostgreSQL refuses."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise NoPostgres("running as root, and there is neither a user postgres nor nobody to run the server")


def _as(account: pwd.struct_passwd | None) -> dict[str, Any]:
    rights: dict[str, Any] = (
        {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    )
    return rights | {"env": {"PATH": os.defpath, "LC_ALL": "C.UTF-8"}}


def _run(command: list[str | Path], folder: Path, account: pwd.struct_passwd | None) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=START_LIMIT_S, **_as(account))
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stderr}")


def _wait_until_ready(folder: Path, server: subprocess.Popen[Any]) -> None:
    import psycopg

    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            psycopg.connect(host=str(folder), user="tester", dbname="postgres", connect_timeout=2).close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {(folder / 'log').read_text()}") from None
            time.sleep(0.1)
