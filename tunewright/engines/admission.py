"""What every engine refuses before it queues anything."""

from pathlib import Path

from tunewright.deployments.ports import Embed, Generate, Prove, Unload
from tunewright.engines.adapter_files import adapter_invalid
from tunewright.engines.adapter_shelf import Key
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark


def check_request(
    request: Generate | Prove | Embed | Unload,
    *,
    tokens: range,
    context_tokens: int,
    own_weights: bool,
    store: str | None,
) -> Key | None:
    """The adapter that a request needs, None for the base. `tokens` are those that can be read and written, adapters lie below
    `store` and nowhere else.

    Raises InvalidRequest for what can never be served.
    """
    if isinstance(request, Unload):
        return None
    prompts = _prompts_of(request)
    answer = request.max_tokens if isinstance(request, Generate) else 0
    if not prompts or not all(prompts) or any(i not in tokens for prompt in prompts for i in prompt):
        raise InvalidRequest("invalid_prompt", mark("The prompt is empty or has tokens that this base does not know."))
    if isinstance(request, Generate) and not all(token in tokens for token in request.logit_bias):
        raise InvalidRequest(
            "invalid_value", mark("logit_bias has tokens that this base does not know."), param="logit_bias"
        )
    if isinstance(request, Generate) and answer < 1:
        raise InvalidRequest("invalid_max_tokens", mark("max_tokens must be at least 1."), param="max_tokens")
    longest = max(map(len, prompts))
    if longest + answer > context_tokens:
        raise InvalidRequest(
            "context_length_exceeded",
            mark("{prompt} prompt tokens and up to {answer} answer tokens are more than the limit of {limit} tokens."),
            prompt=longest,
            answer=answer,
            limit=context_tokens,
        )
    if isinstance(request, Embed) or request.adapter_id is None:
        return None
    if own_weights:
        raise adapter_invalid(["this instance serves a model with weights of its own"])
    if not request.adapter_path or not request.adapter_sha256:
        raise adapter_invalid(["its path or sha256 is missing from the request"])
    if store is not None and not Path(request.adapter_path).resolve().is_relative_to(Path(store).resolve()):
        raise adapter_invalid(["it does not lie where this server keeps adapters"])
    return Key(request.adapter_id, request.adapter_sha256)


def _prompts_of(request: Generate | Prove | Embed) -> list[list[int]]:
    if isinstance(request, Prove):
        return request.prompts
    return request.texts if isinstance(request, Embed) else [request.prompt_ids]
