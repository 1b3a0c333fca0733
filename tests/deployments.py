"""Private instances of a live server, for tests: make, watch, find their processes."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from tests.live_server import LiveServer
from tunewright.deployments.ports import WorkerProcess


def deploy(server: LiveServer, model: str, **wish: Any) -> dict[str, Any]:
    """A new deployment that takes calls."""
    with server.api("/api/v1") as api:
        answer = api.post("/deployments", json={"model": model, **wish})
    assert answer.status_code == 201, answer.text
    return wait_for(server, answer.json()["id"], lambda found: found["status"] == "ready")


def deployment(server: LiveServer, deployment_id: str) -> dict[str, Any]:
    with server.api("/api/v1") as api:
        answer = api.get(f"/deployments/{deployment_id}")
    answer.raise_for_status()
    return answer.json()


def wait_for(
    server: LiveServer, deployment_id: str, condition: Callable[[dict[str, Any]], bool], limit_s: float = 120
) -> dict[str, Any]:
    """The deployment once the condition holds."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        found = deployment(server, deployment_id)
        if condition(found):
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{deployment(server, deployment_id)}\n{server.log.read_text()[-3000:]}")


def change(server: LiveServer, deployment_id: str, **changes: Any) -> dict[str, Any]:
    with server.api("/api/v1") as api:
        answer = api.patch(f"/deployments/{deployment_id}", json=changes)
    answer.raise_for_status()
    return answer.json()


def undeploy(server: LiveServer, deployment_id: str) -> None:
    with server.api("/api/v1") as api:
        assert api.delete(f"/deployments/{deployment_id}").json()["deleted"] is True


def events(server: LiveServer, deployment_id: str) -> list[str]:
    """The codes of what happened, oldest first."""
    with server.api("/api/v1") as api:
        answer = api.get(f"/deployments/{deployment_id}/events?limit=200")
    answer.raise_for_status()
    return [event["code"] for event in reversed(answer.json()["data"])]


def processes(server: LiveServer, deployment_id: str) -> dict[str, WorkerProcess]:
    """Replica id -> its process, for all that could answer once. One that is being started again has none for a moment."""
    found: dict[str, WorkerProcess] = {}
    for path in (Path(server.home) / "workers" / deployment_id).glob("*/worker.json"):
        with suppress(FileNotFoundError):
            found[path.parent.name] = msgspec.json.decode(path.read_bytes(), type=WorkerProcess)
    return found
