"""Statistics of a data file, collected row by row in bounded memory. Rows with errors are not counted.

Lengths are exact below 2,048 and kept to one part in a thousand above, so that a table of them stays small.
"""

import re
from collections import Counter
from itertools import accumulate, chain
from typing import Any

import msgspec

from tunewright.datasets.checking.row_facts import Facts, Shape
from tunewright.datasets.rules.messages import CHAT
from tunewright.datasets.rules.preferences import PREFERENCE

PERCENTILES = (5, 25, 50, 75, 95, 99)
SAMPLE_ROWS = 5_000
TOP_TOOLS = 50
MAX_BINS = 20
_MAX_NAMES = 10_000
"""Names of tools, and system prompts, that are told apart."""
_EXACT_BITS = 11
_MANY = 8192
_SAMPLE_CHARACTERS = 200
_SAMPLE_MESSAGES = 4
_LIMIT = (1 << 64) - 1
OTHER = "other"
RARE_SHARE = 0.02


_COUNTS = (
    *("rows", "messages", "turns", "characters", "roles", "kinds", "tasks"),
    *("with_system", "with_tools", "with_reasoning", "with_weights", "with_images", "images"),
)


class Lengths(msgspec.Struct):
    """How long things are. `table`: length, rounded down to 11 significant bits -> how many; `waiting` go there later."""

    count: int = 0
    total: int = 0
    smallest: int | None = None
    largest: int = 0
    table: dict[int, int] = {}
    waiting: list[int] = []

    def add(self, values: list[int]) -> None:
        """Count some more."""
        self.waiting += values
        if len(self.waiting) >= _MANY:
            self.settle()

    def settle(self) -> None:
        """Count those that wait: many at once cost little each."""
        values = self.waiting
        if not values:
            return
        self.waiting = []
        self.count += len(values)
        self.total += sum(values)
        least = min(values)
        self.smallest = least if self.smallest is None else min(self.smallest, least)
        self.largest = max(self.largest, max(values))
        for value, number in Counter(values).items():
            shift = max(0, value.bit_length() - _EXACT_BITS)
            _count(self.table, value >> shift << shift, number)

    def absorb(self, other: "Lengths") -> None:
        """Count what another has counted."""
        self.settle()
        other.settle()
        self.count += other.count
        self.total += other.total
        if other.smallest is not None:
            self.smallest = other.smallest if self.smallest is None else min(self.smallest, other.smallest)
        self.largest = max(self.largest, other.largest)
        for value, number in other.table.items():
            _count(self.table, value, number)

    def summary(self) -> dict[str, Any]:
        """`total`, `mean`, `min`, `max`, `p5` to `p99`, `histogram`: [{from, to, count}], each bin twice as wide as the last."""
        self.settle()
        if self.smallest is None:
            return {}
        values = sorted(self.table)
        sums = list(accumulate(self.table[value] for value in values))
        result: dict[str, Any] = {
            "total": self.total,
            "mean": round(self.total / self.count, 1),
            "min": self.smallest,
            "max": self.largest,
        }
        for percentile in PERCENTILES:
            rank = -(-self.count * percentile // 100)
            place = next(i for i, reached in enumerate(sums) if reached >= rank)
            result[f"p{percentile}"] = max(values[place], self.smallest)
        bins: dict[int, int] = {}
        for value in values:
            place = min(max(value.bit_length() - 1, 0), MAX_BINS - 1)
            bins[place] = bins.get(place, 0) + self.table[value]
        result["histogram"] = [
            {
                "from": 0 if place == 0 else 1 << place,
                "to": self.largest if place == max(bins) else (2 << place) - 1,
                "count": bins.get(place, 0),
            }
            for place in range(min(bins), max(bins) + 1)
        ]
        return result


class Statistics(msgspec.Struct):
    """What was counted so far; plain values, so that one process can tell another."""

    rows: int = 0
    messages: int = 0
    turns: int = 0
    characters: int = 0
    roles: dict[str, int] = {}
    kinds: dict[str, int] = {}
    tasks: dict[str, int] = {}
    with_system: int = 0
    with_tools: int = 0
    with_reasoning: int = 0
    with_weights: int = 0
    with_images: int = 0
    images: int = 0
    all_characters: Lengths = msgspec.field(default_factory=Lengths)
    trained_characters: Lengths = msgspec.field(default_factory=Lengths)
    line_bytes: Lengths = msgspec.field(default_factory=Lengths)
    calls: int = 0
    called: dict[str, int] = {}
    system_prompts: dict[int, int] = {}
    """Number of a system prompt -> rows."""
    sample: dict[int, str] = {}
    """Number of a row's bytes -> some of its text, for the rows with the smallest numbers."""
    sample_limit: int = _LIMIT
    """Rows whose number is at most this belong to the sample."""
    languages: dict[int, str] = {}
    """The language of each row of the sample, once `settle` was called."""
    shapes: dict[str, list[Any]] = {}
    """Kind -> shapes of rows that are not counted yet; none once `settle` was called."""

    def add_shapes(self, shapes: list[Shape], kind: str) -> None:
        """Count rows of one kind by the roles of their messages."""
        waiting = self.shapes.setdefault(kind, [])
        waiting += shapes
        if len(waiting) >= _MANY:
            self._settle_shapes()

    def _settle_shapes(self) -> None:
        """Count those that wait: many at once cost little each."""
        for kind, shapes in self.shapes.items():
            self.rows += len(shapes)
            _count(self.kinds, kind, len(shapes))
            for shape, rows in Counter(shapes).items():
                self.messages += shape.size * rows
                self.turns += shape.turns * rows
                self.with_system += shape.has_system * rows
                for role, number in shape.roles.items():
                    _count(self.roles, role, number * rows)
                _count(self.tasks, _task(kind, shape), rows)
        self.shapes = {}

    def add(self, rows: list[Facts]) -> None:
        """Count some rows, but for their lengths and texts."""
        for kind in {facts.kind for facts in rows}:
            shapes = [facts.shape for facts in rows if facts.kind == kind]
            self.add_shapes(shapes, kind)
            if kind == PREFERENCE:
                self.messages += 2 * len(shapes)
                _count(self.roles, "assistant", 2 * len(shapes))
        self.characters += sum([facts.characters for facts in rows])
        self.with_tools += sum([facts.tools != "" for facts in rows])
        self.with_reasoning += sum([facts.reasoning for facts in rows])
        self.with_weights += sum([facts.weights for facts in rows])
        self.with_images += sum([facts.images > 0 for facts in rows])
        self.images += sum([facts.images for facts in rows])
        for name, number in Counter(chain.from_iterable([facts.calls for facts in rows])).items():
            self.calls += number
            if name in self.called or len(self.called) < _MAX_NAMES:
                _count(self.called, name, number)

    def add_lengths(self, characters: list[int], trained: list[int], line_bytes: list[int]) -> None:
        """Count rows by length: characters, those that are trained on, bytes."""
        self.all_characters.add(characters)
        self.trained_characters.add(trained)
        self.line_bytes.add(line_bytes)

    def add_system_prompt(self, key: int) -> None:
        """Count a system prompt, known by a number."""
        if key in self.system_prompts or len(self.system_prompts) < _MAX_NAMES:
            self.system_prompts[key] = self.system_prompts.get(key, 0) + 1

    def add_sample(self, key: int, texts: list[str]) -> None:
        """Take the row of number `key` into the sample."""
        self.sample[key] = "\n".join(text[:_SAMPLE_CHARACTERS] for text in texts[-_SAMPLE_MESSAGES:])
        if len(self.sample) >= 2 * SAMPLE_ROWS:
            self.sample = _smallest(self.sample)
            self.sample_limit = max(self.sample)

    def settle(self) -> None:
        """Do what was put off: shapes, lengths, and the languages of the sample."""
        self._settle_shapes()
        for key, text in _smallest(self.sample).items():
            self.languages[key] = language_of(text)
        self.sample = {}
        for lengths in (self.all_characters, self.trained_characters, self.line_bytes):
            lengths.settle()
        self.languages = _smallest(self.languages)

    def absorb(self, other: "Statistics") -> None:
        """Add what was counted of another part of the file, and settled."""
        self._settle_shapes()
        for name in self.__struct_fields__:
            mine, more = getattr(self, name), getattr(other, name)
            if isinstance(mine, Lengths):
                mine.absorb(more)
            elif name in ("sample", "languages"):
                mine |= more
            elif isinstance(mine, dict):
                for key, number in more.items():
                    _count(mine, key, number)
            elif name != "sample_limit":
                setattr(self, name, mine + more)

    def result(self) -> dict[str, Any]:
        """All of it for a person: plain values that JSON can hold."""
        self.settle()
        counts = {name: getattr(self, name) for name in _COUNTS}
        if not self.line_bytes.count:
            return counts
        languages = Counter(self.languages.values())
        top = sorted(self.called.items(), key=lambda item: (-item[1], item[0]))[:TOP_TOOLS]
        most = max(self.system_prompts.values(), default=0)
        return counts | {
            "characters_per_row": self.all_characters.summary(),
            "trained_characters_per_row": self.trained_characters.summary(),
            "bytes_per_row": self.line_bytes.summary(),
            "tools": {"calls": self.calls, "distinct": len(self.called), "top": dict(top)},
            "system_prompts": {
                "distinct": len(self.system_prompts),
                "largest_share": round(most / self.with_system, 4) if self.with_system else 0.0,
            },
            "languages": {
                "sampled": len(self.languages),
                "shares": {name: round(rows / len(self.languages), 4) for name, rows in languages.most_common()},
            },
        }

    def rare_groups(self) -> list[tuple[str, float]]:
        """(task or language, its share) where a group is so small beside the others that it will hardly be learned.

        Of the tasks and of the languages the smallest group each, if it is below `RARE_SHARE`.
        """
        found = []
        self.settle()
        languages = Counter(name for name in self.languages.values() if name != OTHER)
        for groups in (self.tasks, languages):
            total = sum(groups.values())
            name, rows = min(groups.items(), key=lambda item: (item[1], item[0]), default=("", 0))
            if rows and rows < RARE_SHARE * total:
                found.append((name, rows / total))
        return found


def _smallest(sample: dict[int, str]) -> dict[int, str]:
    """A sample that depends neither on the order of the rows nor on how a file is split."""
    return sample if len(sample) <= SAMPLE_ROWS else {key: sample[key] for key in sorted(sample)[:SAMPLE_ROWS]}


def _count(table: dict[Any, int], key: Any, number: int) -> None:
    table[key] = table.get(key, 0) + number


def _task(kind: str, shape: Shape) -> str:
    """What a row practises: `single_turn` or `multi_turn` chat, else its kind."""
    if kind != CHAT:
        return kind
    return "single_turn" if shape.turns <= 1 else "multi_turn"


# None overlaps another. What is frequent comes first, so that little is left for the others to go through.
_SCRIPTS = {
    "zh": re.compile("[\u4e00-\u9fff]+"),
    "latin": re.compile("[A-Za-z\u00c0-\u024f]+"),
    "ja": re.compile("[\u3040-\u30ff]+"),
    "ko": re.compile("[\uac00-\ud7af]+"),
    "ru": re.compile("[\u0400-\u04ff]+"),
    "ar": re.compile("[\u0600-\u06ff]+"),
}
_ENGLISH = frozenset(
    (
        *("the", "and", "of", "to", "is", "are", "in", "you", "it", "that", "for", "with", "this", "what", "how"),
        *("please", "an", "be", "can", "i"),
    )
)
_BREAKS = str.maketrans({chr(byte): " " for byte in range(128) if not (chr(byte).isalnum() or chr(byte) == "_")})
_LATIN = _SCRIPTS["latin"]
_LATIN_BEYOND_ASCII = re.compile("[\u00c0-\u024f]")


def language_of(text: str) -> str:
    """`zh`, `en`, `ja`, `ko`, `ru`, `ar` or `other`: a guess from scripts and, for Latin letters, common words."""
    if text.isascii():
        return _latin(text) if _LATIN.search(text) else OTHER
    counts: dict[str, int] = {}
    rest = text
    for name, pattern in _SCRIPTS.items():
        left = pattern.sub("", rest)
        counts[name] = len(rest) - len(left)
        rest = left
    # A Chinese character says about as much as two or three letters; Japanese is written with both.
    counts["zh"] *= 3
    counts["ko"] *= 2
    if counts["ja"]:
        counts["ja"] = counts["ja"] * 3 + counts["zh"] if counts["ja"] * 10 > counts["zh"] / 3 else 0
    name = max(counts, key=counts.__getitem__)
    if not counts[name]:
        return OTHER
    if name != "latin":
        return name
    return OTHER if len(_LATIN_BEYOND_ASCII.findall(text)) * 50 > counts["latin"] else _latin(text)


def _latin(text: str) -> str:
    words = len(text.split())
    if words < 5:
        return "en"
    common = sum(map(_ENGLISH.__contains__, text.lower().translate(_BREAKS).split()))
    return "en" if common * 25 >= words else OTHER
