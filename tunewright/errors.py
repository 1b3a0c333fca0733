"""Everything that can go wrong for a user, as types.

The domain raises a *kind* (a class below) with a stable `code`; each dialect of the API has one table that turns kinds and
codes into statuses and bodies (`api/*/errors.py`). Nothing here knows HTTP.

To add an error: pick the kind, a new snake_case code, and an English sentence with `{named}` places wrapped in `mark()`;
add the Chinese sentence to `locale/zh/`. Sentences say where, what was expected, and quote at most 40 characters of
the value (`quote()`). Errors cross process borders, so every argument must pickle.
"""

from typing import ClassVar

from tunewright.i18n import translate


class TunewrightError(Exception):
    """Base of all errors whose text a user may read.

    `param` names the offending field or argument (`hyperparameters.n_epochs`), `values` fill the sentence,
    `retryable` says whether the same request can succeed later without change.
    """

    kind: ClassVar[str] = "internal"

    def __init__(
        self, code: str, message: str, *, param: str | None = None, retryable: bool = False, **values: object
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.param = param
        self.retryable = retryable
        self.values = values

    def text(self, language: str = "en") -> str:
        """The sentence in 'en' or 'zh'."""
        return translate(self.message, language, **self.values)

    def __str__(self) -> str:
        return f"{self.code}: {self.text()}"

    def __reduce__(self) -> tuple[object, ...]:
        state = {"param": self.param, "retryable": self.retryable, "values": self.values}
        return (type(self), (self.code, self.message), state)

    def __setstate__(self, state: dict[str, object] | None) -> None:
        self.__dict__.update(state or {})


class InvalidRequest(TunewrightError):
    """The request or its data is wrong; the caller must change it."""

    kind = "invalid_request"


class AuthenticationFailed(TunewrightError):
    """No key, or not a valid one."""

    kind = "authentication"


class PermissionDenied(TunewrightError):
    """A valid key that may not do this."""

    kind = "permission"


class NotFound(TunewrightError):
    """Absent, or not visible to this project: one body for both."""

    kind = "not_found"


class Conflict(TunewrightError):
    """The state of the thing forbids it now (file in use, job already ended)."""

    kind = "conflict"


class TooLarge(TunewrightError):
    """Body, file, line or upload over its limit."""

    kind = "too_large"


class UnsupportedMedia(TunewrightError):
    """Content type or content encoding that the route does not take."""

    kind = "unsupported_media"


class IdempotencyMismatch(TunewrightError):
    """The same idempotency key with another request."""

    kind = "idempotency_mismatch"


class RateLimited(TunewrightError):
    """Too many requests, streams or jobs for this key."""

    kind = "rate_limited"

    def __init__(self, code: str, message: str, *, retry_after_s: int = 1, **rest: object) -> None:
        super().__init__(code, message, retryable=True, **rest)  # type: ignore[arg-type]
        self.retry_after_s = retry_after_s


class Unavailable(TunewrightError):
    """This part of the product can't answer now (engine starting, database busy, shutting down)."""

    kind = "unavailable"

    def __init__(self, code: str, message: str, *, retry_after_s: int = 1, **rest: object) -> None:
        super().__init__(code, message, retryable=True, **rest)  # type: ignore[arg-type]
        self.retry_after_s = retry_after_s


class StorageFull(TunewrightError):
    """No room on the disk."""

    kind = "storage_full"


class Misconfigured(TunewrightError):
    """The operator must change something (bad home, unknown base folder, offline). Command-line exit code 78."""

    kind = "misconfigured"


def quote(value: object) -> str:
    """At most 40 characters of a value, printable, for use inside a sentence. JSON's other values are spelled as in JSON;
    of lists and objects only the brackets are shown, for they may be as large as a body."""
    if isinstance(value, list | tuple):
        text = "[…]" if value else "[]"
    elif isinstance(value, dict):
        text = "{…}" if value else "{}"
    elif value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = value if isinstance(value, str) else repr(value)
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:40])
    return shown + ("…" if len(text) > 40 else "")


def as_sent(value: object) -> str:
    """`quote`, with a text in quotation marks as in the body, so that `"5"` is not taken for the number it should have been."""
    return f'"{quote(value)}"' if isinstance(value, str) else quote(value)
