"""How a text model is trained: supervised LoRA or all weights, from top to bottom. spec -> data -> model -> loop -> save.

- Loss on assistant tokens only: summed, and divided by the labels of the whole optimizer step however it is cut up.
- Conversations laid end to end in micro-batches (packing.py, flattened.py); precision, checkpointing and the tokens of a
  micro-batch are measured and chosen at the start (computing.py); layers of a Llama are computed by hand (fast_layers.py).
- AdamW (0.9, 0.999, 1e-8), gradients clipped to norm 1; linear warm-up, then a cosine down to a tenth of the peak.
- Everything random comes from the seed; a resumed training makes the same numbers as one that was never stopped.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError

from tunewright.clock import mono_s
from tunewright.errors import InvalidRequest, Misconfigured
from tunewright.i18n import mark
from tunewright.jobs.spec import Checkpoint, Finished, Metrics, ReceiptCounts, Started
from tunewright.recipes import (
    adapters,
    base_model,
    checkpoints,
    computing,
    divergence,
    evaluation,
    flattened,
    full_weights,
    job_rows,
    packing,
    products,
    saving,
    schedule,
)
from tunewright.recipes.attempt import Attempt, StopRequested
from tunewright.recipes.evaluation import Progress
from tunewright.recipes.forecast import Forecast, Sample, Workload, row_cost, sample
from tunewright.recipes.memory import explaining_memory, is_out_of_memory
from tunewright.recipes.receipts import Receipts
from tunewright.recipes.tensorboard_log import TensorboardLog
from tunewright.recipes.threads import choose_threads
from tunewright.rendering.renderer import renderer_of

CLIP_NORM = 1.0
_Done = TypeVar("_Done")


def train(attempt: Attempt) -> Finished:
    """Train what the attempt's spec asks for; when this returns, `result/` is complete.

    Raises StopRequested (a checkpoint lies there, unless no step was made), Superseded, and InvalidRequest or Misconfigured
    for what a retry would not mend: `file_integrity`, `base_model_integrity`, `base_model_unsupported`, `nothing_to_train`,
    `out_of_memory`, `loss_not_finite`, `diverged`, `checkpoint_unrecoverable`, `adapter_mismatch`, `base_mismatch`,
    `invalid_artifact`, `artifact_integrity`.
    """
    return explaining_memory(attempt, lambda: Training(attempt).run())


class Training:
    """One attempt's data, model and optimizer, made in that order; `run` is the loop."""

    sides = 1
    """Conversations in a row of the data."""

    def __init__(self, attempt: Attempt, data: tuple[packing.Rows, packing.Rows | None] | None = None) -> None:
        """`data` are rows to train on and to validate with, instead of those of the spec's files."""
        self.attempt = attempt
        self.spec = attempt.spec
        self.wanted = attempt.spec.hyperparameters
        self.threads = choose_threads(self.spec.threads)
        torch.set_num_threads(self.threads)
        attempt.inputs_verified.result()
        attempt.go_on()

        # data
        self.renderer = renderer_of(Path(self.spec.base_path))
        self.rows, self.validation = data or job_rows.read(attempt, self.renderer, self.sides)
        self.steps_per_epoch = math.ceil(self.rows.n_examples / self.wanted.batch_size)
        self.total_steps = self.steps_per_epoch * self.wanted.n_epochs
        self.computing = computing.choose(self.spec, self._longest_example(), computing.capabilities())
        self.token_budget = self.computing.micro_batch_tokens
        self.products = self.computing.products if self.threads == 1 else products.TORCH
        products.use(self.products)
        self._tell_of_scarce_memory()

        # model
        full = self.spec.training_type == "full"
        dtype = torch.float32 if full else self.computing.dtype  # in bf16 small updates of large weights are lost
        self.device = torch.device(self.computing.device)
        self.model = base_model.load_model(Path(self.spec.base_path), dtype, self.computing.attention).to(self.device)
        attempt.go_on()
        self.lora = None if full else base_model.add_adapter(attempt, self.model)
        self.parameters = full_weights.train_all(self.model) if full else adapters.adapter_parameters(self.model)
        self.by_hand = base_model.speed_up(self.model, self.computing)
        base_model.prove_flattening(self.model, self.rows, self.computing)
        self.share = base_model.can_share(self.model, self.rows, self.computing)
        if full:
            full_weights.require_room(attempt.folder, self.parameters, evaluated=self.validation is not None)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=self.wanted.learning_rate,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=self.wanted.weight_decay,
            fused=True,
        )
        self.trained = saving.Trained(self.spec, self.model, self.parameters, self.lora)
        self.receipts = Receipts(self.spec, self.rows)

    def run(self) -> Finished:
        """Start or resume, train, save."""
        progress = self._resume()
        self.saved_step = progress.step
        self._write_started(progress)
        self.receipts.before(self._losses_before, progress.step)
        with closing(TensorboardLog(self.attempt, progress)) as self.curves:
            progress = self._loop(progress)
        step = self._choose_step(progress)
        counts = self._write_receipts()
        return Finished(
            trained_tokens=progress.tokens,
            final_loss=progress.loss,
            adapter_sha256=self.trained.publish_result(self.attempt.check_fence),
            step=step,
            receipts=counts,
        )

    def _tell_of_scarce_memory(self) -> None:
        if not self.computing.fits:
            self.attempt.note(
                "memory_may_not_be_enough",
                mark("This training needs about {needed} GB of memory even at its leanest; it may take {allowed} GB."),
                needed=self.computing.figures["memory_estimate_gb"],
                allowed=self.computing.figures["memory_allowed_gb"],
            )

    def _longest_example(self) -> int:
        rows = [self.rows] if self.validation is None else [self.rows, self.validation]
        return max(int(some.lengths.reshape(-1, self.sides).sum(1).max()) for some in rows)

    def _write_started(self, progress: Progress) -> None:
        rows = self.rows
        self.attempt.write(
            Started(
                total_steps=self.total_steps,
                resumed_step=progress.step,
                rows=job_rows.counts(rows, self.validation),
                tokens_per_epoch=rows.n_tokens,
                trained_tokens_per_epoch=rows.n_trained,
                choices=self._choices(),
                renderer_hash=self.renderer.hash,
            )
        )

    def _choices(self) -> dict[str, Any]:
        """What was chosen at start, for people to read."""
        return {
            "device": self.device.type,
            "precision": self.computing.precision,
            "products": self.products,
            "activation_checkpointing": self.computing.activation_checkpointing,
            "micro_batch_tokens": self.token_budget,
            "attention": self.computing.attention,
            "layers": "by hand" if self.by_hand else "plain",
            "measured": self.computing.figures,
            "threads": self.threads,
            "tokens": "cached" if self.rows.cached else "made",
            "tokens_spared": round(1 - self._sample().computed, 3),
            "trained_parameters": sum(parameter.numel() for parameter in self.parameters.values()),
            "lora": None if self.lora is None else asdict(self.lora),
            "optimizer": "AdamW, betas 0.9 and 0.999",
            "schedule": f"warm-up, then cosine to {schedule.FINAL_LEARNING_RATE} of the peak",
        }

    def _sample(self) -> Sample:
        """What is computed together, by the first steps."""
        return sample(self.rows, self.wanted.batch_size, self.spec.seed, self.token_budget, self.share)

    def _micro_batches(self, rows: packing.Rows, examples: np.ndarray) -> Iterator[list[int]]:
        """Rows that are computed together."""
        return packing.micro_batches(rows, examples, self.token_budget, self.share)

    # --- loop ---

    def _before_first_step(self) -> None:
        """What a method needs once, before the weights are changed."""

    def _loop(self, progress: Progress) -> Progress:
        began, elapsed_before = mono_s(), progress.elapsed_s
        saved_at = began
        work = Workload(self.spec, self.rows, self.validation, row_cost(self.model.config.to_dict()))
        forecast = Forecast()
        order, order_epoch = np.empty(0), -1
        while progress.step < self.total_steps and not evaluation.is_enough(progress, self.wanted.early_stopping):
            epoch, place = divmod(progress.step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = packing.epoch_order(self.rows.n_examples, self.spec.seed, epoch), epoch
            chosen = order[place * self.wanted.batch_size : (place + 1) * self.wanted.batch_size]
            started = mono_s()
            try:
                self.attempt.go_on()
                progress = self._within_memory(partial(self._step, progress, chosen))
            except StopRequested:
                self._save(progress)
                raise
            pieces = sum(1 for _ in self._micro_batches(self.rows, chosen))
            forecast.step(work.units(chosen), pieces, mono_s() - started)
            if self.validation is not None and evaluation.is_due(
                progress.step, self.steps_per_epoch, self.wanted.eval_steps
            ):
                started = mono_s()
                progress = self._evaluate(progress, self.validation)
                forecast.evaluation(mono_s() - started)
                progress = evaluation.judged(progress, self.wanted.early_stopping)
            now = mono_s()
            progress = replace(progress, elapsed_s=elapsed_before + now - began)
            progress = divergence.watched(
                progress,
                uninformed_loss=self.uninformed_loss(),
                multiplier=self.wanted.learning_rate_multiplier,
            )
            left = work.left(progress.step, forecast.pieces_per_step)
            self._write_metrics(progress, forecast.remaining_s(left))
            if self._is_worth_keeping(progress) or now - saved_at >= self.spec.checkpoint_every_s:
                self._save(progress)
                saved_at = mono_s()
                forecast.save(saved_at - now)
        return progress

    def _is_worth_keeping(self, progress: Progress) -> bool:
        """Whether a checkpoint is due whatever the clock says."""
        ends = progress.step % self.steps_per_epoch == 0
        return ends or progress.is_best or evaluation.is_enough(progress, self.wanted.early_stopping)

    def _within_memory(self, work: Callable[[], _Done]) -> _Done:
        """What `work` returns, an optimizer step for example; if memory runs out for the first time, it is done again with
        half the micro-batch."""
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or self.computing.halved:
                raise
        self.computing = self.computing.with_half_the_micro_batch().kept_in(self.attempt.folder)
        self.token_budget = self.computing.micro_batch_tokens
        self.attempt.note(
            "micro_batch_halved",
            mark("Memory ran out, so the work goes on in pieces of {tokens} tokens. The batch size stays."),
            tokens=self.token_budget,
        )
        return work()

    def _step(self, progress: Progress, chosen: np.ndarray) -> Progress:
        n_labels = packing.count_labels(self.rows, chosen)
        total, right = 0.0, 0
        self.optimizer.zero_grad()
        for group in self._micro_batches(self.rows, chosen):
            self.attempt.go_on()
            flat = packing.flatten(self.rows, group, self.share)
            loss, hits = flattened.summed_loss(self.model, flat, self.device)
            (loss / n_labels).backward()
            total, right = total + loss.item(), right + int(hits)
        self._update(progress.step, total)
        return replace(
            progress,
            step=progress.step + 1,
            tokens=progress.tokens + self.rows.only(chosen.tolist()).n_tokens,
            loss=total / n_labels,
            accuracy=right / n_labels,
        )

    def uninformed_loss(self) -> float:
        """The loss of a model that knows nothing."""
        return math.log(self.model.config.get_text_config().vocab_size)

    def _update(self, steps_done: int, loss: float) -> None:
        """Change the weights by the gradients that lie there. Raises InvalidRequest(`loss_not_finite`)."""
        for parameter in self.parameters.values():
            if parameter.grad is None:  # experts that no token chose: with moments of their own all the same
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP_NORM)
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            raise self._not_finite(steps_done + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(steps_done)
        self.optimizer.step()

    def _learning_rate(self, steps_done: int) -> float:
        return schedule.learning_rate(self.wanted.learning_rate, steps_done, self.total_steps, self.wanted.warmup_ratio)

    def _evaluate(self, progress: Progress, rows: packing.Rows) -> Progress:
        """Mean loss and accuracy over all labels of the validation rows."""
        total, right = 0.0, 0
        with torch.no_grad():
            for group in self._micro_batches(rows, np.arange(len(rows))):
                flat = packing.flatten(rows, group, self.share)
                loss, hits = flattened.summed_loss(self.model, flat, self.device)
                total, right = total + loss.item(), right + int(hits)
        mean = total / rows.n_trained
        return replace(progress, eval_loss=mean if math.isfinite(mean) else None, eval_accuracy=right / rows.n_trained)

    def _losses_before(self, examples: np.ndarray) -> np.ndarray:
        return self._row_losses(examples)

    @torch.no_grad()
    def _row_losses(self, examples: np.ndarray) -> np.ndarray:
        """Mean loss of each example under the weights as they are, float64."""
        found = np.empty(len(self.rows))
        for group in self._micro_batches(self.rows, examples):
            self.attempt.go_on()
            flat = packing.flatten(self.rows, group, self.share)
            losses, _ = flattened.label_losses(self.model, flat, self.device)
            parts = losses.double().split(self.rows.n_labels[group].tolist())
            found[group] = [part.mean().item() for part in parts]
        return found[examples]

    def _write_receipts(self) -> ReceiptCounts | None:
        """Also says so where only some rows have one."""
        counts = self._within_memory(lambda: self.receipts.write(self._row_losses))
        if counts is not None and counts.rows < counts.of:
            text = mark("{rows} of {of} rows, chosen at random, have a receipt, so that it takes little time.")
            self.attempt.note("receipts_of_a_sample", text, level="info", rows=counts.rows, of=counts.of)
        return counts

    def _write_metrics(self, progress: Progress, remaining_s: float | None) -> None:
        metrics = Metrics(
            step=progress.step,
            total_steps=self.total_steps,
            epoch=progress.step / self.steps_per_epoch,
            loss=progress.loss,
            accuracy=progress.accuracy,
            learning_rate=self._learning_rate(progress.step - 1),
            tokens=progress.tokens,
            elapsed_s=progress.elapsed_s,
            remaining_s=remaining_s,
            eval_loss=progress.eval_loss if progress.evaluated else None,
            eval_accuracy=progress.eval_accuracy if progress.evaluated else None,
            reward_margin=progress.margin,
            eval_reward_margin=progress.eval_margin if progress.evaluated else None,
        )
        self.attempt.write(metrics)
        self.curves.add(metrics)

    # --- save ---

    def _save(self, progress: Progress) -> None:
        """Publish a checkpoint unless one of this step lies there already, or the loss has just exploded: those before are
        kept for when it stays so. A full disk costs the checkpoint only."""
        if progress.step == self.saved_step or progress.exploded_steps:
            return
        self._require_finite(progress.step)

        def write(folder: Path) -> None:
            self.trained.write_weights(folder)
            saving.write_moments(folder, self.parameters, self.optimizer)
            epoch, place = divmod(progress.step, self.steps_per_epoch)
            position = {"epoch": epoch, "row": place * self.wanted.batch_size}
            checkpoints.write_state(folder, {"progress": asdict(progress), "position": position})
            self._write_more(folder)

        self.attempt.journal.sync()  # the steps that a resumed training will not repeat
        standing = checkpoints.Standing(
            validation_loss=progress.eval_loss if progress.evaluated else None,
            ends_epoch=progress.step % self.steps_per_epoch == 0,
        )
        try:
            checkpoints.publish(self.spec, progress.step, write, self.attempt.check_fence, standing)
        except (OSError, SafetensorError) as error:
            if not checkpoints.is_disk_full(error):
                raise
            self.attempt.note(
                "checkpoint_not_saved", mark("The disk is full: no checkpoint at step {step}."), step=progress.step
            )
            return
        self.saved_step = progress.step
        self._write_checkpoint_record(progress)

    def _write_checkpoint_record(self, progress: Progress) -> None:
        path = checkpoints.checkpoint_path(Path(), progress.step)
        known = {name: value for name, value in self._checkpoint_metrics(progress).items() if value is not None}
        self.attempt.write(
            Checkpoint(
                step=progress.step,
                path=str(path),
                metrics=known,
                kept=checkpoints.steps(self.attempt.folder),
                adapter_sha256=None
                if self.lora is None
                else checkpoints.sha256_in(self.attempt.folder, progress.step, adapters.WEIGHTS),
                renderer_hash=self.renderer.hash,
            )
        )

    def _checkpoint_metrics(self, progress: Progress) -> dict[str, float | None]:
        validation = {"loss": progress.eval_loss, "mean_token_accuracy": progress.eval_accuracy}
        return {
            "step": progress.step,
            "train_loss": progress.loss,
            "train_mean_token_accuracy": progress.accuracy,
        } | evaluation.of_validation(validation, progress)

    def _write_more(self, folder: Path) -> None:
        """What else a method keeps in its checkpoints."""

    def _read_more(self, folder: Path) -> None:
        """Take back what `_write_more` wrote."""

    def _resume(self) -> Progress:
        """Load the newest verified checkpoint if there is one."""

        def corrupt(step: int) -> None:
            self.attempt.note(
                "checkpoint_corrupt",
                mark("The checkpoint of step {step} is damaged; it was put aside."),
                step=step,
            )

        folder = checkpoints.newest_verified(self.spec, corrupt)
        if folder is None:
            if checkpoints.damaged(self.attempt.folder):
                self._restart_or_fail()
            return Progress()
        self.trained.read_weights(folder)
        progress = Progress(**checkpoints.read_state(folder)["progress"])
        saving.read_moments(folder, self.parameters, self.optimizer, progress.step)
        self._read_more(folder)
        self._write_checkpoint_record(progress)  # its first record may have died with the attempt that saved it
        return progress

    def _choose_step(self, progress: Progress) -> int:
        """The step whose weights are published: with early stopping the best one, whose weights the model then has."""
        self._require_finite(progress.step)
        stopping = self.wanted.early_stopping
        if stopping is not None and evaluation.is_enough(progress, stopping):
            self.attempt.note(
                "early_stopped",
                mark(
                    "Stopped early at step {step} of {total_steps}: in {patience} evaluations in a row the validation "
                    "loss did not fall by more than {min_delta}."
                ),
                level="info",
                step=progress.step,
                total_steps=self.total_steps,
                patience=stopping.patience,
                min_delta=stopping.min_delta,
            )
        if stopping is None or progress.best_step in (0, progress.step):
            return progress.step
        folder = checkpoints.verified(self.spec, progress.best_step)
        if folder is None:
            text = mark(
                "The checkpoint of the best step {best} can't be read; the weights of step {step} are published."
            )
            self.attempt.note("best_checkpoint_lost", text, best=progress.best_step, step=progress.step)
            return progress.step
        self.trained.read_weights(folder)
        self.attempt.note(
            "best_step_published",
            mark("The weights of step {best} are published: its validation loss was the lowest, {loss}."),
            level="info",
            best=progress.best_step,
            loss=f"{progress.best_loss:.4f}",
        )
        return progress.best_step

    def _restart_or_fail(self) -> None:
        """No checkpoint is left of those that were made. Raises Misconfigured(`checkpoint_unrecoverable`)."""
        if self.spec.on_corrupt != "restart":
            raise Misconfigured(
                "checkpoint_unrecoverable",
                mark(
                    "No checkpoint of this job is whole any more. The damaged ones were put aside in its work folder."
                ),
            )
        self.attempt.note(
            "restarted_from_zero", mark("No checkpoint is whole any more: the training begins again at step 0.")
        )

    def _require_finite(self, step: int) -> None:
        if not self.trained.is_finite():
            raise self._not_finite(step)

    def _not_finite(self, step: int) -> InvalidRequest:
        return InvalidRequest(
            "loss_not_finite",
            mark(
                "The loss was no longer a number at step {step}. Lower learning_rate_multiplier (it was {multiplier})."
            ),
            param="hyperparameters.learning_rate_multiplier",
            step=step,
            multiplier=self.wanted.learning_rate_multiplier,
        )
