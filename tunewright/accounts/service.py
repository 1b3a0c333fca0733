"""Projects, API keys, and who is asking."""

import hashlib
import secrets as random_source
import string
import threading
from typing import TYPE_CHECKING

import msgspec

from tunewright.accounts import tokens
from tunewright.accounts.records import ApiKey, Caller, Project
from tunewright.accounts.secrets import Sealer, Secrets, create_master_key, read_master_key
from tunewright.clock import mono_s, wall_ms, wall_s
from tunewright.errors import AuthenticationFailed, Misconfigured, NotFound
from tunewright.files_on_disk import write_atomically
from tunewright.i18n import mark
from tunewright.ids import new_id
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.storage import Storage

SECRET_CHARACTERS = string.ascii_letters + string.digits
SECRET_LENGTH = 43
"""256 bits, and long enough for HS256 in every JWT library."""
REMEMBERED_S = 5.0
"""How long another process's revocation may take to be noticed; our own is noticed at once."""
REMEMBERED_CALLERS = 4096


class _Remembered(msgspec.Struct, frozen=True):
    caller: Caller
    epoch: int
    until_s: float
    expires_ms: int | None


class AccountService:
    """Keys look like `{32 hex}.{43 letters and digits}`. All methods block; all may be called from any thread.

    No setting concerns accounts yet; `settings` is taken so that all services are built alike.
    """

    def __init__(self, storage: "Storage", home: HomeFolder, settings: Settings) -> None:
        self._storage = storage
        self._home = home
        self._lock = threading.Lock()
        self._loaded: Secrets | None = None
        self._remembered: dict[bytes, _Remembered] = {}
        self._epoch = 0

    def first_start(self) -> str | None:
        """On an empty database: make a project with one key, keep the key in the home's `first.key` and return it.
        None ever after. Raises Misconfigured (`master_key_missing`, `master_key_invalid`, `master_key_differs`)."""
        secrets = self._secrets()
        with self._storage.write() as tx:
            projects = tx.projects.all()
            if projects:
                self._compare(secrets, [key for project in projects[:1] for key in tx.keys.list(project.id)])
                return None
            project = Project(id=new_id("proj"), number=_new_number(set()), name="default", created_at=wall_s())
            key, text = _new_key(secrets, project.id, "first", jwt=True)
            tx.projects.insert(project)
            tx.keys.insert(key)
            # Before the commit: a crash in between leaves a file that the next start replaces, never a lost key.
            write_atomically(self._home.first_key, text.encode() + b"\n")
        return text

    def _compare(self, secrets: Secrets, keys: list[ApiKey]) -> None:
        """With another master key than theirs no key would be valid, and nobody would know why."""
        sealed = [key for key in keys if key.secret_sealed is not None]
        if sealed and all(secrets.unseal(key.secret_sealed or b"", key.id, key.project_id) is None for key in sealed):
            raise Misconfigured(
                "master_key_differs",
                mark("{path} is not the master.key that the keys in the database were made with; restore that one"),
                path=self._home.master_key,
            )

    def create_project(self, name: str) -> Project:
        """A new tenant, without keys."""
        with self._storage.write() as tx:
            number = _new_number({project.number for project in tx.projects.all()})
            project = Project(id=new_id("proj"), number=number, name=name, created_at=wall_s())
            tx.projects.insert(project)
        return project

    def create_key(self, name: str, project_id: str | None = None, *, jwt: bool = True) -> str:
        """The text of a new key, which can't be shown again. `project_id` None means the oldest project.

        With `jwt` False, tokens signed with the secret are refused and no copy that could be decrypted is stored.
        Raises NotFound (`project_not_found`).
        """
        secrets = self._secrets()
        with self._storage.write() as tx:
            project = next(iter(tx.projects.all()), None) if project_id is None else tx.projects.get(project_id)
            if project is None:
                raise NotFound("project_not_found", mark("There is no such project"), param="project_id")
            key, text = _new_key(secrets, project.id, name, jwt=jwt)
            tx.keys.insert(key)
        return text

    def revoke(self, project_id: str, key_id: str) -> None:
        """End a key at once. Raises NotFound (`key_not_found`) if there is no such live key in the project."""
        with self._storage.write() as tx:
            revoked = tx.keys.revoke(project_id, key_id, wall_s())
        self._epoch += 1
        self._remembered.clear()
        if not revoked:
            raise NotFound("key_not_found", mark("There is no such key"), param="key_id")

    def authenticate(self, authorization: str | None) -> Caller:
        """Who sends this Authorization header value.

        Raises AuthenticationFailed: `missing_api_key`, `invalid_api_key`, and for signed tokens `invalid_token`,
        `token_expired`.
        """
        credential = _credential(authorization)
        digest = hashlib.sha256(credential.encode("utf-8", "surrogatepass")).digest()
        known = self._remembered.get(digest)
        if known is not None and known.epoch == self._epoch and mono_s() < known.until_s:
            _check_time(known.expires_ms)
            return known.caller
        epoch = self._epoch  # before the row is read: a revocation in between makes the memory void
        if credential.count(".") >= 2:
            caller, expires_ms = self._caller_of_token(credential)
        else:
            caller, expires_ms = self._caller_of_key(credential), None
        if len(self._remembered) >= REMEMBERED_CALLERS:
            self._remembered.clear()
        self._remembered[digest] = _Remembered(caller, epoch, mono_s() + REMEMBERED_S, expires_ms)
        return caller

    def sealer(self, purpose: bytes) -> Sealer:
        """What seals secrets for storage under a key of that purpose alone. Raises Misconfigured as `first_start` does."""
        self._secrets()
        return Sealer(read_master_key(self._home.master_key), purpose)

    def _caller_of_key(self, credential: str) -> Caller:
        key_id, _, secret = credential.partition(".")
        if not tokens.KEY_ID.fullmatch(key_id) or len(secret) != SECRET_LENGTH or not secret.isascii():
            raise _invalid_api_key()
        with self._storage.read() as tx:
            key = tx.keys.find(key_id)
        proven = self._secrets().proves(key and key.secret_mac, key_id, secret)
        if key is None or not proven or key.revoked_at is not None:
            raise _invalid_api_key()
        return Caller(project_id=key.project_id, key_id=key.id)

    def _caller_of_token(self, credential: str) -> tuple[Caller, int]:
        token = tokens.parse(credential)
        with self._storage.read() as tx:
            key = tx.keys.find(token.key_id)
        secret = None
        if key is not None and key.secret_sealed is not None:
            secret = self._secrets().unseal(key.secret_sealed, key.id, key.project_id)
        signed = token.signed_with(secret or "no such key")
        if key is None or secret is None or not signed or key.revoked_at is not None:
            raise tokens.invalid_token()
        _check_time(token.expires_ms)
        return Caller(project_id=key.project_id, key_id=key.id), token.expires_ms

    def _secrets(self) -> Secrets:
        with self._lock:
            if self._loaded is None:
                if not self._home.master_key.exists():
                    self._create_master_key()
                self._loaded = Secrets(read_master_key(self._home.master_key))
            return self._loaded

    def _create_master_key(self) -> None:
        with self._storage.read() as tx:
            in_use = bool(tx.projects.all())
        if in_use:  # a new one would make every key invalid without a word
            raise Misconfigured(
                "master_key_missing",
                mark("{path} is missing, but the database has keys that were made with it; restore it from a backup"),
                path=self._home.master_key,
            )
        create_master_key(self._home.master_key)


def _credential(authorization: str | None) -> str:
    scheme, _, credential = (authorization or "").partition(" ")
    if not scheme or (scheme.lower() == "bearer" and not credential.strip(" ")):
        raise AuthenticationFailed(
            "missing_api_key", mark("No API key: send the header 'Authorization: Bearer' with your key")
        )
    if scheme.lower() != "bearer":
        raise _invalid_api_key()
    return credential.strip(" ")


def _invalid_api_key() -> AuthenticationFailed:
    return AuthenticationFailed("invalid_api_key", mark("The API key is not valid"))


def _check_time(expires_ms: int | None) -> None:
    if expires_ms is not None and expires_ms <= wall_ms():
        raise tokens.token_expired()


def _new_key(secrets: Secrets, project_id: str, name: str, *, jwt: bool) -> tuple[ApiKey, str]:
    key_id = random_source.token_hex(16)
    secret = "".join(random_source.choice(SECRET_CHARACTERS) for _ in range(SECRET_LENGTH))
    key = ApiKey(
        id=key_id,
        project_id=project_id,
        name=name,
        secret_mac=secrets.proof(key_id, secret),
        secret_sealed=secrets.seal(key_id, project_id, secret) if jwt else None,
        created_at=wall_s(),
    )
    return key, f"{key_id}.{secret}"


def _new_number(taken: set[str]) -> str:
    while True:
        number = str(1_000_000_000 + random_source.randbelow(9_000_000_000))
        if number not in taken:
            return number
