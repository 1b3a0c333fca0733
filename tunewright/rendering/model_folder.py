"""What the renderer reads from a model folder in Hugging Face layout. Nothing here loads weights."""

import json
from pathlib import Path
from typing import Any

import msgspec

from tunewright.errors import Misconfigured
from tunewright.i18n import mark

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json")
"""Every file that can change a rendering."""

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ModelFolder(msgspec.Struct, frozen=True, kw_only=True):
    """The files' contents as far as rendering needs them.

    `tokens` are the special tokens by name (`bos_token` -> `<s>`), `eos_ids` the ids that the configurations call the end.
    `tool_template` is a second template that some bases bring for conversations with tools.
    """

    tokenizer: str
    template: str
    tool_template: str | None
    tokens: dict[str, str]
    eos_ids: tuple[int, ...]


def read_model_folder(folder: Path) -> ModelFolder:
    """Read `folder`. Raises Misconfigured `model_folder_incomplete` when the tokenizer or the chat template is missing
    or unreadable."""
    config = _json(folder, "tokenizer_config.json")
    templates = _templates(folder, config)
    return ModelFolder(
        tokenizer=_text(folder, "tokenizer.json"),
        template=templates["default"],
        tool_template=templates.get("tool_use"),
        tokens={name: token for name in _TOKEN_NAMES if (token := _token(config.get(name)))},
        eos_ids=_eos_ids(_json(folder, "generation_config.json"), _json(folder, "config.json")),
    )


def _text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _incomplete(folder, name) from error


def _json(folder: Path, name: str) -> dict[str, Any]:
    """The object in an optional file, {} without it."""
    if not (folder / name).exists():
        return {}
    try:
        value = json.loads(_text(folder, name))
    except ValueError as error:
        raise _incomplete(folder, name) from error
    if not isinstance(value, dict):
        raise _incomplete(folder, name)
    return value


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Name -> text, with `default` always there."""
    if (folder / "chat_template.jinja").exists():
        return {"default": _text(folder, "chat_template.jinja")}
    found = config.get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found if isinstance(entry, dict) and "template" in entry}
        if "default" in named:
            return named
    raise _incomplete(folder, "chat_template.jinja")


def _token(value: Any) -> str | None:
    """A special token is written as text or as an object with its text in `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _eos_ids(*configs: dict[str, Any]) -> tuple[int, ...]:
    ids: list[int] = []
    for config in configs:
        value = config.get("eos_token_id")
        ids += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and i not in ids]
    return tuple(ids)


def _incomplete(folder: Path, name: str) -> Misconfigured:
    return Misconfigured(
        "model_folder_incomplete",
        mark("The model folder {folder} has no readable {name}."),
        folder=folder.name,
        name=name,
    )
