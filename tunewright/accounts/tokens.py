"""Tokens that a client signs with its API secret (JWT as the Zhipu SDKs make it): pure parsing and proof.

General JWT libraries do not fit: times are in milliseconds, and what they support beyond HS256 is attack surface. The
order is fixed: shape, header, the id that the payload claims, MAC over the bytes as they came, and only then the time.

Source: zhipuai 2.1.5 `core/_jwt_token.py` (header and payload), RFC 7515 (compact serialisation).
"""

import base64
import hmac
import re
from typing import Any

import msgspec

from tunewright import strict_json
from tunewright.errors import AuthenticationFailed, InvalidRequest
from tunewright.i18n import mark

MAX_TOKEN_CHARACTERS = 4096
KEY_ID = re.compile(r"[0-9a-f]{32}")

_SEGMENT = re.compile(r"[A-Za-z0-9_-]+")
_MAC_BYTES = 32
# Header members that would change which key is used or how the payload is read. We would ignore them, but a client
# that sends them means something that we do not do.
_REFUSED = frozenset({"crit", "jku", "jwk", "kid", "x5u", "x5c", "x5t", "x5t#S256", "b64", "zip", "enc", "epk"})


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """A well-formed token. Nothing in it is true until `signed_with` says so."""

    key_id: str
    expires_ms: int
    signed: bytes
    mac: bytes

    def signed_with(self, secret: str) -> bool:
        """Whether the MAC is HMAC-SHA256 of the token's own first two segments under `secret`."""
        return hmac.compare_digest(hmac.digest(secret.encode(), self.signed, "sha256"), self.mac)


def invalid_token() -> AuthenticationFailed:
    """One error for every flaw: a caller learns neither which ids exist nor how far a forgery came."""
    return AuthenticationFailed("invalid_token", mark("The token is not valid"))


def token_expired() -> AuthenticationFailed:
    return AuthenticationFailed(
        "token_expired", mark("The token has expired; 'exp' counts milliseconds and must lie ahead")
    )


def parse(text: str) -> Token:
    """Raises AuthenticationFailed (`invalid_token`)."""
    if len(text) > MAX_TOKEN_CHARACTERS:
        raise invalid_token()
    segments = text.split(".")
    if len(segments) != 3:
        raise invalid_token()
    header, payload = _members(segments[0]), _members(segments[1])
    mac = _bytes_of(segments[2])
    if header.get("alg") != "HS256" or header.get("sign_type", "SIGN") != "SIGN" or header.get("typ", "JWT") != "JWT":
        raise invalid_token()
    key_id, expires_ms = payload.get("api_key"), payload.get("exp")
    if (
        not _REFUSED.isdisjoint(header)
        or len(mac) != _MAC_BYTES
        or not isinstance(key_id, str)
        or not KEY_ID.fullmatch(key_id)
        or type(expires_ms) is not int  # True is an int to isinstance
    ):
        raise invalid_token()
    return Token(key_id=key_id, expires_ms=expires_ms, signed=f"{segments[0]}.{segments[1]}".encode("ascii"), mac=mac)


def _members(segment: str) -> dict[str, Any]:
    try:
        members = strict_json.loads(_bytes_of(segment))
    except InvalidRequest:
        raise invalid_token() from None
    if not isinstance(members, dict):
        raise invalid_token()
    return members


def _bytes_of(segment: str) -> bytes:
    """base64url without padding, and only in its one canonical spelling."""
    if not _SEGMENT.fullmatch(segment) or len(segment) % 4 == 1:
        raise invalid_token()
    data = base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    if base64.urlsafe_b64encode(data).rstrip(b"=") != segment.encode("ascii"):
        raise invalid_token()
    return data
