"""Rows that occur again: the same row, the same question with another answer, rows of a training file in its validation file.

A few numbers are kept for each line, 24 bytes in all, and looked through once the last line is read. So memory is bounded by
the number of lines and repeated rows are found however far apart they stand.
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import xxhash

from tunewright.datasets.checking.row_facts import Facts, Shape

_hash = xxhash.xxh3_64_intdigest
_short_hash = xxhash.xxh32_intdigest
_MOST = 0xFFFF_FFFF
_MIX = 0x9E37_79B9_7F4A_7C15
_FEW = 20_000
"""Up to so many lines plain Python does the looking: numpy need not be loaded for a small file."""
_CHUNK = 1 << 18


class Fingerprints:
    """The numbers of all lines. A number of 0 says: nothing to compare (a blank line, a row with errors)."""

    def __init__(self) -> None:
        self.rows = array("Q")
        """Of each line's bytes."""
        self.prompts = array("Q")
        """Of everything before a row's last answer."""
        self.answers = array("I")
        """Of the last answer."""
        self.lengths = array("I")
        """Bytes of each line with its newline: so a line's place need not be kept. 0 for a line in `huge`."""
        self.huge: dict[int, int] = {}
        """Index of a line of 4 GiB or more -> its bytes."""

    def add(self, row: int, prompt: int, answer: int, length: int) -> None:
        """One line."""
        self.rows.append(row)
        self.prompts.append(prompt)
        self.answers.append(answer)
        if length > _MOST:
            self.huge[len(self.lengths)] = length
            length = 0
        self.lengths.append(length)

    def add_plain(self, rows: list[int], shapes: list[Shape], texts: list[list[str]], lengths: list[int]) -> None:
        """Rows of nothing but contents, all trained on, of which the last is an answer."""
        self.rows.extend(rows)
        self.lengths.extend(lengths)
        prompts = ["\0".join((shape.head, *contents[:-1])) for shape, contents in zip(shapes, texts, strict=True)]
        self.prompts.extend(map(_hash, map(str.encode, prompts)))
        self.answers.extend(map(_short_hash, map(str.encode, [contents[-1] for contents in texts])))

    def add_rows(self, rows: list[int], found: list[Facts], lengths: list[int]) -> None:
        """Any rows without errors, none of them huge."""
        self.rows.extend(rows)
        self.lengths.extend(lengths)
        self.prompts.extend(map(_hash, map(str.encode, map(_prompt_of, found))))
        self.answers.extend(map(_short_hash, map(str.encode, [facts.answer for facts in found])))

    def write(self, stream: BinaryIO) -> None:
        """The raw numbers; `read` takes them back, on the same machine."""
        for numbers in self._all():
            numbers.tofile(stream)

    def read(self, stream: BinaryIO, lines: int) -> None:
        """Add the numbers of `lines` lines that `write` wrote."""
        for numbers in self._all():
            numbers.fromfile(stream, lines)

    def _all(self) -> tuple["array[int]", ...]:
        return self.rows, self.prompts, self.answers, self.lengths


def row_key(line: bytes) -> int:
    """The number of a line's bytes, without its newline."""
    return _hash(line)


def keys_of(facts: Facts) -> tuple[int, int]:
    """The numbers of a row's prompt and answer."""
    return _hash(_prompt_of(facts).encode()), _short_hash(facts.answer.encode())


def _prompt_of(facts: Facts) -> str:
    """Everything before the last answer, as one text."""
    shape, texts, tools, pair = facts.shape, facts.texts, facts.tools, facts.pair
    last = len(texts) if pair else shape.last
    head = f"{shape.code[:last]}\0{tools}\0{pair}" if tools or pair else shape.head
    return "\0".join((head, *texts[:last]))


def _view(numbers: "array[int]") -> Any:
    """The same numbers for numpy, not copied: the array can't grow while a view of it lives."""
    import numpy as np

    return np.frombuffer(numbers, dtype=numbers.typecode) if numbers else np.empty(0, dtype=numbers.typecode)


class Again(NamedTuple):
    """Line `line_index` (from 0) and the earlier line that it repeats or contradicts."""

    line_index: int
    first: int


def duplicates(found: Fingerprints) -> Iterator[Again]:
    """Lines whose bytes stood in an earlier line, in order."""
    return _repeated(found.rows, None)


def contradictions(found: Fingerprints) -> Iterator[Again]:
    """Rows whose prompt stood in an earlier row with another answer, in order; compared with the first of its prompt."""
    return _repeated(found.prompts, found.answers)


def _repeated(keys: "array[int]", answers: "array[int] | None") -> Iterator[Again]:
    if len(keys) <= _FEW:
        firsts: dict[int, int] = {}
        for i, key in enumerate(keys):
            first = firsts.setdefault(key, i)
            if key and first != i and (answers is None or answers[i] != answers[first]):
                yield Again(i, first)
        return
    import numpy as np

    firsts_of = _first_of_each(keys)
    found = firsts_of != np.arange(len(keys), dtype=np.uint32)
    found &= _view(keys) != 0
    if answers is not None:
        numbers = _view(answers)
        for start in range(0, len(keys), _CHUNK):
            stop = start + _CHUNK
            found[start:stop] &= numbers[start:stop] != numbers[firsts_of[start:stop]]
    for start in range(0, len(keys), _CHUNK):
        for i in np.flatnonzero(found[start : start + _CHUNK]).tolist():
            yield Again(start + i, int(firsts_of[start + i]))


def _first_of_each(keys: "array[int]") -> Any:
    """For each index the first index of the same key."""
    import numpy as np

    numbers = _view(keys)
    order = np.argsort(numbers, kind="stable").astype(np.uint32)
    # Equal keys stand side by side and the earliest of them comes first; every other one takes over its leader's place.
    leaders = np.zeros(len(keys), dtype=np.uint32)
    for start in range(1, len(keys), _CHUNK):
        stop = min(start + _CHUNK, len(keys))
        new = numbers[order[start:stop]] != numbers[order[start - 1 : stop - 1]]
        leaders[start:stop] = np.where(new, np.arange(start, stop, dtype=np.uint32), 0)
    np.maximum.accumulate(leaders, out=leaders)
    firsts = np.empty(len(keys), dtype=np.uint32)
    for start in range(0, len(keys), _CHUNK):
        stop = start + _CHUNK
        firsts[order[start:stop]] = order[leaders[start:stop]]
    return firsts


class Known:
    """The rows of another file: whether a row without errors stands in it, however it is written. 8 bytes a line."""

    def __init__(self, found: Fingerprints) -> None:
        """Takes `found` over: it is of no use afterwards."""
        for start in range(0, len(found.prompts), _CHUNK):
            stop = min(start + _CHUNK, len(found.prompts))
            _view(found.prompts)[start:stop] = _contents(found, start, stop)
        self._contents = _view(found.prompts)
        self._contents.sort()

    def common(self, found: Fingerprints) -> Iterator[Again]:
        """The lines of `found` that this file holds too, in order; `first` means nothing."""
        for start in range(0, len(found.prompts), _CHUNK):
            stop = min(start + _CHUNK, len(found.prompts))
            hit = _is_in(_contents(found, start, stop), self._contents)
            yield from (Again(i, i) for i in (hit.nonzero()[0] + start).tolist())


def _contents(found: Fingerprints, start: int, stop: int) -> Any:
    """Prompt and answer as one number; 0 where there is nothing to compare."""
    import numpy as np

    prompts = _view(found.prompts)[start:stop]
    answers = _view(found.answers)[start:stop]
    mixed = prompts * np.uint64(_MIX) ^ answers
    mixed[prompts == 0] = 0
    return mixed


def _is_in(numbers: Any, known: Any) -> Any:
    import numpy as np

    if not len(known):
        return np.zeros(len(numbers), dtype=bool)
    places = np.searchsorted(known, numbers)
    places[places == len(known)] = 0
    return (known[places] == numbers) & (numbers != 0)


def with_offsets(found: Fingerprints, begin: int, rows: Iterable[Again]) -> Iterator[tuple[Again, int]]:
    """Each of `rows` (in order) with the byte offset of its line; `begin` is that of the first line."""
    at = 0
    offset = begin
    for row in rows:
        index = row.line_index
        offset += sum(found.lengths[at:index]) + sum(size for i, size in found.huge.items() if at <= i < index)
        at = index
        yield row, offset
