"""Any bytes give a report or a clear error: never a crash, a hang, or memory without bound."""

import os
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_models import tiny_tokenizer
from tests.unit.any_bytes import CORPUS, GOOD_FILES, holds, mended, mutated
from tunewright.datasets.mending.repair import Choice
from tunewright.datasets.records import PURPOSES
from tunewright.rendering.renderer import Renderer, renderer_of

FUZZ_S = float(os.environ.get("FUZZ_S", "300"))
BENT = st.builds(mutated, st.sampled_from(CORPUS), st.integers(0, 2**64 - 1).map(Random))
CHOICES = (
    Choice(),
    Choice(drop_bad_rows=True),
    Choice(codes=frozenset({"invalid_json", "invalid_role", "duplicate_row"})),
    Choice(lines=frozenset({2}), drop_bad_rows=True),
)
ANY = st.binary(max_size=200) | BENT


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return renderer_of(tiny_tokenizer(tmp_path_factory.mktemp("base") / "tiny"))


@pytest.mark.parametrize("data", GOOD_FILES, ids=range(len(GOOD_FILES)))
def test_the_unbent_files_are_good(tmp_path: Path, renderer: Renderer, data: bytes) -> None:
    assert holds(tmp_path, data, "fine-tune", renderer).ok


@settings(max_examples=1000)
@given(data=ANY, purpose=st.sampled_from(PURPOSES))
def test_any_bytes_give_a_report(tmp_path: Path, renderer: Renderer, data: bytes, purpose: str) -> None:
    holds(tmp_path, data, purpose, renderer)


@settings(max_examples=500)
@given(data=ANY, purpose=st.sampled_from(PURPOSES), choice=st.sampled_from(CHOICES))
def test_a_repair_of_any_bytes_does_what_it_says(tmp_path: Path, data: bytes, purpose: str, choice: Choice) -> None:
    mended(tmp_path, data, purpose, choice)


@pytest.mark.soak
@pytest.mark.timeout(FUZZ_S + 300)
def test_five_minutes_of_bent_rows_find_nothing(tmp_path: Path, renderer: Renderer) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    random = Random(seed)
    corpus = list(CORPUS)
    deadline = time.monotonic() + FUZZ_S
    runs = 0
    while time.monotonic() < deadline:
        data = mutated(random.choice(corpus), random)
        (tmp_path / "last").write_bytes(data)
        began = time.monotonic()
        purpose = random.choice(PURPOSES)
        report = holds(tmp_path, data, purpose, renderer)
        mended(tmp_path, data, purpose, random.choice(CHOICES))
        assert time.monotonic() - began < 30
        runs += 1
        if not report.ok and len(data) < 8192 and random.random() < 0.05:  # bend some of the bent ones further
            corpus[random.randrange(len(GOOD_FILES), len(corpus))] = data
    print(f"{runs} files")
