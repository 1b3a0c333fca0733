"""The peers: how each is installed into an environment of its own, and the settings it is run with.

`settings` go to the peer under its own names, but for `batch` (rows of one forward pass; the rest of the 8 rows of a
step is accumulated) and `accumulation`.
"""

from dataclasses import dataclass, field
from typing import Any

_TORCH = "torch>=2.9,<2.14"


@dataclass(frozen=True)
class Environment:
    """Requirements of one peer. `alone` are installed without what they ask for, because that includes packages which
    have no build for this torch (torchvision, torchaudio, xformers) and which text training does not use. `without` are
    such packages that are removed again, where a peer asks for too many others to list them."""

    name: str
    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contender:
    """A trainer with settings. `kind`: defaults, best (or near it, in each precision) or tried (others, not in the table)."""

    environment: str
    label: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    method: str = "lora"


ENVIRONMENTS = (
    Environment("trl", (_TORCH, "trl==1.16.0", "peft==0.21.2", "transformers==5.24.0")),
    Environment(
        "llamafactory",
        (
            _TORCH, "accelerate>=1.3,<=1.11", "av>=10,<=16", "datasets>=2.16,<=4.0.0", "einops", "fastapi", "fire",
            "hf-transfer", "matplotlib>=3.7", "modelscope", "omegaconf", "peft>=0.18,<=0.18.1", "protobuf", "scipy",
            "sentencepiece", "sse-starlette", "tiktoken", "torchdata>=0.10,<=0.11", "transformers>=4.55,!=4.57.0,<=5.6",
            "trl>=0.18,<=0.24", "tyro<0.9", "uvicorn",
        ),
        ("llamafactory==0.9.5",),
    ),
    Environment("swift", (_TORCH, "ms-swift==4.6.0", "transformers>=5.0,<5.20")),
    Environment(
        "unsloth",
        (
            _TORCH, "accelerate", "click", "datasets>=4.6,<5", "einops", "hf_transfer", "json5", "msgspec",
            "nest-asyncio", "peft>=0.18", "pillow", "protobuf", "psutil", "pyyaml", "regex", "rich", "sentencepiece>=0.2",
            "structlog", "torchao>=0.13", "transformers>=5.2,<=5.17", "trl<=1.15", "typer", "tyro", "wheel",
        ),
        ("unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "cut_cross_entropy", "bitsandbytes>=0.45.5"),
    ),
)  # fmt: skip

_TRL_LEAN = {"gradient_checkpointing": False, "batch": 1}
# Its infer_dtype is for answering only, and it refuses pure_bf16 without a GPU: bf16 in training is `bf16` alone.
_LF_LEAN = {"disable_gradient_checkpointing": True, "batch": 1}
_UNSLOTH_LEAN = {"checkpointing": False, "gradient_checkpointing": False, "batch": 1}

OURS = Contender("", "Tunewright", "ours")
OURS_FULL = Contender("", "Tunewright, all weights", "ours", method="full")
OURS_SMALL = Contender("", "Tunewright, checkpointing on", "ours", {"activation_checkpointing": "on"})

CONTENDERS = (
    Contender("trl", "TRL, its defaults", "defaults"),
    Contender("trl", "TRL, float32, no checkpointing, 1 x 8", "best", {"bf16": False, **_TRL_LEAN}),
    Contender("trl", "TRL, bf16 base, no checkpointing, 1 x 8", "best", {"dtype": "bfloat16", **_TRL_LEAN}),
    Contender("trl", "TRL, bf16 autocast, no checkpointing, 1 x 8", "tried", {"dtype": "float32", **_TRL_LEAN}),
    Contender("trl", "TRL, bf16 base, no checkpointing, packed 2 x 1024", "tried",
              {"dtype": "bfloat16", "gradient_checkpointing": False, "batch": 2, "accumulation": 1, "packing": True}),
    Contender("trl", "TRL, bf16 base, no checkpointing, 2 x 4 by length", "tried",
              {"dtype": "bfloat16", "gradient_checkpointing": False, "batch": 2,
               "train_sampling_strategy": "group_by_length"}),
    Contender("llamafactory", "LLaMA-Factory, its defaults", "defaults"),
    Contender("llamafactory", "LLaMA-Factory, float32, no checkpointing, 1 x 8", "best", _LF_LEAN),
    Contender("llamafactory", "LLaMA-Factory, bf16 base and autocast, no checkpointing, 1 x 8", "best",
              {"bf16": True, **_LF_LEAN}),
    Contender("llamafactory", "LLaMA-Factory, bf16 base and autocast, no checkpointing, packed 2 x 1024", "tried",
              {"bf16": True, "disable_gradient_checkpointing": True, "batch": 2, "accumulation": 1, "packing": True}),
    Contender("swift", "ms-swift, its defaults", "defaults"),
    Contender("swift", "ms-swift, its defaults but for 8 rows side by side, as the others' are", "defaults", {"batch": 8}),
    Contender("swift", "ms-swift, float32, no checkpointing, 1 x 8", "best",
              {"torch_dtype": "float32", "gradient_checkpointing": False}),
    Contender("swift", "ms-swift, bf16 base, no checkpointing, 1 x 8", "tried",
              {"torch_dtype": "bfloat16", "bf16": False, "gradient_checkpointing": False}),
    Contender("swift", "ms-swift, bf16 autocast, no checkpointing, 1 x 8", "best",
              {"torch_dtype": "bfloat16", "gradient_checkpointing": False}),
    Contender("unsloth", "Unsloth, its defaults", "defaults"),
    Contender("unsloth", "Unsloth, float32, no checkpointing, 1 x 8", "best",
              {"dtype": "float32", "bf16": False, **_UNSLOTH_LEAN}),
    Contender("unsloth", "Unsloth, bf16, no checkpointing, 1 x 8", "best", {"dtype": "bfloat16", **_UNSLOTH_LEAN}),
    Contender("trl", "TRL, all weights, float32, no checkpointing, 1 x 8", "best", {"bf16": False, **_TRL_LEAN}, "full"),
    Contender("trl", "TRL, all weights, bf16 autocast, no checkpointing, 1 x 8", "best",
              {"dtype": "float32", **_TRL_LEAN}, "full"),
    Contender("trl", "TRL, all weights, bf16 base, no checkpointing, 1 x 8", "best",
              {"dtype": "bfloat16", **_TRL_LEAN}, "full"),
)  # fmt: skip
