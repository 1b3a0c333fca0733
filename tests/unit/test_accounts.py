"""The authentication gate against a real database: keys, revocation, first start, master key."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunewright.accounts import service as service_module
from tunewright.accounts.secrets import Secrets, create_master_key, read_master_key
from tunewright.accounts.service import AccountService
from tunewright.errors import AuthenticationFailed, Misconfigured, NotFound
from tunewright.settings import HomeFolder, Settings
from tunewright.storage import Storage


@pytest.fixture
def home(tmp_path: Path) -> HomeFolder:
    home = HomeFolder(tmp_path / "home")
    home.create()
    return home


@pytest.fixture
def storage(home: HomeFolder) -> Iterator[Storage]:
    storage = Storage(f"sqlite:///{home.database}")
    storage.migrate()
    yield storage
    storage.close()


@pytest.fixture
def accounts(storage: Storage, home: HomeFolder) -> AccountService:
    return AccountService(storage, home, Settings(home=home.root))


def refusal(accounts: AccountService, authorization: str | None) -> str:
    with pytest.raises(AuthenticationFailed) as caught:
        accounts.authenticate(authorization)
    return caught.value.code


def test_first_start_gives_a_key_that_works_and_is_kept(accounts: AccountService, home: HomeFolder) -> None:
    key = accounts.first_start()
    assert key is not None
    assert home.first_key.read_text() == key + "\n"
    key_id, _, secret = key.partition(".")
    assert (len(key_id), len(secret), secret.isalnum()) == (32, 43, True)
    caller = accounts.authenticate(f"Bearer {key}")
    assert caller.key_id == key_id
    assert accounts.first_start() is None
    for path in (home.first_key, home.master_key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_keys_survive_a_restart(accounts: AccountService, storage: Storage, home: HomeFolder) -> None:
    key = accounts.first_start()
    again = AccountService(storage, home, Settings(home=home.root))
    assert again.first_start() is None
    assert again.authenticate(f"Bearer {key}") == accounts.authenticate(f"Bearer {key}")


def test_the_database_holds_no_secret(accounts: AccountService, storage: Storage, home: HomeFolder) -> None:
    key = accounts.first_start()
    assert key is not None
    storage.close()
    content = b"".join(path.read_bytes() for path in home.root.glob("tunewright.db*"))
    assert key.partition(".")[0].encode() in content
    assert key.partition(".")[2].encode() not in content


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Bearer ", "missing_api_key"),
        ("bearer    ", "missing_api_key"),
        ("Basic dXNlcjpwYXNz", "invalid_api_key"),
        ("{key}", "invalid_api_key"),
        ("Token {key}", "invalid_api_key"),
        ("Bearer x", "invalid_api_key"),
        ("Bearer .", "invalid_api_key"),
        ("Bearer {id}", "invalid_api_key"),
        ("Bearer {id}.", "invalid_api_key"),
        ("Bearer {key}x", "invalid_api_key"),
        ("Bearer {short}", "invalid_api_key"),
        ("Bearer {swapped}", "invalid_api_key"),
        ("Bearer {unknown}", "invalid_api_key"),
        ("Bearer {upper}", "invalid_api_key"),
        ("Bearer {key}, Bearer {key}", "invalid_token"),
        ("Bearer {key} {id}", "invalid_api_key"),
        ("Bearer {key}\n", "invalid_api_key"),
        ("Bearer {key}\r\nX: y", "invalid_api_key"),
        ("Bearer \t{key}", "invalid_api_key"),
        ("Bearer {id}.\u5bc6\u5bc6", "invalid_api_key"),
        ("Bearer {id}." + "\u00e9" * 43, "invalid_api_key"),
        ("Bearer {id}." + "\udcff" * 43, "invalid_api_key"),
        ("Bearer {id}." + "a" * 2**20, "invalid_api_key"),
        ("Bearer " + "a" * 2**20, "invalid_api_key"),
        ("Bearer {id}.' OR 1=1 --", "invalid_api_key"),
        ("Bearer {id}\0.{secret}", "invalid_api_key"),
    ],
)
def test_refused_headers(accounts: AccountService, authorization: str | None, code: str) -> None:
    key = accounts.first_start() or ""
    key_id, _, secret = key.partition(".")
    places = {
        "{key}": key,
        "{id}": key_id,
        "{secret}": secret,
        "{short}": key[:-1],
        "{swapped}": key[:-2] + key[-1] + ("a" if key[-2] != "a" else "b"),
        "{unknown}": f"{'0' * 32}.{secret}",
        "{upper}": f"{key_id.upper()}A.{secret}",
    }
    for place, value in places.items():
        authorization = authorization and authorization.replace(place, value)
    assert refusal(accounts, authorization) == code


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer  {}", "Bearer {} "])
def test_accepted_spellings(accounts: AccountService, form: str) -> None:
    key = accounts.first_start()
    assert accounts.authenticate(form.format(key)).key_id == (key or "").partition(".")[0]


def test_a_revoked_key_ends_at_once(accounts: AccountService) -> None:
    key = accounts.first_start()
    caller = accounts.authenticate(f"Bearer {key}")
    accounts.revoke(caller.project_id, caller.key_id)
    assert refusal(accounts, f"Bearer {key}") == "invalid_api_key"
    with pytest.raises(NotFound) as caught:
        accounts.revoke(caller.project_id, caller.key_id)
    assert caught.value.code == "key_not_found"


def test_another_process_revocation_is_noticed_when_the_memory_ends(
    accounts: AccountService, storage: Storage, home: HomeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(service_module, "mono_s", lambda: now)
    key = accounts.first_start()
    caller = accounts.authenticate(f"Bearer {key}")
    AccountService(storage, home, Settings(home=home.root)).revoke(caller.project_id, caller.key_id)
    now += 4.9
    assert accounts.authenticate(f"Bearer {key}") == caller
    now += 0.2
    assert refusal(accounts, f"Bearer {key}") == "invalid_api_key"


def test_a_project_can_not_revoke_the_key_of_another(accounts: AccountService) -> None:
    key = accounts.first_start()
    caller = accounts.authenticate(f"Bearer {key}")
    other = accounts.create_project("other")
    with pytest.raises(NotFound):
        accounts.revoke(other.id, caller.key_id)
    assert accounts.authenticate(f"Bearer {key}") == caller


def test_keys_belong_to_their_project(accounts: AccountService) -> None:
    first = accounts.authenticate(f"Bearer {accounts.first_start()}")
    other = accounts.create_project("other")
    assert other.number.isdigit() and len(other.number) == 10
    theirs = accounts.authenticate(f"Bearer {accounts.create_key('theirs', other.id)}")
    ours = accounts.authenticate(f"Bearer {accounts.create_key('ours')}")
    assert (theirs.project_id, ours.project_id) == (other.id, first.project_id)
    with accounts._storage.read() as tx:
        assert {key.name for key in tx.keys.list(first.project_id)} == {"first", "ours"}
    with pytest.raises(NotFound):
        accounts.create_key("nobody's", "proj-none")


def test_memory_of_callers_is_bounded(accounts: AccountService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "REMEMBERED_CALLERS", 2)
    accounts.first_start()
    for number in range(5):
        accounts.authenticate(f"Bearer {accounts.create_key(str(number))}")
    assert len(accounts._remembered) <= 2


def test_a_lost_master_key_is_never_replaced(accounts: AccountService, storage: Storage, home: HomeFolder) -> None:
    accounts.first_start()
    home.master_key.unlink()
    with pytest.raises(Misconfigured) as caught:
        AccountService(storage, home, Settings(home=home.root)).first_start()
    assert caught.value.code == "master_key_missing"
    assert not home.master_key.exists()


def test_another_master_key_is_told_at_the_start(accounts: AccountService, storage: Storage, home: HomeFolder) -> None:
    accounts.first_start()
    home.master_key.write_text("ab" * 32)
    with pytest.raises(Misconfigured) as caught:
        AccountService(storage, home, Settings(home=home.root)).first_start()
    assert caught.value.code == "master_key_differs"


@pytest.mark.parametrize("content", ["", "abc", "g" * 64, "00" * 31, "00" * 33, "é"])
def test_a_damaged_master_key_is_named(accounts: AccountService, home: HomeFolder, content: str) -> None:
    home.master_key.write_text(content)
    with pytest.raises(Misconfigured) as caught:
        accounts.first_start()
    assert caught.value.code == "master_key_invalid"


def test_a_master_key_is_made_once(tmp_path: Path) -> None:
    create_master_key(tmp_path / "master.key")
    first = read_master_key(tmp_path / "master.key")
    create_master_key(tmp_path / "master.key")
    assert read_master_key(tmp_path / "master.key") == first
    assert os.listdir(tmp_path) == ["master.key"]


def test_proofs_and_seals_are_bound_to_their_key() -> None:
    secrets = Secrets(bytes(32))
    proof = secrets.proof("id-1", "secret")
    assert secrets.proves(proof, "id-1", "secret")
    assert not secrets.proves(proof, "id-2", "secret")
    assert not secrets.proves(None, "", "")
    sealed = secrets.seal("id-1", "project-1", "secret")
    assert secrets.unseal(sealed, "id-1", "project-1") == "secret"
    assert secrets.unseal(sealed, "id-2", "project-1") is None
    assert secrets.unseal(sealed, "id-1", "project-2") is None
    assert Secrets(bytes(31) + b"x").unseal(sealed, "id-1", "project-1") is None
    assert secrets.unseal(b"\x02" + sealed[1:], "id-1", "project-1") is None
    assert secrets.unseal(sealed[:-1] + bytes([sealed[-1] ^ 1]), "id-1", "project-1") is None
    assert secrets.unseal(b"", "id-1", "project-1") is None
    assert secrets.seal("id-1", "project-1", "secret") != sealed
