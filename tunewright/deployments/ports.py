"""The internal protocol between the gateway and an engine worker.

Transport: TCP on 127.0.0.1, one connection per request, newline-delimited JSON. The first line from the client is an
`EngineRequest` and carries the worker's secret; the worker answers with lines of `EngineReply`. Closing the connection cancels
the request and frees its slot. A worker without the right secret in the first line closes at once and says nothing.
"""

from typing import Any

import msgspec

OWN_CODE = "tunewright.engines.own_code"
"""Reads a WorkerSpec from its standard input and keeps what that model's own code says (`engines/references.py`)."""


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """`spec.json` in a worker's folder (mode 0600), written by the server before it starts the process."""

    worker_id: str
    base_code: str
    base_path: str
    base_files: dict[str, str]
    renderer_hash: str
    secret: str
    threads: int
    slots: int
    queue: int
    adapters: int
    context_tokens: int
    idle_exit_s: float
    """An orphaned worker (its parent is gone, nobody connects) ends itself after this."""
    weights_path: str | None = None
    """Serve the weights of this folder in place of the base's: of a model trained in full, or one with an adapter merged in.
    Tokenizer and renderer stay the base's, and there are no adapters: they would be made for other weights."""
    weights_sha256: str | None = None
    """Of that folder's MANIFEST.json, which has those of its other files; without it the folder is not loaded."""
    precision: str = "auto"
    """Number format of matrix products: float32, bfloat16, fastest (measured), or auto: float32 on a processor."""
    weights: str = "exact"
    """exact, float16, or int8 for weights of 8 bits."""
    store_path: str | None = None
    """Adapters are loaded from below this folder only; None does not look."""
    references_path: str | None = None
    """What models' own code says of them is remembered in this folder; None has it say so at every start."""
    engine: str = "torch"
    """`torch`, ours, or `vllm`."""
    python: str | None = None
    """The interpreter that has vLLM; None is the one that the worker was started with."""


class WorkerProcess(msgspec.Struct, frozen=True, kw_only=True):
    """`worker.json`, written by the worker once it can answer: how a restarted server finds it again."""

    pid: int
    start_ticks: int
    port: int
    worker_id: str


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """Continue `prompt_ids`. `adapter_id` None is the base; `adapter_path` is where to load it from on first use
    (the server writes it from its registry; callers of the API can't).
    `stop_ids` end the answer and are not shown; `stop` strings too, also across token borders."""

    secret: str
    request_id: str
    fingerprint: str = ""
    """Equal for requests that make the worker do the same; `State` says those it is at."""
    prompt_ids: list[int]
    adapter_id: str | None = None
    adapter_path: str | None = None
    adapter_sha256: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int
    stop: list[str] = []
    stop_ids: list[int] = []
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    top_logprobs: int | None = None
    """How many of the likeliest tokens are told at each place; None tells no probabilities at all."""
    grammar: str | None = None
    """What the answer must be, in llguidance's words, once it has said `grammar_after`; None leaves it free."""
    grammar_after: str = ""
    grammar_begun: list[int] = []
    """The last tokens of the prompt that are the beginning of the answer already."""
    priority: int = 0
    """0: somebody waits for the answer. Larger numbers come after smaller ones and give way to 0: they are begun only while no
    such request waits, pause while its prompt is read, and lose their slot to it if there is no other (`engine_yielded`)."""
    tenant: str | None = None
    """Who may be answered with what was computed for this request, and with whose what (see `engines/prefixes.py`): requests of
    the same tenant and adapter. None: nothing is reused."""


class Prove(msgspec.Struct, frozen=True, kw_only=True, tag="prove"):
    """Load the adapter and compare next-token logits with the base's on `prompts` (token ids)."""

    secret: str
    adapter_id: str
    adapter_path: str
    adapter_sha256: str
    prompts: list[list[int]]


class Embed(msgspec.Struct, frozen=True, kw_only=True, tag="embed"):
    """Vectors of texts (token ids) under the base: its last hidden states, after the final norm, pooled by `mean` over all tokens
    or taken from the `last` one, and normalised. A `Vector` for each text, in any order, then `Done`."""

    secret: str
    request_id: str
    texts: list[list[int]]
    pooling: str
    priority: int = 0


class Unload(msgspec.Struct, frozen=True, kw_only=True, tag="unload"):
    """Forget an adapter; requests that use it end first."""

    secret: str
    adapter_id: str


class Health(msgspec.Struct, frozen=True, kw_only=True, tag="health"):
    """Ask for the worker's state."""

    secret: str


EngineRequest = Generate | Prove | Embed | Unload | Health


class TokenScore(msgspec.Struct, frozen=True, array_like=True):
    """A token of the answer with the natural logarithm of its probability, as the model itself gave it: before temperature,
    penalties and bias. `top` are the likeliest tokens at its place, likeliest first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class TokenText(msgspec.Struct, frozen=True, kw_only=True, tag="token", omit_defaults=True):
    """New text (whole characters; may be empty) after `n_tokens` generated tokens so far. `scores` are of the tokens whose
    text is out with this line, if the request asked for them."""

    text: str
    n_tokens: int
    scores: list[TokenScore] = []


class Vector(msgspec.Struct, frozen=True, kw_only=True, tag="vector"):
    """The vector of one text; `data` are little-endian float32."""

    index: int
    data: bytes


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """The last line of a generation. `reason` is stop or length."""

    reason: str
    prompt_tokens: int
    completion_tokens: int
    text: str = ""
    cached_tokens: int = 0
    """Of the prompt: computed for an earlier request of the same tenant."""


class Proof(msgspec.Struct, frozen=True, kw_only=True, tag="proof"):
    """What `Prove` measured. `max_logit_shift` is the largest absolute difference over all prompts and tokens."""

    tensors: int
    tensors_applied: int
    max_logit_shift: float
    mean_logit_shift: float
    load_ms: float


class State(msgspec.Struct, frozen=True, kw_only=True, tag="state"):
    """Answer to `Health`; also the empty answer to `Unload`."""

    worker_id: str
    base_code: str
    active: int
    waiting: int
    slots: int
    adapters: list[str]
    precision: str = ""
    """Number format of matrix products: float32, bfloat16, float16 or int8."""
    threads: int = 0
    adapter_hits: int = 0
    """Requests that began, since the worker's start, with an adapter that was not loaded for them."""
    adapter_loads: int = 0
    adapter_load_ms: float = 0.0
    """Of all loads together."""
    step_s: float = 0.0
    """For how long the engine has been at its present step; 0 while it has nothing to do."""
    running: list[str] = []
    """Fingerprints of the generations that take part in its steps."""
    prefix_hits: int = 0
    """Prompts so far of which the beginning had been computed before."""
    prefix_tokens_reused: int = 0
    prefix_tokens_total: int = 0
    """Of all prompts so far."""


class Trouble(msgspec.Struct, frozen=True, kw_only=True, tag="trouble"):
    """The request failed. `kind` is that of the error class to raise (`errors.py`), the rest its arguments."""

    kind: str
    code: str
    message: str
    values: dict[str, Any] = {}


EngineReply = TokenText | Vector | Done | Proof | State | Trouble

encode_line = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(EngineRequest).decode
decode_reply = msgspec.json.Decoder(EngineReply).decode
