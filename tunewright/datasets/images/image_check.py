"""The images of a file on the disk, checked for the command line: nothing is stored."""

import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from tunewright.datasets.images.image_decoder import Decoder
from tunewright.datasets.images.image_findings import Findings, appending
from tunewright.datasets.images.image_pass import image_lines
from tunewright.datasets.images.image_records import Outcome
from tunewright.datasets.images.image_references import (
    IMAGE_KINDS,
    ImageStatistics,
    Obtainer,
    Reference,
    read_references,
)
from tunewright.datasets.report import Report
from tunewright.egress import Egress

_AT_ONCE = 4


def check_images(
    path: Path,
    report: Report,
    max_line_bytes: int,
    *,
    egress: Egress | None = None,
    remote_allowed: bool = True,
    problems: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Decode the images of a file whose rows `report` is about; what is wrong with them is added to `report` and to the list in
    `problems`, if that exists, and `report.statistics["image_files"]` is set. The answer is how many were not looked at.

    Without `egress` these are all that are given by their web address; with `remote_allowed` False such are errors. `progress`
    hears how many different images are done. Raises OSError and Unavailable(`image_decoder_failed`).
    """
    if report.kind not in IMAGE_KINDS or report.file_errors:
        return 0
    outcomes: dict[bytes, Outcome] = {}
    left_out = 0
    with tempfile.TemporaryDirectory() as folder, Decoder() as decoder, ThreadPoolExecutor(_AT_ONCE) as threads:
        obtainer = Obtainer(Path(folder), egress, decoder, threading.Event())

        def look(reference: Reference) -> tuple[bytes, Outcome]:
            outcome, image = obtainer.obtain(reference.url)
            if image is not None:
                image.unlink()
            return reference.key, outcome

        references = read_references(path, max_line_bytes)
        while some := list(islice(references, _AT_ONCE)):
            refused = [one for one in some if obtainer.refuses(one)]
            left_out += len(refused)
            if not remote_allowed:
                outcomes.update((one.key, Outcome(code="remote_media_not_allowed")) for one in refused)
            new = {one.key: one for one in some if one.key not in outcomes and one not in refused}
            outcomes.update(threads.map(look, new.values()))
            if progress is not None:
                progress(len(outcomes))
    statistics = ImageStatistics()
    with appending(problems) as stream:
        findings = Findings(stream)
        looked_at = (one for one in read_references(path, max_line_bytes) if one.key in outcomes)
        for _ in image_lines(looked_at, outcomes, findings, statistics):
            pass
    findings.join(report)
    if any(outcome.code != "remote_media_not_allowed" for outcome in outcomes.values()):
        report.statistics["image_files"] = statistics.result()
    return left_out if remote_allowed else 0
