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

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "glm4": GLM4, "instruct": INSTRUCT, "native": NATIVE}

_SPECIALS = {
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "glm4": ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
    "instruct": ["<s>", "</s>"],
}
_CONFIG = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "glm4": {"eos_token": "<|endoftext|>"},
    "instruct": {"bos_token": "<s>", "eos_token": "</s>"},
}
_STOPS = {"llama3": ["<|eot_id|>"], "glm4": ["<|endoftext|>", "<|user|>", "<|observation|>"], "instruct": ["</s>"]}


def styled_folder(folder: Path, style: str, *, template: str | None = None) -> Path:
    """A folder whose tokenizer has the special tokens of `style` (a key of TEMPLATES); returns it."""
    tiny_tokenizer(folder, chat_template=template or TEMPLATES[style])
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in _SPECIALS.get(style, [])])
    if style == "native":
        tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<tool_call>", "</tool_call>", "<think>")])
    tokenizer.save(str(path))
    edit_json(folder / "tokenizer_config.json", **_CONFIG.get(style, {}))
    if style in _STOPS:
        stops = [tokenizer.token_to_id(text) for text in _STOPS[style]]
        edit_json(folder / "generation_config.json", eos_token_id=stops)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
