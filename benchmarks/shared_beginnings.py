"""What it saves to compute alike beginnings once: `python benchmarks/shared_beginnings.py BASE_FOLDER [--data FILE.jsonl]`.

Steps of the optimizer (LoRA of rank 8 on all linear layers) on the same rows with and without, in turn, in one process; the
figures are CPU-seconds for the tokens of the rows, computed or not, and their ratio is that of the faster half of the rounds.
Without --data, of three kinds that are made here:

    chat         long_tailed_chat.py: all rows share the default system message of the base
    function     an assistant with one list of tools, and short conversations that call them
    preference   pairs of answers to long-tailed questions, as DPO sees them
"""

import argparse
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import long_tailed_chat
import numpy as np
import torch

from tunewright.jobs.memory_estimate import MICRO_BATCH_TOKENS
from tunewright.recipes import adapters, fast_layers, flattened, packing
from tunewright.recipes.base_model import load_model
from tunewright.rendering.renderer import Renderer

_TOOLS = {
    "find_order": ("Look up an order by its number.", ["order_number"]),
    "cancel_order": ("Cancel an order that has not been sent yet.", ["order_number", "reason"]),
    "track_parcel": ("Where a parcel is, by its tracking number.", ["tracking_number"]),
    "open_ticket": ("Hand the conversation to a colleague, with a short summary.", ["summary", "urgency"]),
    "search_articles": ("Search the articles of the help centre.", ["query", "language"]),
    "change_address": ("Change the address of an order that has not been sent yet.", ["order_number", "address"]),
}
_SYSTEM = "You are the assistant of a mail order shop. Be brief and polite, and look things up before you answer."


def _tool(name: str) -> dict[str, Any]:
    described, arguments = _TOOLS[name]
    properties = {one: {"type": "string", "description": f"The {one.replace('_', ' ')}."} for one in arguments}
    schema = {"type": "object", "properties": properties, "required": arguments}
    return {"type": "function", "function": {"name": name, "description": described, "parameters": schema}}


def function_rows(n_rows: int) -> Iterator[dict[str, Any]]:
    """A question, a call, what it gave, an answer."""
    chance, tools = random.Random(1), [_tool(name) for name in _TOOLS]
    for messages in long_tailed_chat.conversations(n_rows, seed=1):
        name = chance.choice(list(_TOOLS))
        given = {argument: f"{chance.randrange(10**6):06}" for argument in _TOOLS[name][1]}
        call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}
        question, answer = (" ".join(message["content"].split()[:40]) for message in messages[:2])
        yield {
            "messages": [
                {"role": "system", "content": _SYSTEM},
                {"role": "user", "content": question},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": json.dumps({"state": answer[:60]})},
                {"role": "assistant", "content": answer},
            ],
            "tools": tools,
        }


def preference_rows(n_rows: int) -> Iterator[dict[str, Any]]:
    """All but the last turn is the question; the other answer has half of the words, in another order."""
    chance = random.Random(2)
    for messages in long_tailed_chat.conversations(n_rows, seed=2):
        words = messages[-1]["content"].split()
        other = " ".join(chance.sample(words, max(1, len(words) // 2)))
        yield {
            "input": {"messages": messages[:-1]},
            "preferred_output": [messages[-1]],
            "non_preferred_output": [{"role": "assistant", "content": other}],
        }


def read(path: Path, base: Path, sides: int) -> packing.Rows:
    """The rows of a file as the trainer reads them."""
    return packing.read_rows(
        path,
        Renderer(base),
        max_length=1024,
        max_line_bytes=2**24,
        between_rows=lambda: None,
        param="data",
        sides=sides,
    )


def step(model: Any, rows: packing.Rows, chosen: np.ndarray, share: bool) -> tuple[float, float]:
    """(CPU-seconds, summed loss) of the forward and backward passes of one step."""
    began, total = time.process_time(), 0.0
    for group in packing.micro_batches(rows, chosen, MICRO_BATCH_TOKENS, share):
        loss, _ = flattened.summed_loss(model, packing.flatten(rows, group, share), torch.device("cpu"))
        loss.backward()
        total += loss.item()
    took = time.process_time() - began
    model.zero_grad()
    return took, total


def measure(name: str, model: Any, rows: packing.Rows, batch_size: int, rounds: int) -> None:
    """Print a line of the table. The first round is not timed."""
    order = packing.epoch_order(rows.n_examples, 0, 0)
    took: dict[bool, list[float]] = {False: [], True: []}
    own = computed = 0
    for place in range(rounds + 1):
        chosen = order[np.arange(place * batch_size, (place + 1) * batch_size) % len(order)]
        losses = []
        for share in (False, True) if place % 2 else (True, False):
            seconds, loss = step(model, rows, chosen, share)
            losses.append(loss)
            if place:
                took[share].append(seconds)
        assert abs(losses[0] - losses[1]) < 1e-4 * losses[0], losses
        if place:
            own += rows.only(chosen.tolist()).n_tokens
            for group in packing.micro_batches(rows, chosen, MICRO_BATCH_TOKENS, True):
                computed += packing.layout(rows, group, True).tokens
    ratios = [apart / shared for apart, shared in zip(took[False], took[True], strict=True)]
    print(
        f"{name:<12} {own / len(ratios):>8.0f} {computed / own:>9.2f} {own / sum(took[False]):>10.1f} "
        f"{own / sum(took[True]):>9.1f} {statistics.median(ratios):>7.2f} {min(ratios):>6.2f} {max(ratios):>6.2f}",
        flush=True,
    )


def main() -> None:
    """Make rows, load the model, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of a base model in Hugging Face layout")
    parser.add_argument("--data", type=Path, help="rows of your own instead of those that are made, JSONL")
    parser.add_argument("--pairs", action="store_true", help="the rows of --data are preference rows")
    parser.add_argument("--kinds", nargs="+", default=["chat", "function", "preference"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--layers", default="hand", choices=["hand", "plain"], help="ours, transformers'")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(given.base, torch.float32)
    adapters.add_lora(model, rank=8, alpha=16, targets=adapters.linear_names(model), seed=0)
    if given.layers == "hand":
        fast_layers.speed_up(model, torch.float32, checkpointing=False)
    print("rows           tokens  computed  tok/CPU-s  and shared  faster  least   most")
    with tempfile.TemporaryDirectory() as folder:
        if given.data is not None:
            measure(
                given.data.stem, model, read(given.data, given.base, 1 + given.pairs), given.batch_size, given.rounds
            )
            return
        made = {"chat": None, "function": function_rows, "preference": preference_rows}
        n_rows = given.batch_size * (given.rounds + 1)
        for kind in given.kinds:
            path, make = Path(folder) / f"{kind}.jsonl", made[kind]
            if make is None:
                long_tailed_chat.write(path, n_rows)
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in make(n_rows)), "utf-8")
            rows = read(path, given.base, 2 if kind == "preference" else 1)
            measure(kind, model, rows, given.batch_size, given.rounds)
    print(f"peak GB {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f}")


if __name__ == "__main__":
    main()
