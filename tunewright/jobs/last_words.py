"""How a trainer died that left no last record: read from its log, its exit code and what the kernel says. Pure.

`recognise` finds the first row of `SIGNATURES` that fits; `evidence_of` shows what it was seen by, for the owner of the job.
"""

import re
import signal
from typing import NamedTuple

from tunewright.jobs.signatures import SIGNATURES, SILENT, STARVED, WORDLESS, Signature

_EVIDENCE_LINES, _EVIDENCE_CHARACTERS, _LINE_CHARACTERS, _FRAMES = 12, 2000, 240, 4


class Death(NamedTuple):
    """`exit_code` is minus the signal of one that was killed by a signal; None if another server was its parent. `starved`:
    the kernel says that it killed for want of memory. `silent`: we killed it, for it had stopped to beat."""

    log: str = ""
    exit_code: int | None = None
    starved: bool = False
    silent: bool = False


_COMPILED = [(row, re.compile(row.pattern) if row.pattern else None) for row in SIGNATURES]
_FRAME = re.compile(r'\s*File "([^"]*)", line (\d+),? in (\S+)')
_EXCEPTION = re.compile(r"([A-Za-z_][\w.]*)(: .*)?")
_SECRET = re.compile(
    r"(?i)\b(?:bearer|basic)\s+\S+|\b(?:sk|pk|hf|ghp|whsec|tw)[-_][\w-]{6,}|\beyJ[\w.-]{10,}|\b[0-9a-f]{32,}\.\w+|"
    r"\b\w*(?:password|secret|token|api_?key)\w*\s*[=:]\s*\S+|\b\w+://\S+"
)
_QUOTED = re.compile(r"(?<!\w)'[^']*'|\"[^\"]*\"|`[^`]*`|[«“‘「『][^»”’」』]*[»”’」』]?")
_PATH = re.compile(r"(?:/[\w.@+-]+)+/([\w.@+-]+)")
_FOREIGN = re.compile(r"[^\x20-\x7e]+")
_HIDDEN = "\N{HORIZONTAL ELLIPSIS}"


def recognise(death: Death) -> Signature:
    """Of what the trainer died."""
    if death.silent:
        return SILENT
    if death.starved:
        return STARVED
    lines = death.log.splitlines()
    for row, pattern in _COMPILED:
        if death.exit_code in row.exits or (pattern is not None and any(map(pattern.search, lines))):
            return row
    return WORDLESS


def evidence_of(death: Death) -> str:
    """How it ended, and `evidence_in` its log."""
    found: list[str] = []
    if death.exit_code is not None:
        found.append(f"exit: {_exit_text(death.exit_code)}")
    if death.starved:
        found.append("kernel: oom_kill")
    return "\n".join([*found, evidence_in(death.log)]).strip()


def evidence_in(log: str) -> str:
    """What a log says of a failure: places in the code, kinds of errors, and lines that a signature knows.

    Everything else is left out, and of those lines what is quoted, what is no ASCII, secrets and folders: they may come
    from rows, or are the operator's.
    """
    shown: list[str] = []
    frames = 0
    for line in log.splitlines():
        text = _shown(line)
        if text is None:
            continue
        frames = frames + 1 if text.startswith("File ") else 0
        if frames > _FRAMES:  # the innermost tell most
            del shown[-_FRAMES]
        shown.append(text)
    return "\n".join(shown[-_EVIDENCE_LINES:])[-_EVIDENCE_CHARACTERS:]


def _exit_text(code: int) -> str:
    if code >= 0:
        return str(code)
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"


def _shown(line: str) -> str | None:
    frame = _FRAME.match(line)
    if frame:
        path, number, name = frame.groups()
        return f"File {_short(path)}, line {number}, in {name}"
    if any(pattern.search(line) for row, pattern in _COMPILED if pattern is not None and row.name != "exception"):
        return _scrubbed(line)
    error = _EXCEPTION.fullmatch(line)
    if error and _is_error(error[1]):
        return error[1] + (f": {_HIDDEN}" if error[2] else "")
    return None


def _is_error(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last.endswith(("Error", "Exception", "Interrupt", "Exit")) or name.startswith("tunewright.")


def _scrubbed(line: str) -> str:
    text = line.strip()
    for pattern, instead in ((_SECRET, _HIDDEN), (_QUOTED, _HIDDEN), (_PATH, r"\1"), (_FOREIGN, _HIDDEN)):
        text = pattern.sub(instead, text)
    return text[:_LINE_CHARACTERS]


def _short(path: str) -> str:
    """From the package on; of anything else the last part."""
    for start in ("/site-packages/", "/dist-packages/"):
        if start in path:
            return path.rpartition(start)[2]
    own = path.rfind("/tunewright/")
    return path[own + 1 :] if own >= 0 else path.rpartition("/")[2]
