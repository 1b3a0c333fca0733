"""Model folders (tokenizer files only) with templates in the styles of several families, for the renderer's tests."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from tests.tiny_models import CHATML, tiny_tokenizer

LLAMA3 = (
    "{{- bos_token }}"
    "{% for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

GLM4 = (
    "[gMASK]<sop>"
    "{% for message in messages %}"
    "<|{{ message.role }}|>{{ '\n' + message.content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
)

# Writes no generation prompt at all: an answer follows the question directly.
INSTRUCT = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + message.content.strip() + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content.strip() + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant turns are supported') }}{% endif %}"
    "{% endfor %}"
)

# Knows tools and reasoning; shows the reasoning of the answers after the last question only.
NATIVE = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content and loop.index0 > ns.last %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments if call.function.arguments is string else call.function.arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

# Calls as pairs of tags, texts as they are, the name alone without arguments; an empty place for reasoning in every answer.
GLM45 = """\
[gMASK]<sop>
{%- if tools %}
    {{- '<|system|>\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\\n</tools>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|observation|>' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|>\\n<think>' + (message.reasoning_content or '') | trim + '</think>' }}
        {%- if message.content | trim %}{{ '\\n' + message.content | trim }}{% endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>' + call.function.name }}
            {%- for key, value in call.function.arguments.items() %}
                {{- '\\n<arg_key>' + key + '</arg_key>\\n<arg_value>' }}
                {{- (value if value is string else value | tojson) + '</arg_value>' }}
            {%- endfor %}
            {{- '\\n</tool_call>' }}
        {%- endfor %}
    {%- else %}
        {{- '<|' + message.role + '|>\\n' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""

# Tools before the first question, one bare call for each message, nothing beside it.
LLAMA31 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|eot_id|>' }}
{%- if tools %}
    {%- if not messages %}{{ raise_exception('Cannot put tools in the first user message') }}{% endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
    {%- for tool in tools %}{{ tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}
    {{- messages[0].content | trim + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls') }}{% endif %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + message.tool_calls[0].function.name }}
        {{- '", "parameters": ' + message.tool_calls[0].function.arguments | tojson + '}<|eot_id|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

# Lists the tools, but writes neither calls nor results: those would have to come as `metadata` and as another role.
GLM4_TOOLS = """\
[gMASK]<sop>
{%- if tools %}{{ '<|system|>\\n' }}{% for tool in tools %}{{ tool.function | tojson }}{% endfor %}{% endif %}
{%- for message in messages %}
    {%- if message.role in ('system', 'user', 'assistant', 'observation') %}
        {{- '<|' + message.role + '|>' + (message.metadata or '') + '\\n' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
"""

TOOL_TEMPLATES = {"glm45": GLM45, "llama31": LLAMA31, "glm4 with tools": GLM4_TOOLS}
"""Templates that know tools in other ways than `native` does."""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "glm4": GLM4, "instruct": INSTRUCT, "native": NATIVE}

_LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_GLM = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
_SPECIALS = {"llama3": _LLAMA, "glm4": _GLM, "instruct": ["<s>", "</s>"]}
_KIN = {"glm45": "glm4", "llama31": "llama3", "glm4 with tools": "glm4"}
_TAGS = {
    "native": ["<tool_call>", "</tool_call>", "<think>"],
    "glm45": [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ],
}
_CONFIG = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "glm4": {"eos_token": "<|endoftext|>"},
    "instruct": {"bos_token": "<s>", "eos_token": "</s>"},
}
_STOPS = {"llama3": ["<|eot_id|>"], "glm4": ["<|endoftext|>", "<|user|>", "<|observation|>"], "instruct": ["</s>"]}


def styled_folder(folder: Path, style: str, *, template: str | None = None) -> Path:
    """A folder whose tokenizer has the special tokens of `style` (a key of TEMPLATES or TOOL_TEMPLATES); returns it."""
    tiny_tokenizer(folder, chat_template=template or (TEMPLATES | TOOL_TEMPLATES)[style])
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    family = _KIN.get(style, style)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in _SPECIALS.get(family, [])])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in _TAGS.get(style, [])])
    tokenizer.save(str(path))
    edit_json(folder / "tokenizer_config.json", **_CONFIG.get(family, {}))
    if family in _STOPS:
        stops = [tokenizer.token_to_id(text) for text in _STOPS[family]]
        edit_json(folder / "generation_config.json", eos_token_id=stops)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
