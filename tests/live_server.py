"""A real `tunewright serve` process on a home of its own, with a tiny random model as the base `tiny`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from tunewright.models.catalogue import Catalogue
from tunewright.settings import HomeFolder

TUNEWRIGHT = [sys.executable, "-m", "tunewright.cli"]
_FAST = {
    "TUNEWRIGHT_TRAINER_THREADS": "1",
    "TUNEWRIGHT_ENGINE_THREADS": "1",
    "TUNEWRIGHT_LOG_LEVEL": "info",
    "TUNEWRIGHT_MIN_FREE_DISK_BYTES": "1",
    "TUNEWRIGHT_MAX_REQUESTS_PER_MINUTE": "0",
    "TUNEWRIGHT_MAX_REFUSED_KEYS_PER_MINUTE": "0",
}


_HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


def _remember_together(home: HomeFolder) -> None:
    """What a model's own code said is kept by hashes, so the homes of one run of tests can share it: six seconds a start."""
    run = next((parent for parent in home.root.parents if parent.name.removeprefix("pytest-").isdigit()), None)
    if run is not None and not home.references.exists():
        shared = run / "references"
        shared.mkdir(mode=0o700, exist_ok=True)
        home.references.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.references.symlink_to(shared, target_is_directory=True)


class LiveServer:
    """Start, kill and start again; `api()` is a plain HTTP client with the first key."""

    def __init__(self, home: Path, *, module: str = "tunewright.cli", **settings: str) -> None:
        self.home = home
        self._command = [sys.executable, "-m", module]
        self.log = home.parent / f"{home.name}.log"
        self._environment = {**os.environ, **_FAST, **settings}
        self._process: subprocess.Popen[str] | None = None
        self.address = ""

    def run(self, *arguments: str) -> str:
        """A command of the product on this home; returns stdout."""
        command = [*TUNEWRIGHT, *arguments, "--home", str(self.home)]
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{arguments}: {done.stderr}")
        return done.stdout

    def add_base(self, folder: Path, code: str = "tiny") -> None:
        """What `models add` does, without the second that its process takes to start."""
        home = HomeFolder(self.home)
        home.create()
        _remember_together(home)
        Catalogue(home).add(folder, code, licence="unknown")

    def start(self, port: int = 0, listener: socket.socket | None = None) -> "LiveServer":
        """Serve, and return when the server says that it is ready. A `listener` is handed over as a service manager does."""
        command = [*self._command, "serve", "--home", str(self.home), "--port", str(port)]
        if listener is not None:
            command = [sys.executable, "-c", _HAND_OVER, str(listener.fileno()), *command]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
                pass_fds=[] if listener is None else [listener.fileno()],
            )
        if self._process.stdout is None:
            raise RuntimeError("no stdout")
        line = self._process.stdout.readline()
        if not line:
            code = self._end(0)
            raise RuntimeError(f"exit code {code}: {self.log.read_text()[-2000:]}")
        self.address = line.split()[-1]
        return self

    @property
    def host(self) -> str:
        return self.address.partition("://")[2].rsplit(":", 1)[0]

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])

    @property
    def key(self) -> str:
        return (self.home / "first.key").read_text().strip()

    def kill(self) -> None:
        """kill -9 of the server alone; its workers live on."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        if self._process is None:
            return 0
        if number:
            self._process.send_signal(number)
        code = self._process.wait(40)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None
        return code

    def api(self, prefix: str = "/v1") -> httpx.Client:
        """An HTTP client with the first key; close it."""
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.address + prefix, headers=headers, timeout=60, trust_env=False)

    def upload(self, rows: list[dict[str, Any]], purpose: str = "fine-tune") -> str:
        """Upload rows as JSONL; the file's id."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self.api() as api:
            answer = api.post("/files", data={"purpose": purpose}, files={"file": ("rows.jsonl", data.encode())})
        answer.raise_for_status()
        return answer.json()["id"]

    def create_job(self, file_id: str, **body: Any) -> str:
        """Create a job on the base `tiny`; its id."""
        with self.api() as api:
            answer = api.post("/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id, **body})
        answer.raise_for_status()
        return answer.json()["id"]

    def create_batch(self, file_id: str) -> str:
        """Have the requests of a file answered; the batch's id."""
        body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        with self.api() as api:
            answer = api.post("/batches", json=body)
        answer.raise_for_status()
        return answer.json()["id"]

    def job(self, job_id: str) -> dict[str, Any]:
        with self.api() as api:
            answer = api.get(f"/fine_tuning/jobs/{job_id}")
        answer.raise_for_status()
        return answer.json()

    def wait(self, job_id: str, timeout_s: float = 240) -> dict[str, Any]:
        """The job once it has ended."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            job = self.job(job_id)
            if job["status"] in ("succeeded", "failed", "cancelled"):
                return job
            time.sleep(0.1)
        raise TimeoutError(f"{self.job(job_id)}\n{self.log.read_text()[-2000:]}")


def chat_rows(n: int = 12) -> list[dict[str, Any]]:
    """`n` short rows that a tiny model can learn by heart."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is number {i}?"},
                {"role": "assistant", "content": f"It is {['one', 'two', 'three', 'four', 'five'][i % 5]}, yes."},
            ]
        }
        for i in range(n)
    ]
