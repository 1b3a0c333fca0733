"""How fast data files are checked: `python benchmarks/check_speed.py [--mb 1000] [--runs 3] [--rows FILE ...]`.

Makes a chat file and a function file (short and long rows, Chinese and English) in a temporary folder and reads them side by
side, each time in a process of its own: with the plain loop that cookbooks publish (`json.loads` and checks line by line), and
with ours: structure alone, the whole report, both also on two processes. The best of the runs counts. Speed is by processor
time where one process works and by the clock where two do, and the ratios are between figures of the same sort. Where
neighbours take processors away the clock says little: "with both free" is what two processes win by their processor time, starts
included, as both take pieces of the file until none is left. RSS growth is of the process and its children, from after its
imports to its peak.

`--rows`: true rows, repeated until they are a file as large as the function file. Each is numbered, and in every other copy of
them the tools are too, so that half of the lists of tools are met for the first time.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

WAYS = {
    "plain loop": "json.loads and checks",
    "structure": "ours: structure alone",
    "structure, 2": "ours: structure alone, two processes",
    "full": "ours: the whole report",
    "full, 2": "ours: the whole report, two processes",
}
_KEYS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id")
# fmt: off
_ENGLISH = (
    "the", "model", "answer", "question", "data", "train", "of", "to", "and", "in", "is", "that", "for", "it", "with", "as",
    "was", "on", "be", "at", "by", "this", "have", "from", "or", "one", "had", "word", "but", "not", "what", "all", "were",
    "when", "your", "can", "said", "there", "use", "an", "each", "which", "she", "do", "how", "their", "if", "will", "up",
)
# fmt: on
_CHINESE = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--mb", type=int, default=1000, help="size of the chat file; the function file has a fifth")
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--rows", nargs="+", type=Path, default=[], help="files of true function rows")
    options.add_argument("--child", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        _child(given.child[0], Path(given.child[1]))
        return
    with tempfile.TemporaryDirectory(prefix="tunewright-bench-") as folder:
        files = [("chat", chat_rows, given.mb), ("function", function_rows, given.mb // 5)]
        if given.rows:
            files.append(("true function rows", lambda rng: true_rows(given.rows), given.mb // 5))
        for name, rows, megabytes in files:
            path = Path(folder) / f"{name}.jsonl"
            count = write(path, rows, megabytes * 10**6)
            print(
                f"{name}: {path.stat().st_size / 1e6:.0f} MB, {count} rows, {path.stat().st_size // count} bytes each"
            )
            compare(path, given.runs)
            path.unlink()


class Limits(NamedTuple):
    """What the check asks of the settings."""

    max_line_bytes: int = 4 * 2**20
    min_training_rows: int = 1


class Run(NamedTuple):
    """Seconds by the clock and of processors, and bytes of growth."""

    wall_s: float
    cpu_s: float
    growth: int


def compare(path: Path, runs: int) -> None:
    """Run all ways in turn, several times, and print the best of each."""
    best: dict[str, Run] = {}
    for _ in range(runs):
        for way in WAYS:
            run = measure(way, path)
            other = best.get(way, run)
            best[way] = Run(min(run.wall_s, other.wall_s), min(run.cpu_s, other.cpu_s), max(run.growth, other.growth))
    size = path.stat().st_size / 1e6
    plain, one = best["plain loop"], {"structure, 2": "structure", "full, 2": "full"}
    print(f"{'':38} {'MB/s':>6} {'of the plain loop':>18} {'of one process':>15} {'with both free':>15} {'growth':>9}")
    for way, title in WAYS.items():
        run = best[way]
        seconds, reference = (run.wall_s, plain.wall_s) if way in one else (run.cpu_s, plain.cpu_s)
        beside = free = ""
        if way in one:
            beside = f"{best[one[way]].wall_s / run.wall_s:.2f}"
            free = f"{2 * best[one[way]].cpu_s / run.cpu_s:.2f}"
        speeds = f"{size / seconds:6.0f} {reference / seconds:18.2f}"
        print(f"{title:38} {speeds} {beside:>15} {free:>15} {run.growth / 2**20:5.0f} MiB")


def measure(way: str, path: Path) -> Run:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--child", way, str(path)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if child.stdin is None or child.stdout is None:
        raise RuntimeError("no pipes")
    child.stdout.readline()  # its imports are done
    process = psutil.Process(child.pid)
    before, peak = process.memory_info().rss, 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.2):  # a look goes through all processes of the machine: often, it would take a processor
            peak = max(peak, sum(map(rss, [process, *process.children(recursive=True)])))

    watcher = threading.Thread(target=watch)
    watcher.start()
    child.stdin.write("go\n")
    child.stdin.flush()
    found = json.loads(child.stdout.readline())
    done.set()
    watcher.join()
    child.stdin.close()
    child.wait()
    return Run(found["wall_s"], found["cpu_s"], peak - before)


def rss(process: psutil.Process) -> int:
    """Resident bytes; 0 for a process that has ended."""
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _child(way: str, path: Path) -> None:
    import numpy  # noqa: F401  (the first large file loads it: start-up is not what is measured)

    from tunewright.datasets.checking.check import check

    gc.freeze()
    print("ready", flush=True)
    sys.stdin.readline()
    began, used = time.perf_counter(), os.times()
    if way == "plain loop":
        counts: Any = plain_loop(path)
    else:
        semantic, processes = way.startswith("full"), 2 if way.endswith("2") else 1
        report = check(path, "fine-tune", Limits(), semantic=semantic, processes=processes)
        counts = (report.rows, report.statistics["messages"], report.statistics["characters"], report.errors)
    now = os.times()
    cpu_s = sum(now[:4]) - sum(used[:4])
    print(json.dumps({"wall_s": time.perf_counter() - began, "cpu_s": cpu_s, "counts": counts}), flush=True)
    sys.stdin.readline()


def plain_loop(path: Path) -> tuple[int, int, int, int]:
    """Rows, messages, characters and faults, as a careful reader of cookbooks would count them."""
    rows = messages = characters = faults = 0
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            rows += 1
            if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
                faults += 1
                continue
            before = None
            answered = False
            for i, message in enumerate(row["messages"]):
                if not isinstance(message, dict) or "role" not in message:
                    faults += 1
                    continue
                messages += 1
                if any(key not in _KEYS for key in message):
                    faults += 1
                role, content = message["role"], message.get("content")
                if role not in ("system", "user", "assistant", "tool"):
                    faults += 1
                if isinstance(content, str) and content.strip():
                    characters += len(content)
                elif not message.get("tool_calls"):
                    faults += 1
                if (role == "system" and i > 0) or (role == before and role != "tool"):
                    faults += 1
                if role == "assistant":
                    answered = True
                before = role
            if not answered or before != "assistant":
                faults += 1
    return rows, messages, characters, faults


def write(path: Path, rows: Callable[[random.Random], Iterator[dict[str, Any]]], size: int) -> int:
    """Write rows up to `size` bytes; the answer is how many."""
    written = count = 0
    with path.open("wb") as stream:
        for row in rows(random.Random(1)):
            written += stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
            if written >= size:
                return count
    return count


class Writer:
    """Texts in English and Chinese, cut out of a long one: making them word by word would take longer than all checks."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        words = rng.choices(_ENGLISH, k=200_000)
        self.english = " ".join(word + rng.choice([".\n\n", ",", "", "", "", "", ' "so"']) for word in words)
        self.chinese = "".join(
            rng.choice(_CHINESE) + rng.choice(["，", "。\n", "", "", "", "", "“好”"]) for _ in range(200_000)
        )

    def text(self, mean: int, zh: bool) -> str:
        """About `mean` characters, some of them far more."""
        source = self.chinese if zh else self.english
        length = max(2, int(self.rng.lognormvariate(0, 0.8) * mean * (0.4 if zh else 1)))
        start = self.rng.randrange(len(source) - length - 1)
        return source[start : start + length].strip() or "?"


def chat_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    """One turn or several, every fifth with a system prompt."""
    writer = Writer(rng)
    systems = [writer.text(120, zh) for zh in (True, False) * 10]
    for number in range(sys.maxsize):
        zh = rng.random() < 0.5
        messages = [{"role": "system", "content": rng.choice(systems)}] if rng.random() < 0.2 else []
        for turn in range(1 if rng.random() < 0.7 else rng.randint(2, 5)):
            messages.append({"role": "user", "content": f"{number}.{turn} " + writer.text(90, zh)})
            messages.append({"role": "assistant", "content": writer.text(450, zh)})
        yield {"messages": messages}


def function_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    """A call, its reply and an answer, sometimes twice; a few hundred lists of tools."""
    writer = Writer(rng)
    tools = [_tool(writer, i) for i in range(300)]
    for number in range(sys.maxsize):
        zh = rng.random() < 0.5
        offered = rng.sample(tools, rng.randint(1, 2)) if rng.random() < 0.01 else [tools[number % 300]]
        messages: list[dict[str, Any]] = []
        for turn in range(rng.randint(1, 3)):
            name = rng.choice(offered)["function"]["name"]
            arguments = json.dumps({"query": writer.text(30, zh), "count": rng.randint(1, 20)}, ensure_ascii=False)
            call = {"id": f"call_{turn}", "type": "function", "function": {"name": name, "arguments": arguments}}
            messages += [
                {"role": "user", "content": f"{number} " + writer.text(80, zh)},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": call["id"], "content": json.dumps({"found": writer.text(150, zh)})},
                {"role": "assistant", "content": writer.text(300, zh)},
            ]
        yield {"messages": messages, "tools": offered}


def true_rows(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """The rows of files over and over, no two alike."""
    rows = [line for path in paths for line in path.read_bytes().splitlines()]
    for copy in range(sys.maxsize):
        for number, line in enumerate(rows):
            row = json.loads(line)
            asked = next(message for message in row["messages"] if message["role"] == "user")
            asked["content"] = f"{copy}.{number} {asked['content']}"
            if copy % 2:
                for tool in row.get("tools") or ():
                    tool["function"]["description"] = f"{tool['function'].get('description', '')} {copy}"
            yield row


def _tool(writer: Writer, number: int) -> dict[str, Any]:
    properties = {
        "query": {"type": "string", "description": writer.text(60, False)},
        "count": {"type": "integer", "minimum": 1, "maximum": 50, "description": writer.text(60, False)},
    }
    parameters = {"type": "object", "properties": properties, "required": ["query"]}
    function = {"name": f"search_{number}", "description": writer.text(100, False), "parameters": parameters}
    return {"type": "function", "function": function}


if __name__ == "__main__":
    main()
