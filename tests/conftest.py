"""Fixtures that several folders share."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings

from tests.contract.postgres_cluster import NoPostgres, postgres_cluster
from tests.live_server import LiveServer, chat_rows

# How long an example takes, or the making of some, says how busy the machine is.
settings.register_profile(
    "ours", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("ours")
METRICS_TOKEN = "a token of the operator's choice"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in Hugging Face layout; read only."""
    from tests.tiny_models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def live_server(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[LiveServer]:
    """One server for all tests that only call it."""
    server = LiveServer(tmp_path_factory.mktemp("live") / "home", TUNEWRIGHT_METRICS_TOKEN=METRICS_TOKEN)
    server.run("models", "add", str(tiny_base), "--code", "tiny", "--embeddings", "mean")
    for alias in ("glm-4-9b", "glm-4v", "m"):
        server.run("models", "alias", alias, "tiny")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def tuned_model(live_server: LiveServer) -> str:
    """The name of a model that a real job made on the live server."""
    file_id = live_server.upload(chat_rows())
    job_id = live_server.create_job(file_id, suffix="shared", hyperparameters={"n_epochs": 2, "batch_size": 4})
    job = live_server.wait(job_id)
    if job["status"] != "succeeded":
        raise RuntimeError(f"{job}\n{live_server.log.read_text()[-3000:]}")
    return job["fine_tuned_model"]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a database in a real server; skips where there is none."""
    try:
        with postgres_cluster() as url:
            yield url
    except NoPostgres as reason:
        pytest.skip(str(reason))


@pytest.fixture
def postgres_url(postgres: str) -> str:
    """A fresh schema: as good as a database, and made in a tenth of the time."""
    import psycopg
    from psycopg import sql

    name = f"test_{uuid4().hex}"
    with psycopg.connect(postgres.replace("postgresql+psycopg:", "postgresql:"), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))
    return f"{postgres}&options=-csearch_path%3D{name}"
