"""vLLM itself, where TUNEWRIGHT_VLLM_PYTHON names the Python of an environment that has it and Tunewright."""

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

PYTHON = os.environ.get("TUNEWRIGHT_VLLM_PYTHON")
START_LIMIT_S = 900.0
_FIX = '''
"""Rows without an adapter have index -1, which vLLM's CPU build takes for the last slot: nothing is added to them here."""

from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

_shrink = lora_ops.bgmv_shrink


def _shrink_but_for_the_base(inputs, weights, output, indices, scaling=1.0):
    _shrink(inputs, weights, output, indices, scaling)
    output[indices < 0] = 0


def apply():
    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = _shrink_but_for_the_base
'''


def needs_vllm() -> str:
    """Its Python; skips the test where there is none."""
    if PYTHON is None:
        pytest.skip("TUNEWRIGHT_VLLM_PYTHON names no environment with vLLM")
    return PYTHON


@cache
def is_of_processors() -> bool:
    """Whether that is its CPU build, which mixes rows of the base up with adapters."""
    code = "from vllm.platforms import current_platform; print('it is for', current_platform.device_type)"
    done = subprocess.run([needs_vllm(), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1] == "cpu"


def mended(folder: Path) -> dict[str, str]:
    """What the environment of a worker must have so that vLLM's CPU build mixes nothing up: a plugin that each of its processes
    loads. Empty for other builds: nothing is mended there."""
    if not is_of_processors():
        return {}
    about = folder / "lora_mended-1.dist-info"
    about.mkdir(parents=True)
    (folder / "lora_mended.py").write_text(_FIX)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lora-mended\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nlora_mended = lora_mended:apply\n")
    return {"PYTHONPATH": str(folder)}
