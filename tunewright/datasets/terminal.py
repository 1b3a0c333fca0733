"""What a person sees of data files on a terminal: tables that fit it, in Chinese or English.

Whatever a file holds is shown as plain text: no markup, no control characters.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.i18n import mark, translate

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    from tunewright.datasets.importing.convert import Converted
    from tunewright.datasets.mending.repair import Repaired
    from tunewright.datasets.report import Report
    from tunewright.datasets.tokens.preview import ShownExample

_LINES_SHOWN = 6


def plain(text: object) -> str:
    """On a terminal nothing but text: what would steer it is shown as �."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, emoji=False)


def say(console: "Console", sign: str, colour: str, sentence: str, language: str, **values: object) -> None:
    from rich.text import Text

    shown = translate(sentence, language, **{name: plain(value) for name, value in values.items()})
    console.print(_grid(Text(sign, style=f"bold {colour}"), _Paragraphs((shown, ""))))


# A word, the spaces behind it, or one character of a script that is written without spaces and what may not begin a line.
_PIECE = re.compile(r"[\u2e80-\uffef][，。；：？！、）》”’]*|[^\s\u2e80-\uffef]+[，。；：？！、）》”’]*|\s+")


class _Paragraphs:
    """Texts with a style each, below one another, as plain text. Rich would break lines of Chinese at spaces alone."""

    def __init__(self, *texts: tuple[str, str]) -> None:
        self._texts = [(plain(text), style) for text, style in texts]

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[Text]":
        from rich.text import Text

        for text, style in self._texts:
            for line in _wrapped(text, options.max_width):
                yield Text(line, style=style, overflow="fold")

    def __rich_measure__(self, console: "Console", options: "ConsoleOptions") -> "Measurement":
        from rich.cells import cell_len
        from rich.measure import Measurement

        widest = max((cell_len(text) for text, _ in self._texts), default=1)
        return Measurement(min(8, options.max_width), min(max(widest, 1), options.max_width))


def _wrapped(text: str, width: int) -> Iterator[str]:
    """The text in lines of at most `width` cells, where its words allow it."""
    from rich.cells import cell_len

    line = ""
    for piece in _PIECE.findall(text):
        if line and cell_len(line) + cell_len(piece.rstrip()) > width:
            yield line.rstrip()
            line = ""
        line += piece if line or not piece.isspace() else ""
    yield line.rstrip()


def _grid(*cells: Any) -> "Table":
    """Cells side by side; a long last one is wrapped in its own column."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    for _ in cells:
        grid.add_column(overflow="fold")
    grid.add_row(*cells)
    return grid


def print_report(
    console: "Console",
    file: Path,
    shown: dict[str, Any],
    report: "Report",
    language: str,
    *,
    not_fetched: int = 0,
    against: Path | None = None,
) -> None:
    """The whole report; `not_fetched` images were not looked at, and the rows were compared with those of `against`."""
    from rich.filesize import decimal
    from rich.text import Text

    title = Text(plain(file), style="bold")
    rows = translate(mark("rows: {rows}"), language, rows=f"{shown['rows'] or 0:,}")
    facts = " · ".join(str(fact) for fact in (shown["kind"], rows, decimal(shown["bytes"]), shown["purpose"]) if fact)
    console.print(title)
    console.print(Text(facts, style="dim"))
    console.print()
    print_statistics(console, shown["statistics"], language)
    if groups := shown["report"]["groups"]:
        console.print(_problem_table(groups, _places(report), language))
    elif shown["statistics"]:
        console.print()
    mendable = sum(group["patchable"] for group in groups)
    if report.ok:
        sentence = mark("The file can be used. Errors: 0, warnings: {warnings}.")
        say(console, "✓", "green", sentence, language, warnings=f"{report.warnings:,}")
    elif report.file_errors:
        sentence = mark("The file can't be used as it is. Errors: {errors}, warnings: {warnings}.")
        counts = {"errors": f"{report.errors:,}", "warnings": f"{report.warnings:,}"}
        say(console, "✗", "red", sentence, language, **counts)
    else:
        sentence = mark("{bad_rows} of {rows} rows can't be used. Errors: {errors}, warnings: {warnings}.")
        counts = {name: f"{getattr(report, name):,}" for name in ("bad_rows", "rows", "errors", "warnings")}
        say(console, "✗", "red", sentence, language, **counts)
    if not_fetched:
        sentence = mark("Images given by a web address and not looked at: {count}. --fetch-images fetches them.")
        say(console, "!", "yellow", sentence, language, count=f"{not_fetched:,}")
    if mendable:
        sentence = mark("Mends that are certain: {mendable}. Apply them: tunewright datasets repair {path} -o OUT")
        words = file if against is None else f"{file} --against {against}"
        say(console, "→", "cyan", sentence, language, mendable=f"{mendable:,}", path=words)


def _places(report: "Report") -> dict[str, list[int]]:
    """The lines of those problems that the report holds, by code."""
    places: dict[str, list[int]] = {}
    for problem in report.problems:
        places.setdefault(problem.code, []).append(problem.line or 0)
    return places


def _problem_table(groups: list[dict[str, Any]], places: dict[str, list[int]], language: str) -> "Table":
    from rich.text import Text

    mendable = any(group["patchable"] for group in groups)
    heads = ["", ">" + translate(mark("count"), language), translate(mark("problem"), language)]
    table = _table(*heads, *([">" + translate(mark("mendable"), language)] if mendable else []))
    for group in groups:
        wrong = group["severity"] == "error"
        colour = "red" if wrong else "yellow"
        body = [(group["code"], f"bold {colour}")]
        if group["message"]:
            body.append((group["message"], ""))
        known = places.get(group["code"], [])
        also = list(dict.fromkeys(known))[1:]
        if also:
            listed = ", ".join(f"{line:,}" for line in also[:_LINES_SHOWN])
            more = ", …" if len(also) > _LINES_SHOWN or group["count"] > len(known) else ""
            body.append((translate(mark("also in lines {listed}"), language, listed=listed + more), "dim"))
        cells = [Text("✗" if wrong else "!", style=f"bold {colour}"), f"{group['count']:,}", _Paragraphs(*body)]
        if mendable:
            cells.append(f"{group['patchable']:,}" if group["patchable"] else "-")
        table.add_row(*cells)
    return table


def _table(*heads: str) -> "Table":
    """An empty table over the whole width; a head that begins with > is of numbers. The last head of texts gets the room."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1), pad_edge=False)
    widest = max(i for i, head in enumerate(heads) if not head.startswith(">"))
    for i, head in enumerate(heads):
        number = head.startswith(">")
        table.add_column(
            head.removeprefix(">"),
            justify="right" if number else "left",
            no_wrap=number,
            overflow="fold",
            ratio=1 if i == widest else None,
        )
    return table


def print_converted(console: "Console", output: Path, converted: "Converted", language: str) -> None:
    from rich.text import Text

    if converted.problems:
        place = mark("row") if converted.file_format == "Parquet" else mark("line")
        table = _table(">" + translate(place, language), translate(mark("why it can't be converted"), language))
        for problem in converted.problems[:20]:
            table.add_row(f"{problem.line:,}", _Paragraphs((problem.text(language), "")))
        console.print(table)
    if converted.written:
        sentence = mark("Wrote {path}, rows: {rows}")
        say(console, "✓", "green", sentence, language, rows=f"{converted.rows:,}", path=output)
        if converted.skipped:
            say(console, "!", "yellow", mark("Rows left out: {rows}"), language, rows=f"{converted.skipped:,}")
    else:
        sentence = mark(
            "Nothing was written: {skipped} of {rows} rows can't be converted. --skip-bad leaves them out, --drop NAME a field."
        )
        total = f"{converted.rows + converted.skipped:,}"
        say(console, "✗", "red", sentence, language, skipped=f"{converted.skipped:,}", rows=total)
    encoding = f" ({converted.encoding})" if converted.encoding not in ("utf-8", "utf-8-sig") else ""
    styles = ", ".join(f"{style} {count:,}" for style, count in converted.styles.most_common())
    facts = [f"{converted.file_format}{encoding}", styles]
    if converted.dropped:
        listed = ", ".join(f"{name} {count:,}" for name, count in converted.dropped.most_common(20))
        facts.append(translate(mark("fields left out: {listed}"), language, listed=listed))
    console.print(Text("  " + plain(" · ".join(fact for fact in facts if fact)), style="dim"))


def print_statistics(console: "Console", statistics: dict[str, Any], language: str) -> None:
    """What the sound rows hold, in a few lines; what was not counted has none."""
    from rich.text import Text

    lines = [
        (
            mark("turns"),
            _numbers({"": statistics.get("turns", 0), mark("messages"): statistics.get("messages", 0)}, language),
        ),
        (mark("rows with"), _numbers({name: statistics.get(field, 0) for name, field in _WITH}, language)),
        (mark("images"), _images(statistics.get("image_files"), language)),
        (mark("characters"), _spread(statistics.get("characters_per_row"), language)),
        (mark("kinds of task"), _shares(statistics.get("tasks"))),
        (mark("languages"), _shares(statistics.get("languages", {}).get("shares"))),
        (mark("tools called"), _numbers(statistics.get("tools", {}).get("top", {}), language)),
        (mark("tokens"), _tokens(statistics.get("tokens"), language)),
        (mark("training"), _training(statistics.get("estimate"), language)),
    ]
    rows = [(translate(name, language), text) for name, text in lines if text]
    if not rows:
        return
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(Text(name, style="dim"), _Paragraphs(*((line, "") for line in text.split("\n"))))
    console.print(grid)


_WITH = (
    (mark("system"), "with_system"),
    (mark("tools"), "with_tools"),
    (mark("reasoning"), "with_reasoning"),
    (mark("weights"), "with_weights"),
    (mark("images"), "with_images"),
)
_SHARES_SHOWN = 6


def _plain_lines(text: str) -> str:
    return "\n".join(plain(line) for line in text.split("\n"))


def _numbers(counts: dict[str, int], language: str) -> str:
    """`name 12 · other 3`, without the zeros."""
    found = [f"{translate(name, language)} {count:,}".strip() for name, count in counts.items() if count]
    more = f" · +{len(found) - _SHARES_SHOWN}" if len(found) > _SHARES_SHOWN else ""
    return " · ".join(found[:_SHARES_SHOWN]) + more


def _shares(counts: dict[str, float] | None) -> str:
    """`zh 95 % · en 5 %`, the largest first."""
    total = sum((counts or {}).values())
    if not counts or not total:
        return ""
    ordered = sorted(counts.items(), key=lambda item: -item[1])[:_SHARES_SHOWN]
    return " · ".join(
        f"{name} {count / total:.0%}" if count * 100 >= total else f"{name} < 1%" for name, count in ordered
    )


def _spread(values: dict[str, Any] | None, language: str) -> str:
    if not values:
        return ""
    sentence = mark("mean {mean} · half of them up to {p50} · 95% up to {p95} · longest {max}")
    shown = {name: f"{round(values[name]):,}" for name in ("mean", "p50", "p95", "max")}
    return translate(sentence, language, **shown)


def _tokens(tokens: dict[str, Any] | None, language: str) -> str:
    """Tokens with the chosen base, and the rows that its length limit changes."""
    if tokens is None:
        return ""
    lines = [_spread(tokens["tokens"], language)]
    sentence = mark("in one epoch {seen}, of which {trained} are trained; rows may have up to {limit}")
    numbers = {
        "seen": tokens["tokens_per_epoch"],
        "trained": tokens["trained_per_epoch"],
        "limit": tokens["max_length"],
    }
    lines.append(translate(sentence, language, **{name: f"{number:,}" for name, number in numbers.items()}))
    return "\n".join(lines)


def _images(images: dict[str, Any] | None, language: str) -> str:
    """How many images, of which formats, of which sizes."""
    from rich.filesize import decimal

    if images is None:
        return ""
    sentence = mark("different: {distinct} ({size})")
    lines = [translate(sentence, language, distinct=f"{images['distinct']:,}", size=decimal(images["bytes"]))]
    if images["formats"]:
        lines[0] += " · " + _numbers(images["formats"], language)
    sizes = sorted(images["sizes"], key=lambda size: -size["count"])[:_SHARES_SHOWN]
    edges = (f"{size['width'] or '>4096'} x {size['height'] or '>4096'}: {size['count']:,}" for size in sizes)
    if sizes:
        lines.append(translate(mark("pixels, at most {sizes}"), language, sizes=" · ".join(edges)))
    if images["failed"]:
        lines.append(translate(mark("unusable: {count}"), language, count=f"{images['failed']:,}"))
    return "\n".join(lines)


def _training(taken: dict[str, Any] | None, language: str) -> str:
    """What training would take: tokens of all epochs, and a price if the operator has set one."""
    if taken is None:
        return ""
    sentence = mark("{tokens} tokens = {formula}, n_epochs {n_epochs}")
    names = {"tokens": f"{taken['trained_tokens']:,}", "formula": taken["formula"], "n_epochs": taken["n_epochs"]}
    text = translate(sentence, language, **names)
    if taken["price"] is not None:
        text += " · " + translate(mark("price {price}"), language, price=f"{taken['price']:,}")
    return text


def print_preview(console: "Console", examples: "list[ShownExample]", language: str) -> None:
    """The tokens of one row: those that are trained in colour and between ⟨ ⟩, those cut off behind ✂."""
    from rich.text import Text

    for example in examples:
        if example.side is not None:
            console.print(Text(example.side, style="bold underline"))
        text = Text()
        trained = False
        for place, token in enumerate(example.tokens):
            if token.trained != trained:
                trained = token.trained
                text.append("⟨" if trained else "⟩", style="bold green")
            if place == example.cut_at:
                text.append("✂", style="bold red")
            cut = example.cut_at is not None and place >= example.cut_at
            style = "strike dim" if cut else "green" if token.trained else "default"
            text.append(_plain_lines(token.text or ""), style=style)
        if trained:
            text.append("⟩", style="bold green")
        if example.truncated:
            text.append(" …", style="dim")
        console.print(text)
        console.print()
        sentence = mark("tokens: {tokens}, trained (between ⟨ ⟩): {trained}, cut off (behind ✂): {cut}")
        cut = max(0, example.n_tokens - example.cut_at) if example.cut_at is not None else 0
        counts = {"tokens": f"{example.n_tokens:,}", "trained": f"{example.n_trained:,}", "cut": f"{cut:,}"}
        say(console, "·", "green", sentence, language, **counts)
        if example.untrained_messages:
            listed = ", ".join(str(number) for number in example.untrained_messages)
            sentence = mark("the base's template has no place to train these answers: messages {listed}")
            say(console, "!", "yellow", sentence, language, listed=listed)


def print_repaired(console: "Console", output: Path, repaired: "Repaired", language: str) -> None:
    """What a repair did, and what it had to leave."""
    sentence = mark("Wrote {path}. Rows mended: {patched}, left out: {dropped}")
    counts = {"patched": f"{repaired.patched:,}", "dropped": f"{repaired.dropped:,}"}
    say(console, "✓", "green", sentence, language, path=output, **counts)
    if repaired.left:
        sentence = mark("Rows that still have errors: {left}. --drop-bad-rows leaves them out.")
        say(console, "✗", "red", sentence, language, left=f"{repaired.left:,}")
