from pathlib import Path

import pytest

from tests.tiny_models import tiny_llama


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its tokenizer."""
    return tiny_llama(tmp_path_factory.mktemp("bases") / "tiny")
