"""What a model can be trained with."""

from typing import Any

from fastapi import Request

from tunewright.api.access import exchange_of
from tunewright.api.answers import Json
from tunewright.api.auth import CallerOf
from tunewright.api.body import router_at
from tunewright.api.native.jobs import PREFIX
from tunewright.api.services import JobsOf
from tunewright.i18n import translate
from tunewright.jobs.hyperparameters import ONLY_LORA, ranges
from tunewright.jobs.ranges import Range

router = router_at(PREFIX)


@router.get("/models/{name}/hyperparameters")
def model_hyperparameters(request: Request, name: str, caller: CallerOf, jobs: JobsOf) -> Json:
    """Every method and type of training that starts from this model, with the range of each hyperparameter and what "auto"
    becomes."""
    language = exchange_of(request.scope).language
    base, pairs = jobs.trainings(caller.project_id, name)
    trainings = [
        {
            "method": method,
            "training_type": training_type,
            "hyperparameters": [
                _range_object(name, range_, language)
                for name, range_ in ranges(method, training_type, base.context_tokens).items()
                if training_type == "lora" or name not in ONLY_LORA
            ],
        }
        for method, training_type in pairs
    ]
    return Json({"object": "model.hyperparameters", "model": name, "base": base.code, "trainings": trainings})


def _range_object(name: str, range_: Range, language: str) -> dict[str, Any]:
    """`default` is what "auto" becomes where no data is needed to know it; `auto` says the rule in a sentence."""
    sentence = translate(range_.auto, language, **range_.values, default=range_.default)
    return {"name": name, **range_.shape(), "default": range_.default, "auto": sentence}
