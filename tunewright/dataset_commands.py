"""`tunewright datasets ...`: data files from the command line, without a server.

Exit codes: 0 fine, 1 the data has errors, 2 the command was not meant like that (a file is missing, a target exists), 78 the
machine lacks something. Whatever a file holds reaches the terminal as plain text: no markup, no control characters.
"""

import codecs
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, NoReturn

import typer
from pydantic import ValidationError

from tunewright.datasets import terminal
from tunewright.datasets.records import PURPOSES
from tunewright.errors import InvalidRequest, Misconfigured, TunewrightError, quote
from tunewright.files_on_disk import fsync_file
from tunewright.i18n import mark, translate
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.datasets.report import Report
    from tunewright.jobs.spec import Hyperparameters

EXIT_DATA = 1
EXIT_USAGE = 2
EXIT_MISCONFIGURED = 78
_BAR_FROM_BYTES = 8 * 2**20
"""Smaller files are done before anybody would look at a progress bar."""
_MANY_BYTES = 16 * 2**20
"""Smaller files are checked by one process: starting others takes longer."""

app = typer.Typer(no_args_is_help=True, help="Data files: check, mend, convert, split.")

Source = Annotated[Path, typer.Argument(help="The data file", show_default=False)]
Target = Annotated[Path, typer.Option("--output", "-o", help="The file to write", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace the file to write if it exists")]
Home = Annotated[Path | None, typer.Option("--home", help="Folder with the base models [default: ~/.tunewright]")]
Length = Annotated[int | None, typer.Option(min=16, help="Tokens a row may have [default: as a job would choose]")]
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
    model: Annotated[str | None, typer.Option(help="Also count tokens, with this base model")] = None,
    max_length: Length = None,
    fetch_images: Annotated[
        bool,
        typer.Option("--fetch-images", help="Also fetch images that rows give by their address, as the server does"),
    ] = False,
    home: Home = None,
    force: Force = False,
    as_json: AsJson = False,
    language: Language = None,
) -> None:
    """Check a data file: what it holds, what is wrong in it and where, and what can be mended."""
    from tunewright.datasets.export import export_list
    from tunewright.datasets.presentation import dataset_object

    with _explained(language, home) as settings:
        tongue = language or settings.language
        _check_purpose(purpose)
        for path in (file, against):
            _check_source(path)
        base = _base(settings, model) if model is not None else None
        if problems is not None:
            _check_target(problems, force, file, against)
        with tempfile.TemporaryDirectory(prefix="tunewright-") as folder:
            listed = Path(folder) / "problems.jsonl" if problems is not None else None
            report, not_fetched = _checked(file, purpose, settings, tongue, against, listed, fetch_images)
            if base is not None and not report.file_errors and report.rows > report.bad_rows:
                _count_tokens(report, file, base, max_length, settings, tongue, listed)
            if problems is not None and listed is not None:
                export_list(listed, problems, tongue)
        shown = dataset_object(report, filename=file.name, purpose=purpose, language=tongue)
        if as_json:
            typer.echo(json.dumps(shown, ensure_ascii=False, indent=2))
        else:
            terminal.print_report(
                terminal.console(), file, shown, report, tongue, not_fetched=not_fetched, against=against
            )
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
    from tunewright.datasets.importing.convert import OWN
    from tunewright.datasets.importing.convert import convert as convert_file
    from tunewright.datasets.importing.foreign import FORMATS
    from tunewright.datasets.importing.importers import STYLES
    from tunewright.datasets.presentation import converted_object

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
            typer.echo(json.dumps(converted_object(converted, tongue), ensure_ascii=False, indent=2))
        else:
            terminal.print_converted(terminal.console(), output, converted, tongue)
    if (converted.skipped and not skip_bad) or not converted.written:
        raise typer.Exit(EXIT_DATA)


@app.command()
def repair(
    file: Source,
    output: Target,
    purpose: Purpose = "fine-tune",
    code: Annotated[list[str] | None, typer.Option(help="Mend problems of this code alone; repeat it")] = None,
    line: Annotated[list[int] | None, typer.Option(min=1, help="Mend this line alone; repeat it")] = None,
    against: Annotated[
        Path | None, typer.Option(help="The training file, if FILE is for validation: leaves out rows that are in both")
    ] = None,
    drop_bad_rows: Annotated[
        bool, typer.Option("--drop-bad-rows", help="Leave out rows that still have errors")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
    language: Language = None,
) -> None:
    """Apply the mends that are certain and write the result to another file."""
    from tunewright.datasets.mending.repair import Choice
    from tunewright.datasets.mending.repair import repair as repair_file

    with _explained(language) as settings:
        tongue = language or settings.language
        _check_purpose(purpose)
        for path in (file, against):
            _check_source(path)
        _check_target(output, force, file, against)
        choice = Choice(
            codes=frozenset(code) if code else None,
            lines=frozenset(line) if line else None,
            drop_bad_rows=drop_bad_rows,
        )
        with (
            tempfile.TemporaryDirectory(prefix=".tunewright-", dir=output.parent) as folder,
            _bar(file, mark("Mending"), tongue) as progress,
        ):
            mended = Path(folder) / "mended.jsonl"
            repaired = repair_file(file, mended, purpose, settings, choice, against=against, progress=progress)
            fsync_file(mended)
            os.replace(mended, output)
        if as_json:
            counts = {"patched": repaired.patched, "dropped": repaired.dropped, "left": repaired.left}
            typer.echo(json.dumps(counts))
        else:
            terminal.print_repaired(terminal.console(), output, repaired, tongue)
    if repaired.left:
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
        with _bar(file, mark("Splitting"), tongue) as progress:
            sides = split_file(
                file,
                output,
                validation_out,
                ratio=validation_ratio,
                seed=seed,
                max_line_bytes=settings.max_line_bytes,
                progress=progress,
            )
        if as_json:
            typer.echo(json.dumps(sides._asdict()))
            return
        console = terminal.console()
        for rows, path in ((sides.train, output), (sides.validation, validation_out)):
            terminal.say(console, "✓", "green", mark("Wrote {path}, rows: {rows}"), tongue, rows=f"{rows:,}", path=path)


@app.command()
def preview(
    file: Source,
    model: Annotated[str, typer.Option(help="The base model", show_default=False)],
    line: Annotated[int, typer.Option(min=1, help="The row's line in the file")] = 1,
    max_length: Length = None,
    home: Home = None,
    as_json: AsJson = False,
    language: Language = None,
) -> None:
    """Show the tokens of one row as the trainer sees them: which are trained, and which are cut off."""
    import msgspec

    from tunewright.datasets.tokens.preview import preview as preview_row
    from tunewright.rendering.renderer import renderer_of

    with _explained(language, home) as settings:
        tongue = language or settings.language
        _check_source(file)
        base = _base(settings, model)
        data = _row_at(file, line, settings.max_line_bytes)
        examples = preview_row(data, line, renderer_of(base.path), _choices(base, 1, max_length).max_length)
        if as_json:
            shown = {"line": line, "model": base.code, "examples": msgspec.to_builtins(examples)}
            typer.echo(json.dumps(shown, ensure_ascii=False, indent=2))
        else:
            terminal.print_preview(terminal.console(), examples, tongue)


# the parts of the commands


def _checked(
    file: Path,
    purpose: str,
    settings: Settings,
    language: str,
    against: Path | None,
    listed: Path | None,
    fetch_images: bool,
) -> "tuple[Report, int]":
    """The report on the file and the images in its rows, and how many images were not fetched; all problems in `listed`."""
    from tunewright.datasets.checking.check import check
    from tunewright.datasets.images.image_check import check_images
    from tunewright.egress import Egress

    processes = (os.cpu_count() or 1) if file.stat().st_size > _MANY_BYTES else 1
    with _bar(file, mark("Checking"), language) as progress:
        report = check(
            file, purpose, settings, problems_to=listed, against=against, processes=processes, progress=progress
        )
    remote_allowed = settings.remote_media == "public"
    egress = Egress(settings.remote_media_hosts) if fetch_images and remote_allowed else None
    limit = settings.max_line_bytes
    left_out = check_images(file, report, limit, egress=egress, remote_allowed=remote_allowed, problems=listed)
    return report, left_out


def _row_at(file: Path, number: int, max_line_bytes: int) -> bytes:
    """The line's bytes. Raises InvalidRequest if it is blank, too long or not there."""
    from itertools import islice

    from tunewright.datasets.lines import read_lines

    with file.open("rb") as stream:
        if stream.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            stream.seek(0)
        found = next(islice(read_lines(stream, max_line_bytes), number - 1, None), None)
    if found is not None and found.data is None:
        sentence = mark("line {line} is longer than {limit} bytes")
        raise InvalidRequest("line_too_long", sentence, line=number, limit=max_line_bytes)
    if found is None or not found.data or found.data.isspace():
        raise _usage(mark("There is no row in line {line}."), line=number)
    return found.data


class _Pulled(NamedTuple):
    """A base model on this machine."""

    code: str
    path: Path
    context_tokens: int
    tokens_per_image: int
    price_per_million_tokens: float | None


def _base(settings: Settings, code: str) -> _Pulled:
    from tunewright.models.catalogue import Catalogue, unknown_base

    base = Catalogue(HomeFolder(settings.home)).find(code)
    if base is None:
        raise unknown_base(code)
    if base.path is None:
        sentence = mark('The weights of "{base}" are not on this machine; run: tunewright models pull {base}')
        raise InvalidRequest("model_not_pulled", sentence, base=base.code)
    price = base.price_per_million_tokens
    return _Pulled(
        base.code,
        base.path,
        base.context_tokens,
        base.tokens_per_image,
        settings.price_per_million_tokens if price is None else price,
    )


def _choices(base: _Pulled, rows: int, max_length: int | None) -> "Hyperparameters":
    """What a job on so many rows would choose, but for the length that was asked for."""
    from tunewright.jobs.hyperparameters import resolve

    asked = {} if max_length is None else {"max_length": min(max_length, base.context_tokens)}
    return resolve(asked, rows=rows, training_type="lora", method="supervised", context_tokens=base.context_tokens)


def _count_tokens(
    report: "Report",
    file: Path,
    base: _Pulled,
    max_length: int | None,
    settings: Settings,
    language: str,
    listed: Path | None,
) -> None:
    """Add the tokens to the report: their statistics, what training takes, and the rows that the length limit changes."""
    from tunewright.datasets.tokens.estimates import estimate
    from tunewright.datasets.tokens.token_counts import count_tokens
    from tunewright.datasets.tokens.token_report import add_tokens, join_lists

    choices = _choices(base, report.rows, max_length)
    of_tokens = None if listed is None else listed.with_name("tokens.jsonl")
    with _bar(file, mark("Counting tokens"), language) as progress:
        counted = count_tokens(
            file,
            base.path,
            max_length=choices.max_length,
            max_line_bytes=settings.max_line_bytes,
            progress=progress,
            problems_to=of_tokens,
        )
    if listed is not None and of_tokens is not None:
        join_lists(listed, of_tokens)
    taken = estimate(
        report.kind,
        counted,
        n_epochs=choices.n_epochs,
        tokens_per_image=base.tokens_per_image,
        price_per_million_tokens=base.price_per_million_tokens,
        speeds=(),
    )
    add_tokens(report, counted, taken)


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
        raise _usage(mark("There is no file {path}."), path=terminal.plain(path))
    if path is not None and not path.is_file():
        raise _usage(mark("{path} is not a file."), path=terminal.plain(path))


def _check_target(path: Path, force: bool, *sources: Path | None) -> None:
    if any(source is not None and path.resolve() == source.resolve() for source in sources):
        raise _usage(mark("{path} can't be read and written at the same time."), path=terminal.plain(path))
    if path.is_dir() or not path.parent.is_dir():
        raise _usage(mark("{path} is not a place for a file."), path=terminal.plain(path))
    if path.exists() and not force:
        raise _usage(mark("{path} exists; --force replaces it."), path=terminal.plain(path))


@contextmanager
def _explained(language: str | None, home: Path | None = None) -> Iterator[Settings]:
    """The settings; what goes wrong inside the block becomes one line on stderr and an exit code."""
    tongue = language or "en"
    try:
        settings = _settings(home)
        tongue = language or settings.language
        yield settings
    except _Usage as error:
        _stop(translate(error.sentence, tongue, **error.values), EXIT_USAGE)
    except TunewrightError as error:
        _stop(error.text(tongue), EXIT_MISCONFIGURED if isinstance(error, Misconfigured) else EXIT_DATA)
    except OSError as error:
        sentence = mark("{path}: {reason}")
        _stop(
            translate(sentence, tongue, path=terminal.plain(error.filename or "?"), reason=error.strerror or "?"),
            EXIT_USAGE,
        )


def _settings(home: Path | None) -> Settings:
    try:
        return Settings() if home is None else Settings(home=home)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = "TUNEWRIGHT_" + str(wrong["loc"][0]).upper()
        sentence = mark("{name} (or its option) is wrong: {reason}")
        raise Misconfigured("invalid_setting", sentence, name=name, reason=wrong["msg"]) from None


def _stop(sentence: str, exit_code: int) -> NoReturn:
    typer.echo(f"tunewright: {sentence}", err=True)
    raise typer.Exit(exit_code) from None


@contextmanager
def _bar(file: Path, label: str, language: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, if that is a terminal and the file takes a while."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal or file.stat().st_size < _BAR_FROM_BYTES:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(translate(label, language), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
