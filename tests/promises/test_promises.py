"""Promises that are easy to make and easy to forget."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunewright.i18n import _catalogue
from tunewright.jobs.diagnosis import EXPLANATIONS
from tunewright.settings import Settings

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "tunewright").rglob("*.py"))


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in SOURCES:
        yield path.relative_to(ROOT), ast.parse(path.read_text("utf-8"))


def marked_texts() -> list[tuple[str, str]]:
    """(place, text) of every `mark("...")` in the product."""
    found = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "mark" and node.args:
                text = node.args[0]
                place = f"{path}:{node.lineno}"
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found.append((place, text.value))
                else:
                    found.append((place, "<not a literal>"))
    return found


def test_every_text_has_a_chinese_translation_with_the_same_places() -> None:
    chinese = _catalogue("zh")
    texts = marked_texts()
    assert len(texts) > 50
    places = re.compile(r"{(\w+)[^}]*}")
    wrong = [
        f"{place}: {text}"
        for place, text in texts
        if text not in chinese or set(places.findall(chinese[text])) != set(places.findall(text))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_catalogue_holds_no_text_that_nothing_says() -> None:
    said = {text for _, text in marked_texts()}
    assert not set(_catalogue("zh")) - said


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_is_in_the_operations_page(name: str) -> None:
    assert f"`TUNEWRIGHT_{name.upper()}`" in (ROOT / "docs" / "operations.md").read_text("utf-8")


ERROR_CLASSES = {
    "AuthenticationFailed", "Conflict", "IdempotencyMismatch", "InvalidRequest", "Misconfigured", "NotFound",
    "PermissionDenied", "RateLimited", "StorageFull", "TooLarge", "Unavailable", "UnsupportedMedia",
}  # fmt: skip


def test_every_error_code_is_documented() -> None:
    """In docs/api.md for callers or docs/operations.md for operators."""
    manual = "".join((ROOT / "docs" / name).read_text("utf-8") for name in ("api.md", "operations.md"))
    missing = {
        f"{path}:{node.lineno} {node.args[0].value}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ERROR_CLASSES
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and f"`{node.args[0].value}`" not in manual
    }
    assert not missing, "\n".join(sorted(missing))


def test_the_table_of_failed_jobs_is_that_of_the_diagnosis() -> None:
    section = (
        (ROOT / "docs" / "operations.md").read_text("utf-8").partition("## When a job fails")[2].partition("\n## ")[0]
    )
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    documented = [code for row in rows for code in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(documented) == sorted(EXPLANATIONS)


ENDS_OF_JOBS = (
    "recipes/",
    "rendering/",
    "jobs/preparation.py",
    "jobs/row_choice.py",
    "jobs/publication.py",
    "jobs/moves.py",
    "models/whole_models.py",
    "deployments/one_answer.py",
    "engines/adapter_files.py",
    "engines/base_files.py",
    "engines/full_proof.py",
    "engines/loading.py",
    "engines/proof.py",
)
"""Where errors are raised that end a job."""


def test_every_way_for_a_job_to_fail_is_explained() -> None:
    raised = {
        node.args[0].value
        for path, tree in trees()
        if path.relative_to("tunewright").as_posix().startswith(ENDS_OF_JOBS)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ERROR_CLASSES
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    assert len(raised) > 20 and raised <= set(EXPLANATIONS)


BANNED_IMPORTS = {
    "pickle",
    "cPickle",
    "dill",
    "joblib",
    "cloudpickle",
    "shelve",
    "marshal",
    "requests",
    "urllib.request",
}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_ATTRIBUTES = {("torch", "load"), ("torch", "save"), ("yaml", "load"), ("os", "system"), ("time", "time")}
BANNED_NAMES = {"BaseHTTPMiddleware"}
BANNED_FLAGS = {"shell", "trust_remote_code", "allow_pickle"}  # only a literal False may follow
CLOCK = Path("tunewright/clock.py")
SETTINGS = Path("tunewright/settings.py")
WORKER_ENVIRONMENT = Path("tunewright/worker_environment.py")


def test_no_banned_construct_in_the_product() -> None:
    """No pickle, no evaluation of text, no shell, one clock, one reader of the environment."""
    found: list[str] = []
    for path, tree in trees():
        for node in ast.walk(tree):
            place = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                found += [f"{place} import {a.name}" for a in node.names if a.name in BANNED_IMPORTS]
            elif isinstance(node, ast.ImportFrom) and (node.module or "") in BANNED_IMPORTS:
                found.append(f"{place} from {node.module}")
            elif isinstance(node, ast.Name) and node.id in BANNED_NAMES:
                found.append(f"{place} {node.id}")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
                found.append(f"{place} {node.func.id}()")
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                pair = (node.value.id, node.attr)
                if pair in BANNED_ATTRIBUTES and path != CLOCK:
                    found.append(f"{place} {'.'.join(pair)}")
                if pair == ("os", "environ") and path not in (SETTINGS, WORKER_ENVIRONMENT):
                    found.append(f"{place} os.environ")
            elif (
                isinstance(node, ast.keyword)
                and node.arg in BANNED_FLAGS
                and not (isinstance(node.value, ast.Constant) and node.value.value is False)
            ):
                found.append(f"{place} {node.arg}")
    assert not found, "\n".join(found)


def test_no_file_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "helpers", "misc", "base", "manager", "common"}
    assert not [path for path in SOURCES if path.stem in empty]


def test_the_readmes_have_the_same_commands() -> None:
    """Code blocks are equal in both languages, comments aside."""

    def blocks(name: str) -> list[str]:
        found = re.findall(r"```\w*\n(.*?)```", (ROOT / name).read_text("utf-8"), re.S)
        return ["\n".join(line.split("#")[0].rstrip() for line in block.splitlines()) for block in found]

    assert blocks("README.md")
    assert blocks("README.md") == blocks("README.zh.md")
