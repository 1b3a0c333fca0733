"""Does tuning teach a base to call functions? `python benchmarks/function_calling.py BASE DATA.jsonl [--rows 140] [--epochs 2]`.

BASE is a folder in Hugging Face layout or the code of a base that can be pulled. A real server on a home of its own trains on
function-calling rows and then answers for the base and for the tuned model, all of it through the `openai` package.

About a quarter of the rows with tools is held out, by the content of each row; of the others the `--rows` shortest are trained
on. A held-out row gives one question for each assistant turn up to its first call: the last one calls for a tool, those before
call for text; what a training row asks in the same words is left out. Answers are greedy. An argument is valid if it keeps the
schema of its function; exact is the same function with the same arguments as in the row. "seen" are questions whose function
was offered in a training row.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema_rs
from openai import OpenAI

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.live_server import LiveServer
from tunewright.datasets.splitting import side

HELD_OUT, SEED = 0.25, 0
LEARNING_RATE_MULTIPLIER = 2.5
MOST_TOKENS = 192
JOB_LIMIT_S = 7200


class Question(NamedTuple):
    """A prompt of a held-out row. `calls` are those of the row's answer, [] where it answers in text."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    calls: list[tuple[str, Any]]
    seen: bool


class Answer(NamedTuple):
    """What a model did. `calls` is empty for text; `tried`: a call was begun, whether or not it could be read."""

    tried: bool
    calls: list[tuple[str, Any]]


def rows_with_tools(data: Path, rows: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to train on (the shortest, at most `rows`) and rows held out."""
    train: list[bytes] = []
    held_out: list[dict[str, Any]] = []
    for line in data.read_bytes().splitlines():
        row = json.loads(line) if line.strip() else {}
        if row.get("tools"):
            if side(line, HELD_OUT, SEED):
                held_out.append(row)
            else:
                train.append(line)
    return [json.loads(line) for line in sorted(train, key=len)[:rows]], held_out


def names_of(row: dict[str, Any]) -> set[str]:
    """Names of the functions that a row offers."""
    return {tool["function"]["name"] for tool in row["tools"]}


def read_calls(calls: Any) -> list[tuple[str, Any]]:
    """(function, arguments) of calls in the OpenAI shape; arguments are None where they are no JSON object."""
    found = []
    for call in calls or ():
        try:
            arguments = json.loads(call["function"]["arguments"])
        except ValueError:
            arguments = None
        found.append((call["function"]["name"], arguments if isinstance(arguments, dict) else None))
    return found


def questions_of(row: dict[str, Any], known: set[str]) -> Iterator[Question]:
    """One for each assistant turn up to the first call."""
    for index, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            calls = read_calls(message.get("tool_calls"))
            wanted = {name for name, _ in calls} or names_of(row)
            yield Question(row["messages"][:index], row["tools"], calls, wanted <= known)
            if calls:
                return


def distinct(held_out: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[Question]:
    """The questions of the rows held out, each once, and none that a row of training asks too."""
    known = set().union(*map(names_of, rows))
    asked = {key_of(question) for row in rows for question in questions_of(row, known)}
    found = {key_of(question): question for row in held_out for question in questions_of(row, known)}
    return [question for key, question in found.items() if key not in asked]


def key_of(question: Question) -> str:
    """The same for the same prompt, whatever ids its calls have."""
    texts = [(message["role"], message.get("content")) for message in question.messages]
    return json.dumps([texts, question.tools], sort_keys=True)


def ask(client: OpenAI, model: str, question: Question) -> Answer:
    """The answer of `model`."""
    made: Any = client.chat.completions.create
    message = (
        made(model=model, messages=question.messages, tools=question.tools, temperature=0, max_tokens=MOST_TOKENS)
        .choices[0]
        .message
    )
    calls = read_calls([call.model_dump() for call in message.tool_calls or ()])
    return Answer(bool(calls) or "<tool_call>" in (message.content or ""), calls)


def valid(calls: list[tuple[str, Any]], tools: list[dict[str, Any]]) -> bool:
    """Whether every call names an offered function and its arguments keep that function's schema."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    return bool(calls) and all(
        name in schemas and arguments is not None and jsonschema_rs.is_valid(schemas[name], arguments)
        for name, arguments in calls
    )


def counts(questions: list[Question], answers: list[Answer]) -> dict[str, tuple[int, int]]:
    """What is counted -> (how often, out of how many)."""
    both = list(zip(questions, answers, strict=True))
    calling = [(q, a) for q, a in both if q.calls]
    texts = [a for q, a in both if not q.calls]

    def share(pairs: list[tuple[Question, Answer]], passes: Any) -> tuple[int, int]:
        return sum(bool(passes(q, a)) for q, a in pairs), len(pairs)

    def parseable(_: Question, a: Answer) -> bool:
        return bool(a.calls) and all(arguments is not None for _, arguments in a.calls)

    seen = [(q, a) for q, a in calling if q.seen]
    unseen = [(q, a) for q, a in calling if not q.seen]
    return {
        "call expected: began one": share(calling, lambda _, a: a.tried),
        "  parseable": share(calling, parseable),
        "  the right function": share(calling, lambda q, a: [n for n, _ in a.calls] == [n for n, _ in q.calls]),
        "  valid by the schema": share(calling, lambda q, a: valid(a.calls, q.tools)),
        "  exact": share(calling, lambda q, a: a.calls == q.calls),
        "  parseable, function seen": share(seen, parseable),
        "  parseable, function unseen": share(unseen, parseable),
        "  exact, function seen": share(seen, lambda q, a: a.calls == q.calls),
        "  exact, function unseen": share(unseen, lambda q, a: a.calls == q.calls),
        "text expected: no false call": (sum(not a.tried for a in texts), len(texts)),
    }


def train(server: LiveServer, client: OpenAI, rows: list[dict[str, Any]], base: str, epochs: int) -> str:
    """Upload, create the job, wait; the tuned model's name."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    file = client.files.create(file=("functions.jsonl", content), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=file.id,
        suffix="functions",
        seed=SEED,
        hyperparameters={
            "n_epochs": epochs,
            "batch_size": 4,
            "learning_rate_multiplier": LEARNING_RATE_MULTIPLIER,
        },
    )
    began = time.monotonic()
    ended = server.wait(job.id, JOB_LIMIT_S)
    if ended["status"] != "succeeded":
        raise SystemExit(f"the job {ended['status']}: {ended['error']}")
    job = client.fine_tuning.jobs.retrieve(job.id)
    print(f"trained: {len(rows)} rows, {epochs} epochs, {job.trained_tokens} tokens, {time.monotonic() - began:.0f} s")
    return str(job.fine_tuned_model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a model folder, or the code of a base to pull")
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=140, help="rows to train on, the shortest first")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--answers", type=Path, help="write every question with both answers here, as JSON lines")
    given = parser.parse_args()
    rows, held_out = rows_with_tools(given.data, given.rows)
    questions = distinct(held_out, rows)
    code, folder = ("base", given.base) if Path(given.base).is_dir() else (given.base, None)
    with tempfile.TemporaryDirectory(prefix="tunewright-functions-") as temporary:
        server = LiveServer(Path(temporary) / "home")
        server.run("models", "add", folder, "--code", code) if folder else server.run("models", "pull", code)
        server.start()
        try:
            client = OpenAI(api_key=server.key, base_url=f"{server.address}/v1", timeout=1800)
            print(f"held out: {len(held_out)} rows, {len(questions)} questions", flush=True)
            tuned = train(server, client, rows, code, given.epochs)
            with ThreadPoolExecutor(8) as pool:
                answers = {
                    name: list(pool.map(partial(ask, client, model), questions))
                    for name, model in (("base", code), ("tuned", tuned))
                }
        finally:
            server.stop()
    if given.answers:
        pairs = zip(questions, answers["base"], answers["tuned"], strict=True)
        lines = (json.dumps([q.messages[-1], q.calls, b, t], ensure_ascii=False) + "\n" for q, b, t in pairs)
        given.answers.write_text("".join(lines), "utf-8")
    base_counts, tuned_counts = (counts(questions, answers[name]) for name in ("base", "tuned"))
    print(f"\n{'':<32}{'base':>10}{'tuned':>10}")
    for name, (right, of) in base_counts.items():
        print(f"{name:<32}{f'{right}/{of}':>10}{f'{tuned_counts[name][0]}/{of}':>10}")


if __name__ == "__main__":
    main()
