"""Chat rows whose lengths have a long tail, as real ones do: `python benchmarks/long_tailed_chat.py ROWS OUT.jsonl`.

The same number of rows and seed give the same bytes, with no network and no tokenizer. In tokens of the starter
(SmolLM2, its template and default system message included): 227 a row on average, 99 of 100 rows below 806, half of
them labels. `--check BASE_FOLDER` measures that.
"""

import argparse
import json
import math
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

_LOG_TOKENS = statistics.NormalDist(5.241, 0.622)
"""What the logarithm of a row's length follows: mean 226 tokens, 99th percentile about 810."""
_MAX_TOKENS = 1000
_SYSTEM_TOKENS = 26
_MESSAGE_TOKENS = 5
"""What the template adds to each message."""
_TOKENS_PER_WORD = 1.105
"""Punctuation included."""

_TEXT = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man me "
    "even most made after also did many off before must well back through years much where your way down should because "
    "long each just state those people too how little good world make very year still see work life men being day under "
    "never last both between same another know while again might us old great against since come go right few use place "
    "home small number water part found thought right high general house during school every left without order group "
    "model data answer question reason example number system test point paper market river city music road letter table"
)
_WORDS = _TEXT.split()


def conversations(n_rows: int, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """The messages of each row: one to four questions and answers."""
    chance = random.Random(seed)
    # Every quantile once and in random order, so that a few rows are already distributed like many.
    lengths = [math.exp(_LOG_TOKENS.inv_cdf((row + 0.5) / n_rows)) for row in range(n_rows)]
    chance.shuffle(lengths)
    for length in lengths:
        tokens = min(_MAX_TOKENS, round(length))
        n_turns = min(chance.choice((1, 1, 1, 2, 2, 3, 4)), 1 + tokens // 120)
        answered = min(tokens * 0.49, 0.92 * (tokens - _SYSTEM_TOKENS - 2 * n_turns * _MESSAGE_TOKENS))
        asked = tokens - answered - _SYSTEM_TOKENS - 2 * n_turns * _MESSAGE_TOKENS
        shares = [chance.uniform(0.5, 1.5) for _ in range(n_turns)]
        messages = []
        for share in shares:
            for role, part in (("user", asked), ("assistant", answered)):
                n_words = max(1, round(part * share / sum(shares) / _TOKENS_PER_WORD))
                messages.append({"role": role, "content": _prose(chance, n_words)})
        yield messages


def _prose(chance: random.Random, n_words: int) -> str:
    """Sentences of so many words, frequent ones more often."""
    sentences = []
    while n_words > 0:
        length = min(n_words, chance.randint(5, 14))
        words = [_WORDS[min(int(chance.expovariate(0.02)), len(_WORDS) - 1)] for _ in range(length)]
        sentences.append(" ".join(words).capitalize() + ".")
        n_words -= length
    return " ".join(sentences)


def write(path: Path, n_rows: int, seed: int = 0) -> Path:
    """Write the rows as JSONL; returns `path`."""
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for messages in conversations(n_rows, seed):
            out.write(json.dumps({"messages": messages}) + "\n")
    return path


def check(data: Path, base: Path) -> str:
    """What the rows are in tokens of the base model, as one sentence."""
    from tunewright.rendering.conversation import Conversation, Message
    from tunewright.rendering.renderer import Renderer

    renderer = Renderer(base)
    lengths, labels = [], 0
    for line in data.read_text("utf-8").splitlines():
        messages = tuple(Message(**message) for message in json.loads(line)["messages"])
        example = renderer.example(Conversation(messages=messages))
        lengths.append(len(example.tokens))
        labels += sum(example.trained)
    lengths.sort()
    return (
        f"{len(lengths)} rows: {statistics.mean(lengths):.0f} tokens on average, median {lengths[len(lengths) // 2]}, "
        f"99th percentile {lengths[int(len(lengths) * 0.99)]}, longest {lengths[-1]}, "
        f"{100 * labels / sum(lengths):.0f} % labels"
    )


def main() -> None:
    """Write a file of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=Path, metavar="BASE_FOLDER", help="tell the lengths in tokens of this model")
    given = parser.parse_args()
    write(given.out, given.rows, given.seed)
    if given.check is not None:
        print(check(given.out, given.check))


if __name__ == "__main__":
    main()
