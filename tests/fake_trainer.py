"""A trainer that keeps the whole contract of jobs/spec.py and trains nothing: `python -m tests.fake_trainer WORK_FOLDER`.

Its orders are in the first row of the training data, under "fake" (see `Orders`). The loss of a step is a function of the
seed and the step, so a resumed run can be compared with a whole one.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

from tunewright.files_on_disk import publish_folder, sha256_of, write_atomically
from tunewright.jobs.spec import (
    Checkpoint,
    Failed,
    Finished,
    JournalRecord,
    Metrics,
    Rehearsed,
    Started,
    Stopped,
    TrainerProcess,
    TrainingSpec,
    encode_record,
)


class Orders(msgspec.Struct):
    """`crash_at`: die by `crash_signal` after that step (0: before the first record), `crashes` times (each attempt is one)."""

    steps: int = 12
    sleep_s: float = 0.005
    checkpoint_every: int = 4
    crash_at: int | None = None
    crashes: int = 1
    crash_signal: int = signal.SIGKILL
    say_before_crash: str = ""
    ignore_sigterm: bool = False
    fork_child: bool = False
    fail: str | None = None
    fails: int = 99
    """How many attempts fail."""
    wrong_hash: bool = False
    adapters: bool = False
    """Checkpoints hold adapters; the newest two and that of step 2 are kept."""
    rehearsal_s: float = 0.02
    rehearsal_holds: bool = False
    """It waits until it is asked to stop, killed, or there is a file `go` in its folder."""
    rehearsal_crashes: int = 0
    """How many of its attempts die by SIGKILL."""
    rehearsal_fail: str | None = None
    holds: list[int] = []
    """Attempt n waits after step holds[n - 1] until it is asked to stop, killed, or there is a file `go`."""


class Trainer:
    def __init__(self, spec: TrainingSpec) -> None:
        self.spec = spec
        self.folder = Path(spec.work_folder)
        with open(spec.training_data, "rb") as stream:
            self.orders = msgspec.convert(json.loads(stream.readline()).get("fake", {}), Orders)
        self.stop = False
        self.journal = (self.folder / f"journal-{spec.attempt}.jsonl").open("ab")

    def write(self, record: JournalRecord) -> None:
        self.journal.write(encode_record(record) + b"\n")
        self.journal.flush()

    def renderer_hash(self) -> str:
        """That of the base, if there is one."""
        base = Path(self.spec.base_path)
        if not (base / "tokenizer.json").exists():
            return "r" * 64
        from tunewright.rendering.renderer import renderer_of  # not for those who have none: it takes long

        return renderer_of(base).hash

    def run(self) -> None:
        if self.orders.ignore_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stop", True))
        if self.orders.fork_child:
            script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
            subprocess.Popen([sys.executable, "-c", script])
        if self.spec.rehearsal:
            self.rehearse()
            return
        self.crash_if(0)
        step = self.newest_checkpoint()
        self.write(
            Started(
                total_steps=self.orders.steps,
                resumed_step=step,
                rows={"used": 3, "skipped": 0, "cut": 0},
                tokens_per_epoch=30,
                trained_tokens_per_epoch=10,
                choices={"dtype": "none", "halved": self.spec.halve_micro_batch},
                renderer_hash=self.renderer_hash(),
            )
        )
        if self.orders.fail and self.spec.attempt <= self.orders.fails:
            self.write(Failed(code=self.orders.fail, message="Row {row} can't be used", values={"row": 7, "code": "x"}))
            return
        while step < self.orders.steps:
            if self.stop:
                self.save(step)
                self.write(Stopped(step=step))
                return
            time.sleep(self.orders.sleep_s)
            step += 1
            self.write(self.metrics(step))
            self.crash_if(step)
            self.hold_if(step)
            if step % self.orders.checkpoint_every == 0:
                self.save(step)
        self.finish()

    def rehearse(self) -> None:
        if self.spec.attempt <= self.orders.rehearsal_crashes:
            print(self.orders.say_before_crash, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        until = time.monotonic() + self.orders.rehearsal_s
        while time.monotonic() < until or (self.orders.rehearsal_holds and not (self.folder / "go").exists()):
            if self.stop:
                self.write(Stopped(step=0))
                return
            time.sleep(0.005)
        if self.orders.rehearsal_fail:
            message = "Memory was not enough for rows of {max_length} tokens"
            self.write(Failed(code=self.orders.rehearsal_fail, message=message, values={"max_length": 64}))
            return
        self.write(
            Rehearsed(
                lines=[2, 1],
                memory_peak_bytes=2 * 10**9,
                micro_batch_tokens=1024,
                seconds_per_step=0.5,
                least_s=3.4,
                most_s=7000.2,
                tokens=250_000,
                answer="yes",
                seconds=0.3,
            )
        )

    def metrics(self, step: int) -> Metrics:
        return Metrics(
            step=step,
            total_steps=self.orders.steps,
            epoch=step / self.orders.steps,
            loss=loss_of(self.spec.seed, step),
            accuracy=0.5,
            learning_rate=1e-4,
            tokens=10 * step,
            elapsed_s=step * self.orders.sleep_s,
            remaining_s=(self.orders.steps - step) * self.orders.sleep_s,
            eval_loss=2.0 if step == self.orders.steps else None,
        )

    def crash_if(self, step: int) -> None:
        if self.orders.crash_at == step and self.spec.attempt <= self.orders.crashes:
            print(self.orders.say_before_crash, flush=True)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), self.orders.crash_signal)

    def hold_if(self, step: int) -> None:
        if self.orders.holds[self.spec.attempt - 1 : self.spec.attempt] == [step]:
            while not self.stop and not (self.folder / "go").exists():
                time.sleep(0.005)

    def save(self, step: int) -> None:
        final = self.folder / "checkpoints" / f"step-{step}"
        if final.exists() or step == 0:
            return
        prepared = self.folder / "checkpoints" / f".new-{step}"
        shutil.rmtree(prepared, ignore_errors=True)
        prepared.mkdir(parents=True)
        (prepared / "state.json").write_text(json.dumps({"step": step}))
        (prepared / "MANIFEST.json").write_text(json.dumps({"state.json": sha256_of(prepared / "state.json")}))
        sha256, kept = None, None
        if self.orders.adapters:
            (prepared / "adapter_config.json").write_text("{}")
            (prepared / "adapter_model.safetensors").write_bytes(f"weights of step {step}".encode())
            sha256 = sha256_of(prepared / "adapter_model.safetensors")
        publish_folder(prepared, final)
        if self.orders.adapters:
            steps = sorted(int(path.name.removeprefix("step-")) for path in final.parent.glob("step-*"))
            kept = sorted({*steps[-2:], *(step for step in steps if step == 2)})
            for old in set(steps) - set(kept):
                shutil.rmtree(final.parent / f"step-{old}")
        self.write(
            Checkpoint(
                step=step,
                path=f"checkpoints/step-{step}",
                metrics={"step": step, "train_loss": 1.0, "full_valid_loss": abs(step - 2) + 0.5},
                kept=kept,
                adapter_sha256=sha256,
                renderer_hash="r" * 64,
            )
        )

    def newest_checkpoint(self) -> int:
        found = (self.folder / "checkpoints").glob("step-*/MANIFEST.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)

    def finish(self) -> None:
        prepared = self.folder / ".result"
        shutil.rmtree(prepared, ignore_errors=True)
        prepared.mkdir()
        weights = prepared / "adapter_model.safetensors"
        weights.write_bytes(f"weights of seed {self.spec.seed}".encode())
        digest = "0" * 64 if self.orders.wrong_hash else sha256_of(weights)
        publish_folder(prepared, self.folder / "result")
        self.write(Finished(trained_tokens=10 * self.orders.steps, final_loss=1.0, adapter_sha256=digest))


def loss_of(seed: int, step: int) -> float:
    return round(3.0 / step + (seed % 97) / 1000, 6)


def main(folder: Path) -> int:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another trainer has the lock", flush=True)
        return 75
    spec = msgspec.json.decode((folder / "spec.json").read_bytes(), type=TrainingSpec)
    if int((folder / "attempt").read_text()) > spec.attempt:
        return 75
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    process = TrainerProcess(pid=os.getpid(), start_ticks=ticks, attempt=spec.attempt)
    write_atomically(folder / "trainer.json", msgspec.json.encode(process))

    def beat() -> None:
        while True:
            (folder / "heartbeat").touch()
            time.sleep(0.1)

    threading.Thread(target=beat, daemon=True).start()
    Trainer(spec).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
