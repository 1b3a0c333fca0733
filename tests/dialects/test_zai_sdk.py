"""The unmodified `zai-sdk` package against a real server."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.live_server import LiveServer

VERSION = "0.2.3"
ENVIRONMENT = Path(__file__).parents[2] / ".venvs" / f"zai-{VERSION}"


@pytest.fixture(scope="session")
def zai_python() -> Path:
    """The interpreter of an environment with zai-sdk, made at the first run."""
    python = ENVIRONMENT / "bin" / "python"
    done = ENVIRONMENT / "installed"
    if not done.exists():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"zai-sdk=={VERSION}"]
        subprocess.run(pip, check=True)
        done.touch()
    return python


def test_a_session(zai_python: Path, live_server: LiveServer, tuned_model: str) -> None:
    script = Path(__file__).with_name("zai_session.py")
    command = [str(zai_python), str(script), live_server.address, live_server.key, tuned_model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen.pop("tokens") > 0
    assert seen.pop("again") in ("stop", "length") and seen.pop("finish") in ("stop", "length")
    assert seen == {
        "file_status": "processed",
        "listed": True,
        "content": True,
        "job": "fine_tuning.job",
        "cancelled": True,
        "usage": True,
        "error": "1211",
        "deleted": True,
        "vectors": 2,
        "begun": "AsyncTaskStatus",
        "begun_status": "PROCESSING",
        "late": ["AsyncCompletion", "SUCCESS", "assistant", True],
        "failed": ["AsyncTaskStatus", "FAIL"],
        "batch": ["completed", 1, "one"],
        "batch_listed": True,
    }


def test_the_environments_are_apart() -> None:
    assert str(ENVIRONMENT) not in sys.prefix
