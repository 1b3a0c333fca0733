import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
import structlog
from safetensors.numpy import save_file

from tests.api.running import Running
from tests.api.world import World
from tests.tiny_models import tiny_tokenizer

LOG = io.StringIO()
"""What the whole folder logged."""


@pytest.fixture(scope="session", autouse=True)
def json_log() -> Iterator[None]:
    """As the server logs, only not to the terminal."""
    structlog.configure(
        processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(LOG),
    )
    yield
    structlog.reset_defaults()


@pytest.fixture
def log_lines() -> Callable[[], list[dict[str, Any]]]:
    """All lines logged since the test began."""
    start = LOG.tell()

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in LOG.getvalue()[start:].splitlines()]

    return lines


@pytest.fixture(scope="session")
def untrained_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that the catalogue takes and no engine would; made without torch."""
    folder = tiny_tokenizer(tmp_path_factory.mktemp("base") / "tiny")
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 2048})
    )
    save_file({"model.norm.weight": numpy.ones(4, numpy.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, untrained_base: Path) -> Iterator[World]:
    """One world for all tests of the folder; they share it, so they must not count what is in it."""
    world = World(tmp_path_factory.mktemp("api") / "home", untrained_base)
    yield world
    world.platform.storage.close()


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with world.client() as client:
        yield client


@pytest.fixture
async def running(world: World) -> AsyncIterator[Running]:
    running = Running(world)
    await running.start()
    yield running
    await running.stop()
