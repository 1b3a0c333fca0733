"""How cost grows: `python benchmarks/serve_scaling.py MODEL_FOLDER [--plot docs/serving-speed.svg]`.

The same requests as in serve_speed.py on one core: 1, 2, 4 ... 64 at once to the base and over four adapters, then 64 at once
(or as many as `--at`) over 1, 4, 16 and 64 adapters. Prints a table and draws throughput and time to the first token.
"""

import argparse
import asyncio
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from serve_speed import Figures, load, process_of, run, vocabulary_of, worker_with

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 330, 230, 46, 34, 40
COLOURS = ("#2563eb", "#dc2626")

Curve = list[tuple[int, float]]


def panel(x: int, y: int, title: str, below: str, curves: dict[str, Curve]) -> list[str]:
    """Lines of SVG: powers of two from left to right, values from zero up."""
    wide, high = WIDTH - LEFT - 14, HEIGHT - TOP - BOTTOM
    values = [value for curve in curves.values() for _, value in curve]
    last = max(math.log2(n) for curve in curves.values() for n, _ in curve) or 1
    step = 10 ** math.floor(math.log10(max(values)))
    step = step / 2 if max(values) / step < 3 else step
    top = step * math.ceil(max(values) / step)

    def place(n: float, value: float) -> tuple[float, float]:
        return x + LEFT + wide * math.log2(n) / last, y + TOP + high * (1 - value / top)

    lines = [f'<text x="{x + LEFT}" y="{y + 16}" font-weight="bold">{title}</text>']
    for i in range(round(top / step) + 1):
        _, level = place(1, i * step)
        lines.append(f'<path d="M{x + LEFT} {level:.1f}h{wide}" stroke="#ddd"/>')
        lines.append(f'<text x="{x + LEFT - 6}" y="{level + 4:.1f}" text-anchor="end">{i * step:g}</text>')
    for n in sorted({n for curve in curves.values() for n, _ in curve}):
        across, _ = place(n, 0)
        lines.append(f'<text x="{across:.1f}" y="{y + TOP + high + 16}" text-anchor="middle">{n}</text>')
    middle = x + LEFT + wide / 2
    lines.append(f'<text x="{middle}" y="{y + TOP + high + 33}" text-anchor="middle">{below}</text>')
    for i, (name, curve) in enumerate(curves.items()):
        points = [place(n, value) for n, value in curve]
        path = "M" + "L".join(f"{across:.1f} {level:.1f}" for across, level in points)
        lines.append(f'<path d="{path}" fill="none" stroke="{COLOURS[i]}" stroke-width="2"/>')
        lines += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{COLOURS[i]}"/>' for a, b in points]
        if len(curves) > 1:
            lines.append(f'<text x="{x + LEFT + 8}" y="{y + TOP + 14 + 15 * i}" fill="{COLOURS[i]}">{name}</text>')
    return lines


def picture(base: dict[int, Figures], mixed: dict[int, Figures], spread: dict[int, Figures], at: int) -> str:
    """Four panels as one SVG."""

    def speed(found: dict[int, Figures]) -> Curve:
        return [(n, one.tokens_per_cpu_s) for n, one in found.items()]

    def wait(found: dict[int, Figures]) -> Curve:
        return [(n, one.ttft_ms / 1000) for n, one in found.items()]

    by_requests, by_adapters = "requests at once", f"adapters, {at} requests at once"
    panels = [
        panel(0, 0, "output tokens per CPU-second", by_requests, {"base": speed(base), "4 adapters": speed(mixed)}),
        panel(
            WIDTH, 0, "seconds to the first token (p50)", by_requests, {"base": wait(base), "4 adapters": wait(mixed)}
        ),
        panel(0, HEIGHT, "output tokens per CPU-second", by_adapters, {"": speed(spread)}),
        panel(WIDTH, HEIGHT, "seconds to the first token (p50)", by_adapters, {"": wait(spread)}),
    ]
    body = "\n".join(line for lines in panels for line in lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * HEIGHT}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--most", type=int, default=64)
    parser.add_argument("--at", type=int, default=64, help="requests at once over growing numbers of adapters")
    parser.add_argument("--weights", default="exact", choices=["exact", "int8"])
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    os.sched_setaffinity(0, {given.core})
    numbers = [2**i for i in range(given.most.bit_length())]
    with worker_with(given.model, given.most, threads=1, slots=given.most, weights=given.weights) as (worker, adapters):
        process, vocabulary = process_of(worker), vocabulary_of(given.model)
        load(worker, [])
        load(worker, adapters)

        def one(n: int, count: int) -> Figures:
            found = asyncio.run(run(worker.port, process, vocabulary, n, adapters[:count]))
            print(f"| {n} | {count} | {found.tokens_per_cpu_s:.0f} | {found.ttft_ms / 1000:.2f} |", flush=True)
            return found

        print("| requests | adapters | tokens per CPU-s | TTFT p50 s |\n|---|---|---|---|")
        base = {n: one(n, 0) for n in numbers}
        mixed = {n: one(n, 4) for n in numbers}
        spread = {count: one(given.at, count) for count in numbers[::2]}
    if given.plot:
        given.plot.write_text(picture(base, mixed, spread, given.at), encoding="utf-8")


if __name__ == "__main__":
    main()
