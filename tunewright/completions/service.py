"""From a chat request to a stream of deltas: resolve the model, render the prompt, let an engine answer, parse the answer."""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tunewright.accounts.rates import Buckets
from tunewright.accounts.records import Caller
from tunewright.clock import mono_s
from tunewright.completions.answer_formats import answer_grammar, offers_tools
from tunewright.completions.choices import answer_deltas, choice_of, side_by_side
from tunewright.completions.embeddings import EmbeddingAnswer, EmbeddingRequest, embed_order, in_order
from tunewright.completions.metering import Meter, Metering
from tunewright.completions.vocabulary import ChatRequest, Completion, Delta, Finish, Usage
from tunewright.deployments.ports import Done, Embed, Generate, TokenText, Vector
from tunewright.deployments.serving import Serving, Target
from tunewright.errors import Conflict, InvalidRequest, RateLimited, TunewrightError, Unavailable
from tunewright.i18n import mark
from tunewright.ids import new_id
from tunewright.models.records import Base, TunedModel
from tunewright.models.service import ModelService
from tunewright.rendering.conversation import Conversation
from tunewright.rendering.renderer import Renderer, renderer_of
from tunewright.settings import Settings

_YIELD_PAUSE_S = 0.25


class _Admitted(NamedTuple):
    target: Target
    renderer: Renderer
    order: Generate
    opening: str
    """The text of an answer that the engine begins because a call is required."""
    meter: Meter


class CompletionService:
    """Answers chat requests of both dialects."""

    def __init__(self, models: ModelService, serving: Serving, settings: Settings, metering: Metering) -> None:
        self._models = models
        self._serving = serving
        self._settings = settings
        self._metering = metering
        self._under_way: Counter[str] = Counter()
        self._tokens = Buckets(settings.max_tokens_per_minute, settings.max_tokens_per_minute)

    async def stream(self, caller: Caller, request: ChatRequest) -> AsyncGenerator[Delta, None]:
        """The deltas of all choices, a `Finish` at the end of each.

        Everything that the caller did wrong is raised before the first delta: NotFound (`model_not_found`), InvalidRequest
        (`context_length_exceeded`, `invalid_value`, ...), RateLimited (`concurrency_limit`, `token_rate_exceeded`), Unavailable.
        Closing the iterator frees the engine's slots.
        """
        async with (
            self._admitted(caller, request, whole=False) as admitted,
            aclosing(self._deltas(caller, request, admitted)) as deltas,
        ):
            async for delta in deltas:
                yield delta

    @asynccontextmanager
    async def _admitted(self, caller: Caller, request: ChatRequest, *, whole: bool) -> AsyncIterator[_Admitted]:
        """What to do for a request that nothing is wrong with. It is one row of the ledger, however often it is tried."""
        with self._metered(caller, request, whole=whole) as metered, self._places(caller, request, request.n):
            target, renderer, order, opening = await asyncio.to_thread(self._prepare, caller, request)
            meter = metered(target, len(order.prompt_ids))
            yield _Admitted(target, renderer, order, opening, meter)

    @contextmanager
    def _metered(
        self, caller: Caller, request: ChatRequest | EmbeddingRequest, *, whole: bool
    ) -> Iterator[Callable[[Target, int], Meter]]:
        """Gives what begins the meter once target and tokens of the prompt are known, and ends it however the request ends."""
        begun_s = mono_s()
        meter: Meter | None = None

        def begin(target: Target, prompt_tokens: int) -> Meter:
            nonlocal meter
            if not request.priority:
                self._tokens.spend(caller.key_id, prompt_tokens)
            meter = self._metering.begin(
                caller, request, target, prompt_tokens=prompt_tokens, begun_s=begun_s, whole=whole
            )
            return meter

        try:
            if not request.priority:
                self._check_token_rate(caller)
            yield begin
        except TunewrightError as error:
            if meter is None:
                self._metering.refused(error.code)
            else:
                meter.end(error=error.code)
            raise
        except Exception:
            if meter is not None:
                meter.end(error="internal_error")
            raise
        finally:
            if meter is not None:
                meter.end()  # whoever leaves before the end

    async def _deltas(self, caller: Caller, request: ChatRequest, admitted: _Admitted) -> AsyncGenerator[Delta, None]:
        order, meter, renderer = admitted.order, admitted.meter, admitted.renderer
        tools = request.conversation.tools if offers_tools(request) else ()
        answers = [
            answer_deltas(
                choice,
                self._replies(caller, request, admitted.target, _order_of(choice, order), choice, meter),
                renderer.answer_parser(tools),
                renderer,
                opening=admitted.opening,
                one_call=request.one_call,
            )
            for choice in range(request.n)
        ]
        async with aclosing(_counted(answers, len(order.prompt_ids), meter)) as deltas:
            async for delta in deltas:
                yield delta

    async def _replies(
        self,
        caller: Caller,
        request: ChatRequest,
        target: Target,
        order: Generate,
        choice: int,
        meter: Meter,
    ) -> AsyncGenerator[TokenText | Done, None]:
        """What the engine says. An adapter that can't be loaded because its model was just deleted is a model not found; one
        whose files are not what was published is the server's affair, a Conflict(`adapter_invalid`)."""
        tokens = 0
        try:
            generate = self._patiently if request.priority else self._serving.generate
            async with aclosing(generate(target, order)) as replies:
                async for reply in replies:
                    tokens = reply.n_tokens if isinstance(reply, TokenText) else reply.completion_tokens
                    meter.produced(choice, tokens)
                    yield reply
        except InvalidRequest as error:
            if target.tuned is not None and error.code == "adapter_invalid":
                await asyncio.to_thread(self._models.resolve, caller.project_id, request.model)
                values: dict[str, Any] = dict(error.values)
                raise Conflict(error.code, error.message, param="model", **values) from error
            raise
        finally:
            if not request.priority:
                self._tokens.spend(caller.key_id, tokens)

    async def _patiently(self, target: Target, order: Generate) -> AsyncGenerator[TokenText | Done, None]:
        """All of an answer at its end; one that had to make room for others begins anew."""
        while True:
            try:
                async with aclosing(self._serving.generate(target, order)) as replies:
                    whole = [reply async for reply in replies]
                break
            except Unavailable as error:
                if error.code != "engine_yielded":
                    raise
                await asyncio.sleep(_YIELD_PAUSE_S)
        for reply in whole:
            yield reply

    async def complete(self, caller: Caller, request: ChatRequest) -> Completion:
        """All answers at once; raises like `stream`. Nobody has seen any of it, so an engine that is lost is no loss yet."""
        async with self._admitted(caller, request, whole=True) as admitted:
            try:
                return await self._whole(caller, request, admitted)
            except Unavailable as error:
                if error.code != "engine_lost":
                    raise
            admitted.meter.again()
            return await self._whole(caller, request, admitted)

    async def _whole(self, caller: Caller, request: ChatRequest, admitted: _Admitted) -> Completion:
        deltas: list[list[Delta]] = [[] for _ in range(request.n)]
        usage: Usage | None = None
        async with aclosing(self._deltas(caller, request, admitted)) as stream:
            async for delta in stream:
                deltas[delta.choice].append(delta)
                if isinstance(delta, Finish):
                    usage = delta.usage
        if usage is None:
            raise RuntimeError("the stream ended without a finish")
        return Completion(choices=tuple(map(choice_of, deltas)), usage=usage)

    async def embed(self, caller: Caller, request: EmbeddingRequest) -> EmbeddingAnswer:
        """A vector for each input. Raises NotFound (`model_not_found`), InvalidRequest (`embeddings_not_supported`,
        `context_length_exceeded`, `invalid_value`), RateLimited, Unavailable."""
        with self._metered(caller, request, whole=True) as metered, self._places(caller, request, 1):
            target, order = await asyncio.to_thread(self._embed_order, caller, request)
            usage = Usage(prompt_tokens=sum(map(len, order.texts)), completion_tokens=0)
            meter = metered(target, usage.prompt_tokens)
            vectors: dict[int, bytes] = {}
            async with aclosing(self._serving.embed(target, order)) as replies:
                async for reply in replies:
                    if isinstance(reply, Vector):
                        vectors[reply.index] = reply.data
            meter.first()
            await meter.stored()
            meter.end(usage)
            return EmbeddingAnswer(vectors=in_order(vectors, request.dimensions), usage=usage)

    def _embed_order(self, caller: Caller, request: EmbeddingRequest) -> tuple[Target, Embed]:
        resolved = self._models.resolve(caller.project_id, request.model)
        target = Target(base=resolved.base, tuned=resolved.tuned, deployment=None)
        order = embed_order(target.base, target.tuned, request, self._context(target.base))
        self._serving.check_room(target)
        return target, order

    def _prepare(self, caller: Caller, request: ChatRequest) -> tuple[Target, Renderer, Generate, str]:
        """What to ask of the engine, and the text of an answer that it begins because a call is required."""
        target = self._serving.resolve(caller.project_id, request.model)
        base, tuned = target.base, target.tuned
        self._serving.check_room(target)
        renderer = renderer_of(Path(base.path or ""))
        if tuned is not None and tuned.renderer_hash != renderer.hash:
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
        if tuned is not None and not tuned.proof and target.deployment is None:
            self._prove(caller, request.model, base, tuned)
        conversation = request.conversation
        if not offers_tools(request):
            conversation = Conversation(messages=conversation.messages)
        # Rendering 20 MB takes half a minute of a processor: what can't fit is refused by its length.
        texts = sum(len(message.content or "") for message in conversation.messages)
        least = (texts + _size_of(conversation.tools)) // renderer.longest_token
        if least >= self._context(base):
            sentence = mark("The prompt has at least {prompt} tokens; this model's context holds {context}.")
            raise _too_long(sentence, least, self._context(base))
        ids, opening = [], ""
        if conversation.tools and request.tool_choice == "required":
            ids, opening = renderer.call_opening(request.function)
        order = self._order(base, request, renderer, renderer.prompt(conversation) + ids)
        grammar = answer_grammar(request, renderer)
        order = msgspec.structs.replace(order, grammar=grammar, grammar_begun=ids, tenant=caller.project_id)
        return target, renderer, order, opening

    def _prove(self, caller: Caller, name: str, base: Base, checkpoint: TunedModel) -> None:
        """Measure the effect of a checkpoint that is called for the first time; what has none is not served."""
        try:
            proof = self._serving.prove(base, checkpoint)
        except InvalidRequest:
            self._models.resolve(caller.project_id, name)  # it may just have had its day
            raise
        self._models.keep_proof(checkpoint, proof)

    def _context(self, base: Base) -> int:
        return min(base.context_tokens, self._settings.engine_context_tokens)

    def _order(self, base: Base, request: ChatRequest, renderer: Renderer, prompt: list[int]) -> Generate:
        sampling = request.sampling
        unknown = [token for token in sampling.logit_bias if token >= renderer.vocabulary_size]
        if unknown:
            raise InvalidRequest(
                "invalid_value",
                mark("logit_bias names token {token}; this model has the tokens 0 to {last}."),
                param="logit_bias",
                token=unknown[0],
                last=renderer.vocabulary_size - 1,
            )
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
            request_id="",
            prompt_ids=prompt,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            max_tokens=min(sampling.max_tokens or self._settings.max_completion_tokens, context - len(prompt)),
            stop=list(sampling.stop),
            stop_ids=sorted(renderer.stop_ids),
            grammar_after="</think>" if renderer.opens_reasoning else "",
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=sampling.logit_bias,
            top_logprobs=sampling.top_logprobs,
            priority=request.priority,
        )

    def _check_token_rate(self, caller: Caller) -> None:
        if wait_s := self._tokens.wait_s(caller.key_id):
            seconds = math.ceil(wait_s)
            sentence = mark("This key has used its tokens of this minute; wait {seconds} s.")
            raise RateLimited("token_rate_exceeded", sentence, retry_after_s=seconds, seconds=seconds)

    @contextmanager
    def _places(self, caller: Caller, request: ChatRequest | EmbeddingRequest, wanted: int) -> Iterator[None]:
        """Every choice of a request counts as a completion under way."""
        limit = self._settings.max_streams_per_key
        if request.priority:  # nobody waits: the loop that asks has limits of its own
            yield
            return
        if self._under_way[caller.key_id] + wanted > limit:
            raise RateLimited(
                "concurrency_limit", mark("This key may have {limit} completions under way."), limit=limit
            )
        self._under_way[caller.key_id] += wanted
        try:
            yield
        finally:
            self._under_way[caller.key_id] -= wanted
            if not self._under_way[caller.key_id]:
                del self._under_way[caller.key_id]


async def _counted(
    answers: list[AsyncGenerator[Delta, None]], prompt_tokens: int, meter: Meter
) -> AsyncGenerator[Delta, None]:
    """The deltas of all answers; the last `Finish` gets the tokens of all, the others none."""
    left, completion_tokens, cached_tokens, first = len(answers), 0, prompt_tokens, True
    async with aclosing(answers[0] if len(answers) == 1 else side_by_side(answers)) as deltas:
        async for delta in deltas:
            if first:
                meter.first()
                await meter.stored()
                first = False
            usage = None
            if isinstance(delta, Finish) and delta.usage is not None:
                left, completion_tokens = left - 1, completion_tokens + delta.usage.completion_tokens
                cached_tokens = min(cached_tokens, delta.usage.cached_tokens)
                if not left:
                    usage = Usage(
                        prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, cached_tokens=cached_tokens
                    )
                delta = msgspec.structs.replace(delta, usage=usage)
            yield delta
            meter.delivered()
            if usage is not None:
                meter.end(usage)


def _too_long(sentence: str, prompt: int, context: int) -> InvalidRequest:
    return InvalidRequest("context_length_exceeded", sentence, param="messages", prompt=prompt, context=context)


def _size_of(tools: Sequence[Any]) -> int:
    """Characters that tools add to a prompt, by a low guess: templates write them in ways of their own."""
    return len(msgspec.json.encode(tools)) // 8


def _order_of(choice: int, order: Generate) -> Generate:
    seed = None if order.seed is None else (order.seed + choice) % 2**63
    return msgspec.structs.replace(order, request_id=new_id("gen"), seed=seed)
