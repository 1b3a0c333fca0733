"""The rows of one job: read, counted, and told of where they are not used as they are."""

from pathlib import Path

import msgspec

from tunewright.i18n import mark
from tunewright.jobs.spec import RowChoice
from tunewright.recipes import packing
from tunewright.recipes.attempt import Attempt
from tunewright.rendering.renderer import Renderer


def read(attempt: Attempt, renderer: Renderer, sides: int = 1) -> tuple[packing.Rows, packing.Rows | None]:
    """The rows to train on and those to validate with; `sides` is 2 for preference rows.

    Raises what `packing.read_rows` raises.
    """
    spec = attempt.spec
    bad, bad_validation = _lines_left_out(spec.skip_lines)
    rows = _read(attempt, renderer, spec.training_data, spec.training_sha256, "training_file", bad, sides)
    if spec.validation_data is None:
        return rows, None
    sha256 = spec.validation_sha256 or ""
    validation = _read(attempt, renderer, spec.validation_data, sha256, "validation_file", bad_validation, sides)
    _warn_of_overlap(attempt, rows, validation)
    return rows, validation


def counts(rows: packing.Rows, validation: packing.Rows | None) -> dict[str, int]:
    """What happened to every row, as the job shows it."""
    found = {"used": rows.n_examples, "skipped": rows.skipped.rows, "cut": rows.cut.rows}
    return found if validation is None else found | {"validation": validation.n_examples}


def _lines_left_out(path: str | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bad lines of the training and of the validation file, which the job puts up with."""
    if path is None:
        return (), ()
    choice = msgspec.json.decode(Path(path).read_bytes(), type=RowChoice)
    return choice.train.skip, choice.validation.skip if choice.validation else ()


def _read(
    attempt: Attempt, renderer: Renderer, path: str, sha256: str, param: str, bad: tuple[int, ...], sides: int
) -> packing.Rows:
    max_length = attempt.spec.hyperparameters.max_length
    rows = packing.read_rows(
        Path(path),
        renderer,
        max_length=max_length,
        max_line_bytes=attempt.spec.max_line_bytes,
        between_rows=attempt.go_on,
        param=param,
        skip_lines=frozenset(bad),
        cache=packing.cache_of(attempt.spec),
        data_sha256=sha256,
        sides=sides,
    )
    if bad:
        attempt.note(
            "bad_rows_skipped",
            mark("{rows} bad rows of {file} were left out. Lines: {lines}"),
            rows=len(bad),
            file=param,
            lines=packing.Tally(len(bad), 0, list(bad[: packing.LINES_NAMED])).lines_text(),
        )
    if rows.cut.rows:
        attempt.note(
            "rows_cut",
            mark("{rows} rows of {file} were cut to {max_length} tokens; {tokens} tokens were lost. Lines: {lines}"),
            rows=rows.cut.rows,
            file=param,
            max_length=max_length,
            tokens=rows.cut.tokens,
            lines=rows.cut.lines_text(),
        )
    idle = rows.skipped.rows - len(bad)
    if idle:
        lines = [line for line in rows.skipped.lines if line not in bad]
        attempt.note(
            "rows_skipped",
            mark("{rows} rows of {file} were not used, for they hold no token to train on. Lines: {lines}"),
            rows=idle,
            file=param,
            lines=packing.Tally(idle, 0, lines).lines_text(),
        )
    return rows


def _warn_of_overlap(attempt: Attempt, rows: packing.Rows, validation: packing.Rows) -> None:
    found = packing.overlap(rows, validation)
    if found:
        attempt.note(
            "validation_overlap",
            mark(
                "{found} of the {rows} validation rows are also training rows, so the validation loss looks too good."
            ),
            found=found,
            rows=validation.n_examples,
        )
