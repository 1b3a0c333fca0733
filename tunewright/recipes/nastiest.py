"""The rows of a data file that are likeliest to make a training fail, for its dress rehearsal. Pure but for reading the file."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tunewright.datasets.lines import read_lines
from tunewright.recipes.packing import Rows

MOST = 8
_BOM = b"\xef\xbb\xbf"
_BUFFER_BYTES = 1 << 20
_TOKENS_AT_ONCE = 1 << 20
_DEEPEST = 64
_KINDS = ("chat", "function", "preference")


@dataclass(frozen=True)
class Features:
    """What makes rows nasty, one number for each example: the larger, the nastier. `kind` is a place in _KINDS."""

    tokens: np.ndarray
    labels: np.ndarray
    turns: np.ndarray
    calls: np.ndarray
    depth: np.ndarray
    rarity: np.ndarray
    kind: np.ndarray


def nastiest(rows: Rows, path: Path, max_line_bytes: int) -> list[int]:
    """At most `MOST` examples of `rows`, which were read from `path`, longest first. Raises OSError."""
    return choose(features(rows, path, max_line_bytes), MOST)


def choose(found: Features, most: int) -> list[int]:
    """At most `most` examples, longest first: the first in each feature, one of each kind, and then the longest.

    Where several are equal, the longer and then the earlier one is taken.
    """
    n_examples = len(found.tokens)
    by_length = np.lexsort((np.arange(n_examples), -found.tokens))

    def ranking(feature: np.ndarray) -> np.ndarray:
        return by_length[np.argsort(-feature[by_length], kind="stable")]

    shapes = (found.tokens, found.labels, found.turns, found.calls, found.depth)
    firsts = [ranking(shape) for shape in shapes if shape.any()]
    firsts += [by_length[found.kind[by_length] == kind] for kind in np.unique(found.kind)]
    firsts.append(ranking(found.rarity))
    taken: dict[int, None] = {}
    for order in firsts:
        if len(taken) < most:
            taken[int(order[0])] = None  # one that leads in two features leaves room for another long one
    for example in map(int, by_length):
        if len(taken) < most:
            taken[example] = None
    places = {example: place for place, example in enumerate(map(int, by_length))}
    return sorted(taken, key=places.__getitem__)


def features(rows: Rows, path: Path, max_line_bytes: int) -> Features:
    """Of every example. Tokens and labels are those that are left once rows are cut, the rest is that of the whole row."""
    per_example = (rows.n_examples, rows.sides)
    shapes = np.array(list(_shapes(rows.lines[:: rows.sides], path, max_line_bytes)), dtype=np.int64).reshape(-1, 4)
    return Features(
        tokens=rows.lengths.reshape(per_example).sum(1),
        labels=rows.n_labels.reshape(per_example).sum(1),
        turns=shapes[:, 0],
        calls=shapes[:, 1],
        depth=shapes[:, 2],
        rarity=_rarity(rows).reshape(per_example).sum(1),
        kind=shapes[:, 3],
    )


def _rarity(rows: Rows) -> np.ndarray:
    """(rows,) the sum of 1/n over the tokens of each row, n being how often a token occurs in the file: the largest has most
    of what no other row has."""
    counts = np.zeros(0, np.int64)
    for begin in range(0, len(rows.tokens), _TOKENS_AT_ONCE):
        some = np.bincount(rows.tokens[begin : begin + _TOKENS_AT_ONCE], minlength=len(counts))
        some[: len(counts)] += counts
        counts = some
    weights = 1.0 / np.maximum(counts, 1)
    return np.array([weights[rows.tokens_of(row)].sum() for row in range(len(rows))])


def _shapes(lines: np.ndarray, path: Path, max_line_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """(turns, tool calls, depth of the deepest arguments, kind) of the rows in these lines, which ascend."""
    wanted = iter(lines.tolist())
    next_line = next(wanted, None)
    with path.open("rb", _BUFFER_BYTES) as stream:
        if stream.read(len(_BOM)) != _BOM:
            stream.seek(0)
        for line in read_lines(stream, max_line_bytes):
            if line.number == next_line:
                yield shape_of(_decoded(line.data or b"null"))
                next_line = next(wanted, None)


def shape_of(row: Any) -> tuple[int, int, int, int]:
    """(turns, tool calls, depth of the deepest arguments, kind) of one row; of what is no row, what can be told."""
    if not isinstance(row, dict):
        return 0, 0, 0, 0
    asked = row.get("input", row)
    asked = asked if isinstance(asked, dict) else {}
    answers = [value for key, value in row.items() if key not in ("messages", "tools", "input") and _is_turns(value)]
    turns = [message for part in (asked.get("messages"), *answers) for message in _messages(part)]
    calls = [call for message in turns for call in _messages(message.get("tool_calls"))]
    arguments = (call.get("function", {}).get("arguments") for call in calls if isinstance(call.get("function"), dict))
    function = bool(calls) or bool(asked.get("tools")) or any(message.get("role") == "tool" for message in turns)
    kind = "preference" if answers else "function" if function else "chat"
    return len(turns), len(calls), max(map(_argument_depth, arguments), default=0), _KINDS.index(kind)


def _decoded(text: bytes) -> Any:
    """None for what is no JSON: arguments may be any text."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(message, dict) and "role" in message for message in value)


def _messages(value: Any) -> Iterable[dict[str, Any]]:
    return (message for message in value if isinstance(message, dict)) if isinstance(value, list) else ()


def _argument_depth(arguments: Any) -> int:
    if isinstance(arguments, str):
        try:
            arguments = _decoded(arguments.encode())
        except UnicodeEncodeError:
            return 0
    return _depth(arguments)


def _depth(value: Any, limit: int = _DEEPEST) -> int:
    if not isinstance(value, dict | list) or limit == 0:
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(one, limit - 1) for one in inner), default=0)
