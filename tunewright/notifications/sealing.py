"""The secrets of channels at rest: addresses and signing secrets, each kind under a key of its own purpose."""

import msgspec

from tunewright.accounts.service import AccountService
from tunewright.notifications.records import Channel

MOST_SECRETS = 4
"""A receiver has no use for more signatures than a rotation or two leaves."""


class Signing(msgspec.Struct, frozen=True):
    """A signing secret; `until_s` (Unix seconds) is when it ends, None for the newest."""

    secret: str
    until_s: int | None = None


class Vault:
    """Reads the master key when it is first needed, not when it is made."""

    def __init__(self, accounts: AccountService) -> None:
        self._accounts = accounts

    def seal_url(self, project_id: str, channel_id: str, url: str) -> bytes:
        """An address as it is stored."""
        return self._accounts.sealer(b"tunewright channel address").seal(url, _context(project_id, channel_id))

    def url(self, channel: Channel) -> str | None:
        """The address; None if it was sealed under another master key."""
        sealer = self._accounts.sealer(b"tunewright channel address")
        return sealer.unseal(channel.url_sealed, _context(channel.project_id, channel.id))

    def seal_secrets(self, project_id: str, channel_id: str, secrets: list[Signing]) -> bytes:
        """Signing secrets as they are stored."""
        text = msgspec.json.encode(secrets[:MOST_SECRETS]).decode()
        return self._accounts.sealer(b"tunewright webhook signing").seal(text, _context(project_id, channel_id))

    def secrets(self, channel: Channel, now_s: int) -> list[Signing] | None:
        """Those that are active, the newest first; None if they were sealed under another master key."""
        sealer = self._accounts.sealer(b"tunewright webhook signing")
        text = sealer.unseal(channel.secrets_sealed or b"", _context(channel.project_id, channel.id))
        if text is None:
            return None
        known = msgspec.json.decode(text, type=list[Signing])
        return [each for each in known if each.until_s is None or each.until_s > now_s]


def _context(project_id: str, channel_id: str) -> str:
    return f"{channel_id}|{project_id}"
