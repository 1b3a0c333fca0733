"""Every row of the catalogue of bad input is held by tests that exist, or says why not yet."""

import ast
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
IDS = [f"{part}{n:02d}" for part, last in (("J", 65), ("F", 20), ("A", 52), ("M", 14)) for n in range(1, last + 1)]
CATALOGUE: dict[str, dict[str, Any]] = tomllib.loads((TESTS / "bad_inputs.toml").read_text("utf-8"))


@cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((TESTS / path).read_text("utf-8"))
    return frozenset(
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    )


def test_the_rows_are_those_of_the_catalogue() -> None:
    assert len(IDS) == 151
    assert list(CATALOGUE) == IDS


@pytest.mark.parametrize("row", IDS)
def test_a_row_names_tests_that_exist_or_says_why_not(row: str) -> None:
    entry = CATALOGUE[row]
    assert entry and entry.keys() <= {"tests", "later"}
    assert "tests" not in entry or entry["tests"]
    for name in entry.get("tests", ()):
        path, _, function = name.partition("::")
        assert function.partition("[")[0] in functions_of(path), name
    if "later" in entry:
        assert entry["later"].endswith(".") and len(entry["later"].split()) >= 5
