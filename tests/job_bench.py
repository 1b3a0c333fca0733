"""A home with a project, one base model and the job machinery, around the fake trainer. As a program it is a server that
only moves jobs, to be killed: `python -m tests.job_bench HOME`."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec

from tests.fake_trainer import loss_of
from tunewright.accounts.records import Project
from tunewright.clock import wall_s
from tunewright.datasets.records import File
from tunewright.errors import TunewrightError
from tunewright.files_on_disk import sha256_of
from tunewright.ids import new_id
from tunewright.jobs.controller import JobController
from tunewright.jobs.line import Line
from tunewright.jobs.ports import OnEnd, nothing_at_end
from tunewright.jobs.records import TERMINAL, Job, JobEvent
from tunewright.jobs.service import CreateJob, JobService
from tunewright.jobs.spec import TrainerProcess
from tunewright.models.catalogue import Catalogue
from tunewright.models.records import Base, Source, TunedModel
from tunewright.models.service import ModelService
from tunewright.runners.local import LocalRunner
from tunewright.settings import HomeFolder, Settings
from tunewright.storage import Blobs, Storage

PROJECT = "proj-1"
TRAINER = "tests.fake_trainer"


class Bases:
    """A catalogue of few bases that are there without any weights."""

    def __init__(self, *bases: Base) -> None:
        self.bases = list(bases)

    def all(self) -> list[Base]:
        return self.bases

    def find(self, code_or_alias: str) -> Base | None:
        return next((base for base in self.bases if code_or_alias in (base.code, *base.aliases)), None)


class Prover:
    """Says that an adapter works, if its file is there; or raises the errors it was given, one for each call."""

    def __init__(self, adapters: Path) -> None:
        self.adapters = adapters
        self.errors: list[Exception] = []
        self.warmed: list[str] = []
        self.proved: list[str] = []
        self.wait_for: Callable[[], bool] = lambda: True
        self.held_bytes = 0

    def warm(self, base: Base) -> None:
        self.warmed.append(base.code)

    def memory_bytes(self) -> int:
        return self.held_bytes

    def prove(self, base: Base, model: TunedModel) -> dict[str, Any]:
        while not self.wait_for():
            time.sleep(0.005)
        self.proved.append(model.id)
        if self.errors:
            raise self.errors.pop(0)
        weights = self.adapters / (model.adapter_path or "?") / "adapter_model.safetensors"
        return {"tensors": 2, "tensors_applied": 2, "max_logit_shift": len(weights.read_bytes()) / 10}


class Machine:
    """Large, without GPUs."""

    def __init__(self) -> None:
        self.bytes = 2**50
        self.number_of_gpus = 0

    def memory_bytes(self) -> int:
        return self.bytes

    def cores(self) -> int:
        return 8

    def gpus(self) -> int:
        return self.number_of_gpus


def a_base(home: HomeFolder, code: str = "tiny", **changes: Any) -> Base:
    fields: dict[str, Any] = {
        "code": code,
        "name": code,
        "source": Source(kind="folder"),
        "licence": "none",
        "context_tokens": 512,
        "path": home.bases,
    }
    return Base(**(fields | changes))


class Bench:
    def __init__(self, root: Path, **settings: Any) -> None:
        quick: dict[str, Any] = {"home": root, "heartbeat_limit_s": 10.0, "cancel_grace_s": 10.0}
        self.settings = Settings(**(quick | settings))
        self.home = HomeFolder(root)
        self.home.create()
        self.storage = Storage(f"sqlite:///{self.home.database}")
        self.storage.migrate()
        self.blobs = Blobs(f"file://{self.home.blobs}")
        self.bases = Bases(a_base(self.home))
        catalogue = cast(Catalogue, self.bases)
        self.models = ModelService(self.storage, catalogue, self.home)
        self.machine = Machine()
        self.line = Line(self.settings, self.machine)
        self.jobs = JobService(self.storage, catalogue, self.models, self.home, self.settings, self.line)
        self.prover = Prover(self.home.adapters)
        self.runners: list[LocalRunner] = []
        self.on_end: OnEnd = nothing_at_end
        self.controller = self.new_controller()
        with self.storage.write() as tx:
            if tx.projects.get(PROJECT) is None:
                tx.projects.insert(Project(id=PROJECT, number="1000000001", name="test", created_at=wall_s()))

    def new_controller(self, lease_holder: str | None = None) -> JobController:
        """As after a restart of the server: nothing remembered, not the parent of any trainer it finds."""
        self.runners.append(LocalRunner())
        return JobController(
            self.storage,
            self.blobs,
            cast(Catalogue, self.bases),
            self.models,
            self.home,
            self.settings,
            self.runners[-1],
            self.prover,
            self.line,
            trainer_module=TRAINER,
            lease_holder=lease_holder,
            on_end=self.on_end,
        )

    def upload(self, rows: int = 3, purpose: str = "fine-tune", kind: str | None = "chat", **orders: Any) -> str:
        path = self.home.temporary / "upload"
        lines = [{"messages": [], "n": n} for n in range(rows)]
        if lines:
            lines[0]["fake"] = orders
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        file = File(
            id=new_id("file"),
            project_id=PROJECT,
            filename="rows.jsonl",
            purpose=purpose,
            size_bytes=path.stat().st_size,
            sha256=sha256_of(path),
            created_at=wall_s(),
            kind=kind,
            rows=rows,
        )
        self.blobs.put_file(f"files/{PROJECT}/{file.id}", path)
        with self.storage.write() as tx:
            tx.files.insert(file)
        return file.id

    def create(self, seed: int = 5, rehearsal: Any = None, **orders: Any) -> Job:
        file_id = self.upload(**orders)
        return self.jobs.create(PROJECT, CreateJob(model="tiny", training_file=file_id, seed=seed, rehearsal=rehearsal))

    def job(self, job_id: str) -> Job:
        return self.jobs.get(PROJECT, job_id)

    def until(self, condition: Callable[[], Any], limit_s: float = 60.0, *, moving: bool = True) -> None:
        """Run passes until the condition holds."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                with self.storage.read() as tx:
                    state = [(job.id, job.status, job.attempt, job.step) for job in tx.jobs.unfinished()]
                raise AssertionError(f"did not happen within {limit_s} s: {state}")
            if moving:
                self.controller.run_once()
            time.sleep(0.005)

    def until_over(self, job_id: str) -> Job:
        self.until(lambda: self.job(job_id).status in TERMINAL)
        return self.job(job_id)

    def until_step(self, job_id: str, step: int) -> Job:
        self.until(lambda: self.job(job_id).step >= step)
        return self.job(job_id)

    def events(self, job_id: str) -> list[JobEvent]:
        return self.jobs.events_since(PROJECT, job_id, None, limit=10_000)

    def codes(self, job_id: str) -> list[str]:
        return [event.code for event in self.events(job_id) if event.type == "message"]

    def losses(self, job_id: str) -> list[tuple[int | None, Any]]:
        return [(e.step, (e.data or {})["loss"]) for e in self.events(job_id) if e.type == "metrics"]

    def process(self, job_id: str) -> TrainerProcess:
        return msgspec.json.decode((self.home.jobs / job_id / "trainer.json").read_bytes(), type=TrainerProcess)

    def rehearsing(self, job_id: str) -> TrainerProcess | None:
        """The newest process of the job's dress rehearsal, None before it has said its name."""
        try:
            data = (self.home.jobs / job_id / "rehearsal" / "trainer.json").read_bytes()
        except FileNotFoundError:
            return None
        return msgspec.json.decode(data, type=TrainerProcess)

    def processes_left(self, job_id: str) -> list[int]:
        """Sessions of all processes whose command line names the job's folder, or that belong to its last trainer."""
        runner = LocalRunner()
        folder = self.home.jobs / job_id
        found = runner.find(TRAINER, folder) + runner.find(TRAINER, folder / "rehearsal")
        try:
            pid = self.process(job_id).pid
        except FileNotFoundError:
            return found
        return found if runner.group_empty(pid) else [*found, pid]

    def close(self) -> None:
        """End what is left. Runners keep their children until here, as a parent that reaps."""
        with self.storage.read() as tx:
            pids = [pid for job in tx.jobs.unfinished() for pid in self.processes_left(job.id)]
        for pid in pids:
            self.runners[0].kill(pid)
        deadline = time.monotonic() + 30
        while not all(runner.group_empty(pid) for runner in self.runners for pid in pids):
            if time.monotonic() > deadline:
                raise AssertionError("a trainer can't be killed")
            time.sleep(0.01)
        for runner in self.runners:
            for child in list(runner._children.values()):  # one whose job is over may still be about to end
                child.kill()
                child.wait(30)
            runner.reap()
        self.storage.close()


def whole_run(seed: int, steps: int) -> list[tuple[int | None, Any]]:
    """(step, loss) of a run that nothing disturbed."""
    return [(step, loss_of(seed, step)) for step in range(1, steps + 1)]


def main(root: Path) -> None:
    bench = Bench(root, on_shutdown="continue")
    print(os.getpid(), flush=True)
    while True:
        try:
            bench.controller.run_once()
        except TunewrightError as error:
            print(error, flush=True)
        time.sleep(0.01)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
