"""From what the engine says of one prompt to the deltas of one or several choices, and from deltas to whole answers."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from tunewright.completions.vocabulary import (
    Choice,
    Delta,
    Finish,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from tunewright.deployments.ports import Done, TokenScore, TokenText
from tunewright.rendering.renderer import Renderer
from tunewright.rendering.tools import AnswerParser, CallPiece, Piece, ReasoningPiece, TextPiece


async def answer_deltas(
    choice: int,
    replies: AsyncGenerator[TokenText | Done, None],
    parser: AnswerParser,
    renderer: Renderer,
    *,
    opening: str = "",
    one_call: bool = False,
) -> AsyncGenerator[Delta, None]:
    """The deltas of one choice; its `Finish` has the tokens of this choice alone.

    `opening` is the beginning of the answer that stands in the prompt already. With `one_call` the first call ends the answer.
    """
    called = False
    logprobs: list[TokenLogprob] = []
    pieces = parser.push(opening)
    async with aclosing(replies):
        async for reply in replies:
            pieces += parser.push(reply.text)
            if isinstance(reply, TokenText):
                logprobs += [_logprob(score, renderer) for score in reply.scores]
            else:
                pieces += parser.finish(cut=reply.reason == "length")
            for piece in _to_first_call(pieces) if one_call else pieces:
                called = called or isinstance(piece, CallPiece)
                delta = _delta(piece, choice)
                if logprobs and isinstance(delta, TextDelta):
                    delta, logprobs = msgspec.structs.replace(delta, logprobs=logprobs), []
                yield delta
            pieces = []
            if isinstance(reply, Done) or (called and one_call):
                if logprobs:  # of tokens without text of their own
                    yield TextDelta(text="", choice=choice, logprobs=logprobs)
                yield _finish(reply, choice, called=called)
                return


def _to_first_call(pieces: list[Piece]) -> list[Piece]:
    first = next((n for n, piece in enumerate(pieces) if isinstance(piece, CallPiece)), len(pieces))
    return pieces[: first + 1]


def _finish(last: TokenText | Done, choice: int, *, called: bool) -> Finish:
    done = isinstance(last, Done)
    reason = last.reason if done else "stop"
    usage = Usage(
        prompt_tokens=0,
        completion_tokens=last.completion_tokens if done else last.n_tokens,
        cached_tokens=last.cached_tokens if done else 0,
    )
    return Finish(reason="tool_calls" if called and reason == "stop" else reason, usage=usage, choice=choice)


async def side_by_side(answers: list[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """The deltas of several answers as they come. The first error ends all of them."""
    arrived: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(len(answers))

    async def take(answer: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(answer):
                async for delta in answer:
                    await arrived.put(delta)
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    tasks = [asyncio.ensure_future(take(answer)) for answer in answers]
    try:
        left = len(tasks)
        while left:
            item = await arrived.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def choice_of(deltas: list[Delta]) -> Choice:
    """The deltas of one answer put together."""
    text: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, dict[str, str]] = {}
    logprobs: list[TokenLogprob] = []
    reason = ""
    for delta in deltas:
        match delta:
            case TextDelta():
                text.append(delta.text)
                logprobs += delta.logprobs or []
            case ReasoningDelta():
                reasoning.append(delta.text)
            case ToolCallDelta():
                call = calls.setdefault(delta.index, {"id": "", "name": "", "arguments": ""})
                call["id"] += delta.id or ""
                call["name"] += delta.name or ""
                call["arguments"] += delta.arguments
            case Finish():
                reason = delta.reason
    return Choice(
        text="".join(text),
        reason=reason,
        reasoning="".join(reasoning) or None,
        tool_calls=tuple(calls[index] for index in sorted(calls)),
        logprobs=logprobs or None,
    )


def _delta(piece: Piece, choice: int) -> Delta:
    match piece:
        case TextPiece():
            return TextDelta(text=piece.text, choice=choice)
        case ReasoningPiece():
            return ReasoningDelta(text=piece.text, choice=choice)
        case CallPiece():
            return ToolCallDelta(
                index=piece.index, id=piece.id, name=piece.name, arguments=piece.arguments, choice=choice
            )


def _logprob(score: TokenScore, renderer: Renderer) -> TokenLogprob:
    def of(token_id: int, logprob: float, top: list[TokenLogprob] | None) -> TokenLogprob:
        written = renderer.written(token_id)
        return TokenLogprob(
            token=written.decode(errors="replace"), bytes=list(written), logprob=logprob, top_logprobs=top
        )

    return of(score.token_id, score.logprob, [of(*one, None) for one in score.top])
