"""Run by test_zai_sdk.py in an environment of its own (zai-sdk and zhipuai exclude each other)."""

import io
import json
import sys
import time

from zai import ZhipuAiClient
from zai.core import APIStatusError


def main(address: str, key: str, model: str) -> None:
    """Print one JSON object of what was seen."""
    client = ZhipuAiClient(api_key=key, base_url=f"{address}/api/paas/v4")
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    data = io.BytesIO((json.dumps(row) + "\n").encode())
    data.name = "rows.jsonl"
    seen: dict[str, object] = {}
    made = client.files.create(file=data, purpose="fine-tune")
    seen["file_status"] = made.status
    seen["listed"] = made.id in [file.id for file in client.files.list().data]
    seen["content"] = client.files.content(made.id).content == data.getvalue()
    job = client.post("/fine_tuning/jobs", body={"model": "tiny", "training_file": made.id}, cast_type=object)
    seen["job"] = job["object"]
    seen["cancelled"] = client.post(f"/fine_tuning/jobs/{job['id']}/cancel", cast_type=object)["id"] == job["id"]
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "你好"}], max_tokens=6)
    seen["tokens"] = answer.usage.completion_tokens
    again = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "hi"}, answer.choices[0].message, {"role": "user", "content": "and?"}],
        max_tokens=4,
    )
    seen["again"] = again.choices[0].finish_reason
    chunks = list(
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "你好"}], stream=True, max_tokens=6
        )
    )
    seen["finish"] = chunks[-1].choices[0].finish_reason
    seen["usage"] = chunks[-1].usage.total_tokens > 0
    try:
        client.chat.completions.create(model="nowhere", messages=[{"role": "user", "content": "hi"}])
    except APIStatusError as error:
        seen["error"] = error.response.json()["error"]["code"]
    seen["vectors"] = len(client.embeddings.create(model="tiny", input=["a", "你好"]).data)
    seen |= offline(client, model)
    while client.get(f"/fine_tuning/jobs/{job['id']}", cast_type=object)["status"] != "cancelled":
        time.sleep(0.1)  # a file can be deleted once no unfinished job uses it
    seen["deleted"] = client.files.delete(made.id).deleted if made.id else None
    print(json.dumps(seen))


def offline(client: ZhipuAiClient, model: str) -> dict[str, object]:
    """What was seen of a late answer and of a batch."""
    messages = [{"role": "user", "content": "你好"}]
    task = client.chat.asyncCompletions.create(model=model, messages=messages, max_tokens=4)
    seen: dict[str, object] = {"begun": type(task).__name__, "begun_status": task.task_status}
    while (late := client.chat.asyncCompletions.retrieve_completion_result(task.id)).task_status == "PROCESSING":
        time.sleep(0.1)
    seen["late"] = [type(late).__name__, late.task_status, late.choices[0].message.role, late.usage.total_tokens > 0]
    long = [{"role": "user", "content": "word " * 9000}]
    task = client.chat.asyncCompletions.create(model=model, messages=long)
    while (failed := client.chat.asyncCompletions.retrieve_completion_result(task.id)).task_status == "PROCESSING":
        time.sleep(0.1)
    seen["failed"] = [type(failed).__name__, failed.task_status]
    body = {"model": model, "messages": messages, "max_tokens": 4}
    row = {"custom_id": "one", "method": "POST", "url": "/v4/chat/completions", "body": body}
    data = io.BytesIO((json.dumps(row) + "\n").encode())
    data.name = "batch.jsonl"
    file = client.files.create(file=data, purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v4/chat/completions", metadata={"a": "b"})
    while client.batches.retrieve(batch.id).status not in ("completed", "failed"):
        time.sleep(0.1)
    done = client.batches.retrieve(batch.id)
    line = json.loads(client.files.content(done.output_file_id).content)
    seen["batch"] = [done.status, done.request_counts.completed, line["response"]["body"]["request_id"]]
    seen["batch_listed"] = batch.id in [each.id for each in client.batches.list(limit=1)]
    return seen


if __name__ == "__main__":
    main(*sys.argv[1:])
