"""From a chat request to a stream of deltas: resolve the model, render the prompt, let the pool answer, parse the answer."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from tunewright.accounts.records import Caller
from tunewright.completions.vocabulary import (
    ChatRequest,
    Completion,
    Delta,
    Finish,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from tunewright.deployments.pool import Pool
from tunewright.deployments.ports import Done, Generate, TokenText
from tunewright.errors import Conflict, InvalidRequest, RateLimited
from tunewright.i18n import mark
from tunewright.ids import new_id
from tunewright.models.records import FULL, Base, TunedModel
from tunewright.models.service import ModelService
from tunewright.rendering.conversation import Conversation
from tunewright.rendering.renderer import Renderer, renderer_of
from tunewright.rendering.tools import AnswerParser, CallPiece, Piece, ReasoningPiece, TextPiece
from tunewright.settings import Settings


class CompletionService:
    """Answers chat requests of both dialects."""

    def __init__(self, models: ModelService, pool: Pool, settings: Settings) -> None:
        self._models = models
        self._pool = pool
        self._settings = settings
        self._under_way: Counter[str] = Counter()

    async def stream(self, caller: Caller, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        """The deltas of one answer, exactly one `Finish` at the end.

        Everything that the caller did wrong is raised before the first delta: NotFound (`model_not_found`), InvalidRequest
        (`context_length_exceeded`, `invalid_value`, ...), RateLimited (`concurrency_limit`), Unavailable. Closing the
        iterator frees the engine's slot.
        """
        with self._slot(caller):
            base, tuned, renderer, prompt = await asyncio.to_thread(self._prepare, caller, request)
            order = self._order(base, request, renderer, prompt)
            answer = AnswerParser(_offers_tools(request), reasoning_open=renderer.opens_reasoning)
            called = False
            async with aclosing(self._replies(caller, request, base, tuned, order)) as replies:
                async for reply in replies:
                    for piece in answer.push(reply.text):
                        called = called or isinstance(piece, CallPiece)
                        yield _delta(piece)
                    if isinstance(reply, Done):
                        for piece in answer.finish():
                            called = called or isinstance(piece, CallPiece)
                            yield _delta(piece)
                        usage = Usage(prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)
                        yield Finish(
                            reason="tool_calls" if called and reply.reason == "stop" else reply.reason, usage=usage
                        )

    async def _replies(
        self, caller: Caller, request: ChatRequest, base: Base, tuned: TunedModel | None, order: Generate
    ) -> AsyncGenerator[TokenText | Done, None]:
        """What the pool says. An adapter that can't be loaded because its model was just deleted is a model not found."""
        try:
            async with aclosing(self._pool.generate(base, tuned, order)) as replies:
                async for reply in replies:
                    yield reply
        except InvalidRequest as error:
            if tuned is not None and error.code == "adapter_invalid":
                await asyncio.to_thread(self._models.resolve, caller.project_id, request.model)
            raise

    async def complete(self, caller: Caller, request: ChatRequest) -> Completion:
        """The whole answer at once; raises like `stream`."""
        text: list[str] = []
        reasoning: list[str] = []
        calls: dict[int, dict[str, str]] = {}
        finish: Finish | None = None
        async with aclosing(self.stream(caller, request)) as deltas:
            async for delta in deltas:
                match delta:
                    case TextDelta():
                        text.append(delta.text)
                    case ReasoningDelta():
                        reasoning.append(delta.text)
                    case ToolCallDelta():
                        call = calls.setdefault(delta.index, {"id": "", "name": "", "arguments": ""})
                        call["id"] += delta.id or ""
                        call["name"] += delta.name or ""
                        call["arguments"] += delta.arguments
                    case Finish():
                        finish = delta
        if finish is None:
            raise RuntimeError("the stream ended without a finish")
        return Completion(
            text="".join(text),
            reasoning="".join(reasoning) or None,
            tool_calls=tuple(calls[index] for index in sorted(calls)),
            reason=finish.reason,
            usage=finish.usage,
        )

    def _prepare(self, caller: Caller, request: ChatRequest) -> tuple[Base, TunedModel | None, Renderer, list[int]]:
        resolved = self._models.resolve(caller.project_id, request.model)
        base = resolved.base
        if not base.pool or (resolved.tuned is not None and resolved.tuned.kind == FULL):
            raise InvalidRequest(
                "model_not_served",
                mark('"{model}" is not served from the shared pool; deploy a private instance of it.'),
                param="model",
                model=request.model,
            )
        renderer = renderer_of(Path(base.path or ""))
        if resolved.tuned is not None and resolved.tuned.renderer_hash != renderer.hash:
            raise Conflict(
                "renderer_changed",
                mark(
                    'The tokenizer or chat template of "{base}" is not the one that "{model}" was trained with; '
                    "restore the base as it was, or train again."
                ),
                param="model",
                base=base.code,
                model=request.model,
            )
        conversation = request.conversation
        if not _offers_tools(request):
            conversation = Conversation(messages=conversation.messages)
        # Rendering 20 MB takes half a minute of a processor: what can't fit is refused by its length.
        texts = sum(len(message.content or "") for message in conversation.messages)
        least = (texts + _size_of(conversation.tools)) // renderer.longest_token
        if least >= self._context(base):
            sentence = mark("The prompt has at least {prompt} tokens; this model's context holds {context}.")
            raise _too_long(sentence, least, self._context(base))
        return base, resolved.tuned, renderer, renderer.prompt(conversation)

    def _context(self, base: Base) -> int:
        return min(base.context_tokens, self._settings.engine_context_tokens)

    def _order(self, base: Base, request: ChatRequest, renderer: Renderer, prompt: list[int]) -> Generate:
        sampling = request.sampling
        context = self._context(base)
        if len(prompt) >= context:
            sentence = mark("The prompt has {prompt} tokens; this model's context holds {context}, answer included.")
            raise _too_long(sentence, len(prompt), context)
        if sampling.max_tokens is not None and sampling.max_tokens > context:
            raise InvalidRequest(
                "invalid_value",
                mark("max_tokens must be between 1 and {context}."),
                param="max_tokens",
                context=context,
            )
        return Generate(
            secret="",
            request_id=new_id("gen"),
            prompt_ids=prompt,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            max_tokens=min(sampling.max_tokens or self._settings.max_completion_tokens, context - len(prompt)),
            stop=list(sampling.stop),
            stop_ids=sorted(renderer.stop_ids),
        )

    @contextmanager
    def _slot(self, caller: Caller) -> Iterator[None]:
        limit = self._settings.max_streams_per_key
        if self._under_way[caller.key_id] >= limit:
            raise RateLimited(
                "concurrency_limit", mark("This key has {limit} completions under way, its limit."), limit=limit
            )
        self._under_way[caller.key_id] += 1
        try:
            yield
        finally:
            self._under_way[caller.key_id] -= 1
            if not self._under_way[caller.key_id]:
                del self._under_way[caller.key_id]


def _too_long(sentence: str, prompt: int, context: int) -> InvalidRequest:
    return InvalidRequest("context_length_exceeded", sentence, param="messages", prompt=prompt, context=context)


def _size_of(tools: Sequence[Any]) -> int:
    """Characters that tools add to a prompt, by a low guess: templates write them in ways of their own."""
    return len(msgspec.json.encode(tools)) // 8


def _offers_tools(request: ChatRequest) -> bool:
    return bool(request.conversation.tools) and request.tool_choice != "none"


def _delta(piece: Piece) -> Delta:
    match piece:
        case TextPiece():
            return TextDelta(text=piece.text)
        case ReasoningPiece():
            return ReasoningDelta(text=piece.text)
        case CallPiece():
            return ToolCallDelta(index=piece.index, id=piece.id, name=piece.name, arguments=piece.arguments)
