"""Small records, every field filled, ids as the product makes them."""

from typing import Any

from tunewright.accounts.records import ApiKey, Project
from tunewright.accounts.usage import UsageRow
from tunewright.batches.records import AsyncTask, Batch, BatchError
from tunewright.datasets.records import File, PartedUpload, UploadPart
from tunewright.deployments.records import Deployment, DeploymentEvent, Reason, ReplicaRecord
from tunewright.ids import new_id, random_text
from tunewright.jobs.records import Job, JobCheckpoint, JobError, JobEvent
from tunewright.models.records import TunedModel
from tunewright.notifications.records import Channel, Delivery

NOON = 1_800_000_000
"""2027-01-15 08:00:00 UTC, the second that ids made by `dated_id(..., 0)` name."""


def dated_id(prefix: str, seconds: int) -> str:
    """An id that was made `seconds` (under 60) after NOON."""
    return f"{prefix}-202701150800{seconds:02d}000-{random_text(20)}"


def project(number: str) -> Project:
    return Project(id=new_id("proj"), number=number * 10, name=f"project {number}", created_at=NOON)


def api_key(project_id: str, **changes: Any) -> ApiKey:
    values: dict[str, Any] = {
        "id": random_text(32),
        "name": "key",
        "secret_mac": b"\x01\x00\xff",
        "secret_sealed": b"\x00",
    }
    values |= {"project_id": project_id, "created_at": NOON}
    return ApiKey(**(values | changes))


def file(project_id: str, **changes: Any) -> File:
    values: dict[str, Any] = {
        "id": new_id("file"),
        "filename": "训练 'a\".jsonl",
        "purpose": "fine-tune",
        "size_bytes": 2**40,
        "sha256": "0" * 64,
        "created_at": NOON,
        "kind": "chat",
        "rows": 3,
        "report": {"warnings": [{"line": 1, "text": "a\"b'\u0001"}], "share": 0.5, "none": None},
    }
    values |= {"project_id": project_id}
    return File(**(values | changes))


def parted_upload(project_id: str, **changes: Any) -> PartedUpload:
    values: dict[str, Any] = {
        "id": new_id("upload"),
        "filename": "训练.jsonl",
        "purpose": "fine-tune",
        "mime_type": "application/jsonl",
        "size_bytes": 2**40,
        "created_at": NOON,
        "expires_at": NOON + 60,
        "file_id": "file-x",
        "on_problems": "keep",
        "completed_with": "2" * 64,
    }
    values |= {"project_id": project_id}
    return PartedUpload(**(values | changes))


def upload_part(of: PartedUpload, **changes: Any) -> UploadPart:
    values: dict[str, Any] = {"id": new_id("part"), "size_bytes": 2**33, "sha256": "3" * 64, "created_at": NOON}
    values |= {"upload_id": of.id, "project_id": of.project_id}
    return UploadPart(**(values | changes))


def job(project_id: str, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "id": new_id("ftjob"),
        "base_code": "base",
        "model": "base-alias",
        "tuned_model_id": "model-1",
        "tuned_model_name": "base:1:x:y",
        "training_file": "file-train",
        "validation_file": "file-valid",
        "requested": {"n_epochs": "auto"},
        "hyperparameters": {"n_epochs": 3, "learning_rate": 1e-4},
        "suffix": "x",
        "seed": 2**31,
        "metadata": {"team": "red", 'quo"te': "a'b", "点": "中文"},
        "request_id": None,
        "created_at": NOON,
        "running_at": NOON + 1,
        "finished_at": NOON + 2,
        "estimated_finish": NOON + 3,
        "trained_tokens": 2**33,
        "result_files": ("file-a", "file-b"),
        "rows": {"used": 2, "skipped": 1},
        "error": JobError(code="c", message="m {n}", param="p", values={"n": 1}),
        "attempt": 1,
        "failures": 1,
        "journal_offset": 2**35,
        "total_steps": 9,
        "step": 4,
        "checkpoint_step": 3,
        "options": {"receipts": "off"},
        "receipts": {"rows": 2},
        "rehearsal": {"status": "done", "memory_peak_bytes": 2**33, "price": None},
        "choices": {"dtype": "bfloat16"},
        "priority": "high",
        "interrupted": True,
        "passes": 2,
        "elapsed_s": 0.25,
        "resources": {"memory_bytes": 2**33, "source": "estimate"},
        "retry_of": "ftjob-a",
        "cloned_from": "ftjob-b",
    }
    values |= {"project_id": project_id}
    return Job(**(values | changes))


def event(of: Job, **changes: Any) -> JobEvent:
    values: dict[str, Any] = {
        "id": new_id("ftevent"),
        "type": "message",
        "message": "step {step}",
        "values": {"step": 1},
        "data": {"loss": 0.25, "accuracy": None},
        "created_at": NOON,
    }
    values |= {"job_id": of.id, "project_id": of.project_id}
    return JobEvent(**(values | changes))


def metrics(of: Job, step: int, **changes: Any) -> JobEvent:
    return event(of, type="metrics", step=step, **changes)


def checkpoint(of: Job, step: int, **changes: Any) -> JobCheckpoint:
    values: dict[str, Any] = {
        "id": new_id("ftckpt"),
        "metrics": {"loss": 1.5},
        "path": f"checkpoints/step-{step}",
        "adapter_sha256": "4" * 64,
        "renderer_hash": "5" * 64,
        "proof": {"tensors": 4},
        "created_at": NOON,
    }
    values |= {"job_id": of.id, "project_id": of.project_id, "step": step}
    return JobCheckpoint(**(values | changes))


def model(project_id: str, **changes: Any) -> TunedModel:
    values: dict[str, Any] = {
        "id": new_id("model"),
        "name": f"base:1:x:{random_text(8)}",
        "base_code": "base",
        "job_id": "ftjob-1",
        "created_at": NOON,
        "status": "ready",
        "adapter_path": "adapters/x",
        "adapter_sha256": "0" * 64,
        "renderer_hash": "1" * 64,
        "checkpoint_step": 7,
        "proof": {"tensors": 4, "max_logit_shift": 0.125},
    }
    values |= {"project_id": project_id}
    return TunedModel(**(values | changes))


def channel(project_id: str, **changes: Any) -> Channel:
    values: dict[str, Any] = {
        "id": new_id("channel"),
        "kind": "webhook",
        "name": "钩子",
        "url_sealed": b"\x01\x00\xff",
        "shown_url": "https://good.example/***",
        "secrets_sealed": b"\x00",
        "language": "zh",
        "recipients": 2,
        "note": "failing_for_days",
        "failing_since": NOON,
        "created_at": NOON,
        "updated_at": NOON + 1,
    }
    values |= {"project_id": project_id}
    return Channel(**(values | changes))


def delivery(of: Channel, **changes: Any) -> Delivery:
    values: dict[str, Any] = {
        "id": new_id("delivery"),
        "event_id": new_id("event"),
        "type": "fine_tuning.job.failed",
        "subject_id": "ftjob-1",
        "data": {"model": "m", "error": {"code": "c", "message": "m {n}", "values": {"n": 1}}},
        "recipients": 3,
        "metered": True,
        "attempts": 2,
        "attempted_at": NOON + 1,
        "next_at": NOON + 2,
        "error": "status",
        "http_status": 500,
        "created_at": NOON,
        "delivered_at": NOON + 3,
    }
    values |= {"channel_id": of.id, "project_id": of.project_id}
    return Delivery(**(values | changes))


def usage(project_id: str, **changes: Any) -> UsageRow:
    values: dict[str, Any] = {
        "id": new_id("usage"),
        "key_id": "key-1",
        "model": "base:1:点:y",
        "base_code": "base",
        "tuned_id": "model-1",
        "deployment_id": "deployment-1",
        "request_id": "req-1",
        "dialect": "zhipu",
        "endpoint": "/chat/completions",
        "prompt_tokens": 2**33,
        "completion_tokens": 7,
        "cached_tokens": 3,
        "status": "running",
        "error_code": "engine_lost",
        "ttft_ms": 12,
        "duration_ms": 2**33,
        "created_at": NOON,
        "server": "server-1",
    }
    values |= {"project_id": project_id}
    return UsageRow(**(values | changes))


def batch(project_id: str, **changes: Any) -> Batch:
    values: dict[str, Any] = {
        "id": new_id("batch"),
        "key_id": "key-1",
        "dialect": "zhipu",
        "endpoint": "/v4/chat/completions",
        "input_file_id": "file-input",
        "completion_window": "24h",
        "metadata": {"点": "中文"},
        "delete_input": True,
        "errors": (BatchError(code="c", message="m {n}", values={"n": 1}, line=2**33, param="p"),),
        "output_file_id": "file-output",
        "error_file_id": "file-errors",
        "total": 3,
        "completed": 2,
        "failed": 1,
        "created_at": NOON,
        "expires_at": NOON + 1,
        "in_progress_at": NOON + 2,
        "finalizing_at": NOON + 3,
        "completed_at": NOON + 4,
        "failed_at": NOON + 5,
        "expired_at": NOON + 6,
        "cancelling_at": NOON + 7,
        "cancelled_at": NOON + 8,
    }
    values |= {"project_id": project_id}
    return Batch(**(values | changes))


def async_task(project_id: str, **changes: Any) -> AsyncTask:
    values: dict[str, Any] = {
        "id": new_id("task"),
        "key_id": "key-1",
        "dialect": "zhipu",
        "model": "base:1:点:y",
        "request_id": "req-1",
        "body": b'{"a":1}',
        "answer": {"choices": [{"点": None}]},
        "error": {"code": "1"},
        "created_at": NOON,
        "ended_at": NOON + 1,
    }
    values |= {"project_id": project_id}
    return AsyncTask(**(values | changes))


def deployment(project_id: str, **changes: Any) -> Deployment:
    reason = Reason(code="replica_died", message="m {n}", values={"n": 1})
    values: dict[str, Any] = {
        "id": new_id("dep"),
        "name": f"mine-{random_text(8)}",
        "model": f"base:1:x:{random_text(8)}",
        "base_code": "base",
        "tuned_model_id": "model-1",
        "replicas": 2,
        "merge": True,
        "idle_minutes": 0.5,
        "status": "scaling",
        "reason": reason,
        "replica_records": (ReplicaRecord(number=3, state="ready", started_at=NOON, restarts=2, reason=reason),),
        "memory_bytes": 2**33,
        "memory_source": "measured",
        "proof": {"tensors": 4},
        "created_at": NOON,
        "ready_at": NOON + 1,
    }
    values |= {"project_id": project_id}
    return Deployment(**(values | changes))


def deployment_event(of: Deployment, **changes: Any) -> DeploymentEvent:
    values: dict[str, Any] = {
        "id": new_id("depevent"),
        "level": "warning",
        "code": "replica_died",
        "message": "m {n}",
        "values": {"n": 1},
        "created_at": NOON,
    }
    values |= {"deployment_id": of.id, "project_id": of.project_id}
    return DeploymentEvent(**(values | changes))
