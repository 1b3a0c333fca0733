"""What a request says its answer must be, as a grammar that the engine holds it to."""

import re
from typing import Any

from tunewright.completions.vocabulary import ChatRequest
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark
from tunewright.rendering.answer_grammar import calls_grammar, free_grammar, is_strict, json_grammar
from tunewright.rendering.renderer import Renderer

_UNKNOWN_WORDS = re.compile(r"Unimplemented keys: \[([^\]]*)\]")


def offers_tools(request: ChatRequest) -> bool:
    """Whether the model may call tools in this answer."""
    return bool(request.conversation.tools) and request.tool_choice != "none"


def answer_grammar(request: ChatRequest, renderer: Renderer) -> str | None:
    """None if nothing is asked of the answer, or only of calls that the base writes in a style that no grammar is made for:
    those are begun for the model, but it goes on as it likes. Covers the beginning that stands in the prompt, too.

    Raises InvalidRequest(`invalid_schema`, `unsupported_parameter`).
    """
    tools = request.conversation.tools if offers_tools(request) else ()
    schema, several = request.answer_schema, not request.one_call
    if schema is not None and not tools:
        grammar = json_grammar(schema)
    elif not tools:
        return None
    elif not renderer.calls_in_json:
        if schema is not None and request.tool_choice == "auto":
            raise InvalidRequest(
                "unsupported_parameter",
                mark("This model can't be given tools and a response_format at once; leave one of them out."),
                param="response_format",
            )
        return None
    elif request.tool_choice == "required":
        wanted = [tool for tool in tools if request.function in (None, tool["function"]["name"])]
        grammar = calls_grammar(wanted, several=several and request.function is None)
    elif schema is not None:
        grammar = calls_grammar(tools, several=several, schema=schema)
    elif any(map(is_strict, tools)):
        grammar = free_grammar(tools, several=several)
    else:
        return None
    _check(grammar, "tools" if schema is None else "response_format.json_schema.schema")
    return grammar


def _check(grammar: str, param: str) -> None:
    from llguidance import LLMatcher  # only here: most servers never need it

    trouble: Any = LLMatcher.validate_grammar(grammar)
    if not trouble:
        return
    unknown = _UNKNOWN_WORDS.search(trouble)
    if unknown:
        raise InvalidRequest(
            "invalid_schema",
            mark("The schema uses {keywords}, which answers can't be held to; leave that out."),
            param=param,
            keywords=unknown[1].replace('"', "")[:200],
        )
    raise InvalidRequest(
        "invalid_schema",
        mark(
            "The schema can't be used: a type, a $ref or a pattern in it is not valid, or it is nested too deeply. "
            "References must stay inside the schema, and patterns can't look ahead or behind."
        ),
        param=param,
    )
