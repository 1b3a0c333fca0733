"""Private instances: deploy a model, change the number of its replicas, undeploy it."""

from typing import Annotated, Any

from fastapi import Request
from pydantic import Field

from tunewright.api.access import exchange_of
from tunewright.api.answers import Json
from tunewright.api.auth import CallerOf
from tunewright.api.body import router_at
from tunewright.api.idempotency import IdempotencyOf
from tunewright.api.lists import After, Limit, clamped, page
from tunewright.api.native.jobs import PREFIX
from tunewright.api.refusals import StrictBody
from tunewright.api.services import DeploymentsOf
from tunewright.deployments.records import DeploymentEvent, Reason
from tunewright.deployments.service import NewDeployment, Shown
from tunewright.i18n import translate

MOST = 100
MOST_EVENTS = 200

router = router_at(PREFIX)

Replicas = Annotated[int, Field(ge=1)]
IdleMinutes = Annotated[float, Field(gt=0, description="Without a call for so long, no replica runs until the next")]


class NewDeploymentBody(StrictBody):
    """`merge` adds a LoRA model's adapter to its base for good, for this instance; else it runs beside the base, as in the
    pool."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    replicas: Replicas = 1
    name: Annotated[str, Field(max_length=128)] | None = None
    merge: bool = False
    idle_minutes: IdleMinutes | None = None


class DeploymentChangesBody(StrictBody):
    """What is absent stays. `idle_minutes: null` lets it run for ever."""

    replicas: Replicas | None = None
    idle_minutes: IdleMinutes | None = None


@router.post("/deployments")
def create_deployment(
    request: Request,
    body: NewDeploymentBody,
    caller: CallerOf,
    deployments: DeploymentsOf,
    idempotency: IdempotencyOf,
) -> Json:
    """Deploy a base or a tuned model. The answer comes at once; `status` says when it takes calls."""
    wanted = NewDeployment(
        model=body.model,
        replicas=body.replicas,
        name=body.name,
        merge=body.merge,
        idle_minutes=body.idle_minutes,
    )
    return Json(_shown(request, deployments.create(caller.project_id, wanted, idempotency)), status_code=201)


@router.get("/deployments")
def list_deployments(
    request: Request, caller: CallerOf, deployments: DeploymentsOf, after: After, limit: Limit = None
) -> Json:
    """Newest first; without those that were undeployed."""
    found, more = deployments.list(caller.project_id, after=after, limit=clamped(limit, 20, MOST))
    return Json(page(found, more, lambda each: _shown(request, each)))


@router.get("/deployments/{deployment_id}")
def retrieve_deployment(request: Request, deployment_id: str, caller: CallerOf, deployments: DeploymentsOf) -> Json:
    """One deployment with the state of each replica."""
    return Json(_shown(request, deployments.get(caller.project_id, deployment_id)))


@router.patch("/deployments/{deployment_id}")
def update_deployment(
    request: Request,
    deployment_id: str,
    body: DeploymentChangesBody,
    caller: CallerOf,
    deployments: DeploymentsOf,
) -> Json:
    """Change what the body names. Replicas that are not wanted any more end with the last of their answers."""
    changes: dict[str, Any] = {} if body.replicas is None else {"replicas": body.replicas}
    if "idle_minutes" in body.model_fields_set:
        changes["idle_minutes"] = body.idle_minutes
    return Json(_shown(request, deployments.update(caller.project_id, deployment_id, changes)))


@router.delete("/deployments/{deployment_id}")
def delete_deployment(deployment_id: str, caller: CallerOf, deployments: DeploymentsOf) -> Json:
    """Undeploy, effective at once; a second time gives the same answer."""
    deployments.undeploy(caller.project_id, deployment_id)
    return Json({"id": deployment_id, "object": "deployment", "deleted": True})


@router.get("/deployments/{deployment_id}/events")
def list_deployment_events(
    request: Request,
    deployment_id: str,
    caller: CallerOf,
    deployments: DeploymentsOf,
    after: After,
    limit: Limit = None,
) -> Json:
    """What happened to it, newest first; the last thousand are kept."""
    found, more = deployments.events(
        caller.project_id, deployment_id, after=after, limit=clamped(limit, 20, MOST_EVENTS)
    )
    language = exchange_of(request.scope).language
    return Json(page(found, more, lambda event: _event_object(event, language)))


def _shown(request: Request, shown: Shown) -> dict[str, Any]:
    language, deployment = exchange_of(request.scope).language, shown.deployment
    replicas = shown.replicas()
    return {
        "id": deployment.id,
        "object": "deployment",
        "name": deployment.name,
        "model": deployment.model,
        "base": deployment.base_code,
        "merge": deployment.merge,
        "status": deployment.status,
        "replicas_wanted": deployment.wanted,
        "replicas_ready": sum(record.state == "ready" for record, _ in replicas),
        "replicas_limit": deployment.replicas,
        "replicas": [
            {
                "id": str(record.number),
                "state": record.state,
                "started_at": record.started_at,
                "restarts": record.restarts,
                "failures": record.failures,
                "next_try_at": record.next_try_at,
                "reason": _reason_object(record.reason, language),
                "memory_bytes": memory_bytes,
            }
            for record, memory_bytes in replicas
        ],
        "reason": _reason_object(deployment.reason, language),
        "idle_minutes": deployment.idle_minutes,
        "memory": {
            "replica_bytes": deployment.memory_bytes,
            "source": deployment.memory_source,
            "free_bytes": shown.free_bytes,
        },
        "proof": deployment.proof or None,
        "created_at": deployment.created_at,
        "ready_at": deployment.ready_at,
    }


def _reason_object(reason: Reason | None, language: str) -> dict[str, Any] | None:
    if reason is None:
        return None
    return {"code": reason.code, "message": translate(reason.message, language, **reason.values)}


def _event_object(event: DeploymentEvent, language: str) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "deployment.event",
        "level": event.level,
        "code": event.code,
        "message": translate(event.message, language, **event.values),
        "created_at": event.created_at,
    }
