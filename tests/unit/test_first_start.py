"""What a new base's own code says is asked for when the base comes, if there is room for it."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.tiny_models import tiny_tokenizer
from tunewright.deployments import first_start
from tunewright.deployments.ports import OWN_CODE, WorkerSpec
from tunewright.deployments.workers import asks_for, base_spec
from tunewright.models.records import Base, Source
from tunewright.settings import Settings


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[WorkerSpec]:
    """The specs that processes were started with."""
    found: list[WorkerSpec] = []

    def run(command: list[str], *, input: bytes, env: dict[str, str], **_: Any) -> None:
        assert command[-1] == OWN_CODE and "TUNEWRIGHT_DATABASE_URL" not in env
        found.append(msgspec.json.decode(input, type=WorkerSpec))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("TUNEWRIGHT_DATABASE_URL", "postgresql://secret")
    return found


def base_in(folder: Path, **tokenizer: Any) -> Base:
    path = tiny_tokenizer(folder, **tokenizer)
    return Base(code="tiny", name="T", source=Source(kind="folder"), licence="x", context_tokens=99, path=path)


def test_it_is_asked_for_what_a_worker_will_look_for(tmp_path: Path, asked: list[WorkerSpec]) -> None:
    base, settings = base_in(tmp_path / "base"), Settings(home=tmp_path / "home")
    first_start.prepare(base, settings)
    assert len(asked) == 1
    wanted = base_spec(base, settings, "pool-tiny")
    assert asks_for(msgspec.structs.replace(asked[0], worker_id=wanted.worker_id), wanted)
    assert asked[0].references_path == str(tmp_path / "home" / "cache" / "references")


@pytest.mark.parametrize("why", ["memory", "vllm", "no template", "not pulled"])
def test_it_is_not_asked_for_where_that_can_be_of_no_use(
    why: str, tmp_path: Path, asked: list[WorkerSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_in(tmp_path / "base", **({"chat_template": None} if why == "no template" else {}))
    settings = Settings(home=tmp_path, engine="vllm" if why == "vllm" else "torch")
    if why == "memory":
        monkeypatch.setattr(first_start.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**8))
    if why == "not pulled":
        base = msgspec.structs.replace(base, path=None)
    first_start.prepare(base, settings)
    assert asked == []
