"""`tunewright datasets ...`: data files from the command line, without a server.

Exit codes: 0 fine, 1 the data has errors, 2 the command was not meant like that (a file is missing, a target exists), 78 the
machine lacks something. Whatever a file holds reaches the terminal as plain text: no markup, no control characters.
"""

import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from pydantic import ValidationError

from tunewright.datasets.records import PURPOSES
from tunewright.errors import Misconfigured, TunewrightError, quote
from tunewright.i18n import mark, translate
from tunewright.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tunewright.datasets.convert import Converted
    from tunewright.datasets.report import Report

EXIT_DATA = 1
EXIT_USAGE = 2
EXIT_MISCONFIGURED = 78
_BAR_FROM_BYTES = 8 * 2**20
"""Smaller files are done before anybody would look at a progress bar."""
_MANY_BYTES = 16 * 2**20
"""Smaller files are checked by one process: starting others takes longer."""
_LINES_SHOWN = 6

app = typer.Typer(no_args_is_help=True, help="Data files: check, mend, convert, split.")

Source = Annotated[Path, typer.Argument(help="The data file", show_default=False)]
Target = Annotated[Path, typer.Option("--output", "-o", help="The file to write", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace the file to write if it exists")]
Purpose = Annotated[str, typer.Option(help="What the file is for")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object")]
Language = Annotated[
    Literal["en", "zh"] | None, typer.Option(help="Language of messages [default: TUNEWRIGHT_LANGUAGE]")
]


@app.command()
def validate(
    file: Source,
    purpose: Purpose = "fine-tune",
    against: Annotated[
        Path | None, typer.Option(help="The training file, if FILE is for validation: finds rows that are in both")
    ] = None,
    problems: Annotated[Path | None, typer.Option(help="Write every problem to this .jsonl or .csv file")] = None,
    force: Force = False,
    as_json: AsJson = False,
    language: Language = None,
) -> None:
    """Check a data file: what it holds, what is wrong in it and where, and what can be mended."""
    from tunewright.datasets.presentation import dataset_object

    with _explained(language) as settings:
        tongue = language or settings.language
        _check_purpose(purpose)
        for path in (file, against):
            _check_source(path)
        if problems is not None:
            _check_target(problems, force, file, against)
        report = _checked(file, purpose, settings, tongue, against, problems)
        shown = dataset_object(report, filename=file.name, purpose=purpose, language=tongue)
        if as_json:
            typer.echo(json.dumps(shown, ensure_ascii=False, indent=2))
        else:
            _print_report(_console(), file, shown, report, tongue)
    if not report.ok:
        raise typer.Exit(EXIT_DATA)


@app.command()
def convert(
    file: Source,
    output: Target,
    style: Annotated[
        str, typer.Option(help="auto, messages, " + "sharegpt, conversations, alpaca, pairs, preference")
    ] = "auto",
    file_format: Annotated[str, typer.Option("--format", help="auto, jsonl, json, csv (also TSV), parquet")] = "auto",
    column: Annotated[
        list[str] | None,
        typer.Option(help="FIELD=COLUMN, such as prompt=question; repeat it; columns not named are left out"),
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help="A field or column to leave out; repeat it")] = None,
    encoding: Annotated[str | None, typer.Option(help="Encoding of a text file [default: found out]")] = None,
    delimiter: Annotated[
        str | None, typer.Option(help="What separates the cells of a CSV [default: found out]")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that can't be converted")] = False,
    force: Force = False,
    as_json: AsJson = False,
    language: Language = None,
) -> None:
    """Turn ShareGPT, Alpaca, question/answer, TRL, CSV or Parquet into rows to train on.

    Without --skip-bad nothing is written while there is a row that can't be converted.
    """
    from tunewright.datasets.convert import OWN
    from tunewright.datasets.convert import convert as convert_file
    from tunewright.datasets.foreign import FORMATS
    from tunewright.datasets.importers import STYLES

    with _explained(language) as settings:
        tongue = language or settings.language
        _check_choice("--style", style, ("auto", OWN, *STYLES))
        _check_choice("--format", file_format, ("auto", *FORMATS))
        if delimiter is not None and len(delimiter := delimiter.replace("\\t", "\t")) != 1:
            raise _usage(mark("{option} must be one character."), option="--delimiter")
        _check_source(file)
        _check_target(output, force, file)
        with _bar(file, mark("Converting"), tongue) as progress:
            converted = convert_file(
                file,
                output,
                style=style,
                columns=_columns(column),
                drop=drop or (),
                skip_bad=skip_bad,
                file_format=file_format,
                encoding=encoding,
                delimiter=delimiter,
                max_line_bytes=settings.max_line_bytes,
                progress=progress,
            )
        if as_json:
            typer.echo(json.dumps(_converted_object(converted, tongue), ensure_ascii=False, indent=2))
        else:
            _print_converted(_console(), output, converted, tongue)
    if (converted.skipped and not skip_bad) or not converted.written:
        raise typer.Exit(EXIT_DATA)


@app.command()
def split(
    file: Source,
    output: Target,
    validation_out: Annotated[Path, typer.Option(help="The file for the validation rows", show_default=False)],
    validation_ratio: Annotated[float, typer.Option(help="About this part of the rows is for validation")] = 0.05,
    seed: Annotated[int, typer.Option(help="Another number, another choice of rows")] = 0,
    force: Force = False,
    as_json: AsJson = False,
    language: Language = None,
) -> None:
    """Put a part of the rows aside for validation; equal rows always stay together."""
    from tunewright.datasets.splitting import split as split_file

    with _explained(language) as settings:
        tongue = language or settings.language
        if not 0 < validation_ratio < 1:
            raise _usage(mark("{option} must be between 0 and 1."), option="--validation-ratio")
        _check_source(file)
        _check_target(output, force, file)
        _check_target(validation_out, force, file, output)
        limit = settings.max_line_bytes
        sides = split_file(file, output, validation_out, ratio=validation_ratio, seed=seed, max_line_bytes=limit)
        if as_json:
            typer.echo(json.dumps(sides._asdict()))
            return
        console = _console()
        for rows, path in ((sides.train, output), (sides.validation, validation_out)):
            _say(console, "✓", "green", mark("Wrote {path}, rows: {rows}"), tongue, rows=f"{rows:,}", path=path)


# the parts of the commands


def _checked(
    file: Path, purpose: str, settings: Settings, language: str, against: Path | None, problems: Path | None
) -> "Report":
    """The report on the file; all problems in `problems`, if that is wanted."""
    from tunewright.datasets.check import check

    processes = (os.cpu_count() or 1) if file.stat().st_size > _MANY_BYTES else 1
    options: dict[str, Any] = {"against": against, "processes": processes}
    with _bar(file, mark("Checking"), language) as progress:
        options["progress"] = progress
        if "problems_to" not in inspect.signature(check).parameters:
            options = {}
        if problems is None:
            return check(file, purpose, settings, **options)
        with tempfile.TemporaryDirectory(prefix="tunewright-") as folder:
            listed = Path(folder) / "problems.jsonl"
            listed.touch()
            report = check(file, purpose, settings, **options, **({"problems_to": listed} if options else {}))
            if not options:
                import msgspec

                listed.write_bytes(b"".join(msgspec.json.encode(problem) + b"\n" for problem in report.problems))
            _export(listed, problems, language)
    return report


def _export(listed: Path, target: Path, language: str) -> None:
    import msgspec

    from tunewright.datasets import export
    from tunewright.datasets.report import Problem
    from tunewright.files_on_disk import writing

    write = export.table if target.suffix.lower() == ".csv" else export.json_lines
    decode = msgspec.json.Decoder(Problem).decode
    with listed.open("rb") as lines, writing(target) as stream:
        stream.writelines(write((decode(line) for line in lines), language))


def _columns(given: list[str] | None) -> dict[str, str]:
    columns: dict[str, str] = {}
    for item in given or ():
        name, equals, column = item.partition("=")
        if not equals or not name or not column:
            raise _usage(mark("{option} is written FIELD=COLUMN, not {found}."), option="--column", found=quote(item))
        columns[name] = column
    return columns


class _Usage(Exception):
    """The command can't be meant like that."""

    def __init__(self, sentence: str, values: dict[str, object]) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.values = values


def _usage(sentence: str, **values: object) -> _Usage:
    return _Usage(sentence, values)


def _check_purpose(purpose: str) -> None:
    _check_choice("--purpose", purpose, PURPOSES)


def _check_choice(option: str, found: str, allowed: tuple[str, ...]) -> None:
    if found not in allowed:
        sentence = mark("{option} is {found}; allowed: {allowed}.")
        raise _usage(sentence, option=option, found=quote(found), allowed=", ".join(allowed))


def _check_source(path: Path | None) -> None:
    if path is not None and not path.exists():
        raise _usage(mark("There is no file {path}."), path=_plain(path))
    if path is not None and not path.is_file():
        raise _usage(mark("{path} is not a file."), path=_plain(path))


def _check_target(path: Path, force: bool, *sources: Path | None) -> None:
    if any(source is not None and path.resolve() == source.resolve() for source in sources):
        raise _usage(mark("{path} can't be read and written at the same time."), path=_plain(path))
    if path.is_dir() or not path.parent.is_dir():
        raise _usage(mark("{path} is not a place for a file."), path=_plain(path))
    if path.exists() and not force:
        raise _usage(mark("{path} exists; --force replaces it."), path=_plain(path))


@contextmanager
def _explained(language: str | None) -> Iterator[Settings]:
    """The settings; what goes wrong inside the block becomes one line on stderr and an exit code."""
    tongue = language or "en"
    try:
        settings = _settings()
        tongue = language or settings.language
        yield settings
    except _Usage as error:
        _stop(translate(error.sentence, tongue, **error.values), EXIT_USAGE)
    except TunewrightError as error:
        _stop(error.text(tongue), EXIT_MISCONFIGURED if isinstance(error, Misconfigured) else EXIT_DATA)
    except OSError as error:
        sentence = mark("{path}: {reason}")
        _stop(translate(sentence, tongue, path=_plain(error.filename or "?"), reason=error.strerror or "?"), EXIT_USAGE)


def _settings() -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        wrong = error.errors()[0]
        name = "TUNEWRIGHT_" + str(wrong["loc"][0]).upper()
        sentence = mark("{name} (or its option) is wrong: {reason}")
        raise Misconfigured("invalid_setting", sentence, name=name, reason=wrong["msg"]) from None


def _stop(sentence: str, exit_code: int) -> NoReturn:
    typer.echo(f"tunewright: {sentence}", err=True)
    raise typer.Exit(exit_code) from None


# what a person sees


def _plain(text: object) -> str:
    """On a terminal nothing but text: what would steer it is shown as �."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, emoji=False)


@contextmanager
def _bar(file: Path, label: str, language: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr, if that is a terminal and the file takes a while."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal or file.stat().st_size < _BAR_FROM_BYTES:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(translate(label, language), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _say(console: "Console", sign: str, colour: str, sentence: str, language: str, **values: object) -> None:
    from rich.text import Text

    shown = translate(sentence, language, **{name: _plain(value) for name, value in values.items()})
    console.print(_grid(Text(sign, style=f"bold {colour}"), Text(shown)))


def _grid(*cells: Any) -> "Table":
    """Cells side by side; a long last one is wrapped in its own column."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    for _ in cells:
        grid.add_column(overflow="fold")
    grid.add_row(*cells)
    return grid


def _print_report(console: "Console", file: Path, shown: dict[str, Any], report: "Report", language: str) -> None:
    from rich.filesize import decimal
    from rich.text import Text

    title = Text(_plain(file), style="bold")
    rows = translate(mark("rows: {rows}"), language, rows=f"{shown['rows'] or 0:,}")
    facts = " · ".join(str(fact) for fact in (shown["kind"], rows, decimal(shown["bytes"]), shown["purpose"]) if fact)
    console.print(title)
    console.print(Text(facts, style="dim"))
    console.print()
    if groups := shown["report"]["groups"]:
        console.print(_problem_table(groups, _places(report), language))
    mendable = sum(group["patchable"] for group in groups)
    if report.ok:
        sentence = mark("The file can be used. Errors: 0, warnings: {warnings}.")
        _say(console, "✓", "green", sentence, language, warnings=f"{report.warnings:,}")
    elif report.file_errors:
        sentence = mark("The file can't be used as it is. Errors: {errors}, warnings: {warnings}.")
        counts = {"errors": f"{report.errors:,}", "warnings": f"{report.warnings:,}"}
        _say(console, "✗", "red", sentence, language, **counts)
    else:
        sentence = mark("{bad_rows} of {rows} rows can't be used. Errors: {errors}, warnings: {warnings}.")
        counts = {name: f"{getattr(report, name):,}" for name in ("bad_rows", "rows", "errors", "warnings")}
        _say(console, "✗", "red", sentence, language, **counts)
    if mendable:
        sentence = mark("Mends that are certain: {mendable}. Apply them: tunewright datasets repair {path} -o OUT")
        _say(console, "→", "cyan", sentence, language, mendable=f"{mendable:,}", path=file)


def _places(report: "Report") -> dict[str, list[int]]:
    """The first lines with each code."""
    places: dict[str, list[int]] = {}
    for problem in report.problems:
        lines = places.setdefault(problem.code, [])
        if problem.line is not None and problem.line not in lines:
            lines.append(problem.line)
    return places


def _problem_table(groups: list[dict[str, Any]], places: dict[str, list[int]], language: str) -> "Table":
    from rich.text import Text

    mendable = any(group["patchable"] for group in groups)
    heads = ["", ">" + translate(mark("count"), language), translate(mark("problem"), language)]
    table = _table(*heads, *([">" + translate(mark("mendable"), language)] if mendable else []))
    for group in groups:
        wrong = group["severity"] == "error"
        colour = "red" if wrong else "yellow"
        body = Text(group["code"], style=f"bold {colour}")
        if group["message"]:
            body.append(f"\n{_plain(group['message'])}", style="default not bold")
        also = places.get(group["code"], [])[1:]
        if also:
            listed = ", ".join(f"{line:,}" for line in also[:_LINES_SHOWN])
            more = ", …" if group["count"] > len(also[:_LINES_SHOWN]) + 1 else ""
            sentence = translate(mark("also in lines {listed}"), language, listed=listed + more)
            body.append(f"\n{sentence}", style="dim not bold")
        cells = [Text("✗" if wrong else "!", style=f"bold {colour}"), f"{group['count']:,}", body]
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


def _print_converted(console: "Console", output: Path, converted: "Converted", language: str) -> None:
    from rich.text import Text

    if converted.problems:
        place = mark("row") if converted.file_format == "Parquet" else mark("line")
        table = _table(">" + translate(place, language), translate(mark("why it can't be converted"), language))
        for problem in converted.problems[:20]:
            table.add_row(f"{problem.line:,}", Text(_plain(problem.text(language))))
        console.print(table)
    if converted.written:
        sentence = mark("Wrote {path}, rows: {rows}")
        _say(console, "✓", "green", sentence, language, rows=f"{converted.rows:,}", path=output)
        if converted.skipped:
            _say(console, "!", "yellow", mark("Rows left out: {rows}"), language, rows=f"{converted.skipped:,}")
    else:
        sentence = mark(
            "Nothing was written: {skipped} of {rows} rows can't be converted. --skip-bad leaves them out, --drop NAME a field."
        )
        total = f"{converted.rows + converted.skipped:,}"
        _say(console, "✗", "red", sentence, language, skipped=f"{converted.skipped:,}", rows=total)
    encoding = f" ({converted.encoding})" if converted.encoding not in ("utf-8", "utf-8-sig") else ""
    styles = ", ".join(f"{style} {count:,}" for style, count in converted.styles.most_common())
    facts = [f"{converted.file_format}{encoding}", styles]
    if converted.dropped:
        listed = ", ".join(f"{name} {count:,}" for name, count in converted.dropped.most_common(20))
        facts.append(translate(mark("fields left out: {listed}"), language, listed=listed))
    console.print(Text("  " + _plain(" · ".join(fact for fact in facts if fact)), style="dim"))


def _converted_object(converted: "Converted", language: str) -> dict[str, Any]:
    from tunewright.datasets.presentation import problem_object

    return {
        "format": converted.file_format,
        "encoding": converted.encoding,
        "written": converted.written,
        "rows": converted.rows,
        "skipped": converted.skipped,
        "styles": dict(converted.styles),
        "dropped": dict(converted.dropped),
        "problems": [problem_object(problem, language) for problem in converted.problems],
    }
