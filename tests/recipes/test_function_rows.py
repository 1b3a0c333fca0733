"""Rows with calls of functions: what of them is trained, and that every family learns to call, by an adapter and whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.recipes.job_folder import metrics, next_attempt, train_here, write_job
from tests.recipes.test_text import finished, peft_model
from tests.tiny_glm import KINDS, tiny_glm
from tests.tiny_models import tiny_llama
from tunewright.datasets.tokens.examples import examples_of
from tunewright.files_on_disk import sha256_of
from tunewright.jobs.spec import TrainingSpec
from tunewright.recipes import packing
from tunewright.rendering.renderer import renderer_of
from tunewright.rendering.tools import CallPiece

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def call(city: str, call_id: str = "c1") -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": json.dumps({"city": city}, ensure_ascii=False)}
    return {"id": call_id, "type": "function", "function": function}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None = None, *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {}), **more}


def tool(text: str, call_id: str = "c1") -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": call_id}


def row(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages), "tools": [TOOL]}


CALLS = [row(user(f"Weather of {city}?"), assistant(None, call(city))) for city in ("Paris", "北京")]
WHOLE = row(
    {"role": "system", "content": "Be brief."},
    user("hello"),
    assistant("not this one", weight=0),
    user("Paris and 北京?"),
    assistant("Let me see.", call("Paris"), call("北京", "c2")),
    tool("21 degrees"),
    tool("17 degrees", "c2"),
    assistant("21 and 17.", reasoning_content="two numbers"),
    user("and now?"),
    assistant(None, call("Paris", "c3"), weight=0),
    tool("22 degrees", "c3"),
    assistant("22."),
)


def function_job(folder: Path, base: Path, rows: list[dict[str, Any]], **changes: Any) -> TrainingSpec:
    spec = write_job(folder, base, **{"max_length": 512, "batch_size": 2, **changes})
    data = Path(spec.training_data)
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return next_attempt(spec, training_sha256=sha256_of(data))


def read(spec: TrainingSpec, sides: int = 1) -> packing.Rows:
    return packing.read_rows(
        Path(spec.training_data),
        renderer_of(Path(spec.base_path)),
        max_length=1024,
        max_line_bytes=2**20,
        between_rows=lambda: None,
        param="training_file",
        sides=sides,
    )


def labels(rows: packing.Rows, index: int, base: Path) -> list[str]:
    """The text of each trained run of a row."""
    tokens, trained = rows.tokens_of(index), rows.trained_of(index)
    runs: list[list[int]] = []
    for place, is_trained in enumerate(trained):
        if is_trained:
            runs = runs if place and trained[place - 1] else [*runs, []]
            runs[-1].append(int(tokens[place]))
    return [renderer_of(base).decode(run).strip() for run in runs]


def test_answers_and_calls_are_trained_results_and_weight_0_are_not(tmp_path: Path, base: Path) -> None:
    rows = read(function_job(tmp_path, base, [WHOLE]))
    assert labels(rows, 0, base) == [
        'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>',
        "<think>\ntwo numbers\n</think>\n\n21 and 17.",
        "22.",
    ]
    seen = renderer_of(base).decode(rows.tokens_of(0).tolist())
    assert '<tools>\n{"type": "function", "function": {"name": "get_weather"' in seen
    assert all(text in seen for text in ("not this one", "21 degrees", "17 degrees", "22 degrees"))


def test_preferences_among_calls(tmp_path: Path, base: Path) -> None:
    """The right call against a wrong one and against none, after a result too: only the compared answers are trained."""
    history = [user("Paris?"), assistant(None, call("Paris")), tool("21"), user("and 北京?")]
    pairs = [
        {
            "input": {"messages": history, "tools": [TOOL]},
            "preferred_output": [assistant(None, call("北京"))],
            "non_preferred_output": [other],
        }
        for other in (assistant(None, call("Paris")), assistant("I can't know."))
    ]
    spec = function_job(tmp_path, base, pairs, method="dpo", beta=0.5, n_epochs=12, learning_rate=2e-2)
    rows = read(spec, sides=2)
    right = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert [labels(rows, index, base) for index in range(4)] == [
        [right],
        [right.replace("北京", "Paris")],
        [right],
        ["I can't know."],
    ]
    assert all("<tools>" in renderer_of(base).decode(rows.tokens_of(index).tolist()) for index in range(4))
    found = train_here(spec)
    finished(found)
    assert metrics(found)[-1].accuracy == 1.0
    margin = metrics(found)[-1].reward_margin
    assert margin is not None and margin > 0.5


@pytest.mark.parametrize("training_type", ["lora", "full"])
@pytest.mark.parametrize("kind", ["llama", *KINDS])
def test_a_family_learns_to_call(tmp_path: Path, kind: str, training_type: str) -> None:
    base = tiny_llama(tmp_path / "base") if kind == "llama" else tiny_glm(tmp_path / "base", kind)
    wanted: dict[str, Any] = (
        {"lora_rank": 16, "lora_alpha": 32} if training_type == "lora" else {"training_type": "full"}
    )
    rate = 2e-2 if training_type == "lora" else 1e-2
    n_epochs = 60 if kind == "glm4_moe" else 30
    finished(train_here(function_job(tmp_path / "job", base, CALLS, n_epochs=n_epochs, learning_rate=rate, **wanted)))
    result = tmp_path / "job" / "result"
    whole = result if training_type == "full" else base
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    model = model if training_type == "full" else peft_model(model, result)
    renderer = renderer_of(base)
    for value in CALLS:
        conversation = examples_of(value).conversations[0]
        example = renderer.example(conversation)
        with torch.no_grad():
            likeliest = model(input_ids=torch.tensor([example.tokens])).logits[0].argmax(-1).tolist()
        written = [likeliest[place - 1] for place, trained in enumerate(example.trained) if trained]
        asked = renderer.answer(conversation)
        right = sum(one == other for one, other in zip(written, asked, strict=True)) / len(asked)
        assert right > 0.8 if training_type == "lora" else written == asked, (
            "a tiny model's adapter has room for most of it"
        )
        parser = renderer.answer_parser(conversation.tools)
        pieces = parser.push(renderer.decode(asked)) + parser.finish()
        assert [(p.name, p.arguments) for p in pieces if isinstance(p, CallPiece)] == [
            ("get_weather", value["messages"][1]["tool_calls"][0]["function"]["arguments"])
        ]
