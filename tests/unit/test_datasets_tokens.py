"""Token counts, previews, estimates and the cache of tokenised files, on a real tiny tokenizer."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.tiny_models import tiny_tokenizer
from tunewright.datasets.rows import conversation_of
from tunewright.datasets.tokens import packed_rows
from tunewright.datasets.tokens.estimates import estimate
from tunewright.datasets.tokens.examples import examples_of
from tunewright.datasets.tokens.packed_cache import MANIFEST, PackedCache, key_of
from tunewright.datasets.tokens.preview import preview
from tunewright.datasets.tokens.token_counts import TokenStatistics, count_tokens, spread
from tunewright.errors import InvalidRequest
from tunewright.rendering.renderer import renderer_of

MIB = 2**20
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("base") / "tiny")


def chat(question: Any, answer: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", "utf-8")
    return path


def counted(path: Path, base: Path, max_length: int = 64, **options: Any) -> TokenStatistics:
    return count_tokens(path, base, max_length=max_length, max_line_bytes=MIB, processes=1, **options)


def test_counts_are_those_of_the_renderer(tmp_path: Path, base: Path) -> None:
    rows = [chat(f"number {n}" * n, "yes no " * n) for n in range(1, 15)]
    found = counted(write(tmp_path / "rows.jsonl", rows), base, max_length=10_000)
    examples = [renderer_of(base).example(conversation_of(row)) for row in rows]
    lengths = [len(example.tokens) for example in examples]
    assert (found.rows, found.tokens.total, found.tokens_per_epoch) == (14, sum(lengths), sum(lengths))
    assert (found.tokens.min, found.tokens.max) == (min(lengths), max(lengths))
    assert found.tokens.p50 in lengths
    assert found.trained_per_epoch == sum(sum(example.trained) for example in examples)
    assert found.cut.rows == found.nothing_to_train.rows == found.refused.rows == 0
    assert found.problems == []


def test_a_bad_row_that_no_template_can_take_is_refused_for_what_is_wrong_with_it(tmp_path: Path, base: Path) -> None:
    """Arguments that are an object instead of a text passed every reader and ended the count, and the trainer, by a crash."""
    calls = [{"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    asked = {"role": "user", "content": "1 + 2?"}
    bad = {"messages": [asked, {"role": "assistant", "tool_calls": calls}]}
    found = counted(write(tmp_path / "rows.jsonl", [bad, chat("Hi", "Ho")]), base)
    assert (found.rows, found.refused.lines) == (1, [1])
    assert [(problem.line, problem.code) for problem in found.problems] == [(1, "invalid_tool_call")]


def test_rows_over_the_limit_are_counted_and_named(tmp_path: Path, base: Path) -> None:
    """Cut rows are warned of; a row whose answer is cut away whole is an error."""
    rows = [chat("hello", "yes"), chat("hello", "one two three " * 40), chat("hello " * 90, "no")]
    path = write(tmp_path / "rows.jsonl", rows)
    whole, found = counted(path, base, 1000), counted(path, base, 60)
    lengths = [len(renderer_of(base).example(conversation_of(row)).tokens) for row in rows]
    assert found.tokens == whole.tokens  # of whole rows
    assert (found.cut.rows, found.cut.lines, found.cut.tokens) == (1, [2], lengths[1] - 60)
    assert (found.nothing_to_train.rows, found.nothing_to_train.lines) == (1, [3])
    assert found.tokens_per_epoch == lengths[0] + 60
    assert found.counts == {"example_too_long": 1, "nothing_to_train": 1}
    assert [(p.code, p.severity, p.line) for p in found.problems] == [
        ("nothing_to_train", "error", 3),
        ("example_too_long", "warning", 2),
    ]
    assert str(lengths[1]) in found.problems[1].text() and "60" in found.problems[1].text("zh")


def test_rows_that_can_not_be_rendered_are_counted_not_fatal(tmp_path: Path, base: Path) -> None:
    rows = ["{broken", chat("hello", "yes"), "", "[1]", chat("hello", "x" * MIB), chat("again", "no")]
    found = counted(write(tmp_path / "rows.jsonl", rows), base)
    assert (found.rows, found.refused.rows, found.refused.lines) == (2, 3, [1, 4, 5])
    assert {p.line: p.code for p in found.problems} == {1: "invalid_json", 4: "wrong_format", 5: "line_too_long"}


def test_all_cores_count_the_same(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte ranges by several processes: same rows, same lines, same tokens, blank and broken lines included."""
    monkeypatch.setattr(packed_rows, "LEAST_PART_BYTES", 4096)
    rows = [chat(f"Who is number {n}?", "yes " * (n % 40)) if n % 17 else ("" if n % 2 else "{") for n in range(300)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + write(path, rows).read_bytes())
    folders = [tmp_path / "one", tmp_path / "three"]
    seen: list[tuple[int, int]] = []
    for folder, processes in zip(folders, (1, 3), strict=True):
        folder.mkdir()
        packed_rows.tokenise(
            path, base, folder, max_line_bytes=MIB, processes=processes, progress=lambda *done: seen.append(done)
        )
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == ["refused.json", "rows.npy", "spans.npy", "tokens.npy"]
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    one = packed_rows.load(folders[1])
    assert one.refused.tolist() == [n + 1 for n in range(300) if n % 17 == 0 and n % 2 == 0]
    assert [cause.values["line"] for cause in one.causes if "line" in cause.values] == [
        cause.line for cause in one.causes if "line" in cause.values
    ]
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)


def test_counting_ends_when_it_is_told_to(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Enough(Exception):
        pass

    def stop() -> None:
        raise Enough

    monkeypatch.setattr(packed_rows, "LEAST_PART_BYTES", 4096)
    path = write(tmp_path / "rows.jsonl", [chat(f"number {n}", "yes") for n in range(300)])
    cache = PackedCache(tmp_path / "cache", MIB)
    for processes in (1, 2):
        with pytest.raises(Enough):
            count_tokens(
                path,
                base,
                max_length=64,
                max_line_bytes=MIB,
                processes=processes,
                between_rows=stop,
                cache=cache,
                data_sha256="ab" * 32,
            )
    assert [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")] == []


def test_a_part_does_not_outlive_who_ordered_it(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from tunewright.datasets.tokens.token_part import *; end_with_stdin(); threading.Event().wait()",
        ],
        stdin=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 1


PREFERENCE = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ],
    "preferred_output": [{"role": "assistant", "content": "yes"}],
    "non_preferred_completion": [{"role": "assistant", "content": "no no"}],
}


@pytest.mark.parametrize("nested", [False, True])
def test_preference_rows_have_two_sides(tmp_path: Path, base: Path, nested: bool) -> None:
    row: dict[str, Any] = dict(PREFERENCE)
    if nested:
        row = {"input": {"messages": row.pop("messages")}, **row}
    found = examples_of(row)
    assert found.sides == ("preferred", "non_preferred")
    assert [[m.content for m in c.messages if m.trained and m.role == "assistant"] for c in found.conversations] == [
        ["yes"],
        ["no no"],
    ]
    statistics = counted(write(tmp_path / "rows.jsonl", [row, row]), base)
    lengths = [len(renderer_of(base).example(c).tokens) for c in found.conversations]
    assert (statistics.rows, statistics.tokens.max) == (2, sum(lengths))


def test_images_are_counted_and_left_out(tmp_path: Path, base: Path) -> None:
    asked = [{"type": "text", "text": "What is"}, IMAGE, {"type": "text", "text": " this?"}, IMAGE]
    found = counted(write(tmp_path / "rows.jsonl", [chat(asked, "yes"), chat("hello", "no")]), base)
    plain = counted(write(tmp_path / "plain.jsonl", [chat("What is this?", "yes"), chat("hello", "no")]), base)
    assert (found.images, found.tokens) == (2, plain.tokens)
    assert examples_of(chat("a cat", [IMAGE])).images == 1


def test_the_spread_of_numbers() -> None:
    found = spread(np.arange(101))
    assert (found.total, found.mean, found.min, found.max) == (5050, 50.0, 0, 100)
    assert (found.p5, found.p25, found.p50, found.p75, found.p95, found.p99) == (5, 25, 50, 75, 95, 99)
    assert sum(each.rows for each in found.histogram) == 101
    assert [each.below for each in found.histogram[:-1]] == [each.least for each in found.histogram[1:]]
    assert found.histogram[0].rows == 16 and found.histogram[-1].below > 100
    assert spread(np.zeros(0, np.int64)).histogram == []


@pytest.mark.parametrize(
    ("kind", "per_image", "each"),
    [("chat", 1600, 100), ("image_generation", 1600, 3 * 1024), ("image_understanding", 2304, 3 * 2304 + 100)],
)
def test_the_guides_formulas(tmp_path: Path, base: Path, kind: str, per_image: int, each: int) -> None:
    tokens = counted(write(tmp_path / "rows.jsonl", [chat("hello", "yes")]), base)
    tokens = msgspec.structs.replace(tokens, images=3, tokens_per_epoch=100)
    found = estimate(
        kind, tokens, n_epochs=4, tokens_per_image=per_image, price_per_million_tokens=50.0, speeds=[10.0, 40.0]
    )
    assert (found.tokens_per_epoch, found.trained_tokens) == (each, 4 * each)
    assert found.price == pytest.approx(4 * each * 50 / 1e6)
    assert found.seconds == (round(each / 10), round(4 * each / 10))
    unknown = estimate(kind, tokens, n_epochs=1, tokens_per_image=per_image, price_per_million_tokens=None, speeds=[])
    assert unknown.price is None and unknown.seconds is None


def test_a_preview_shows_every_token_and_which_are_trained(base: Path) -> None:
    row = chat("你好，龘", "I am 龘 & <|im_end|>")
    (shown,) = preview(json.dumps(row).encode(), 1, renderer_of(base), 1000)
    example = renderer_of(base).example(conversation_of(row))
    assert [token.id for token in shown.tokens] == example.tokens
    assert [token.trained for token in shown.tokens] == example.trained
    assert (shown.n_tokens, shown.n_trained, shown.cut_at) == (len(example.tokens), sum(example.trained), None)
    assert shown.text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n你好，龘<|im_end|>\n<|im_start|>assistant\nI am 龘 & <|im_end|><|im_end|>\n"
    )
    # A character of three tokens stands at the first one.
    place = next(n for n, token in enumerate(shown.tokens) if token.text == "龘")
    assert [token.text for token in shown.tokens[place + 1 : place + 3]] == [None, None]
    trained = "".join(token.text or "" for token in shown.tokens if token.trained)
    assert trained == "I am 龘 & <|im_end|><|im_end|>"


def test_a_preview_says_where_a_row_is_cut(base: Path) -> None:
    data = json.dumps(chat("hello", "one two three " * 20)).encode()
    (whole,), (shown,) = preview(data, 1, renderer_of(base), 1000), preview(data, 1, renderer_of(base), 50)
    assert (shown.n_tokens, shown.cut_at) == (whole.n_tokens, 50)
    assert not any(token.trained for token in shown.tokens[50:])
    assert [token.trained for token in shown.tokens[:50]] == [token.trained for token in whole.tokens[:50]]
    assert shown.n_trained == sum(token.trained for token in shown.tokens) > 0


def test_a_preview_of_both_answers(base: Path) -> None:
    found = preview(json.dumps(PREFERENCE).encode(), 1, renderer_of(base), 1000)
    assert [example.side for example in found] == ["preferred", "non_preferred"]
    assert ["".join(t.text or "" for t in example.tokens if t.trained) for example in found] == [
        "yes<|im_end|>",
        "no no<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ("{broken", "invalid_json"),
        ("[1]", "wrong_format"),
        ('{"prompt": "a"}', "wrong_format"),
        (json.dumps({"messages": [{"role": "robot", "content": "x"}]}), "invalid_role"),
        (json.dumps({"messages": [{"role": "user", "content": "x"}]}), None),
    ],
)
def test_a_wrong_row_has_no_preview_but_its_problem(base: Path, row: str, code: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        preview(row.encode(), 7, renderer_of(base), 1000)
    assert code in (None, caught.value.code)
    assert caught.value.text() and caught.value.text("zh")


# --- the cache ---


class Made:
    """Makes entries of one file and counts how often."""

    def __init__(self, size: int = 1000) -> None:
        self.times = 0
        self.size = size

    def __call__(self, folder: Path) -> None:
        self.times += 1
        (folder / "data").write_bytes(bytes(self.size))


def read(folder: Path) -> bytes:
    return (folder / "data").read_bytes()


def test_an_entry_is_made_once_and_checked_each_time(tmp_path: Path) -> None:
    cache, made = PackedCache(tmp_path, MIB), Made()
    key = key_of("ab" * 32, "r")
    assert [cache.use(key, made, read)[1] for _ in range(3)] == [False, True, True]
    assert made.times == 1
    (tmp_path / key / "data").write_bytes(b"\1" + bytes(999))
    assert cache.use(key, made, read) == (bytes(1000), False)
    (tmp_path / key / "data").unlink()
    assert cache.use(key, made, read) == (bytes(1000), False)
    (tmp_path / key / MANIFEST).write_bytes(b"{")
    assert cache.use(key, made, read) == (bytes(1000), False)
    assert made.times == 4


def test_keys_tell_apart_all_that_decides_the_tokens() -> None:
    assert len({key_of("ab" * 32, "r"), key_of("ab" * 32, "s"), key_of("cd" * 32, "r")}) == 3


def test_the_cache_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache, made = PackedCache(tmp_path, 3500), Made()
    keys = [key_of(f"{n}" * 64, "r") for n in range(4)]
    for n, key in enumerate(keys[:3]):
        cache.use(key, made, read)
        os.utime(tmp_path / key, (n, n))
    cache.use(keys[0], made, read)  # the oldest is used again
    cache.use(keys[3], made, read)
    assert [(tmp_path / key).exists() for key in keys] == [True, False, True, True]
    assert not (tmp_path / f"{keys[1]}.lock").exists()
    large = Made(5000)
    assert cache.use(keys[1], large, read) == (bytes(5000), False)  # larger than the cache: used, not kept
    assert not (tmp_path / keys[1]).exists()


def test_an_entry_of_a_dead_maker_is_swept(tmp_path: Path) -> None:
    cache = PackedCache(tmp_path, MIB)
    left = tmp_path / f".{key_of('1' * 64, 'r')}"
    left.mkdir()
    cache.use(key_of("2" * 64, "r"), Made(), read)
    assert not left.exists()


def test_what_another_process_works_on_stays(tmp_path: Path) -> None:
    cache, key = PackedCache(tmp_path, MIB), key_of("1" * 64, "r")
    cache.use(key, Made(), read)
    with (tmp_path / f"{key}.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.evict(0)
        cache.forget("1" * 64)
        assert (tmp_path / key).exists()
    cache.forget("2" * 64)
    assert (tmp_path / key).exists()
    cache.forget("1" * 64)
    assert not (tmp_path / key).exists()


def test_several_at_once_make_an_entry_once(tmp_path: Path) -> None:
    key, made, begun, go_on = key_of("1" * 64, "r"), Made(), threading.Event(), threading.Event()
    found: list[tuple[bytes, bool]] = []

    def make(folder: Path) -> None:
        begun.set()
        assert go_on.wait(60)
        made(folder)

    threads = [
        threading.Thread(target=lambda: found.append(PackedCache(tmp_path, MIB).use(key, make, read, go_on.set)))
        for _ in range(3)
    ]
    threads[0].start()
    assert begun.wait(60)
    for thread in threads[1:]:
        thread.start()  # these wait for the lock, and tell so
    for thread in threads:
        thread.join()
    assert made.times == 1
    assert sorted(cached for _, cached in found) == [False, True, True]


def test_who_waits_for_an_entry_can_be_called_off(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop() -> None:
        raise Enough

    key = key_of("1" * 64, "r")
    with (tmp_path / f"{key}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Enough):
            PackedCache(tmp_path, MIB).use(key, Made(), read, stop)


def test_a_full_disk_makes_room_once(tmp_path: Path) -> None:
    cache, made = PackedCache(tmp_path, MIB), Made()
    old, new = key_of("1" * 64, "r"), key_of("2" * 64, "r")
    cache.use(old, made, read)

    def make(folder: Path) -> None:
        if (tmp_path / old).exists():
            raise OSError(28, "No space left on device")
        made(folder)

    assert cache.use(new, make, read) == (bytes(1000), False)

    def never(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        cache.use(old, never, read)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []
