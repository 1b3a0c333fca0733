"""What counting tokens adds to the report of a check: for the command line, which does both in one go."""

from pathlib import Path

import msgspec

from tunewright.datasets.report import MAX_PROBLEMS, Problem, Report
from tunewright.datasets.tokens.estimates import Estimate
from tunewright.datasets.tokens.token_counts import TokenStatistics

_IDLE = "nothing_to_train"
"""Said by the check of rows whose answers all have weight 0; the count finds these again, beside those that are too long."""


def add_tokens(report: Report, counted: TokenStatistics, taken: Estimate) -> None:
    """Add the counts, what training would take, and the rows that the length limit changes to `report`."""
    shown = msgspec.to_builtins(counted)
    shown.pop("problems")
    report.statistics = {**report.statistics, "tokens": shown, "estimate": msgspec.to_builtins(taken)}
    idle = counted.counts.get(_IDLE, 0)
    cut = counted.counts.get("example_too_long", 0)
    said = report.counts.get(_IDLE, 0)
    more = max(0, idle - said)
    report.errors += more
    report.bad_rows += more
    report.warnings += cut
    found = {_IDLE: said + more, "example_too_long": cut}
    report.counts = {**report.counts, **{code: count for code, count in found.items() if count}}
    known = {problem.line for problem in report.problems if problem.code == _IDLE}
    # Why the check refused a row stands among the problems as well; the report has that already.
    new = [p for p in counted.problems if "tokens" in p.values and not (p.code == _IDLE and p.line in known)]
    report.problems = sorted([*report.problems, *new], key=lambda problem: problem.severity)[:MAX_PROBLEMS]
    report.firsts = [*report.firsts, *({problem.code: problem for problem in reversed(new)}.values())]


def join_lists(listed: Path, of_tokens: Path) -> None:
    """Append the problems that a count has listed to those of the check, but for what the check has said already."""
    decode = msgspec.json.Decoder(Problem).decode
    with listed.open("rb") as lines:
        known = {problem.line for problem in map(decode, lines) if problem.code == _IDLE}
    with of_tokens.open("rb") as lines, listed.open("ab") as target:
        for line in lines:
            problem = decode(line)
            if problem.code != _IDLE or problem.line not in known:
                target.write(line)
