"""One module dials addresses that callers name, and one process opens images."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NETWORK = {
    "aiohttp", "apprise", "ftplib", "http", "httpcore", "httpx", "huggingface_hub", "requests", "smtplib", "socket",
    "urllib.request", "urllib3", "websockets", "xmlrpc",
}  # fmt: skip
NETWORK_CALLS = {"create_connection", "open_connection", "sock_connect", "urlopen", "urlretrieve", "getaddrinfo"}
MAY_DIAL = {
    "tunewright/egress.py": "what callers name",
    "tunewright/notifications/apprise_process.py": "services of others, in a process that reaches public addresses only",
    "tunewright/api/serving.py": "listens; it dials nothing",
    "tunewright/deployments/worker_client.py": "our own workers on loopback",
    "tunewright/models/fetching.py": "what the operator names: a base of the hub",
}
MAY_OPEN_IMAGES = {"tunewright/datasets/images/image_worker.py"}


def used(tree: ast.Module) -> Iterator[str]:
    """Modules that are imported and attributes that are called anywhere, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield f"call {node.func.attr}"


def dials(tree: ast.Module) -> set[str]:
    return {
        name
        for name in used(tree)
        if name.split(".")[0] in NETWORK or name in NETWORK or name.removeprefix("call ") in NETWORK_CALLS
    }


def opens_images(tree: ast.Module) -> set[str]:
    return {name for name in used(tree) if name.split(".")[0] in ("PIL", "cv2", "imageio", "torchvision")}


def offenders(path: Path, tree: ast.Module) -> list[str]:
    name = path.relative_to(ROOT).as_posix()
    found = set() if name in MAY_DIAL else dials(tree)
    if name not in MAY_OPEN_IMAGES:
        found |= opens_images(tree)
    return [f"{name}: {what}" for what in sorted(found)]


def test_nothing_else_dials_or_opens_images() -> None:
    sources = sorted((ROOT / "tunewright").rglob("*.py"))
    assert not [what for path in sources for what in offenders(path, ast.parse(path.read_text("utf-8")))]


def test_the_exceptions_exist_and_are_needed() -> None:
    for name in MAY_DIAL:
        assert dials(ast.parse((ROOT / name).read_text("utf-8"))), name
    for name in MAY_OPEN_IMAGES:
        assert opens_images(ast.parse((ROOT / name).read_text("utf-8"))), name


@pytest.mark.parametrize(
    "code",
    [
        "import httpx",
        "def f():\n    from httpx import get",
        "import socket",
        "from socket import create_connection",
        "import urllib.request",
        "from urllib import request",
        "import http.client",
        "asyncio.open_connection('x', 1)",
        "from PIL import Image",
        "import PIL.Image as I",
    ],
)
def test_the_look_finds_what_it_is_for(code: str) -> None:
    assert offenders(ROOT / "tunewright" / "new.py", ast.parse(code))
