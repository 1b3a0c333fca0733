"""New datasets made of old ones: mended, split, and the family they belong to. What is there is never changed in place."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from tunewright.datasets.blob_keys import content_key
from tunewright.datasets.checking.parts import CheckLimits
from tunewright.datasets.intake import Arrival, Intake, not_found
from tunewright.datasets.mending.repair import Choice, Repaired
from tunewright.datasets.records import FINE_TUNE_PURPOSES, File
from tunewright.datasets.uploads import Watch, check_room
from tunewright.datasets.version_work import Order, run
from tunewright.errors import Conflict, InvalidRequest
from tunewright.i18n import mark
from tunewright.settings import Settings

if TYPE_CHECKING:
    from tunewright.accounts.idempotency import IdempotencyKey
    from tunewright.storage import Blobs, Storage

REPAIR_ROUTE = "POST /datasets/repair"
SPLIT_ROUTE = "POST /datasets/split"
ROLES = ("training", "validation")
MOST_ANCESTORS = 1000
MOST_CHILDREN = 1000


class Relative(NamedTuple):
    """A dataset and what it is to the one asked for: `ancestor`, `self` or `child`."""

    relation: str
    file: File


class Split(NamedTuple):
    """The two new datasets; they have each row of the old one between them."""

    training: File
    validation: File


class Versions:
    """Every method blocks."""

    def __init__(self, storage: "Storage", blobs: "Blobs", intake: Intake, settings: Settings) -> None:
        self._storage = storage
        self._blobs = blobs
        self._intake = intake
        self._settings = settings

    def family(self, project_id: str, file_id: str) -> list[Relative]:
        """The ancestors, eldest first, the dataset itself, and what was made from it. Deleted ones are left out, and what is
        beyond them. Raises NotFound(`file_not_found`)."""
        with self._storage.read() as tx:
            file = tx.files.get(project_id, file_id)
            if file is None or file.purpose not in FINE_TUNE_PURPOSES:
                raise not_found(file_id)
            ancestors: list[Relative] = []
            parent_id = file.parent_id
            while parent_id is not None and len(ancestors) < MOST_ANCESTORS:
                parent = tx.files.get(project_id, parent_id)
                if parent is None:
                    break
                ancestors.append(Relative("ancestor", parent))
                parent_id = parent.parent_id
            children = tx.files.children(project_id, file_id, limit=MOST_CHILDREN)
        return [*reversed(ancestors), Relative("self", file), *(Relative("child", child) for child in children)]

    def repair(
        self,
        file: File,
        choice: Choice,
        *,
        idempotency: "IdempotencyKey | None" = None,
        watch: Watch | None = None,
    ) -> File:
        """A new version with the chosen patches, made by `repair.repair`; what is left of errors makes its status `error`.

        Raises InvalidRequest(`nothing_to_repair`), Conflict(`file_not_ready`), RowsRefused if no row is left, StorageFull.
        """
        earlier = self._intake.earlier(file.project_id, REPAIR_ROUTE, idempotency)
        if earlier is not None:
            return earlier
        _check_ready(file)
        with self._intake.folder() as folder:
            source = self._source(file, folder)
            target, problems = folder / "mended", folder / "problems"
            repaired = Repaired(*run(self._order(file, source, [target], choice=choice), watch))
            if not (repaired.patched or repaired.dropped):
                raise InvalidRequest(
                    "nothing_to_repair",
                    mark("Nothing in the file {file} can be mended by the chosen patches."),
                    param="codes" if choice.codes is not None else None,
                    file=file.id,
                )
            report = self._intake.check(target, file.purpose, problems, watch)
            origin = {
                "made_by": "repair",
                "patched": repaired.patched,
                "dropped": repaired.dropped,
                "left": repaired.left,
            }
            arrival = self._intake.arrival(
                target,
                problems,
                report,
                project_id=file.project_id,
                label=file.filename,
                purpose=file.purpose,
                keep_problems=True,
                parent=file,
                origin=origin,
            )
            return self._intake.store([arrival], REPAIR_ROUTE, idempotency)

    def split(
        self,
        file: File,
        ratio: float,
        seed: int,
        *,
        idempotency: "IdempotencyKey | None" = None,
        watch: Watch | None = None,
    ) -> Split:
        """Two new datasets, about `ratio` of the rows in the second. Each row's own content decides where it goes, so equal
        rows are never on both sides, and more rows in a later version move none.

        Raises InvalidRequest(`split_leaves_nothing`, `line_too_long`), Conflict(`file_not_ready`), NotFound, StorageFull.
        """
        earlier = self._intake.earlier(file.project_id, SPLIT_ROUTE, idempotency)
        if earlier is not None:
            return self._both(earlier)
        _check_ready(file)
        with self._intake.folder() as folder:
            source = self._source(file, folder)
            run(self._order(file, source, [folder / role for role in ROLES], ratio=ratio, seed=seed), watch)
            arrivals: list[Arrival] = []
            try:
                for role in ROLES:
                    origin = {"made_by": "split", "role": role, "validation_ratio": ratio, "seed": seed}
                    arrivals.append(self._half(file, folder / role, origin, watch))
            except BaseException:
                for arrival in arrivals:
                    arrival.images.discard()
                raise
            arrivals = _introduced(arrivals)
            return self._both(self._intake.store(arrivals, SPLIT_ROUTE, idempotency))

    def _order(self, file: File, source: Path, targets: list[Path], **more: Any) -> Order:
        limits = CheckLimits(self._settings.max_line_bytes, self._settings.min_training_rows)
        return Order(
            source=str(source), targets=[str(target) for target in targets], purpose=file.purpose, limits=limits, **more
        )

    def _half(self, parent: File, path: Path, origin: dict[str, Any], watch: Watch | None) -> Arrival:
        problems = path.with_name(f"{path.name}-problems")
        return self._intake.arrival(
            path,
            problems,
            self._intake.check(path, parent.purpose, problems, watch),
            project_id=parent.project_id,
            label=_label(parent.filename, path.name),
            purpose=parent.purpose,
            keep_problems=True,
            parent=parent,
            origin=origin,
        )

    def _both(self, training: File) -> Split:
        """The stored pair of which the first is given. Raises NotFound if the other was deleted since."""
        other = training.origin["validation"]
        with self._storage.read() as tx:
            validation = tx.files.get(training.project_id, other)
        if validation is None:
            raise not_found(other)
        return Split(training, validation)

    def _source(self, file: File, folder: Path) -> Path:
        """A local copy of the file's bytes, never to be written to."""
        source = folder / "source"
        check_room(folder, self._settings.min_free_disk_bytes + 2 * file.size_bytes)
        self._blobs.local_copy(content_key(file.project_id, file.id), source)
        return source


def _check_ready(file: File) -> None:
    if file.status == "processing":
        raise Conflict("file_not_ready", mark("File {file} is not ready yet."), param="file_id", file=file.id)


def _introduced(arrivals: list[Arrival]) -> list[Arrival]:
    """Both halves name both."""
    names = {arrival.file.origin["role"]: arrival.file.id for arrival in arrivals}
    return [
        arrival._replace(file=msgspec.structs.replace(arrival.file, origin={**arrival.file.origin, **names}))
        for arrival in arrivals
    ]


def _label(filename: str, role: str) -> str:
    """`rows.jsonl` becomes `rows-training.jsonl`; a name that would grow too long loses its end."""
    stem, dot, ending = filename.rpartition(".")
    if not stem or len(ending) > 16:
        stem, dot, ending = filename, "", ""
    while len(f"{stem}-{role}{dot}{ending}".encode()) > 255:
        stem = stem[:-1]
    return f"{stem}-{role}{dot}{ending}"
