"""Projects and API keys."""

import msgspec


class Project(msgspec.Struct, frozen=True, kw_only=True):
    """The tenant: every other row names one. `number` is the ten-digit account part of model names."""

    id: str
    number: str
    name: str
    created_at: int


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A stored key. `secret_mac` proves a raw bearer secret; `secret_sealed` (AES-GCM, None when the key refuses JWT mode)
    lets the server verify tokens that were signed with the secret."""

    id: str
    project_id: str
    name: str
    secret_mac: bytes
    secret_sealed: bytes | None
    created_at: int
    revoked_at: int | None = None


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who is asking, as the authentication gate found it."""

    project_id: str
    key_id: str
