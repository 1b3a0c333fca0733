"""The check of a data file: one pass, bounded memory, every problem counted, the first ones with their place.

First what the file is as a whole (`sniff.py`), then line by line (`scan.py`), at last what can be said only of all lines
together: repeated and contradicting rows, too few of them, one-sided data.
Nothing here needs a tokenizer: lengths in tokens are the business of the job that knows its base model.
"""

import codecs
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tunewright.datasets.checking import documents, fingerprints
from tunewright.datasets.checking.fingerprints import Again, Known
from tunewright.datasets.checking.parts import read_in_parts, run_in_child
from tunewright.datasets.checking.scan import Depth, Limits, Scan
from tunewright.datasets.checking.sniff import HEAD_BYTES, sniff
from tunewright.datasets.records import FINE_TUNE_PURPOSES
from tunewright.datasets.report import Patch, Report, Reporter
from tunewright.datasets.rules.messages import FUNCTION, IMAGE_GENERATION, IMAGE_UNDERSTANDING
from tunewright.i18n import mark

ADVISED_ROWS = 200
"""The guide asks for some hundreds of rows at least."""
CHILD_FROM_BYTES = 4 << 20
PARTS_FROM_BYTES = 32 << 20

_PURPOSE_KIND = {
    "fine-tune-function-calling": FUNCTION,
    "fine-tune-vision-cogview": IMAGE_GENERATION,
    "fine-tune-vision-cogvlm": IMAGE_UNDERSTANDING,
}

VALIDATION_LEAK = "validation_leak"
Progress = Callable[[int, int], None]
"""Is told the bytes that are done and those of the whole file; may raise to end the check."""


def check(
    path: Path,
    purpose: str,
    limits: Limits,
    *,
    problems_to: Path | None = None,
    statistics: bool = True,
    semantic: bool = True,
    against: Path | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> Report:
    """The report on the file at `path`, whatever bytes it holds. Raises only OSError, if a file can't be read or written.

    For `batch` the lines need to be JSON objects; for the fine-tune purposes they must be rows to train on.

    - `problems_to`: a file that gets every problem, as JSON, one per line (the first million)
    - `semantic=False` looks at structure alone: neither at texts nor for repeated rows, and counts few things
    - `against`: the training file of a validation file; rows of both are reported
    - `processes`: of these a large file gets one for each stretch of it; the report is the same
    - `progress`: called about every 8 MiB
    """
    depth = Depth(texts=semantic, compare=semantic, statistics=statistics)
    with Reporter(problems_to) as reporter, path.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        head = stream.read(HEAD_BYTES)
        verdict = sniff(head, whole=len(head) == size)
        if verdict is not None:
            reporter.add("error", verdict.code, verdict.message, patch=verdict.patch, **verdict.values)
            kind, rows = None, 0
            if verdict.documents:
                stream.seek(0)
                training = purpose in FINE_TUNE_PURPOSES
                kind, rows = documents.check(stream, reporter, limits.max_line_bytes, training=training)
            return reporter.report(kind, rows, size)
        begin = 0
        if head.startswith(codecs.BOM_UTF8):
            begin = len(codecs.BOM_UTF8)
            sentence = mark("The file begins with a byte order mark (BOM); it is dropped.")
            reporter.add("warning", "byte_order_mark", sentence, patch=Patch(rewrite="utf8"))
        known = known_rows(against, purpose, limits) if against is not None and depth.compare else None
        scan = Scan(reporter, purpose, limits, depth)
        told = None if progress is None else lambda done: progress(begin + done, size)
        in_parts = processes > 1 and size >= PARTS_FROM_BYTES and purpose in FINE_TUNE_PURPOSES
        if not (in_parts and read_in_parts(scan, path, purpose, begin, size, processes, told)):
            stream.seek(begin)
            scan.read(stream, size, told)
        del head
        if known is not None:
            _compare_with(known, scan, begin)
            del known  # before the search for repeated rows, which takes as much room
        _compare_rows(scan, begin)
        _sum_up(scan, purpose)
        report = reporter.report(scan.kind, scan.rows, size)
    if statistics and scan.training:
        report.statistics = scan.statistics.result()
    return report


def check_in_child(
    path: Path,
    purpose: str,
    limits: Limits,
    *,
    problems_to: Path | None = None,
    statistics: bool = True,
    against: Path | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> Report:
    """The same as `check`, but a file of more than a few MB is checked by a process of its own, which ends with this one.

    A thread that checks would slow down every other thread of a server. Raises also `ChildProcessError` if the process died.
    """
    if path.stat().st_size < CHILD_FROM_BYTES and (against is None or against.stat().st_size < CHILD_FROM_BYTES):
        return check(
            path, purpose, limits, problems_to=problems_to, statistics=statistics, against=against, progress=progress
        )
    return run_in_child(path, purpose, limits, problems_to, statistics, against, processes, progress)


def known_rows(path: Path, purpose: str, limits: Limits) -> Known:
    """The rows of a training file, without a word on what is wrong with it."""
    scan = Scan(Reporter(), purpose, limits, Depth(texts=False, statistics=False))
    with path.open("rb") as stream:
        if stream.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            stream.seek(0)
        scan.read(stream, path.stat().st_size)
    return Known(scan.fingerprints)


def _compare_rows(scan: Scan, begin: int) -> None:
    """Report rows that stand in the file more than once or contradict each other."""
    found = scan.fingerprints
    repeated = _report(
        scan,
        begin,
        fingerprints.duplicates(found),
        "duplicate_row",
        mark("line {line} repeats line {first}"),
        patch=Patch(drop=True),
    )
    if repeated * 2 > scan.rows:
        sentence = mark(
            "{found} of {rows} rows repeat an earlier one; repeated rows teach little and are soon overfitted."
        )
        scan.reporter.add("warning", "duplicates", sentence, found=repeated, rows=scan.rows)
    sentence = mark("line {line} has the same prompt as line {first} and another answer")
    _report(scan, begin, fingerprints.contradictions(found), "contradicting_row", sentence)


def _compare_with(known: Known, scan: Scan, begin: int) -> None:
    """Report rows that stand in the training file."""
    sentence = mark("line {line} also stands in the training file, so it can't show what was learned")
    leaked = _report(scan, begin, known.common(scan.fingerprints), VALIDATION_LEAK, sentence, patch=Patch(drop=True))
    if leaked:
        sentence = mark("{found} of {rows} rows also stand in the training file.")
        scan.reporter.add("warning", "validation_overlap", sentence, found=leaked, rows=scan.rows)


def _report(scan: Scan, begin: int, rows: Iterable[Again], code: str, sentence: str, patch: Patch | None = None) -> int:
    """Warn of each row; the answer is how many they are."""
    count = 0
    for row, offset in fingerprints.with_offsets(scan.fingerprints, begin, rows):
        count += 1
        values: dict[str, Any] = {} if row.first == row.line_index else {"first": row.first + 1}
        scan.reporter.add(
            "warning", code, sentence, line=row.line_index + 1, byte_offset=offset, path=(), patch=patch, **values
        )
    return count


def _sum_up(scan: Scan, purpose: str) -> None:
    """What can be said only after the last line."""
    reporter = scan.reporter
    if scan.rows == 0 and reporter.errors == 0:
        reporter.add("error", "file_empty", mark("The file holds only blank lines."))
        return
    if not scan.training:
        return
    needed = scan.limits.min_training_rows
    if scan.rows < needed:
        sentence = mark("Rows in the file: {found}; at least {needed} are needed.")
        reporter.add("error", "too_few_examples", sentence, found=scan.rows, needed=needed)
    elif scan.rows < ADVISED_ROWS:
        sentence = mark("Rows in the file: {found}; good results usually need some hundreds.")
        reporter.add("warning", "few_rows", sentence, found=scan.rows)
    else:
        _advise_balance(scan)
    wanted = _PURPOSE_KIND.get(purpose)
    if wanted is not None and scan.kind is not None and scan.kind != wanted:
        sentence = mark("The purpose {purpose} is for rows of kind {expected}; these are {found}.")
        reporter.add("warning", "purpose_mismatch", sentence, purpose=purpose, expected=wanted, found=scan.kind)


def _advise_balance(scan: Scan) -> None:
    if not (scan.depth.statistics and scan.depth.compare):
        return
    for group, share in scan.statistics.rare_groups():
        sentence = mark(
            "Only {percent} % of the rows are of the group {group}; so few are hardly learned beside the others."
        )
        scan.reporter.add("warning", "unbalanced_mix", sentence, percent=round(100 * share, 2), group=group)
