"""`make demo` as a newcomer runs it, on the real starter model (a download of 90 MB)."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(900)
def test_the_demo_teaches_a_model_something_visible(tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--home", str(home), "--port", "0", "--once"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    base = [line for line in done.stdout.splitlines() if line.strip().startswith("base :")]
    tuned = [line for line in done.stdout.splitlines() if line.strip().startswith("tuned:")]
    assert len(base) == len(tuned) == 3
    assert all("Ahoy" in answer for answer in tuned), done.stdout
    assert not any("Ahoy" in answer for answer in base)
    assert "Harbourlight" in "".join(tuned) and "Harbourlight" not in "".join(base)
