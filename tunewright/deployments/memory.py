"""What a replica needs in memory before any was started, from the model's files alone. Pure, without torch.

    weights    all parameters in float32, and those of an adapter
    cache      keys and values of a quarter of what all slots could hold: few answers are as long as they may be
    overhead   interpreter, libraries, their working memory

Once a replica has run, what it held is kept with its deployment and goes before this.
"""

import json
from pathlib import Path

from tunewright.jobs.memory_estimate import sizes_of

_OVERHEAD_BYTES = 350 * 2**20
_FLOAT_BYTES = 4


def estimated_bytes(folder: Path, adapter: Path | None, *, slots: int, context_tokens: int) -> int:
    """For the model in `folder`; where its config says too little, twice the size of its weight files."""
    adapter_bytes = 0 if adapter is None else _weights_bytes(adapter)
    try:
        sizes = sizes_of(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return _OVERHEAD_BYTES + 2 * _weights_bytes(folder) + adapter_bytes
    token_bytes = 2 * sizes.layers * sizes.kv_width * _FLOAT_BYTES
    cache = slots * context_tokens * token_bytes // 4
    return _OVERHEAD_BYTES + sizes.parameters * _FLOAT_BYTES + adapter_bytes + cache


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
