"""Embeddings through the unmodified SDKs against a real server."""

import base64
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from zhipuai import ZhipuAI

from tests.dialects.test_batches import ended, jsonl, lines
from tests.live_server import LiveServer
from tunewright.rendering.renderer import Renderer

TEXTS = ["The capital of France", "你好，世界", "The capital of France"]


@pytest.fixture(scope="module")
def client(live_server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(api_key=live_server.key, base_url=f"{live_server.address}/v1") as client:
        yield client


def length(vector: list[float]) -> float:
    return math.sqrt(sum(number * number for number in vector))


def test_openai_gets_vectors_in_both_encodings(client: OpenAI, tiny_base: Path) -> None:
    packed = client.embeddings.create(model="tiny", input=TEXTS)  # the SDK asks for base64 by itself
    plain = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    assert [each.index for each in packed.data] == [0, 1, 2]
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert length(one.embedding) == pytest.approx(1, abs=1e-5)
    first, second, third = (each.embedding for each in plain.data)
    assert first == pytest.approx(third, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 0.01
    renderer = Renderer(tiny_base)
    ids = [renderer.plain(text) for text in TEXTS]
    assert plain.usage.prompt_tokens == plain.usage.total_tokens == sum(map(len, ids))
    by_ids = client.embeddings.create(model="tiny", input=ids, encoding_format="float")
    assert by_ids.data[1].embedding == pytest.approx(second, abs=1e-4)
    single = client.embeddings.create(model="tiny", input=ids[1], encoding_format="float")
    assert len(single.data) == 1 and single.data[0].embedding == pytest.approx(second, abs=1e-4)


def test_base64_is_of_little_endian_float32(live_server: LiveServer) -> None:
    with live_server.api() as api:
        body = {"model": "tiny", "input": "hi"}
        text = api.post("/embeddings", json=body | {"encoding_format": "base64"}).json()["data"][0]["embedding"]
        numbers = api.post("/embeddings", json=body).json()["data"][0]["embedding"]
    packed = base64.b64decode(text)
    assert struct.unpack(f"<{len(packed) // 4}f", packed) == pytest.approx(numbers, abs=1e-7)


def test_zhipu_gets_vectors(live_server: LiveServer) -> None:
    with ZhipuAI(api_key=live_server.key, base_url=f"{live_server.address}/api/paas/v4") as client:
        answer = client.embeddings.create(model="tiny", input=TEXTS)
        assert length(answer.data[1].embedding) == pytest.approx(1, abs=1e-5)
        assert answer.usage.completion_tokens == 0 and answer.usage.total_tokens == answer.usage.prompt_tokens > 0
        with pytest.raises(Exception, match="1211"):
            client.embeddings.create(model="embedding-3", input="a")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"input": []}, "invalid_value"),
        ({"input": ""}, "invalid_value"),
        ({"input": ["a", ""]}, "invalid_value"),
        ({"input": ["a", 3]}, "invalid_value"),
        ({"input": [[10**6]]}, "invalid_value"),
        ({"input": [[-1]]}, "invalid_value"),
        ({"input": "word " * 9000}, "context_length_exceeded"),
        ({"dimensions": 8}, "unsupported_parameter"),
        ({"encoding_format": "int8"}, "invalid_value"),
    ],
)
def test_wrong_requests_are_refused(client: OpenAI, arguments: dict[str, Any], code: str) -> None:
    request: dict[str, Any] = {"model": "tiny", "input": "a", **arguments}
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(**request)
    assert caught.value.code == code


def test_a_model_without_them_says_so(client: OpenAI, tuned_model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=tuned_model, input="a")
    assert caught.value.code == "embeddings_not_supported"


def test_a_batch_makes_vectors_too(client: OpenAI) -> None:
    rows = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/embeddings", "body": {"model": "tiny", "input": text}}
        for n, text in enumerate([*TEXTS, ""])
    ]
    file = client.files.create(file=jsonl(rows), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    done = ended(client, made.id)
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 3, 1)
    answers = lines(client.files.content(done.output_file_id).read())
    assert length(answers[0]["response"]["body"]["data"][0]["embedding"]) == pytest.approx(1, abs=1e-5)


def test_the_ledger_counts_them(live_server: LiveServer) -> None:
    with live_server.api("/api/v1") as api:
        rows = api.get("/usage/requests", params={"limit": 1000}).json()["data"]
    mine = [row for row in rows if row["endpoint"] == "/embeddings" and row["status"] == "ok"]
    assert mine and all(row["completion_tokens"] == 0 < row["prompt_tokens"] for row in mine)
