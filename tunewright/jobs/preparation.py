"""From a job's row to a work folder that a trainer can start in: data files, checked, and the spec."""

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tunewright.datasets.records import File
from tunewright.errors import Conflict, InvalidRequest, NotFound
from tunewright.files_on_disk import fsync_folder, sha256_of
from tunewright.i18n import mark
from tunewright.jobs.hyperparameters import resolve
from tunewright.jobs.records import Job
from tunewright.jobs.spec import Hyperparameters, TrainingSpec
from tunewright.models.records import Base, TunedModel
from tunewright.settings import HomeFolder, Settings

if TYPE_CHECKING:
    from tunewright.models.catalogue import Catalogue
    from tunewright.storage import Blobs, Storage

_PARAMS = {"train": "training_file", "validation": "validation_file"}


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

    def prepare(self, job: Job) -> tuple[int, Hyperparameters]:
        """Put the rows into the work folder. Returns how many there are to train on, and the resolved hyperparameters.

        Raises NotFound, InvalidRequest or Conflict if the job can't run, Unavailable or StorageFull if it can't run now.
        """
        base = self.base(job)
        files = self._files(job)
        for name, file in files.items():
            self._materialise(job, name, file, check=True)
        rows = files["train"].rows
        if rows is None:
            rows = _count_rows(self._data(job, "train"))
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
        )
        return rows, hyperparameters

    def spec(self, job: Job) -> TrainingSpec:
        """The spec of `job.attempt`. Puts data files back that have gone. Raises what `prepare` raises."""
        base = self.base(job)
        files = self._files(job)
        for name, file in files.items():
            self._materialise(job, name, file, check=False)
        validation = files.get("validation")
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
            training_sha256=files["train"].sha256,
            validation_data=None if validation is None else str(self._data(job, "validation")),
            validation_sha256=None if validation is None else validation.sha256,
            hyperparameters=msgspec.convert(job.hyperparameters, Hyperparameters),
            seed=job.seed,
            threads=self._settings.trainer_threads,
            checkpoint_every_s=self._settings.checkpoint_every_s,
            max_line_bytes=self._settings.max_line_bytes,
        )

    def base(self, job: Job) -> Base:
        """Raises InvalidRequest(`model_not_pulled`)."""
        base = self._catalogue.find(job.base_code)
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
                param=_PARAMS[name],
                file=file.id,
            )

    def _start_model(self, job: Job) -> TunedModel | None:
        """The model to continue from, None when the job starts from the base."""
        with self._storage.read() as tx:
            model = tx.models.find(job.project_id, job.model)
        if model is not None and (model.status != "ready" or model.adapter_path is None):
            raise NotFound(
                "model_not_found", mark("The model {model} to continue from is gone."), param="model", model=job.model
            )
        return model

    def _data(self, job: Job, name: str) -> Path:
        return self._home.jobs / job.id / "data" / f"{name}.jsonl"


def _count_rows(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(1 for line in stream if line.strip())
