"""What values a hyperparameter takes: read from a request, and told to whoever asks. Pure."""

import re
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from tunewright.errors import InvalidRequest, as_sent
from tunewright.i18n import mark

_NUMBER = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{1,15})?")
"""Some clients send numbers as text. Plain decimals only: '1e-4' is more often a slip than a wish."""


class Range(Protocol):
    """One line of the table. `auto` is a marked sentence with places for `values` and `default`: what 'auto' becomes.

    `default` is that number where it does not depend on the data, else None.
    """

    @property
    def auto(self) -> str: ...
    @property
    def values(self) -> dict[str, Any]: ...
    @property
    def default(self) -> Any: ...

    def read(self, param: str, value: Any) -> Any:
        """The value as it is kept. Raises InvalidRequest(`invalid_value`) with the range."""
        ...

    def shape(self) -> dict[str, Any]:
        """Type and bounds, in the words of the API."""
        ...


class Whole(msgspec.Struct, frozen=True):
    """A whole number from `least` to `most`; 3.0 and "3" are the number 3."""

    least: int
    most: int
    auto: str
    values: dict[str, Any] = {}
    default: int | None = None

    def read(self, param: str, value: Any) -> int:
        number = _number(value)
        if number is not None and self.least <= number <= self.most and number == int(number):  # NaN fails the first
            return int(number)
        raise InvalidRequest(
            "invalid_value",
            mark("{field} must be a whole number from {least} to {most} or 'auto', not {value}."),
            param=param,
            field=param,
            least=self.least,
            most=self.most,
            value=as_sent(value),
        )

    def shape(self) -> dict[str, Any]:
        return {"type": "integer", "least": self.least, "least_included": True, "most": self.most}


class Fraction(msgspec.Struct, frozen=True):
    """A number from `least`, or above it, to `most`."""

    least: float
    most: float
    auto: str
    values: dict[str, Any] = {}
    default: float | None = None
    least_included: bool = True

    def read(self, param: str, value: Any) -> float:
        number = _number(value)
        above = number is not None and (number > self.least or (self.least_included and number == self.least))
        if number is not None and above and number <= self.most:
            return float(number)
        sentence = (
            mark("{field} must be a number from {least} to {most} or 'auto', not {value}.")
            if self.least_included
            else mark("{field} must be a number above {least} and at most {most} or 'auto', not {value}.")
        )
        raise InvalidRequest(
            "invalid_value",
            sentence,
            param=param,
            field=param,
            least=self.least,
            most=self.most,
            value=as_sent(value),
        )

    def shape(self) -> dict[str, Any]:
        return {"type": "number", "least": self.least, "least_included": self.least_included, "most": self.most}


class Word(msgspec.Struct, frozen=True):
    """One of a few words."""

    words: tuple[str, ...]
    auto: str
    values: dict[str, Any] = {}
    default: str | None = None

    def read(self, param: str, value: Any) -> str:
        if isinstance(value, str) and value in self.words:
            return value
        raise InvalidRequest(
            "invalid_value",
            mark("{field} must be one of {known} or 'auto', not {value}."),
            param=param,
            field=param,
            known=", ".join(self.words),
            value=as_sent(value),
        )

    def shape(self) -> dict[str, Any]:
        return {"type": "string", "values": self.words}


class Stopping(msgspec.Struct, frozen=True):
    """Whether and when to stop early: true, false or {"patience": 1 to 100, "min_delta": 0 to 100}."""

    auto: str
    values: dict[str, Any] = {}
    default: None = None

    def read(self, param: str, value: Any) -> dict[str, int | float] | None:
        """What `EarlyStopping` is made of; None for false."""
        if value in (False, "false"):
            return None
        given = {} if value in (True, "true") else value
        if not isinstance(given, Mapping) or not _STOPPING.keys() >= given.keys():
            raise InvalidRequest(
                "invalid_value",
                mark("{field} must be true, false or an object with patience and min_delta, not {value}."),
                param=param,
                field=param,
                value=as_sent(value),
            )
        found: dict[str, int | float] = {name: range_.default for name, range_ in _STOPPING.items()}
        asked = {name: one for name, one in given.items() if one not in (None, "auto")}
        return found | {name: _STOPPING[name].read(f"{param}.{name}", one) for name, one in asked.items()}

    def shape(self) -> dict[str, Any]:
        fields = {name: {**range_.shape(), "default": range_.default} for name, range_ in _STOPPING.items()}
        return {"type": "boolean", "fields": fields}


_STOPPING: dict[str, Range] = {
    "patience": Whole(1, 100, auto="", default=3),
    "min_delta": Fraction(0.0, 100.0, auto="", default=0.0),
}


def _number(value: Any) -> int | float | None:
    """None if it is no number. NaN passes; it fails every comparison that follows."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value) if "." in value else int(value)
    return None
