"""Chat templates: the Jinja text that a base's folder brings, compiled once, rendered in a sandbox.

Templates come from the catalogue alone (an operator's choice), never from a request: the sandbox stops code, not loops.
The environment offers what Hugging Face templates rely on, so that the text equals `apply_chat_template`'s.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunewright.clock import wall_s
from tunewright.errors import InvalidRequest, Misconfigured, quote
from tunewright.i18n import mark


class _Refused(jinja2.TemplateError):
    """The template itself said no (`raise_exception`): the conversation is at fault, not the template."""


_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What a template can raise on a conversation that it wasn't written for."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks answers for other trainers; here its body is only text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own protocol)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):  # type: ignore[name-defined]
    """Jinja's namespace without underscore names, which could reach the interpreter."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError("underscore names are not allowed in a namespace")
        super().__setitem__(name, value)


def _refuse(message: str) -> None:
    raise _Refused(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which no model has seen in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["namespace"] = _Namespace
    return environment


class ChatTemplate:
    """A compiled template. `variables` are the special tokens by name (`bos_token`), given to every rendering.

    Raises Misconfigured `template_unsupported` when the text is not a template.
    """

    def __init__(self, text: str, variables: Mapping[str, str]) -> None:
        self.text = text
        self._variables = dict(variables)
        environment = _environment()
        try:
            self._compiled = environment.from_string(text)
            self._names = jinja2.meta.find_undeclared_variables(environment.parse(text))
        except jinja2.TemplateError as error:
            raise template_unsupported(
                mark("The chat template of this base can't be used: it does not compile.")
            ) from error

    @property
    def takes_tools(self) -> bool:
        """Whether the template has a place for tool schemas."""
        return "tools" in self._names

    @property
    def takes_reasoning(self) -> bool:
        """Whether the template has a place for an answer's reasoning."""
        return "reasoning_content" in self.text or "message.thinking" in self.text

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], *, generate: bool, now_s: int) -> str:
        """The text of a conversation, with the generation prompt if `generate`. `now_s` is what the template takes for now.

        Raises InvalidRequest `conversation_not_supported` when the template refuses it, Misconfigured
        `template_unsupported` when the template fails.
        """
        moment = datetime.fromtimestamp(now_s)
        try:
            return self._compiled.render(
                messages=list(messages),
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=generate,
                strftime_now=moment.strftime,
                **self._variables,
            )
        except _Refused as error:
            raise InvalidRequest(
                "conversation_not_supported",
                mark("The chat template of this model refuses the conversation: '{reason}'."),
                param="messages",
                reason=quote(error.message or ""),
            ) from error
        except _FAILURES as error:
            raise template_unsupported(
                mark("The chat template of this base can't be used: it fails on a conversation.")
            ) from error


def now_s() -> int:
    """The moment that one whole rendering uses, so that midnight can't fall between its passes."""
    return wall_s()


def template_unsupported(message: str) -> Misconfigured:
    """The error for a chat template that this renderer can't keep its promises with."""
    return Misconfigured("template_unsupported", message)
