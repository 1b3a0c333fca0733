"""The dress rehearsal of a training: the same code on its nastiest rows, before the job may wait in a queue.

Steps of the optimizer, a checkpoint, the same checkpoint loaded into a fresh model, an answer. What memory and time that
takes tells what the whole training will take; what fails, fails now.

- Two steps of four rows, or as many steps as eight rows make where a step of the training has fewer rows.
- Where a step of the training fills a micro-batch better than four rows, other long rows fill the first step, for the peak.
- One more step, of rows of the usual length, for the time: long rows alone would hide what each micro-batch costs of itself.
"""

import gc
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tunewright.clock import cpu_s, mono_s
from tunewright.errors import InvalidRequest
from tunewright.i18n import mark
from tunewright.jobs.memory_estimate import MICRO_BATCH_TOKENS
from tunewright.jobs.spec import Rehearsed, TrainingSpec
from tunewright.recipes import checkpoints, flattened, job_rows, nastiest, packing, text
from tunewright.recipes.attempt import Attempt
from tunewright.recipes.evaluation import Progress
from tunewright.recipes.forecast import Forecast, RowCost, Workload, row_cost, sample
from tunewright.recipes.memory import explaining_memory
from tunewright.recipes.preference import PreferenceTraining
from tunewright.rendering.renderer import renderer_of

ROWS_PER_STEP = 4
_USUAL_ROWS = 8
"""At most so many in the step of usual rows."""
_ANSWER_TOKENS = 8
_LEAST, _MOST = 0.8, 1.3
"""What the forecast is widened by: rows are only a few, and a machine is never quite the same."""
_RESET_PEAK = "5"
"""Written to clear_refs, it makes the kernel forget the largest resident set so far."""


@dataclass(frozen=True)
class Plan:
    """Which examples are rehearsed with. `steps` are those of the nasty rows, `usual` is the step for the time."""

    nasty: list[int]
    steps: list[list[int]]
    usual: list[int]


@dataclass(frozen=True)
class Timing:
    """A step as it was measured. `cpu_s` is what it would have taken alone on the cores that it uses, at the least."""

    units: float
    pieces: int
    wall_s: float
    cpu_s: float


def rehearse(attempt: Attempt) -> Rehearsed:
    """Try the training of the attempt's spec out.

    Raises what `text.train` raises, and InvalidRequest(`insufficient_storage`, `checkpoint_not_restored`).
    """
    return explaining_memory(attempt, partial(_rehearse, attempt))


def plan_of(
    nasty: list[int],
    lengths: np.ndarray,
    batch_size: int,
    token_budget: int,
    computed: Callable[[list[int]], int] | None = None,
) -> Plan:
    """`nasty` are examples, longest first; `lengths` (examples,) are the tokens of all of them, and `computed` says how many of
    those of some must be computed, all unless it is given."""
    by_length = np.argsort(-lengths, kind="stable")
    n_steps = max(2, math.ceil(len(nasty) / min(ROWS_PER_STEP, batch_size)))
    dealt = nasty if len(nasty) >= n_steps else [nasty[n % len(nasty)] for n in range(n_steps)]
    steps = [dealt[n::n_steps] for n in range(n_steps)]
    for example in map(int, by_length):
        filled = int(lengths[steps[0]].sum()) if computed is None else computed(steps[0])
        if len(steps[0]) >= batch_size or filled >= token_budget:
            break
        if example not in nasty:
            steps[0].append(example)
    middle = len(by_length) // 2
    n_usual = min(batch_size, _USUAL_ROWS, len(by_length))
    usual: list[int] = []
    for example in map(int, by_length[max(0, middle - n_usual // 2) :][:n_usual]):
        if usual and int(lengths[usual].sum() + lengths[example]) > token_budget:
            break
        usual.append(example)
    return Plan(nasty, steps, usual)


class Trial(text.Training):
    """A training that is tried out. What is not here is that of the training itself."""

    def __init__(self, attempt: Attempt, data: tuple[packing.Rows, packing.Rows | None]) -> None:
        super().__init__(attempt, data)
        self.saved_step = 0

    def prepare(self) -> None:
        """What comes before the first step."""
        self._before_first_step()

    def step(self, progress: Progress, chosen: np.ndarray, cost: RowCost) -> tuple[Progress, Timing]:
        """One step of the optimizer on these examples, timed."""
        self.attempt.go_on()
        wall, cpu = mono_s(), cpu_s()
        progress = self._within_memory(partial(self._step, progress, chosen))
        wall, cpu = mono_s() - wall, cpu_s() - cpu
        groups = list(self._micro_batches(self.rows, chosen))
        computed = sum(packing.layout(self.rows, group, self.share).tokens for group in groups)
        part = computed / self.rows.only(chosen.tolist()).n_tokens
        units = float(cost.of(self.rows)[chosen].sum()) * part
        return progress, Timing(units, len(groups), wall, min(wall, cpu / self.threads))

    def evaluate(self, progress: Progress) -> Progress:
        """Measure the validation loss, if there are rows for it."""
        return progress if self.validation is None else self._evaluate(progress, self.validation)

    def save(self, progress: Progress) -> None:
        """Raises InvalidRequest(`insufficient_storage`): a training would go on without the checkpoint, this is to tell."""
        self._save(progress)
        if checkpoints.newest_step(self.attempt.folder) != progress.step:
            message = mark("There is no room on the disk for a checkpoint of this training.")
            raise InvalidRequest("insufficient_storage", message)

    def load(self) -> Progress:
        """Load what was saved."""
        return self._resume()

    def fingerprint(self) -> str:
        """A hash of all that is trained and of the optimizer's state, bit for bit."""
        digest = hashlib.sha256()
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            for tensor in (parameter.detach(), moments["exp_avg"], moments["exp_avg_sq"]):
                digest.update(name.encode())
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def answer(self, row: int) -> str:
        """The first few tokens of an answer to what a row asks first, always the likeliest token."""
        tokens = self.rows.tokens_of(row)[: self._asked(row)]
        asked = len(tokens)
        while len(tokens) < asked + _ANSWER_TOKENS:
            self.attempt.go_on()
            token = flattened.next_token(self.model, tokens, self.device)
            if token in self.renderer.stop_ids:
                break
            tokens = np.append(tokens, token)
        return self.renderer.decode(tokens[asked:].tolist())

    def shortest_asked(self) -> int:
        """The row with the shortest beginning, which is answered soonest."""
        return min(range(len(self.rows)), key=self._asked)

    def _asked(self, row: int) -> int:
        return int(self.rows.spans[self.rows.first_span[row], 0])


class PreferenceTrial(Trial, PreferenceTraining):
    """The same for pairs."""


def _rehearse(attempt: Attempt) -> Rehearsed:
    began, spec = mono_s(), attempt.spec
    trial_of = PreferenceTrial if spec.method == "dpo" else Trial
    attempt.inputs_verified.result()
    rows, validation = job_rows.read(attempt, renderer_of(Path(spec.base_path)), trial_of.sides)
    lengths = rows.lengths.reshape(-1, rows.sides).sum(1)
    nasty = nastiest.nastiest(rows, Path(spec.training_data), spec.max_line_bytes)
    token_budget = spec.hyperparameters.micro_batch_tokens or MICRO_BATCH_TOKENS

    def computed(some: list[int]) -> int:
        return packing.layout(rows, [row for example in some for row in rows.members(example)], share=True).tokens

    plan = plan_of(nasty, lengths, spec.hyperparameters.batch_size, token_budget, computed)
    examples = [example for step in [*plan.steps, plan.usual] for example in step]
    data = rows.only(examples), _longest(validation, token_budget)
    shutil.rmtree(attempt.folder / "checkpoints", ignore_errors=True)  # of an attempt that died
    found = _Findings(spec)
    expected = _try(trial_of, attempt, data, plan, found)
    gc.collect()
    answer = _reload(trial_of, attempt, data, found, expected)
    shutil.rmtree(attempt.folder / "checkpoints", ignore_errors=True)
    return found.record(rows, validation, plan, answer, mono_s() - began)


class _Findings:
    """What the trial has measured, and what that says of the whole training."""

    def __init__(self, spec: TrainingSpec) -> None:
        self.spec = spec
        self.cost = RowCost()
        self.threads = 1
        self.start_s = 0.0
        self.save_s = 0.0
        self.forward: tuple[float, float] | None = None
        """(units, seconds) of a pass without gradients."""
        self.steps: list[Timing] = []
        self.token_budget = 0
        self.share = False
        self.memory_peak_bytes = 0
        self.gpu_memory_peak_bytes: int | None = None
        self.last_step = 0

    def record(
        self, rows: packing.Rows, validation: packing.Rows | None, plan: Plan, answer: str, seconds: float
    ) -> Rehearsed:
        wanted = self.spec.hyperparameters
        total_steps = math.ceil(rows.n_examples / wanted.batch_size) * wanted.n_epochs
        slow = self._seconds(rows, validation, total_steps, [step.wall_s for step in self.steps])
        quick = self._seconds(rows, validation, total_steps, [step.cpu_s for step in self.steps])
        return Rehearsed(
            lines=[int(rows.lines[example * rows.sides]) for example in plan.nasty],
            memory_peak_bytes=self.memory_peak_bytes,
            gpu_memory_peak_bytes=self.gpu_memory_peak_bytes,
            micro_batch_tokens=self.token_budget,
            seconds_per_step=slow[0] / total_steps,
            least_s=min(quick[1], slow[1]) * _LEAST,
            most_s=slow[1] * _MOST,
            tokens=rows.n_tokens * wanted.n_epochs,
            answer=answer,
            seconds=seconds,
        )

    def _seconds(
        self, rows: packing.Rows, validation: packing.Rows | None, total_steps: int, steps_s: list[float]
    ) -> tuple[float, float]:
        """(all steps, the whole training from its start) if the steps of the trial took `steps_s`."""
        forecast, wanted = Forecast(), self.spec.hyperparameters
        for step, seconds in zip(self.steps, steps_s, strict=True):
            forecast.step(step.units, step.pieces, seconds)
        forecast.save(self.save_s)
        work = Workload(self.spec, rows, validation, self.cost)
        steps = sample(rows, wanted.batch_size, self.spec.seed, self.token_budget, self.share)
        left = work.left(0, steps.pieces)
        left = replace(left, units=left.units * steps.computed, look_units=left.look_units * steps.computed)
        asked_s = 0.0
        if self.forward is not None:
            per_unit = self.forward[1] / self.forward[0]
            forecast.evaluation(left.evaluation_units * per_unit)
            if self.spec.method == "dpo":
                asked_s = per_unit * (left.units / wanted.n_epochs + left.evaluation_units)
        steps_all = forecast.seconds(left.units, left.pieces) or 0.0
        return steps_all, self.start_s + asked_s + (forecast.remaining_s(left) or 0.0)


def _try(
    trial_of: type[Trial],
    attempt: Attempt,
    data: tuple[packing.Rows, packing.Rows | None],
    plan: Plan,
    found: _Findings,
) -> str:
    """Train and save, and fill `found`. Returns the fingerprint of what was saved. The model is gone when this returns."""
    _forget_memory_peak()
    began = mono_s()
    trial = trial_of(attempt, data)
    found.start_s = mono_s() - began
    found.cost, found.threads = row_cost(trial.model.config.to_dict()), trial.threads
    began = mono_s()
    trial.prepare()
    if trial_of is PreferenceTrial:
        found.forward = (float(found.cost.of(data[0]).sum()), mono_s() - began)
    progress = Progress()
    for chosen in _places(plan):
        progress, timing = trial.step(progress, chosen, found.cost)
        found.steps.append(timing)
    if data[1] is not None:
        began = mono_s()
        progress = trial.evaluate(progress)
        found.forward = (float(found.cost.of(data[1]).sum()), mono_s() - began)
    began = mono_s()
    trial.save(progress)
    found.save_s, found.last_step = mono_s() - began, progress.step
    found.token_budget, found.share = trial.token_budget, trial.share
    found.memory_peak_bytes = _memory_peak_bytes()
    if trial.device.type == "cuda":
        found.gpu_memory_peak_bytes = torch.cuda.max_memory_allocated()
    return trial.fingerprint()


def _reload(
    trial_of: type[Trial],
    attempt: Attempt,
    data: tuple[packing.Rows, packing.Rows | None],
    found: _Findings,
    expected: str,
) -> str:
    """The checkpoint in a fresh model, and what that answers. Raises InvalidRequest(`checkpoint_not_restored`)."""
    attempt.go_on()
    trial = trial_of(attempt, data)
    progress = trial.load()
    if progress.step != found.last_step or trial.fingerprint() != expected:
        raise InvalidRequest(
            "checkpoint_not_restored",
            mark("A checkpoint could not be read back as it was written, so this training could not be resumed."),
        )
    return trial.answer(trial.shortest_asked())


def _places(plan: Plan) -> Iterator[np.ndarray]:
    """Where the examples of each step lie among those that are rehearsed with."""
    begin = 0
    for step in [*plan.steps, plan.usual]:
        yield np.arange(begin, begin + len(step))
        begin += len(step)


def _longest(rows: packing.Rows | None, token_budget: int) -> packing.Rows | None:
    """The longest examples that fill a micro-batch, at least one; None for None."""
    if rows is None:
        return None
    lengths = rows.lengths.reshape(-1, rows.sides).sum(1)
    order = np.argsort(-lengths, kind="stable")
    fits = int((np.cumsum(lengths[order]) <= token_budget).sum())
    return rows.only(order[: max(1, fits)].tolist())


def _forget_memory_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK, "ascii")


def _memory_peak_bytes() -> int:
    """The largest resident set since `_forget_memory_peak`."""
    for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
