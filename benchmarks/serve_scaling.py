"""How cost grows: `python benchmarks/serve_scaling.py MODEL_FOLDER [--plot docs/serving-speed.svg --machine "one core of ..."]`.

Prompts of 32 tokens and 32 new ones, greedy, everything on one core: 1, 2, 4 ... 64 requests at once to the base and over four
adapters, then 64 at once over 1, 2, 4 ... 64 adapters of rank 16. Prints a table and draws throughput and time to the first
token. Takes six minutes or so on a core that multiplies at 50 GFLOP/s.
"""

import argparse
import asyncio
import math
import os
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from serve_speed import Figures, load, process_of, run, vocabulary_of, worker_with

PROMPT_TOKENS, NEW_TOKENS, SOME = 32, 32, 4
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 380, 250, 52, 40, 42
CAPTION = 26
STYLE = """text{fill:#1f2937;font:12px sans-serif}.paper{fill:#fff}.grid{stroke:#d1d5db}.title{font-weight:bold}
path.a{stroke:#1d4ed8}path.b{stroke:#b91c1c}path.a,path.b{fill:none;stroke-width:2}
circle.a,text.a{fill:#1d4ed8}circle.b,text.b{fill:#b91c1c}
@media(prefers-color-scheme:dark){text{fill:#e5e7eb}.paper{fill:#0d1117}.grid{stroke:#374151}
path.a{stroke:#93c5fd}path.b{stroke:#fca5a5}circle.a,text.a{fill:#93c5fd}circle.b,text.b{fill:#fca5a5}}"""

Curve = dict[int, float]


def panel(x: int, y: int, title: str, below: str, curves: dict[str, Curve]) -> list[str]:
    """Lines of SVG: powers of two from left to right, values from zero up."""
    wide, high = WIDTH - LEFT - 18, HEIGHT - TOP - BOTTOM
    values = [value for curve in curves.values() for value in curve.values()]
    numbers = sorted({n for curve in curves.values() for n in curve})
    last = math.log2(numbers[-1]) or 1
    step = 10 ** math.floor(math.log10(max(values)))
    step = step / 2 if max(values) / step < 3 else step * 2 if max(values) / step > 6 else step
    top = step * math.ceil(max(values) / step)

    def place(n: float, value: float) -> tuple[float, float]:
        return x + LEFT + wide * math.log2(n) / last, y + TOP + high * (1 - value / top)

    lines = [f'<text class="title" x="{x + LEFT}" y="{y + 22}">{title}</text>']
    for i in range(round(top / step) + 1):
        _, level = place(1, i * step)
        lines.append(f'<path class="grid" d="M{x + LEFT} {level:.1f}h{wide}"/>')
        lines.append(f'<text x="{x + LEFT - 6}" y="{level + 4:.1f}" text-anchor="end">{i * step:g}</text>')
    for n in numbers:
        across, _ = place(n, 0)
        lines.append(f'<text x="{across:.1f}" y="{y + TOP + high + 17}" text-anchor="middle">{n}</text>')
    lines.append(f'<text x="{x + LEFT + wide / 2}" y="{y + TOP + high + 35}" text-anchor="middle">{below}</text>')
    for i, (name, curve) in enumerate(curves.items()):
        colour = "ab"[i]
        points = [place(n, value) for n, value in curve.items()]
        path = "M" + "L".join(f"{across:.1f} {level:.1f}" for across, level in points)
        lines.append(f'<path class="{colour}" d="{path}"/>')
        lines += [f'<circle class="{colour}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in points]
        if len(curves) > 1:
            lines.append(f'<text class="{colour}" x="{x + LEFT + 8}" y="{y + TOP + 14 + 16 * i}">{name}</text>')
    return lines


def picture(base: dict[int, Figures], mixed: dict[int, Figures], spread: dict[int, Figures], machine: str) -> str:
    """Four panels as one SVG that follows a reader's light or dark setting."""

    def speed(found: dict[int, Figures]) -> Curve:
        return {n: one.tokens_per_cpu_s for n, one in found.items()}

    def wait(found: dict[int, Figures]) -> Curve:
        return {n: one.ttft_ms / 1000 for n, one in found.items()}

    most = max(base)
    tokens, first = "throughput (output tokens per CPU-second)", "time to the first token (seconds, median)"
    by_requests, by_adapters = "requests at once", f"adapters of rank 16, with {most} requests at once"
    some = f"over {SOME} adapters"
    panels = [
        panel(0, 0, tokens, by_requests, {"base": speed(base), some: speed(mixed)}),
        panel(WIDTH, 0, first, by_requests, {"base": wait(base), some: wait(mixed)}),
        panel(0, HEIGHT, tokens, by_adapters, {"": speed(spread)}),
        panel(WIDTH, HEIGHT, first, by_adapters, {"": wait(spread)}),
    ]
    body = "\n".join(line for lines in panels for line in lines)
    caption = f"{PROMPT_TOKENS}-token prompts, {NEW_TOKENS} new tokens; {machine}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {2 * HEIGHT + CAPTION}" width="{2 * WIDTH}">'
        f"<style>{STYLE}</style>\n"
        f'<rect class="paper" width="100%" height="100%"/>\n{body}\n'
        f'<text x="{WIDTH}" y="{2 * HEIGHT + 10}" text-anchor="middle">{escape(caption)}</text>\n</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--most", type=int, default=64, help="requests, and adapters; a power of two")
    parser.add_argument("--weights", default="exact", choices=["exact", "float16", "int8"])
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--machine", default="one core", help="what the picture says of the machine")
    given = parser.parse_args()
    os.sched_setaffinity(0, {given.core})
    numbers = [2**i for i in range(given.most.bit_length())]
    with worker_with(given.model, given.most, threads=1, slots=given.most, weights=given.weights) as (worker, adapters):
        process, vocabulary = process_of(worker), vocabulary_of(given.model)
        load(worker, [])
        load(worker, adapters)

        def one(n: int, count: int) -> Figures:
            shape = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
            found = asyncio.run(run(worker.port, process, vocabulary, n, adapters[:count], **shape))
            print(f"| {n} | {count} | {found.tokens_per_cpu_s:.0f} | {found.ttft_ms / 1000:.2f} |", flush=True)
            return found

        print("| requests | adapters | tokens per CPU-s | TTFT p50 s |\n|---|---|---|---|")
        base = {n: one(n, 0) for n in numbers}
        mixed = {n: one(n, SOME) for n in numbers}
        spread = {count: mixed[given.most] if count == SOME else one(given.most, count) for count in numbers}
    if given.plot:
        given.plot.write_text(picture(base, mixed, spread, given.machine), encoding="utf-8")


if __name__ == "__main__":
    main()
