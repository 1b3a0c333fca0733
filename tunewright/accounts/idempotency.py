"""A create that is sent twice happens once.

Two ways lead to the earlier result: the same `Idempotency-Key` within 24 h, or, because the openai SDK retries without one,
the same body from the same API key within 120 s when the SDK says that it retries. Look up and remember in the same
write transaction as the create itself: then a failed create burns no key, and of fifty at once one creates.
"""

import hashlib
import re
from typing import TYPE_CHECKING

import msgspec

from tunewright.clock import wall_s
from tunewright.errors import IdempotencyMismatch, InvalidRequest
from tunewright.i18n import mark

if TYPE_CHECKING:
    from tunewright.storage import Transaction

KEY_KEPT_S = 24 * 3600
RETRY_WINDOW_S = 120

_KEY = re.compile(r"[\x20-\x7e]{1,255}")
_QUOTED = re.compile(r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')


class IdempotencyKey(msgspec.Struct, frozen=True, kw_only=True):
    """What marks a create as one that may have been sent before.

    `fingerprint` is a hash of route and body: a key may not be used for two. `body_sha256` adds the API key's id; it is
    always there, because the first request, which is no retry, must leave it for the retry to find.
    """

    key: str | None
    is_retry: bool
    body_sha256: str
    fingerprint: str

    def with_content(self, *parts: str) -> "IdempotencyKey":
        """The same for a request whose meaning is not in its raw body: an upload, whose multipart boundary differs with each
        try. Build it with an empty body, then add file name, purpose and sha256 of the content here."""
        return msgspec.structs.replace(
            self, body_sha256=_digest(self.body_sha256, *parts), fingerprint=_digest(self.fingerprint, *parts)
        )


def from_headers(
    *, idempotency_key: str | None, retry_count: str | None, key_id: str, route: str, body: bytes
) -> IdempotencyKey:
    """From the values of `Idempotency-Key` and `x-stainless-retry-count` (None where absent).

    `route` is method and path template, with the dialect's prefix. Raises InvalidRequest (`invalid_idempotency_key`).
    """
    body_hash = hashlib.sha256(body).hexdigest()
    return IdempotencyKey(
        key=None if idempotency_key is None else _key(idempotency_key),
        is_retry=re.fullmatch(r"0*[1-9][0-9]{0,3}", retry_count or "") is not None,
        body_sha256=_digest(key_id, route, body_hash),
        fingerprint=_digest(route, body_hash),
    )


def find_earlier(tx: "Transaction", project_id: str, route: str, idem: IdempotencyKey) -> str | None:
    """Id of the resource that an earlier try made, or None.

    Raises IdempotencyMismatch (`idempotency_key_reused`) if the key came with another request within 24 h.
    """
    if idem.key is not None:
        earlier = tx.idempotency.find(project_id, route, f"key:{idem.key}", since=wall_s() - KEY_KEPT_S)
        if earlier is None:
            return None
        fingerprint, resource_id = earlier
        if fingerprint != idem.fingerprint:
            raise IdempotencyMismatch(
                "idempotency_key_reused",
                mark("This Idempotency-Key was used for another request within 24 hours"),
                param="Idempotency-Key",
            )
        return resource_id
    if idem.is_retry:
        earlier = tx.idempotency.find(project_id, route, f"body:{idem.body_sha256}", since=wall_s() - RETRY_WINDOW_S)
        return earlier and earlier[1]
    return None


def remember(tx: "Transaction", project_id: str, route: str, idem: IdempotencyKey, resource_id: str) -> None:
    """Leave what `find_earlier` needs; call it in the transaction that inserts the resource."""
    now = wall_s()
    if idem.key is not None:
        tx.idempotency.insert(project_id, route, f"key:{idem.key}", idem.fingerprint, resource_id, now)
    tx.idempotency.insert(project_id, route, f"body:{idem.body_sha256}", idem.fingerprint, resource_id, now)


def forget_expired(tx: "Transaction") -> int:
    """Drop what no lookup can find any more; returns how many rows. For a control loop."""
    return tx.idempotency.forget_before(wall_s() - KEY_KEPT_S)


def _key(header: str) -> str:
    """The key in a header value, bare or in double quotes."""
    quoted = _QUOTED.fullmatch(header)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else header
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            "invalid_idempotency_key",
            mark("Idempotency-Key must be 1 to 255 printable ASCII characters"),
            param="Idempotency-Key",
        )
    return key


def _digest(*parts: str) -> str:
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
