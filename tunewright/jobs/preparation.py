"""From a job's row to a work folder that a trainer can start in: data files, checked, and the spec."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from tunewright.datasets.checking.check import VALIDATION_LEAK, check_in_child
from tunewright.datasets.records import File
from tunewright.errors import Conflict, InvalidRequest, NotFound
from tunewright.files_on_disk import fsync_folder, sha256_of, write_atomically
from tunewright.i18n import mark
from tunewright.jobs import row_choice
from tunewright.jobs.creation import Tolerance, check_number_of_bad_rows
from tunewright.jobs.hyperparameters import resolve
from tunewright.jobs.needs import needs
from tunewright.jobs.records import Job
from tunewright.jobs.recovery import MICRO_BATCH_HALVED
from tunewright.jobs.spec import DataChoice, Hyperparameters, RowChoice, TrainingSpec
from tunewright.models.checkpoint_names import find_model
from tunewright.models.records import Base, TunedModel
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.models.catalogue import Catalogue
    from tunewright.storage import Blobs, Storage

_PARAMS = {"train": "training_file", "validation": "validation_file"}
_UNSPLIT = "unsplit"
"""The name of the training file's copy while it is being split."""


class Prepared(NamedTuple):
    """What is known of a job before it trains."""

    hyperparameters: Hyperparameters
    choice: RowChoice
    leaked: int = 0
    """Rows of the validation file that also stand in the training file."""


class Preparation:
    """All methods can be repeated at any time and block on the disk (`prepare` for as long as the data is big)."""

    def __init__(
        self, storage: "Storage", blobs: "Blobs", catalogue: "Catalogue", home: HomeFolder, settings: Settings
    ) -> None:
        self._storage = storage
        self._blobs = blobs
        self._catalogue = catalogue
        self._home = home
        self._settings = settings

    def prepare(self, job: Job) -> Prepared:
        """Put the rows into the work folder.

        Raises NotFound, InvalidRequest or Conflict if the job can't run, Unavailable or StorageFull if it can't run now.
        """
        base = self.base(job)
        choice = self._choice(job, self._files(job), check=True)
        rows = choice.train.rows
        if rows < self._settings.min_training_rows:
            raise InvalidRequest(
                "too_few_rows",
                mark("File {file} has {rows} rows; training takes at least {least}."),
                param="training_file",
                file=job.training_file,
                rows=rows,
                least=self._settings.min_training_rows,
            )
        hyperparameters = resolve(
            job.requested,
            rows=rows,
            training_type=job.training_type,
            method=job.method,
            context_tokens=base.context_tokens,
            validation_rows=choice.validation.rows if choice.validation else 0,
        )
        return Prepared(hyperparameters, choice, self._leaked(job))

    def spec(self, job: Job) -> TrainingSpec:
        """The spec of `job.attempt`. Puts data files back that have gone. Raises what `prepare` raises."""
        base = self.base(job)
        choice = self._choice(job, self._files(job), check=False)
        validation = choice.validation
        start = self._start_model(job)
        return TrainingSpec(
            job_id=job.id,
            attempt=job.attempt,
            work_folder=str(self._home.jobs / job.id),
            base_code=base.code,
            base_path=str(base.path),
            base_files=base.files,
            start_adapter_path=None if start is None else str(self._home.adapters / (start.adapter_path or "")),
            start_adapter_sha256=None if start is None else start.adapter_sha256,
            method=job.method,
            training_type=job.training_type,
            training_data=str(self._data(job, "train")),
            training_sha256=choice.train.sha256,
            validation_data=None if validation is None else str(self._data(job, "validation")),
            validation_sha256=None if validation is None else validation.sha256,
            skip_lines=str(self._kept(job)) if _some_left_out(choice) else None,
            hyperparameters=msgspec.convert(job.hyperparameters, Hyperparameters),
            seed=job.seed,
            threads=self._settings.trainer_threads,
            products=self._settings.trainer_products,
            checkpoint_every_s=self._settings.checkpoint_every_s,
            halve_micro_batch=self._memory_ran_out(job),
            on_corrupt=self._settings.on_corrupt,
            max_line_bytes=self._settings.max_line_bytes,
            receipts=job.options.get("receipts", "off"),
            tensorboard=job.options.get("tensorboard", False),
            token_cache=str(self._home.token_cache) if self._settings.token_cache_bytes else None,
            token_cache_bytes=self._settings.token_cache_bytes,
        )

    def needs(self, job: Job, most_bytes: int, gpus: int) -> dict[str, Any]:
        """What its trainer takes (`needs.py`). Raises what `prepare` raises."""
        return needs(job, self.base(job), self._files(job)["train"].rows or 0, most_bytes, gpus)

    def price_per_million_tokens(self, job: Job) -> float | None:
        """The base's own price, else the operator's; None if there is none."""
        base = self.known_base(job)
        own = None if base is None else base.price_per_million_tokens
        return self._settings.price_per_million_tokens if own is None else own

    def known_base(self, job: Job) -> Base | None:
        """The job's base, pulled or not; None if the catalogue has it no more."""
        return self._catalogue.find(job.base_code)

    def base(self, job: Job) -> Base:
        """Raises InvalidRequest(`model_not_pulled`)."""
        base = self.known_base(job)
        if base is None or base.path is None:
            raise InvalidRequest(
                "model_not_pulled",
                mark('The weights of "{base}" are not on this machine; run: tunewright models pull {base}'),
                param="model",
                base=job.base_code,
            )
        return base

    def _files(self, job: Job) -> dict[str, File]:
        wanted = {"train": job.training_file, "validation": job.validation_file}
        found: dict[str, File] = {}
        with self._storage.read() as tx:
            for name, file_id in wanted.items():
                if file_id is None:
                    continue
                file = tx.files.get(job.project_id, file_id)
                if file is None:
                    raise NotFound(
                        "file_not_found", mark("There is no file {file}."), param=_PARAMS[name], file=file_id
                    )
                found[name] = file
        return found

    def _choice(self, job: Job, files: dict[str, File], *, check: bool) -> RowChoice:
        """The data files, in place, and what of them is used. Made once and kept beside them, for attempts to agree."""
        if job.validation_split is None and all(file.status == "processed" for file in files.values()):
            return RowChoice(**{name: self._whole(job, name, file, check=check) for name, file in files.items()})
        choice = None if check else self._kept_choice(job)
        if choice is None:
            choice = self._split(job, files["train"]) if job.validation_split else self._without_bad(job, files)
            write_atomically(self._kept(job), msgspec.json.encode(choice))
        return choice

    def _kept_choice(self, job: Job) -> RowChoice | None:
        """None if a file is missing or not as long as it was."""
        try:
            choice = msgspec.json.decode(self._kept(job).read_bytes(), type=RowChoice)
            for name, data in (("train", choice.train), ("validation", choice.validation)):
                if data is not None and self._data(job, name).stat().st_size != data.size_bytes:
                    return None
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return choice

    def _whole(self, job: Job, name: str, file: File, *, check: bool) -> DataChoice:
        self._materialise(job, name, file, check=check)
        rows = _count_rows(self._data(job, name)) if file.rows is None else file.rows
        return DataChoice(sha256=file.sha256, size_bytes=file.size_bytes, rows=rows)

    def _without_bad(self, job: Job, files: dict[str, File]) -> RowChoice:
        found: dict[str, DataChoice] = {}
        for name, file in files.items():
            data = self._whole(job, name, file, check=True)
            bad = self._bad_lines(job, name, file)
            found[name] = msgspec.structs.replace(data, rows=data.rows - len(bad), skip=tuple(bad))
        return RowChoice(**found)

    def _split(self, job: Job, file: File) -> RowChoice:
        self._materialise(job, _UNSPLIT, file, check=True)
        bad = self._bad_lines(job, _UNSPLIT, file)
        source, train, validation = (self._data(job, name) for name in (_UNSPLIT, "train", "validation"))
        sides = row_choice.split(
            source,
            train,
            validation,
            ratio=job.validation_split or 0.0,
            seed=job.seed,
            bad=bad,
            max_line_bytes=self._settings.max_line_bytes,
        )
        source.unlink()
        return RowChoice(
            train=_made(train, rows=sides.train, skip=tuple(bad)), validation=_made(validation, rows=sides.validation)
        )

    def _bad_lines(self, job: Job, name: str, file: File) -> list[int]:
        if file.status == "processed":
            return []
        param = _PARAMS.get(name, "training_file")
        bad = row_choice.bad_lines(file, self._data(job, name), self._blobs, self._settings, param)
        tolerance = msgspec.convert(job.tolerance, Tolerance)
        # A check of another release may have found more than were known when the job was created.
        check_number_of_bad_rows(file, param, tolerance, found=len(bad), rows=file.rows or 0)
        return bad

    def _leaked(self, job: Job) -> int:
        """The rows on both sides, where these are two files: of a split, equal rows lie on one side."""
        if job.validation_file is None:
            return 0
        train, validation = self._data(job, "train"), self._data(job, "validation")
        report = check_in_child(validation, "fine-tune", self._settings, statistics=False, against=train)
        return report.counts.get(VALIDATION_LEAK, 0)

    def _materialise(self, job: Job, name: str, file: File, *, check: bool) -> None:
        target = self._data(job, name)
        if not target.is_file() or target.stat().st_size != file.size_bytes:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._blobs.local_copy(f"files/{job.project_id}/{file.id}", target)
            fsync_folder(target.parent)
            check = True
        if check and sha256_of(target) != file.sha256:
            target.unlink()
            raise Conflict(
                "file_integrity",
                mark("The stored bytes of file {file} are not those that were uploaded. Upload it again."),
                param=_PARAMS.get(name, "training_file"),
                file=file.id,
            )

    def _start_model(self, job: Job) -> TunedModel | None:
        """The model to continue from, None when the job starts from the base."""
        with self._storage.read() as tx:
            model = find_model(tx, job.project_id, job.model)
        if model is not None and (model.status != "ready" or model.adapter_path is None):
            raise NotFound(
                "model_not_found", mark("The model {model} to continue from is gone."), param="model", model=job.model
            )
        return model

    def _memory_ran_out(self, job: Job) -> bool:
        with self._storage.read() as tx:
            return tx.jobs.has_event(job.project_id, job.id, MICRO_BATCH_HALVED)

    def _data(self, job: Job, name: str) -> Path:
        return self._home.jobs / job.id / "data" / f"{name}.jsonl"

    def _kept(self, job: Job) -> Path:
        return self._home.jobs / job.id / "data" / "skip.json"


def _made(path: Path, *, rows: int, skip: tuple[int, ...] = ()) -> DataChoice:
    return DataChoice(sha256=sha256_of(path), size_bytes=path.stat().st_size, rows=rows, skip=skip)


def _some_left_out(choice: RowChoice) -> bool:
    return any(data is not None and data.skip for data in (choice.train, choice.validation))


def _count_rows(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(1 for line in stream if line.strip())
