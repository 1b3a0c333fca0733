"""Text and sampling of one row."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from tests.engines.engine_worker import generate_request
from tunewright.deployments.ports import EngineReply, TokenScore, TokenText
from tunewright.engines.answer_text import AnswerText
from tunewright.engines.rows import Row
from tunewright.engines.sampling import Sampler
from tunewright.engines.tickets import Ticket


class Letters:
    """A decoder whose token n is the n-th text; a token of half a character gives nothing until the next."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts
        self._rest = ""

    def push(self, token_id: int) -> str:
        text, self._rest = self._rest + self._texts[token_id], ""
        if text.endswith("½"):
            text, self._rest = text[:-1], "é"
        return text

    def flush(self) -> str:
        text, self._rest = self._rest, ""
        return text


def stream(texts: list[str], stop: list[str]) -> tuple[list[str], bool]:
    """Pieces shown, and whether a stop string ended it."""
    answer = AnswerText(Letters(texts), stop)
    pieces: list[str] = []
    for token in range(len(texts)):
        text, met = answer.push(token)
        pieces.append(text)
        if met:
            return pieces, True
    text, met = answer.finish()
    return [*pieces, text], met


@pytest.mark.parametrize(
    ("texts", "stop", "shown", "met"),
    [
        (["ab", "cd"], [], "abcd", False),
        (["ab", "c##", "d"], ["##"], "abc", True),
        (["ab#", "#d"], ["##"], "ab", True),
        (["ab#", "cd"], ["##"], "ab#cd", False),
        (["ab#"], ["##"], "ab#", False),
        (["aXbY"], ["Y", "X"], "a", True),
        (["aab", "aac"], ["aabaac"], "", True),
        (["aabaab", "aac"], ["aabaac"], "aab", True),
        (["x½", "y"], ["éy"], "x", True),
        (["x½"], ["é"], "x", True),
        (["x½"], ["z"], "xé", False),
        (["abc"], [""], "abc", False),
    ],
)
def test_stop_strings(texts: list[str], stop: list[str], shown: str, met: bool) -> None:
    pieces, found = stream(texts, stop)
    assert ("".join(pieces), found) == (shown, met)


def test_no_part_of_a_stop_string_ever_shows() -> None:
    """Random texts over two letters, cut at random: the same as looking at the whole text, and never more in between."""
    rng = random.Random(0)
    for _ in range(2000):
        texts = ["".join(rng.choices("ab", k=rng.randint(1, 3))) for _ in range(rng.randint(1, 8))]
        stop = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        pieces, met = stream(texts, stop)
        seen, expected = "", None
        for text in texts:  # stops are looked for after each token: the first token that completes one ends the answer
            seen += text
            places = [place for place in (seen.find(s) for s in stop) if place >= 0]
            if places:
                expected = seen[: min(places)]
                break
        assert met == (expected is not None)
        assert "".join(pieces) == (seen if expected is None else expected)


def draws(n: int, logits: Iterable[float], **values: Any) -> list[int]:
    settings: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 7} | values
    sampler = Sampler(**settings)
    array = np.array(list(logits), dtype=np.float32)
    return [sampler.choose(array) for _ in range(n)]


def test_shares_follow_the_probabilities() -> None:
    counts = np.bincount(draws(20_000, np.log([0.5, 0.3, 0.2])), minlength=3) / 20_000
    assert np.abs(counts - [0.5, 0.3, 0.2]).max() < 0.015
    cold = np.bincount(draws(20_000, np.log([0.5, 0.3, 0.2]), temperature=0.5), minlength=3) / 20_000
    assert np.abs(cold - np.array([25, 9, 4]) / 38).max() < 0.015


def test_limits() -> None:
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    assert set(draws(500, logits, top_k=2)) == {1, 3}
    assert set(draws(500, logits, top_p=0.5)) == {1, 3}
    assert set(draws(500, logits, top_p=0.4)) == {1}
    assert set(draws(500, logits, top_p=0.0)) == {1}
    assert set(draws(500, logits, top_k=3, top_p=0.7)) == {1, 3}
    assert set(draws(50, logits, temperature=0)) == {1}
    assert set(draws(500, logits, top_k=100)) == {0, 1, 2, 3}
    assert set(draws(500, logits, temperature=1e30)) == {0, 1, 2, 3}


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 1.0])
def test_a_large_vocabulary_is_cut_as_a_full_sort_cuts_it(top_p: float) -> None:
    logits = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    shares = np.exp(logits.astype(np.float64))
    shares /= shares.sum()
    order = np.argsort(-shares)
    kept = set(order[: int(np.searchsorted(np.cumsum(shares[order]), top_p)) + 1].tolist())
    assert set(draws(300, logits, top_p=top_p)) <= kept


def test_seeds() -> None:
    logits = np.zeros(1000)
    assert draws(20, logits, seed=1) == draws(20, logits, seed=1)
    assert draws(20, logits, seed=1) != draws(20, logits, seed=2)
    assert draws(20, logits, seed=None) != draws(20, logits, seed=None)
    assert len(draws(2, logits, seed=-5)) == len(draws(2, logits, seed=2**200)) == 2


@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_rounding_hardly_ever_decides(top_p: float) -> None:
    """Logits are a little different in other company; a seed gives the same text all the same."""
    generator = np.random.default_rng(3)
    logits = (3 * generator.standard_normal(50_000)).astype(np.float32)
    one, other = (Sampler(temperature=1.0, top_p=top_p, top_k=0, seed=9) for _ in range(2))
    noise = (generator.uniform(-1e-4, 1e-4, (300, 50_000))).astype(np.float32)
    assert sum(one.choose(logits) != other.choose(logits + some) for some in noise) <= 1


def test_bias_forbids_and_forces() -> None:
    logits = [5.0, 4.0, 3.0]
    assert set(draws(50, logits, temperature=0, logit_bias={0: -100})) == {1}
    assert set(draws(50, logits, logit_bias={2: 100})) == {2}


def test_penalties_count_the_answer_alone() -> None:
    """Frequency takes one step for each time, presence one step in all: greedy draws show the order exactly."""
    assert draws(6, [1.0, 0.9, 0.0], temperature=0, frequency_penalty=0.3) == [0, 1, 0, 1, 0, 1]
    assert draws(6, [1.0, 0.9, 0.0], temperature=0, presence_penalty=0.3) == [0, 1, 0, 0, 0, 0]
    assert draws(4, [1.0, 0.9, 0.0], temperature=0, frequency_penalty=-0.3) == [0, 0, 0, 0]


def test_logits_stay_as_they_are() -> None:
    array = np.array([1.0, 0.5], dtype=np.float32)
    Sampler(temperature=1.0, top_p=1.0, top_k=0, seed=1, logit_bias={0: 3.0}).choose(array)
    assert array.tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("texts", "stop", "n", "scored"),
    [
        (["ab", "cd"], [], 2, [0, 1]),
        (["a½", "b", "c"], [], 3, [0, 1, 2]),
        (["ab", "c##", "d"], ["##"], 3, [0, 1]),  # a token of which a part is shown
        (["ab", "#", "#d"], ["##"], 3, [0]),
        (["ab", "#", "d"], ["##"], 3, [0, 1, 2]),
        (["##"], ["##"], 1, []),
    ],
)
def test_scores_go_with_the_text_of_their_tokens(texts: list[str], stop: list[str], n: int, scored: list[int]) -> None:
    """Every line that goes out has scores of nothing but text that is out by then."""
    request = generate_request(prompt_ids=[1], max_tokens=n, stop=stop)
    replies: list[EngineReply] = []
    sampler = Sampler(temperature=0.0, top_p=1.0, top_k=0, seed=None)
    row = Row(
        Ticket(request, replies.append, 1, None), request, None, sampler, AnswerText(Letters(texts), stop), frozenset()
    )
    for token in range(n):
        if not row.finished:
            row.accept(token, TokenScore(token, -1.0))
    lines = [reply for reply in replies if isinstance(reply, TokenText)]
    assert [score.token_id for line in lines for score in line.scores] == scored
    whole = "".join(line.text for line in lines)
    shown = ""
    for line in lines:
        shown += line.text
        ends = [len("".join(texts[: score.token_id + 1]).replace("½", "")) for score in line.scores]
        assert all(end <= len(shown) or shown == whole for end in ends)
