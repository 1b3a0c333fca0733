"""Ids are sortable and every character of their random part is as likely as any other."""

import re
from collections import Counter

from tunewright.ids import new_id, random_text


def test_an_id() -> None:
    ids = [new_id("req") for _ in range(100)]
    assert all(re.fullmatch(r"req-[0-9]{17}-[0-9a-z]{20}", one) for one in ids)
    assert len(set(ids)) == 100
    assert [one[:21] for one in ids] == sorted(one[:21] for one in ids)


def test_random_text_is_even() -> None:
    counts = Counter(random_text(36_000))
    assert len(counts) == 36
    assert all(800 < count < 1200 for count in counts.values()), "six sigma"
    assert [len(random_text(length)) for length in (0, 1, 20, 333)] == [0, 1, 20, 333]
