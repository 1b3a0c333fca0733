"""The pass over the lines of a data file or a stretch of it: a line that is beyond doubt is read fast, any other exactly."""

from bisect import bisect_left
from collections.abc import Callable
from typing import BinaryIO, Protocol

import msgspec

from tunewright.datasets.checking import fast_rows, fingerprints, quick_look
from tunewright.datasets.checking.block_marks import BlockMarks
from tunewright.datasets.checking.line_check import check_line, without_return
from tunewright.datasets.checking.row_facts import Facts, facts_of
from tunewright.datasets.checking.statistics import Statistics
from tunewright.datasets.lines import Block, read_blocks
from tunewright.datasets.records import FINE_TUNE_PURPOSES
from tunewright.datasets.report import Reporter, Row
from tunewright.datasets.rules import hints
from tunewright.datasets.rules.messages import CHAT, FUNCTION, IMAGE_UNDERSTANDING
from tunewright.i18n import mark

MAX_ROWS = 5_000_000
BLOCKS_FROM_BYTES = 4 << 20
"""Smaller stretches are read line by line: decoding whole blocks needs numpy, which takes a while to load."""
_PROGRESS_BYTES = 8 << 20
_PLAIN_AGAIN = 16
"""After a block that is not plain so many others are not tried as plain."""
_MIXED = ({CHAT, FUNCTION}, {CHAT, IMAGE_UNDERSTANDING})

Progress = Callable[[int], None]
"""Is told how many bytes are done; may raise to end the pass."""


class Limits(Protocol):
    """What the check reads of the settings."""

    @property
    def max_line_bytes(self) -> int: ...
    @property
    def min_training_rows(self) -> int: ...


class Depth(msgspec.Struct, frozen=True):
    """How much is looked at. `texts`: what is odd in texts; `compare`: numbers to find repeated rows."""

    texts: bool = True
    compare: bool = True
    statistics: bool = True


def agreed_kind(before: str | None, kind: str) -> str | None:
    """The kind of a file with rows of both kinds, or None if they can't stand in one file.

    Rows without tools may stand among function rows, text rows among image questions.
    """
    if before is None or before == kind:
        return kind
    if {before, kind} in _MIXED:
        return kind if before == CHAT else before
    return None


class Scan:
    """What a pass collects: problems go to the reporter, the rest is here."""

    def __init__(
        self,
        reporter: Reporter,
        purpose: str,
        limits: Limits,
        depth: Depth | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        """`statistics`: those of other parts of the file, to be continued."""
        self.reporter = reporter
        self.training = purpose in FINE_TUNE_PURPOSES
        self.limits = limits
        self.depth = depth = depth or Depth()
        self.kind: str | None = None
        self.mixed = False
        """Whether rows stood side by side whose kinds do not go together."""
        self.lines = 0
        self.rows = 0
        self.overfull = False
        self.statistics = statistics or Statistics()
        self.fingerprints = fingerprints.Fingerprints()
        self._compare = depth.compare and self.training
        self._marks = BlockMarks()
        self._not_plain = 0

    def read(self, stream: BinaryIO, end: int, progress: Progress | None = None) -> None:
        """Check every line from where `stream` stands to the byte `end`, the end of a line or of the file."""
        begin = told = stream.tell()
        in_blocks = self.training and end - begin >= BLOCKS_FROM_BYTES
        for block in read_blocks(stream, end, self.limits.max_line_bytes):
            self._read_block(block, in_blocks)
            if self.overfull:
                return
            done = block.byte_offset + block.size
            if progress is not None and done - told >= _PROGRESS_BYTES:
                told = done
                progress(done - begin)

    def _read_block(self, block: Block, in_blocks: bool) -> None:
        offset, data, size = block
        if data is None:
            self._read_long_line(offset, size)
            return
        if in_blocks and len(data) <= self.limits.max_line_bytes and self._read_whole(data, offset):
            return
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        for line in lines:
            if not self._room():
                return
            self._read_line(line, offset)
            offset += len(line) + 1

    def _room(self) -> bool:
        """Count a line, if it is not one too many."""
        if self.lines >= MAX_ROWS:
            sentence = mark("The file has more than {limit} lines.")
            self.reporter.add("error", "too_many_examples", sentence, limit=MAX_ROWS)
            self.overfull = True
            return False
        self.lines += 1
        return True

    def _read_long_line(self, offset: int, size: int) -> None:
        if self._room():
            self.rows += 1
            row = Row(self.reporter, self.lines, offset)
            self._refuse_length(row)
            self._note(0, 0, 0, size)

    def _refuse_length(self, row: Row) -> None:
        sentence = mark("line {line} is longer than {limit} bytes")
        row.error("line_too_long", sentence, (), limit=self.limits.max_line_bytes)

    # --- whole blocks ------------------------------------------------------------------------------------------------

    def _read_whole(self, data: bytes, offset: int) -> bool:
        """Read all lines of a block at once; False if it needs a look line by line."""
        marks = self._marks.of(data)
        if marks is None or self.lines + len(marks.ends) > MAX_ROWS:
            return False
        odd = self._odd_lines(data, marks.ends)
        if self._not_plain <= 0:
            plain = fast_rows.plain_rows(data, len(marks.ends), marks.quotes)
            if plain is not None and agreed_kind(self.kind, CHAT):
                self._take_plain(data, offset, marks.ends, plain, odd)
                return True
            if plain is None:
                self._not_plain = _PLAIN_AGAIN
        self._not_plain -= 1
        found = fast_rows.rich_rows(data, len(marks.ends), marks.quotes)
        if found is None:
            return False
        self._take_rich(data, offset, marks.ends, found, set(odd))
        return True

    def _look_needed(self, data: bytes) -> bool:
        return self.depth.texts and hints.may_need_look(data)

    def _odd_lines(self, data: bytes, ends: list[int]) -> list[int]:
        """Indices of the lines whose texts are worth a look, rising."""
        if not self.depth.texts:
            return []
        return [bisect_left(ends, place) for place in quick_look.suspects(data)]

    def _take_plain(
        self, data: bytes, offset: int, ends: list[int], plain: fast_rows.PlainRows, odd: list[int]
    ) -> None:
        """Count and compare rows of roles and contents; those that are odd are checked exactly, in their place."""
        self.kind = agreed_kind(self.kind, CHAT)
        if not self._compare:
            self.lines += len(ends)
            self.rows += len(ends)
            if self.depth.statistics:
                self.statistics.add_shapes(plain.shapes, CHAT)
                self.statistics.characters += sum(map(len, plain.contents))
            return
        rows = _PlainColumns(data, ends, plain)
        for i in odd:
            self._look_closely(rows.line(i), offset + rows.starts[i], self.lines + 1 + i)
        self._take_columns(rows)

    def _take_rich(self, data: bytes, offset: int, ends: list[int], found: list[Facts | None], odd: set[int]) -> None:
        """Count and compare all rows of a block; those in doubt, and those that are odd, are checked exactly in their place."""
        lines: list[bytes] = []
        clean: list[Facts] = []
        start = 0
        for i, (end, facts) in enumerate(zip(ends, found, strict=True)):
            line = data[start:end]
            if facts is not None and (facts.kind == self.kind or agreed_kind(self.kind, facts.kind)):
                self.kind = agreed_kind(self.kind, facts.kind)
                lines.append(line)
                clean.append(facts)
                if i in odd:
                    self._look_closely(line, offset + start, self.lines + len(clean))
            else:
                self._take_facts(lines, clean)
                lines, clean = [], []
                self.lines += 1
                self._read_line(line, offset + start, doubted=True)
            start = end + 1
        self._take_facts(lines, clean)

    def _look_closely(self, line: bytes, offset: int, number: int) -> None:
        """Warn of the texts of a row that is beyond doubt otherwise."""
        hints.look_closely(Row(self.reporter, number, offset), line, msgspec.json.decode(line))

    def _take_columns(self, rows: "_PlainColumns") -> None:
        """Count and compare the rows."""
        shapes, texts, sizes, keys = rows.shapes, rows.texts, rows.sizes, rows.keys
        self.lines += len(keys)
        self.rows += len(keys)
        self.fingerprints.add_plain(keys, shapes, texts, sizes)
        if not self.depth.statistics:
            return
        statistics = self.statistics
        statistics.add_shapes(shapes, CHAT)
        characters = [sum(map(len, each)) for each in texts]
        trained = [
            len(each[-1]) if shape.single else sum(len(each[i]) for i in shape.answers)
            for shape, each in zip(shapes, texts, strict=True)
        ]
        statistics.characters += sum(characters)
        statistics.add_lengths(characters, trained, [size - 1 for size in sizes])
        limit = statistics.sample_limit
        for shape, each, key in zip(shapes, texts, keys, strict=True):
            if shape.has_system:
                statistics.add_system_prompt(fingerprints.row_key(each[0].encode()))
            if key <= limit:
                statistics.add_sample(key, each)

    # --- single lines ------------------------------------------------------------------------------------------------

    def _read_line(self, data: bytes, offset: int, *, doubted: bool = False) -> None:
        """One line; `doubted` if only the exact check can help."""
        row = Row(self.reporter, self.lines, offset)
        length = len(data) + 1
        if len(data) > self.limits.max_line_bytes:
            self.rows += 1
            self._refuse_length(row)
            self._note(0, 0, 0, length)
            return
        errors = self.reporter.errors
        facts: Facts | None = None
        sound = True
        if self.training and not doubted and not self._look_needed(data):
            facts = fast_rows.one_row(data.removesuffix(b"\r"))
            if facts is not None:
                data = without_return(row, data)
        if facts is None:
            checked = check_line(row, data, training=self.training, texts=self.depth.texts)
            data = data.removesuffix(b"\r")
            if checked.blank:
                self._note(0, 0, 0, length)
                return
            sound = checked.value is not None
            if checked.kind is not None:
                self._agree(row, checked.kind)
                if self.reporter.errors == errors and checked.value is not None:
                    facts = facts_of(checked.value, checked.kind)
        else:
            self._agree(row, facts.kind)
        self.rows += 1
        key = fingerprints.row_key(data) if self._compare and sound else 0
        self._take(key, data, facts if self.reporter.errors == errors else None, length)

    def _agree(self, row: Row, kind: str) -> None:
        """One file, one kind."""
        agreed = agreed_kind(self.kind, kind)
        if agreed is None:
            self.mixed = True
            sentence = mark(
                "line {line} is a row of kind {found}, the lines before are {expected}; use one file for each"
            )
            row.error("wrong_format", sentence, (), found=kind, expected=self.kind)
        else:
            self.kind = agreed

    def _take(self, key: int, data: bytes, facts: Facts | None, length: int) -> None:
        """Count and compare a row; `facts` are None if it has errors, `key` is 0 if it is no object."""
        if facts is None:
            self._note(key, 0, 0, length)
            return
        if self._compare:
            self._note(key, *fingerprints.keys_of(facts), length)
        if self.depth.statistics:
            self.statistics.add([facts])
            if self._compare:
                self._measure([len(data)], [facts], [key])

    def _take_facts(self, lines: list[bytes], found: list[Facts]) -> None:
        """Count and compare rows without problems, with their lines, whose kinds agree."""
        self.lines += len(found)
        self.rows += len(found)
        sizes = list(map(len, lines))
        keys = list(map(fingerprints.row_key, lines)) if self._compare else []
        if self._compare:
            self.fingerprints.add_rows(keys, found, [size + 1 for size in sizes])
        if self.depth.statistics:
            self.statistics.add(found)
            if self._compare:
                self._measure(sizes, found, keys)

    def _measure(self, sizes: list[int], found: list[Facts], keys: list[int]) -> None:
        """What takes a look at lengths and texts."""
        statistics = self.statistics
        statistics.add_lengths([facts.characters for facts in found], [facts.trained for facts in found], sizes)
        limit = statistics.sample_limit
        for key, facts in zip(keys, found, strict=True):
            if facts.shape.has_system:
                statistics.add_system_prompt(fingerprints.row_key(facts.texts[0].encode()))
            if key <= limit:
                statistics.add_sample(key, [*facts.texts, facts.answer] if facts.pair else facts.texts)

    def _note(self, row: int, prompt: int, answer: int, length: int) -> None:
        if self._compare:
            self.fingerprints.add(row, prompt, answer, length)


class _PlainColumns:
    """A block of plain rows, with the contents and the number of each row."""

    def __init__(self, data: bytes, ends: list[int], plain: fast_rows.PlainRows) -> None:
        self.data = data
        self.ends = ends
        self.shapes = plain.shapes
        self.starts = [0, *(end + 1 for end in ends[:-1])]
        self.sizes = [end + 1 - start for start, end in zip(self.starts, ends, strict=True)]
        self.keys = [fingerprints.row_key(data[start:end]) for start, end in zip(self.starts, ends, strict=True)]
        self.texts: list[list[str]] = []
        at = 0
        for shape in plain.shapes:
            self.texts.append(plain.contents[at : at + shape.size])
            at += shape.size

    def line(self, i: int) -> bytes:
        """The bytes of row `i`."""
        return self.data[self.starts[i] : self.ends[i]]
