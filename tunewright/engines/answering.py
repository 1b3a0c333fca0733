"""A process that answers one order and ends (see `deployments/one_answer.py`)."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from tunewright.deployments.one_answer import ANSWER, ORDER
from tunewright.engines.placement import use_threads
from tunewright.engines.tickets import trouble_of
from tunewright.errors import TunewrightError
from tunewright.files_on_disk import write_atomically

_log = logging.getLogger(__name__)


class _Order(Protocol):
    @property
    def threads(self) -> int: ...


_SomeOrder = TypeVar("_SomeOrder", bound=_Order)


def answer_order(folder: Path, kind: type[_SomeOrder], work: Callable[[_SomeOrder], msgspec.Struct]) -> int:
    """Answer the order in `folder` by what `work` makes of it, an error of ours as a Trouble; returns the exit code, 0."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    order = msgspec.json.decode((folder / ORDER).read_bytes(), type=kind)
    use_threads(order.threads)
    try:
        answer = work(order)
    except TunewrightError as error:
        _log.error("%s", error)
        answer = trouble_of(error)
    write_atomically(folder / ANSWER, msgspec.json.encode(answer))
    return 0
