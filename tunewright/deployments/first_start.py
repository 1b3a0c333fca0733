"""What would make the first worker of a new base slow is done when the base comes."""

import subprocess
import sys

import msgspec
import psutil

from tunewright.deployments.memory import estimated_bytes
from tunewright.deployments.ports import OWN_CODE
from tunewright.deployments.workers import base_spec
from tunewright.errors import TunewrightError
from tunewright.models.records import Base
from tunewright.settings import Settings
from tunewright.worker_environment import worker_environment


def prepare(base: Base, settings: Settings) -> None:
    """Have the model's own code say now what workers compare their decoders with (`engines/references.py`).

    Blocks for about as long as a worker takes to start. Nothing follows from a failure, or from too little memory now: the
    first worker has it said then.
    """
    if settings.engine != "torch" or base.path is None:
        return
    if estimated_bytes(base.path, None, slots=0, context_tokens=0) > psutil.virtual_memory().available:
        return
    try:
        spec = base_spec(base, settings, base.code)
    except TunewrightError:  # it has no template for chat, or a worker would say what is wrong
        return
    subprocess.run(
        [sys.executable, "-P", "-m", OWN_CODE],
        input=msgspec.json.encode(spec),
        env=worker_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
        umask=0o077,
    )
