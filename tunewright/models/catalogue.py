"""The base models on offer: entries of this release merged with the operator's own, and which of them are on this machine."""

import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog
import tomlkit
from tomlkit.exceptions import ParseError

from tunewright.errors import InvalidRequest, Misconfigured, quote
from tunewright.files_on_disk import publish_folder, write_atomically
from tunewright.i18n import mark
from tunewright.ids import random_text
from tunewright.models.artifact import copy_model_files, inspect_model_folder
from tunewright.models.file_lock import held
from tunewright.models.manifest import read_manifest, write_manifest
from tunewright.models.records import Base, Source
from tunewright.settings import HomeFolder

_BUILT_IN = Path(__file__).with_name("catalogue.toml")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_log = structlog.get_logger(__name__)


class _Entries(msgspec.Struct, frozen=True):
    """What the two files say, checked: `aliases` are the operator's, which go before those inside the bases."""

    bases: dict[str, Base]
    aliases: dict[str, str]


class Catalogue:
    """All methods block on the disk. Edits by another process are seen at the next call.

    An edit by hand that makes the file invalid is refused at start (Misconfigured(`invalid_catalogue`)); a process that is
    running already logs it and goes on with what it read before.
    """

    def __init__(self, home: HomeFolder) -> None:
        self.home = home
        self._cached: tuple[object, _Entries] | None = None

    def all(self) -> list[Base]:
        """Every base, built-in ones first; `path` and `files` are filled for those on this machine."""
        entries = self._entries()
        return [self._on_disk(base, entries) for base in entries.bases.values()]

    def find(self, code_or_alias: str) -> Base | None:
        """The base of a code, of an operator's alias or of a built-in alias, in this order."""
        entries = self._entries()
        code = _resolve(code_or_alias, entries)
        return None if code is None else self._on_disk(entries.bases[code], entries)

    def set_alias(self, alias: str, code: str) -> None:
        """Let `alias` mean `code` (itself a code or alias) from now on; an alias set earlier is replaced.

        Raises InvalidRequest(`invalid_name`, `alias_is_code`, `alias_cycle`), Misconfigured(`unknown_base`).
        """
        check_name(alias, "alias")

        def change(document: tomlkit.TOMLDocument) -> None:
            entries = _checked(document.unwrap(), self.home.catalogue)
            if alias in entries.bases:
                raise InvalidRequest(
                    "alias_is_code",
                    mark('"{alias}" is the code of a base model and can\'t be an alias.'),
                    param="alias",
                    alias=alias,
                )
            if _leads_to(code, alias, entries):
                raise InvalidRequest(
                    "alias_cycle", mark('The alias "{alias}" would lead back to itself.'), param="alias", alias=alias
                )
            if _resolve(code, entries) is None:
                raise unknown_base(code)
            _table(document, "aliases")[alias] = code

        self._edit(change)

    def add(self, folder: Path, code: str, **overrides: Any) -> Base:
        """Take a local folder in Hugging Face layout into the home and the catalogue under `code`.

        `overrides` are fields of Base (`name`, `licence`, `context_tokens`, `row_kinds`, `methods`, `pool`, `aliases`,
        `embeddings`). The code of a built-in base that is not pulled is allowed: that is how a hub's model comes to a machine
        without network.
        Raises InvalidRequest(`invalid_name`, `base_exists`, `folder_not_found`, `invalid_value` or those of artifact.py).
        """
        check_name(code, "code")
        if not folder.is_dir():
            raise InvalidRequest(
                "folder_not_found",
                mark('There is no folder "{folder}".'),
                param="folder",
                folder=quote(str(folder)),
            )
        self._refuse_taken(code)
        self.home.create()
        staging = self.home.temporary / f"add-{code}-{random_text(8)}"
        prepared = staging / "folder"
        prepared.mkdir(parents=True, mode=0o700)
        try:
            copy_model_files(folder, prepared)
            config = inspect_model_folder(prepared)
            source = Source(kind="folder", folder=str(folder.resolve()))
            manifest = write_manifest(prepared, code, source, conversion=None)
            base = self._described(code, source, config, manifest.files, overrides)
            self._edit(lambda document: self._publish(document, base, staging))
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        found = self.find(code)
        return base if found is None else found

    def _described(
        self, code: str, source: Source, config: dict[str, Any], files: dict[str, str], overrides: dict[str, Any]
    ) -> Base:
        """The new entry: what the built-in one of that code says, then the folder's own facts, then the overrides."""
        built_in = self._entries().bases.get(code)
        known = {} if built_in is None else msgspec.to_builtins(built_in)
        stated = {"name": code, "licence": "unknown"} | known
        if isinstance(context := config.get("max_position_embeddings"), int):
            stated["context_tokens"] = context
        stated |= overrides | {"code": code, "source": msgspec.to_builtins(source), "files": files, "path": None}
        try:
            base = msgspec.convert(stated, Base)
        except msgspec.ValidationError as error:
            raise InvalidRequest(
                "invalid_value",
                mark("The entry is not valid: {reason}."),
                reason=str(error),
            ) from error
        for alias in base.aliases:
            check_name(alias, "aliases")
            if _resolve(alias, self._entries()) not in (None, code):
                raise InvalidRequest(
                    "alias_taken",
                    mark('"{alias}" already stands for another base model.'),
                    param="aliases",
                    alias=alias,
                )
        return base

    def _publish(self, document: tomlkit.TOMLDocument, base: Base, staging: Path) -> None:
        """Under the catalogue's lock: folder first, entry after it. A kill in between leaves a folder that no entry names,
        which the next `add` of that code moves away."""
        self._refuse_taken(base.code)
        entry = msgspec.to_builtins(base)
        del entry["code"], entry["path"]
        for table in ("source", "embeddings"):
            if entry[table] is not None:
                entry[table] = {key: value for key, value in entry[table].items() if value is not None}
        _table(document, "bases")[base.code] = {key: value for key, value in entry.items() if value is not None}
        _checked(document.unwrap(), self.home.catalogue)
        final = self.home.bases / base.code
        if final.exists():
            final.rename(staging / "orphan")
        publish_folder(staging / "folder", final)

    def _refuse_taken(self, code: str) -> None:
        entries = self._entries()
        if code in _read(self.home.catalogue).get("bases", {}) or (
            code in entries.bases and self._on_disk(entries.bases[code], entries).path
        ):
            raise InvalidRequest(
                "base_exists", mark('The catalogue has a base model "{base}" already.'), param="code", base=code
            )
        if _resolve(code, entries) not in (None, code):
            raise InvalidRequest(
                "code_is_alias",
                mark('"{alias}" is an alias; remove it first or choose another code.'),
                param="code",
                alias=code,
            )

    def _edit(self, change: Callable[[tomlkit.TOMLDocument], object]) -> None:
        """Read, change and replace the operator's file as one step; comments and order in it stay."""
        self.home.create()
        with held(self.home.root / "catalogue.lock"):
            try:
                document = tomlkit.parse(self.home.catalogue.read_text(encoding="utf-8"))
            except FileNotFoundError:
                document = tomlkit.document()
            except (ParseError, UnicodeDecodeError) as error:
                raise _invalid_catalogue(self.home.catalogue, "TOML") from error
            change(document)
            write_atomically(self.home.catalogue, tomlkit.dumps(document).encode())

    def _entries(self) -> _Entries:
        path = self.home.catalogue
        try:
            status = path.stat()
            state: object = (status.st_mtime_ns, status.st_ino, status.st_size)
        except FileNotFoundError:
            state = None
        cached = self._cached
        if cached is None or cached[0] != state:
            try:
                cached = (state, _checked(_read(path), path))
            except Misconfigured as error:
                if cached is None:
                    raise
                _log.error("catalogue_ignored", reason=error.text())
                cached = (state, cached[1])
            self._cached = cached
        return cached[1]

    def _on_disk(self, base: Base, entries: _Entries) -> Base:
        """`base` with its folder, the hashes of its files and all its aliases as they are now."""
        pointing = (alias for alias in entries.aliases if _resolve(alias, entries) == base.code)
        own = (alias for alias in base.aliases if _resolve(alias, entries) == base.code)
        aliases = tuple(dict.fromkeys((*own, *pointing)))
        folder = self.home.bases / base.code
        manifest = read_manifest(folder)
        if manifest is None:
            return msgspec.structs.replace(base, aliases=aliases, path=None)
        return msgspec.structs.replace(base, aliases=aliases, path=folder, files=base.files or manifest.files)


def check_name(name: str, param: str) -> None:
    """Raises InvalidRequest(`invalid_name`) unless `name` is safe as a model name, a folder name and part of a URL."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            "invalid_name",
            mark('"{name}" is not a valid name: 1 to 64 letters, digits, ".", "_" or "-", a letter or digit first.'),
            param=param,
            name=quote(name),
        )


def unknown_base(code: str) -> Misconfigured:
    """The error for a code that no catalogue has."""
    return Misconfigured(
        "unknown_base",
        mark('There is no base model "{base}"; "tunewright models list" shows them all.'),
        param="code",
        base=quote(code),
    )


def _invalid_catalogue(path: Path, reason: str) -> Misconfigured:
    return Misconfigured(
        "invalid_catalogue", mark('The catalogue "{path}" is not valid: {reason}.'), path=str(path), reason=reason
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _invalid_catalogue(path, str(error)) from error


def _checked(operators: dict[str, Any], path: Path) -> _Entries:
    """The built-in entries overlaid by the operator's. Raises Misconfigured(`invalid_catalogue`) saying where."""
    try:
        stated = _read(_BUILT_IN)["bases"] | operators.get("bases", {})
        bases = {code: msgspec.convert(entry | {"code": code}, Base) for code, entry in stated.items()}
        aliases = msgspec.convert(operators.get("aliases", {}), dict[str, str])
    except (msgspec.ValidationError, TypeError) as error:
        raise _invalid_catalogue(path, str(error)) from error
    entries = _Entries(bases, aliases)
    for name in (*bases, *aliases, *(alias for base in bases.values() for alias in base.aliases)):
        if not _NAME.fullmatch(name):
            raise _invalid_catalogue(path, quote(name))
    for alias, target in aliases.items():
        if alias in bases or _leads_to(target, alias, entries):
            raise _invalid_catalogue(path, f"aliases.{alias}")
    return entries


def _resolve(name: str, entries: _Entries) -> str | None:
    """The code that `name` stands for. Ends because `_checked` lets no cycle in."""
    while name not in entries.bases and name in entries.aliases:
        name = entries.aliases[name]
    if name in entries.bases:
        return name
    return next((base.code for base in entries.bases.values() if name in base.aliases), None)


def _leads_to(name: str, alias: str, entries: _Entries) -> bool:
    seen: set[str] = set()
    while name != alias and name in entries.aliases and name not in seen:
        seen.add(name)
        name = entries.aliases[name]
    return name == alias


def _table(document: tomlkit.TOMLDocument, key: str) -> Any:
    if key not in document:
        document[key] = tomlkit.table()
    return document[key]
