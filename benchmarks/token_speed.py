"""Speed of turning rows into tokens: `python benchmarks/token_speed.py BASE_FOLDER DATA.jsonl [--megabytes 16]`.

DATA is repeated until it is as large as asked. Prints, in one run: rows and tokens a second with one process and with all
cores (starting them included), their ratio, and the seconds until a trainer has its rows: tokenised and kept, then from the
cache, with the growth of the process's own memory beside the size of what it maps. Run it on a quiet machine; compare
ratios, not figures of different machines. Where neighbours take processors away, the ratio by processor time says more: what
one process takes, over the share of each of several, all starts and joins included.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tunewright.datasets.tokens import packed_rows
from tunewright.datasets.tokens.packed_cache import PackedCache, key_of
from tunewright.datasets.tokens.token_part import Order, write_part
from tunewright.files_on_disk import sha256_of
from tunewright.rendering.renderer import renderer_of

MAX_LINE_BYTES = 4 * 2**20


def repeated(source: Path, target: Path, megabytes: int) -> int:
    """Write `source` as often as it takes; returns the bytes."""
    content = source.read_bytes().rstrip(b"\n") + b"\n"
    times = max(1, megabytes * 10**6 // len(content))
    with target.open("wb") as stream:
        for _ in range(times):
            stream.write(content)
    return times * len(content)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that `work` takes: by the clock, and of processors in this process and those it started."""
    began, used = time.perf_counter(), sum(os.times()[:4])
    work()
    return time.perf_counter() - began, sum(os.times()[:4]) - used


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--megabytes", type=int, default=16)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        data = folder / "rows.jsonl"
        size = repeated(wanted.data, data, wanted.megabytes)
        renderer = renderer_of(wanted.base)
        (folder / "one").mkdir()
        order = Order(data=str(data), start=0, end=size, base=str(wanted.base), max_line_bytes=MAX_LINE_BYTES)
        done = write_part(order, folder / "one")  # also warms the file and the tokenizer
        print(f"{size / 1e6:.1f} MB, {done.rows} rows, {done.tokens} tokens")

        def tokenise(target: Path, processes: int) -> None:
            packed_rows.tokenise(
                data, wanted.base, target, max_line_bytes=MAX_LINE_BYTES, processes=processes, keep_tokens=True
            )

        walls: list[float] = []
        shares: list[float] = []
        for processes in (1, packed_rows.cores()):
            target = folder / f"by-{processes}"
            target.mkdir(exist_ok=True)
            took, used = timed(lambda target=target, processes=processes: tokenise(target, processes))
            walls.append(took)
            shares.append(used / processes)
            print(
                f"{processes} process(es): {took:.2f} s ({used:.2f} s of processors), {done.rows / took:.0f} rows/s, "
                f"{done.tokens / took:.0f} tokens/s, {size / took / 1e6:.2f} MB/s"
            )
        by_clock, by_processors = walls[0] / walls[1], shares[0] / shares[1]
        print(f"all cores / one: {by_clock:.2f}x by the clock, {by_processors:.2f}x by processor time")

        cache = PackedCache(folder / "cache", 2**40)
        key = key_of(sha256_of(data), renderer.hash)
        for word in ("not cached", "cached"):
            before = anonymous_bytes()
            found: list[packed_rows.PackedRows] = []
            took, _ = timed(
                lambda found=found: found.append(
                    cache.use(key, lambda target: tokenise(target, packed_rows.cores()), packed_rows.load)[0]
                )
            )
            tokens = found[0].tokens
            mapped = 0 if tokens is None else tokens.nbytes
            grown = (anonymous_bytes() - before) / 1e6
            print(f"{word}: {took:.3f} s; memory grew by {grown:.1f} MB, {mapped / 1e6:.1f} MB are mapped")


if __name__ == "__main__":
    main()
