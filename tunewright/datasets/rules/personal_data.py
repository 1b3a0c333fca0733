"""Personal data in texts: e-mail addresses, Chinese mobile numbers and resident identity numbers, bank card numbers.

Only what carries a check digit or a tight form is taken, for a warning that is mostly wrong is not read. Numbers inside
longer numbers, names and identifiers are let pass, and so are the addresses that documents use as examples.
"""

import re

EMAIL = "email"
MOBILE = "mobile"
RESIDENT_ID = "resident_id"
BANK_CARD = "bank_card"

# Bounded everywhere, and anchored at the rare "@": linear.
_EMAIL = re.compile(
    r"(?<=[A-Za-z0-9_])@([A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,7}\.[A-Za-z]{2,24})(?![A-Za-z0-9-])"
)
_LONGEST_LOCAL, _LONGEST_DOMAIN = 64, 700
_LOCAL_PART = re.compile(r"[A-Za-z0-9._%+-]{1,64}$")
_EXAMPLE_DOMAINS = re.compile(
    r"(?:.*\.)?(?:example|test|invalid|localhost|local)$"
    r"|(?:.*\.)?(?:example|domain|yourdomain|mydomain|yourcompany|company|mycompany|email|mail|test|xxx|xyz|abc|xyzcompany"
    r"|abccompany|website|yourwebsite|sample|samplemail|fake|fakeemail|acme|host)\.[a-z]{2,6}(?:\.[a-z]{2})?$",
    re.IGNORECASE,
)
_OFFICES = frozenset(
    (
        *("info", "support", "service", "contact", "admin", "administrator", "noreply", "no-reply", "help", "sales"),
        *("postmaster", "webmaster", "hello", "office", "git", "hr", "jobs", "careers", "press", "team", "feedback"),
        *(
            "root",
            "user",
            "username",
            "someone",
            "yourname",
            "your-name",
            "your.name",
            "name",
            "email",
            "example",
            "test",
        ),
    )
)
_BEFORE, _AFTER = r"(?<![A-Za-z0-9_.])", r"(?![A-Za-z0-9_]|\.[0-9])"
_NUMBER = re.compile(
    _BEFORE
    + r"(?:(?P<mobile>(?:86[ -]?)?1[3-9][0-9](?:[0-9]{8}|([ -])[0-9]{4}\2[0-9]{4}))"
    + r"|(?P<groups>[0-9]{4}([ -])[0-9]{4}\4[0-9]{4}\4[0-9]{3,4}(?:\4[0-9]{1,3})?)"
    + r"|(?P<run>[0-9]{15,19}|[0-9]{17}[xX]))"
    + _AFTER
)
_FOUR_DIGITS = re.compile("[0-9]{4}")  # in all of them, and quickly found
_MOBILE = re.compile(r"1(?:3[0-9]|4[5-9]|5[0-35-9]|6[2567]|7[0-8]|8[0-9]|9[0-35-9])[0-9]{8}")
_RESIDENT = re.compile(r"[1-9][0-9]{5}(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9Xx]")
_RESIDENT_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_CARD = re.compile(
    r"(?:62[0-9]{14,17}|9558[0-9]{12,15}|4[0-9]{15}|5[1-5][0-9]{14}|2[2-7][0-9]{14}|3[47][0-9]{13}|35[0-9]{14}"
    r"|6(?:011|5[0-9]{2})[0-9]{12})"
)


def kind_in(text: str) -> str | None:
    """Which kind of personal data `text` seems to hold (the first found), or None."""
    if "@" in text:
        for found in _EMAIL.finditer(text):
            if _is_someones(text, found):
                return EMAIL
    for found in _NUMBER.finditer(text) if _FOUR_DIGITS.search(text) else ():
        if kind := _kind_of_number(found):
            return kind
    return None


def may_be_someones(data: bytes, at: int) -> bool:
    """Whether the "@" at `data[at]`, in a line of JSON that is not decoded, may belong to an address that `kind_in` names."""
    begin = max(0, at - _LONGEST_LOCAL - 1)
    text = data[begin : at + _LONGEST_DOMAIN].decode("latin-1")
    found = _EMAIL.match(text, at - begin)
    if found is None:
        return False
    local = _LOCAL_PART.search(text, max(0, found.start() - _LONGEST_LOCAL), found.start())
    # Its first letter may belong to an escape.
    escaped = local is not None and text[local.start() - 1 : local.start()] == "\\"
    return escaped or _is_someones(text, found)


def _is_someones(text: str, found: re.Match[str]) -> bool:
    local = _LOCAL_PART.search(text, max(0, found.start() - _LONGEST_LOCAL), found.start())
    return (
        local is not None
        and local[0].lower() not in _OFFICES
        and not _EXAMPLE_DOMAINS.match(found[1])
        and not found[1].lower().endswith((".png", ".jpg", ".js"))  # image@2x.png
    )


def _kind_of_number(found: re.Match[str]) -> str | None:
    digits = found[0].replace(" ", "").replace("-", "")
    if found["mobile"]:
        digits = digits[-11:]
        # Round numbers and one digit over and over are amounts and placeholders.
        real = _MOBILE.fullmatch(digits) and len(set(digits[3:])) > 2 and not digits.endswith("00000")
        return MOBILE if real else None
    if found["run"] and _RESIDENT.fullmatch(digits) and _resident_check(digits):
        return RESIDENT_ID
    return BANK_CARD if _CARD.fullmatch(digits) and _luhn(digits) else None


def _resident_check(digits: str) -> bool:
    total = sum(int(digit) * weight for digit, weight in zip(digits, _RESIDENT_WEIGHTS, strict=False))
    return "10X98765432"[total % 11] == digits[17].upper()


def _luhn(digits: str) -> bool:
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + i % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0
