"""The sentences that people get, in their channel's language."""

from typing import Any

from tunewright.i18n import mark, translate
from tunewright.notifications.records import (
    DEPLOYMENT_FAILED,
    DEPLOYMENT_READY,
    TEST_TYPE,
    TYPE_OF_STATUS,
    Delivery,
)

_TITLES = {
    TYPE_OF_STATUS["succeeded"]: mark("Fine-tuning succeeded: {model}"),
    TYPE_OF_STATUS["failed"]: mark("Fine-tuning failed: {model}"),
    TYPE_OF_STATUS["cancelled"]: mark("Fine-tuning cancelled: {model}"),
    DEPLOYMENT_READY: mark("Instance ready: {model}"),
    DEPLOYMENT_FAILED: mark("Instance failed: {model}"),
    TEST_TYPE: mark("Test message from Tunewright"),
}
_BODIES = {
    TYPE_OF_STATUS["succeeded"]: mark("Job {id} has succeeded. The model {model} is ready."),
    TYPE_OF_STATUS["failed"]: mark("Job {id} has failed; there is no model {model}. Cause ({code}): {cause}"),
    TYPE_OF_STATUS["cancelled"]: mark("Job {id} was cancelled; there is no model {model}."),
    DEPLOYMENT_READY: mark("Deployment {id} is ready. Call it as {model}."),
    DEPLOYMENT_FAILED: mark("Deployment {id} of {model} can't be started. Cause ({code}): {cause}"),
    TEST_TYPE: mark("This channel works: it will be told when jobs end and when deployments are ready or fail."),
}


def title_and_body(delivery: Delivery, language: str) -> tuple[str, str]:
    """The two texts of one message."""
    error = delivery.data.get("error") or {}
    values = {
        "id": delivery.subject_id,
        "model": delivery.data.get("model", ""),
        "code": error.get("code", ""),
        "cause": _cause(error, language) if error else "",
    }
    return translate(_TITLES[delivery.type], language, **values), translate(_BODIES[delivery.type], language, **values)


def _cause(error: dict[str, Any], language: str) -> str:
    try:
        return translate(error["message"], language, **error["values"])
    except (LookupError, ValueError, TypeError):  # a sentence with a place that these values can't fill
        return error["code"]
