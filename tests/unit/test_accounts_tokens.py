"""Tokens signed with an API secret: what the SDKs make is accepted, everything else is refused."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tunewright.accounts import service as service_module
from tunewright.accounts.service import AccountService
from tunewright.errors import AuthenticationFailed
from tunewright.settings import HomeFolder, Settings
from tunewright.storage import Storage

SDK_HEADER = {"alg": "HS256", "sign_type": "SIGN", "typ": "JWT"}


class Signer:
    """A client with a key."""

    def __init__(self, key: str) -> None:
        self.id, _, self.secret = key.partition(".")

    def payload(self, **changes: Any) -> dict[str, Any]:
        now = time.time_ns() // 1_000_000
        return {"api_key": self.id, "exp": now + 210_000, "timestamp": now} | changes

    def sign(self, header: Any = None, payload: Any = None, *, secret: str | None = None) -> str:
        """`header` and `payload` as objects, or as bytes that go in as they are."""
        head = encode(SDK_HEADER if header is None else header)
        body = encode(self.payload() if payload is None else payload)
        key = (self.secret if secret is None else secret).encode()
        return f"{head}.{body}." + encode(hmac.digest(key, f"{head}.{body}".encode(), "sha256"))


def encode(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccountService]:
    home = HomeFolder(Path(tmp_path_factory.mktemp("home")))
    home.create()
    storage = Storage(f"sqlite:///{home.database}")
    storage.migrate()
    accounts = AccountService(storage, home, Settings(home=home.root))
    accounts.first_start()
    yield accounts
    storage.close()


@pytest.fixture(scope="module")
def signer(accounts: AccountService) -> Signer:
    return Signer(accounts.create_key("signer"))


def refusal(accounts: AccountService, token: str) -> str:
    with pytest.raises(AuthenticationFailed) as caught:
        accounts.authenticate(f"Bearer {token}")
    return caught.value.code


@pytest.mark.parametrize(
    "header",
    [
        SDK_HEADER,
        {"alg": "HS256", "sign_type": "SIGN"},
        {"alg": "HS256", "typ": "JWT"},
        {"alg": "HS256"},
    ],
)
def test_tokens_of_clients_are_accepted(accounts: AccountService, signer: Signer, header: dict[str, str]) -> None:
    token = signer.sign(header)
    assert accounts.authenticate(f"Bearer {token}").key_id == signer.id
    assert accounts.authenticate(f"Bearer {token}").key_id == signer.id  # SDKs send one token many times


def test_any_time_ahead_is_accepted(accounts: AccountService, signer: Signer) -> None:
    far = signer.payload(exp=time.time_ns() // 1_000_000 + 10**12)
    assert accounts.authenticate("Bearer " + signer.sign(payload=far)).key_id == signer.id
    assert accounts.authenticate("Bearer " + signer.sign(payload={"api_key": signer.id, "exp": 10**15}))


def changed(text: str, position: int) -> str:
    return text[:position] + ("A" if text[position] != "A" else "B") + text[position + 1 :]


def resigned_with(algorithm: str, digest: Callable[[], Any] | str) -> Callable[[Signer], str]:
    def make(signer: Signer) -> str:
        head, body = encode({"alg": algorithm, "typ": "JWT"}), encode(signer.payload())
        return f"{head}.{body}." + encode(hmac.new(signer.secret.encode(), f"{head}.{body}".encode(), digest).digest())

    return make


HOSTILE: dict[str, Callable[[Signer], str]] = {
    "alg none, no signature": lambda s: f"{encode({'alg': 'none'})}.{encode(s.payload())}.",
    "alg none, signed": lambda s: s.sign({"alg": "none"}),
    "alg None": lambda s: s.sign({"alg": "None"}),
    "alg nOnE": lambda s: s.sign({"alg": "nOnE"}),
    "alg null": lambda s: s.sign({"alg": None}),
    "alg empty": lambda s: s.sign({"alg": ""}),
    "alg missing": lambda s: s.sign({"typ": "JWT"}),
    "alg lower case": lambda s: s.sign({"alg": "hs256"}),
    "alg with blank": lambda s: s.sign({"alg": "HS256 "}),
    "alg list": lambda s: s.sign({"alg": ["HS256"]}),
    "alg object": lambda s: s.sign({"alg": {"HS256": 1}}),
    "alg RS256": lambda s: s.sign({"alg": "RS256"}),
    "alg ES256": lambda s: s.sign({"alg": "ES256"}),
    "alg HS512": resigned_with("HS512", hashlib.sha512),
    "alg HS384": resigned_with("HS384", hashlib.sha384),
    "alg HS256 with a SHA-512 signature": resigned_with("HS256", hashlib.sha512),
    "alg twice": lambda s: s.sign(b'{"alg":"none","alg":"HS256"}'),
    "typ other": lambda s: s.sign({"alg": "HS256", "typ": "JWE"}),
    "sign_type other": lambda s: s.sign({"alg": "HS256", "sign_type": "NONE"}),
    "sign_type null": lambda s: s.sign({"alg": "HS256", "sign_type": None}),
    "crit": lambda s: s.sign({"alg": "HS256", "crit": ["exp"]}),
    "crit empty": lambda s: s.sign({"alg": "HS256", "crit": []}),
    "jku": lambda s: s.sign({"alg": "HS256", "jku": "https://evil.test/keys"}),
    "jwk": lambda s: s.sign({"alg": "HS256", "jwk": {"kty": "oct", "k": "AA"}}),
    "kid": lambda s: s.sign({"alg": "HS256", "kid": "../../dev/null"}),
    "x5u": lambda s: s.sign({"alg": "HS256", "x5u": "https://evil.test/c"}),
    "x5c": lambda s: s.sign({"alg": "HS256", "x5c": ["AA"]}),
    "b64 false": lambda s: s.sign({"alg": "HS256", "b64": False}),
    "zip": lambda s: s.sign({"alg": "HS256", "zip": "DEF"}),
    "header not an object": lambda s: s.sign([]),
    "header a text": lambda s: s.sign("HS256"),
    "header no JSON": lambda s: s.sign(b"{alg:HS256}"),
    "header not UTF-8": lambda s: s.sign(b'{"alg":"HS256","x":"\xff"}'),
    "header deep": lambda s: s.sign(b'{"alg":"HS256","x":' + b"[" * 1000 + b"]" * 1000 + b"}"),
    "header NaN": lambda s: s.sign(b'{"alg":"HS256","x":NaN}'),
    "header 300 KB": lambda s: s.sign({"alg": "HS256", "x": "a" * 300_000}),
    "payload not an object": lambda s: s.sign(payload=[1]),
    "payload null": lambda s: s.sign(payload=b"null"),
    "payload no JSON": lambda s: s.sign(payload=b"exp"),
    "payload key twice": lambda s: s.sign(
        payload=b'{"api_key":"a","api_key":"%s","exp":9999999999999}' % s.id.encode()
    ),
    "payload over 4 KiB": lambda s: s.sign(payload=s.payload(x="a" * 4096)),
    "api_key missing": lambda s: s.sign(payload={"exp": 9999999999999}),
    "api_key null": lambda s: s.sign(payload=s.payload(api_key=None)),
    "api_key number": lambda s: s.sign(payload=s.payload(api_key=1)),
    "api_key list": lambda s: s.sign(payload=s.payload(api_key=[s.id])),
    "api_key whole key": lambda s: s.sign(payload=s.payload(api_key=f"{s.id}.{s.secret}")),
    "api_key unknown": lambda s: s.sign(payload=s.payload(api_key="0" * 32)),
    "api_key upper case": lambda s: s.sign(payload=s.payload(api_key=s.id.upper() + "F")),
    "api_key with SQL": lambda s: s.sign(payload=s.payload(api_key="' OR '1'='1")),
    "exp missing": lambda s: s.sign(payload={"api_key": s.id}),
    "exp null": lambda s: s.sign(payload=s.payload(exp=None)),
    "exp text": lambda s: s.sign(payload=s.payload(exp="9999999999999")),
    "exp float": lambda s: s.sign(payload=s.payload(exp=9999999999999.5)),
    "exp true": lambda s: s.sign(payload=s.payload(exp=True)),
    "exp infinite": lambda s: s.sign(payload=b'{"api_key":"%s","exp":1e999}' % s.id.encode()),
    "exp of 5000 digits": lambda s: s.sign(payload=b'{"api_key":"%s","exp":%s}' % (s.id.encode(), b"9" * 2000)),
    "signed with nothing": lambda s: s.sign(secret=""),
    "signed with the id": lambda s: s.sign(secret=s.id),
    "signed with the whole key": lambda s: s.sign(secret=f"{s.id}.{s.secret}"),
    "signed with the word for no key": lambda s: s.sign(payload=s.payload(api_key="0" * 32), secret="no such key"),
    "signature missing": lambda s: s.sign().rpartition(".")[0] + ".",
    "signature cut": lambda s: s.sign()[:-4],
    "signature longer": lambda s: s.sign() + "AAAA",
    "signature changed": lambda s: changed(s.sign(), -20),
    "signature in another spelling": lambda s: (t := s.sign())[:-1] + other_spelling(t[-1]),
    "signature padded": lambda s: s.sign() + "=",
    "header padded": lambda s: s.sign().replace(".", "==.", 1),
    "payload changed": lambda s: (
        (t := s.sign())[: len(encode(SDK_HEADER)) + 20]
        + changed(t, len(encode(SDK_HEADER)) + 20)[len(encode(SDK_HEADER)) + 20 :]
    ),
    "standard base64 alphabet": lambda s: s.sign({"alg": "HS256", "x": "\u00bf\u00ff?>~"}).replace(".", "+.", 1),
    "blank inside": lambda s: s.sign().replace(".", ". ", 1),
    "newline inside": lambda s: s.sign().replace(".", ".\n", 1),
    "NUL at the end": lambda s: s.sign() + "\0",
    "not ASCII": lambda s: s.sign() + "\u00e9",
    "full-width letters": lambda s: s.sign().replace("e", "\uff45", 1),
    "two dots only": lambda s: "..",
    "one dot too many": lambda s: s.sign() + ".",
    "five segments (JWE)": lambda s: s.sign() + ".AAAA.AAAA",
    "nested token": lambda s: s.sign({"alg": "HS256", "cty": "JWT"}, s.sign().encode()),
}


def other_spelling(last: str) -> str:
    """The last character of 43 carries two bits that decode to nothing."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return alphabet[alphabet.index(last) ^ 1]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tokens_are_refused(accounts: AccountService, signer: Signer, name: str) -> None:
    assert refusal(accounts, HOSTILE[name](signer)) == "invalid_token"


def test_the_table_is_long_enough() -> None:
    assert len(HOSTILE) >= 30


@pytest.mark.parametrize(
    "exp",
    [
        lambda: time.time_ns() // 1_000_000 - 1,
        lambda: time.time_ns() // 10**9 + 86_400,  # seconds, as ordinary JWT libraries write it
        lambda: 0,
        lambda: -(10**15),
    ],
)
def test_expired_tokens(accounts: AccountService, signer: Signer, exp: Callable[[], int]) -> None:
    assert refusal(accounts, signer.sign(payload=signer.payload(exp=exp()))) == "token_expired"


def test_a_forged_token_does_not_learn_whether_it_expired(accounts: AccountService, signer: Signer) -> None:
    assert refusal(accounts, signer.sign(payload=signer.payload(exp=1), secret="x" * 43)) == "invalid_token"


def test_a_remembered_token_expires_in_time(
    accounts: AccountService, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ms = 1_800_000_000_000
    monkeypatch.setattr(service_module, "wall_ms", lambda: now_ms)
    token = signer.sign(payload={"api_key": signer.id, "exp": now_ms + 1000})
    accounts.authenticate(f"Bearer {token}")
    now_ms += 1000
    assert refusal(accounts, token) == "token_expired"


def test_a_key_that_refuses_tokens(accounts: AccountService) -> None:
    key = accounts.create_key("no tokens", jwt=False)
    assert accounts.authenticate(f"Bearer {key}").key_id == key.partition(".")[0]
    assert refusal(accounts, Signer(key).sign()) == "invalid_token"


def test_a_revoked_key_ends_its_tokens(accounts: AccountService) -> None:
    signer = Signer(accounts.create_key("short-lived"))
    token = signer.sign()
    caller = accounts.authenticate(f"Bearer {token}")
    accounts.revoke(caller.project_id, caller.key_id)
    assert refusal(accounts, token) == "invalid_token"
    assert refusal(accounts, signer.sign()) == "invalid_token"


def test_a_secret_signs_for_its_own_key_only(accounts: AccountService, signer: Signer) -> None:
    other = Signer(accounts.create_key("other"))
    assert refusal(accounts, signer.sign(payload=signer.payload(api_key=other.id))) == "invalid_token"
