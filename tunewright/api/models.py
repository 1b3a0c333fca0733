"""Models over HTTP, the same in both dialects. Names are the rest of the path: clients send `org%2Fmodel` and colons."""

from fastapi import APIRouter, Request

from tunewright.api.access import exchange_of
from tunewright.api.answers import Json
from tunewright.api.auth import CallerOf
from tunewright.api.body import router_at
from tunewright.api.lists import page
from tunewright.api.renderings import deleted_model, model_object
from tunewright.api.services import DeploymentsOf, ModelsOf
from tunewright.errors import NotFound


def list_models(caller: CallerOf, models: ModelsOf, deployments: DeploymentsOf) -> Json:
    """The bases on this machine, the project's own models and what it has deployed, by the names to call; one page."""
    found = [*models.list(caller.project_id), *deployments.cards(caller.project_id)]
    return Json(page(found, False, model_object))


def retrieve(name: str, caller: CallerOf, models: ModelsOf, deployments: DeploymentsOf) -> Json:
    """One model, or one deployment by its name."""
    try:
        card = models.card(caller.project_id, name)
    except NotFound:
        card = next((each for each in deployments.cards(caller.project_id) if each.id == name), None)
        if card is None:
            raise
    return Json(model_object(card))


def delete(request: Request, name: str, caller: CallerOf, models: ModelsOf) -> Json:
    """Remove a tuned model; a second time gives the same answer."""
    models.delete(caller.project_id, name)
    return Json(deleted_model(name, exchange_of(request.scope).request_id))


def model_router(prefix: str) -> APIRouter:
    """A router with all of them."""
    router = router_at(prefix)
    router.add_api_route("/models", list_models, methods=["GET"])
    router.add_api_route("/models/{name:path}", retrieve, methods=["GET"])
    router.add_api_route("/models/{name:path}", delete, methods=["DELETE"])
    return router
