"""Records to rows and back, for every table the same way."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa

Record = TypeVar("Record", bound=msgspec.Struct)
Item = TypeVar("Item")

_PLAIN = (str, int, float, bytes, type(None))


def to_row(record: msgspec.Struct) -> dict[str, Any]:
    """Column values of a record; nested values become what JSON can hold."""
    return to_columns(msgspec.structs.asdict(record))


def to_columns(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same for some fields only (a change)."""
    return {name: value if isinstance(value, _PLAIN) else msgspec.to_builtins(value) for name, value in values.items()}


def to_record(row: sa.Row[Any], kind: type[Record]) -> Record:
    """A row that was selected with all columns of its table, as `kind`."""
    columns = row._mapping
    return msgspec.convert({name: columns[name] for name in kind.__struct_fields__}, kind)


def one(connection: sa.Connection, statement: sa.Select[Any], kind: type[Record]) -> Record | None:
    """The only row, or None."""
    row = connection.execute(statement).one_or_none()
    return None if row is None else to_record(row, kind)


def every(connection: sa.Connection, statement: sa.Select[Any], kind: type[Record]) -> list[Record]:
    """All rows in the statement's order."""
    return [to_record(row, kind) for row in connection.execute(statement)]


def chunks(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """`items` in pieces that fit into one statement: databases limit the number of parameters."""
    return (items[start : start + 500] for start in range(0, len(items), 500))
