"""How a dataset and its report are shown: one object for the API and for the command line."""

from typing import TYPE_CHECKING, Any

import msgspec

from tunewright.datasets.records import File
from tunewright.datasets.report import Problem, Report
from tunewright.i18n import LANGUAGES, mark, translate

if TYPE_CHECKING:
    from tunewright.datasets.importing.convert import Converted

IMAGES = "images"
"""Where the report of a file that is `processing` says how many of its images are done."""
_ORDER = {"error": 0, "warning": 1}


def dataset_object(
    report: Report, *, file: File | None = None, filename: str, purpose: str, language: str = "en"
) -> dict[str, Any]:
    """The whole report on a dataset, sentences in `language` ('en' or 'zh'). Without `file` (a check that stored nothing)
    what only a stored file has is None, and `status` is what the file would get."""
    status = "processed" if report.ok else "error"
    return {
        "id": file.id if file else None,
        "object": "dataset",
        "kind": report.kind,
        "rows": report.rows,
        "status": file.status if file else status,
        "filename": filename,
        "purpose": purpose,
        "bytes": file.size_bytes if file else report.size_bytes,
        "created_at": file.created_at if file else None,
        "version": file.version if file else 1,
        "parent_id": file.parent_id if file else None,
        "origin": file.origin if file else {},
        "statistics": (file.statistics if file else None) or report.statistics,
        "report": {
            **_totals(report),
            "groups": groups(report, language),
            "problems": [problem_object(problem, language) for problem in report.problems],
            "truncated": report.problems_truncated,
            **({"images": file.report[IMAGES]} if file and file.report.get(IMAGES) else {}),
        },
    }


def stored_object(file: File, language: str) -> dict[str, Any]:
    """`dataset_object` of a stored file."""
    return dataset_object(report_of(file), file=file, filename=file.filename, purpose=file.purpose, language=language)


def summary_object(file: File) -> dict[str, Any]:
    """A dataset without its statistics and single problems, for lists."""
    return {
        "id": file.id,
        "object": "dataset",
        "kind": file.kind,
        "rows": file.rows,
        "status": file.status,
        "filename": file.filename,
        "purpose": file.purpose,
        "bytes": file.size_bytes,
        "created_at": file.created_at,
        "version": file.version,
        "parent_id": file.parent_id,
        "origin": file.origin,
        "report": _totals(report_of(file)),
    }


def problem_object(problem: Problem, language: str) -> dict[str, Any]:
    """One problem: its sentence in `language`, and in both."""
    messages = {each: problem.text(each) for each in LANGUAGES}
    return {
        "line": problem.line,
        "byte_offset": problem.byte_offset,
        "pointer": problem.pointer,
        "code": problem.code,
        "severity": problem.severity,
        "message": messages.get(language, messages["en"]),
        "messages": messages,
        "patch": None if problem.patch is None else msgspec.to_builtins(problem.patch),
    }


def groups(report: Report, language: str) -> list[dict[str, Any]]:
    """Every code with its number, errors first, then the most frequent. `message` is the sentence of the first of them."""
    firsts: dict[str, Problem] = {}
    for problem in (*report.problems, *report.firsts):
        firsts.setdefault(problem.code, problem)
    found = [
        {
            "code": code,
            "severity": firsts[code].severity if code in firsts else "error",
            "count": count,
            "patchable": report.patchable.get(code, 0),
            "message": firsts[code].text(language) if code in firsts else None,
        }
        for code, count in report.counts.items()
    ]
    return sorted(found, key=lambda group: (_ORDER[group["severity"]], -group["count"], group["code"]))


def report_of(file: File) -> Report:
    """The stored report; a file from before there were reports has an empty one."""
    return msgspec.convert({"kind": file.kind, "rows": file.rows or 0, **file.report}, Report)


def status_sentence(file: File, language: str) -> str | None:
    """Why a file is not simply `processed`, in one sentence."""
    if file.status == "processing":
        return translate(mark("The images of this file are being fetched."), language)
    if file.status != "error":
        return None
    report = report_of(file)
    first = next((problem for problem in report.problems if problem.severity == "error"), None)
    return translate(
        mark("{bad_rows} of {rows} rows can't be trained on ({errors} errors); the first: {first}"),
        language,
        bad_rows=report.bad_rows,
        rows=report.rows,
        errors=report.errors,
        first=first.text(language) if first else "-",
    )


def _totals(report: Report) -> dict[str, Any]:
    return {
        "errors": report.errors,
        "warnings": report.warnings,
        "bad_rows": report.bad_rows,
        "counts": report.counts,
    }


def converted_object(converted: "Converted", language: str) -> dict[str, Any]:
    """What a conversion did, with the rows that it could not convert."""
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
