"""Texts in Chinese and English from gettext catalogues.

The English text in the code is the key, with `{named}` places. `locale/zh/*.po` hold the Chinese, a file for each stage.
They are read as they are, so there is no compiled copy to forget.
"""

from functools import cache
from pathlib import Path

LANGUAGES = ("en", "zh")


@cache
def _catalogue(language: str) -> dict[str, str]:
    from babel.messages.pofile import read_po

    texts: dict[str, str] = {}
    for path in sorted((Path(__file__).parent / "locale" / language).glob("*.po")):
        with path.open("rb") as stream:
            texts |= {str(m.id): str(m.string) for m in read_po(stream, locale=language) if m.id and m.string}
    return texts


def translate(text: str, language: str = "en", **values: object) -> str:
    """`text` in `language` ('en' or 'zh'; anything else is 'en') with its places filled.

    A text that the catalogue lacks stays English; a promise test finds it before a user does.
    """
    if language == "zh":
        text = _catalogue("zh").get(text, text)
    return text.format(**values) if values else text


def mark(text: str) -> str:
    """Mark a text for the catalogue where it is written; translation happens where it is shown."""
    return text


def preferred_language(accept_language: str | None, default: str) -> str:
    """'zh' or 'en' from an Accept-Language header value, else `default`."""
    if not accept_language:
        return default
    choices: list[tuple[float, str]] = []
    for part in accept_language[:256].split(","):
        tag, _, quality = part.strip().partition(";q=")
        try:
            weight = float(quality) if quality else 1.0
        except ValueError:
            continue
        choices.append((-weight, tag.split("-")[0].lower()))
    for _, language in sorted(choices, key=lambda choice: choice[0]):
        if language in LANGUAGES:
            return language
    return default
