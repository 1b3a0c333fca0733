"""The master key and what is derived from it: one key for each purpose, so that a leak of one opens nothing else.

Stored proofs begin with a byte that names the generation of their key; a later release can derive new keys and still know
which proofs were made with old ones.
"""

import hmac
import os
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tunewright.errors import Misconfigured
from tunewright.files_on_disk import fsync_folder, write_atomically
from tunewright.i18n import mark

GENERATION = b"\x01"
_NONCE_BYTES = 12


def create_master_key(path: Path) -> None:
    """Make a master key (32 random bytes in hex, mode 0600) unless there is one; of two makers, one wins."""
    prepared = path.with_name(f".{path.name}.{os.getpid()}.new")
    write_atomically(prepared, os.urandom(32).hex().encode() + b"\n")
    try:
        os.link(prepared, path)  # fails where a rename would replace
    except FileExistsError:
        pass
    finally:
        prepared.unlink()
    fsync_folder(path.parent)


def read_master_key(path: Path) -> bytes:
    """The 32 bytes. Raises Misconfigured if the file holds anything else, FileNotFoundError if there is none."""
    try:
        master = bytes.fromhex(path.read_text("ascii").strip())
    except ValueError:
        master = b""
    if len(master) != 32:
        raise Misconfigured("master_key_invalid", mark("{path} must hold 64 hexadecimal digits"), path=path)
    return master


class Sealer:
    """Seals texts for storage with the key of one purpose. What was sealed opens only in the context it was sealed for."""

    def __init__(self, master: bytes, purpose: bytes) -> None:
        self._cipher = AESGCM(_derive(master, purpose))

    def seal(self, text: str, context: str) -> bytes:
        """The text, encrypted: generation byte + nonce + AES-GCM with `context`, which is not secret."""
        nonce = os.urandom(_NONCE_BYTES)
        return GENERATION + nonce + self._cipher.encrypt(nonce, text.encode(), context.encode())

    def unseal(self, sealed: bytes, context: str) -> str | None:
        """The text, or None if it was sealed in another context or with another master key, or changed."""
        nonce, cipher = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        if sealed[:1] != GENERATION or len(nonce) != _NONCE_BYTES:
            return None
        try:
            return self._cipher.decrypt(nonce, cipher, context.encode()).decode()
        except InvalidTag:
            return None


class Secrets:
    """Proofs and sealed copies of API secrets. Both are bound to their key's id, so rows can't be swapped."""

    def __init__(self, master: bytes) -> None:
        self._pepper = _derive(master, b"tunewright bearer mac")
        self._sealer = Sealer(master, b"tunewright jwt secret seal")
        self._nobody = self.proof("", "")

    def proof(self, key_id: str, secret: str) -> bytes:
        """What is stored to recognise a secret: generation byte + HMAC-SHA256."""
        return GENERATION + hmac.digest(self._pepper, f"{key_id}.{secret}".encode(), "sha256")

    def proves(self, stored: bytes | None, key_id: str, secret: str) -> bool:
        """Whether `stored` is this secret's proof; takes as long when there is none."""
        same = hmac.compare_digest(self.proof(key_id, secret), self._nobody if stored is None else stored)
        return same and stored is not None

    def seal(self, key_id: str, project_id: str, secret: str) -> bytes:
        """The secret, sealed with the key's and the project's id as context."""
        return self._sealer.seal(secret, _context(key_id, project_id))

    def unseal(self, sealed: bytes, key_id: str, project_id: str) -> str | None:
        """The secret, or None if it was sealed for another key or project, with another master key, or changed."""
        return self._sealer.unseal(sealed, _context(key_id, project_id))


def _derive(master: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=purpose + GENERATION).derive(master)


def _context(key_id: str, project_id: str) -> str:
    return f"{key_id}|{project_id}"
