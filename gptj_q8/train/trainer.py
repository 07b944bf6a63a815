"""Transformers' Trainer, made to stop honestly and to save whole checkpoints or none."""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from gptj_q8.checkpoint.directory import new_directory
from gptj_q8.optim import AdamW8bit
from gptj_q8.train.folder import last_checkpoint
from gptj_q8.train.listener import Listener
from gptj_q8.train.packing import IGNORED, Rows, collate
from gptj_q8.train.settings import Settings


class Q8Trainer(Trainer):
    """A Trainer that writes checkpoints whole, measures exactly, and stops at NaN."""

    control: Any
    _staging: str | None = None

    def go_on(self, checkpoint: Path | None) -> None:
        """Trains from a checkpoint on (None: from the beginning) to the last step.

        One of the last step is only loaded, for Trainer would take one step more.
        """
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if state.global_step >= self.args.max_steps:
                self._load_from_checkpoint(str(checkpoint))
                self.state = state
                return
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Adds to Trainer's: ValueError, with step and learning rate, for a loss that is NaN."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = float((found[0] if return_outputs else found).detach())
        if not math.isfinite(loss):
            raise self._not_finite("loss", loss)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to Trainer's: ValueError for a gradient that is NaN.

        A loss scaler skips the steps in which float16 overflows; without one no step may.
        """
        norm = logs.get("grad_norm", 0.0)
        if not math.isfinite(norm) and not self.args.fp16:
            raise self._not_finite("gradient", norm)
        super().log(logs, start_time)

    def _not_finite(self, what: str, value: float) -> ValueError:
        # In `log` the step is counted already, and the learning rate moved on.
        step = self.state.global_step + (what == "loss")
        scheduler = self.lr_scheduler
        rate = scheduler.get_last_lr()[0] if scheduler is not None else self.args.learning_rate
        last = last_checkpoint(Path(self.args.output_dir))
        kept = f"{last} is kept" if last else "no checkpoint had been written yet"
        return ValueError(
            f"the {what} is {value} at step {step} (learning rate {rate:.3g}); {kept}; try a lower "
            "learning rate"
        )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The held-out loss: the mean over all targets, in nats. Trainer's is one over batches."""
        self.model.eval()
        total, count = 0.0, 0
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        # A data loader draws a number when it begins. Dropout must not see whether one did here, or
        # a run that was stopped instead of measured would go on otherwise.
        with torch.random.fork_rng(devices), torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.get_eval_dataloader(eval_dataset):
                inputs = self._prepare_inputs(batch)
                targets = (inputs["labels"][:, 1:] != IGNORED).sum()
                loss = self.compute_loss(self.model, inputs, num_items_in_batch=targets)
                total += float(loss) * int(targets)
                count += int(targets)
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of what was logged under a name such as "loss"."""
        return [(row["step"], row[name]) for row in self.state.log_history if name in row]

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes beside the checkpoint's place, then renames; the old one goes only after that."""
        target = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with new_directory(target, overwrite=False) as partial:
                self._staging = str(partial)
                super()._save_checkpoint(model, trial)
                made = partial / target.name
                for path in made.iterdir():
                    path.rename(partial / path.name)
                made.rmdir()
        # torch.save reports a full disk as a RuntimeError, safetensors as an error of its own.
        except (OSError, RuntimeError, SafetensorError) as error:
            last = last_checkpoint(Path(self.args.output_dir))
            kept = f"{last} is kept, to resume from" if last else "there is no checkpoint yet"
            reason = str(error).splitlines()[0]
            free = shutil.disk_usage(target.parent).free / 1e6
            raise OSError(
                f"{target} could not be written ({reason}; {free:.1f} MB are free now); {kept}"
            ) from error
        finally:
            self._staging = None
        rotate_checkpoints(str(target.parent), self.args.save_total_limit)


class Watcher(TrainerCallback):
    """Hands on what happens to a listener, and ends the run after a step when asked to."""

    def __init__(self, listener: Listener, tokens_per_step: float) -> None:
        self.listener = listener
        self.tokens_per_step = tokens_per_step
        self.interrupted = False
        self._began = 0.0

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Lets Ctrl-C and SIGTERM end the run after the step in hand; a second one ends it at once.

        Only the main thread may ask for signals; in others the run goes on undisturbed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._interrupt) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupt(self, number: int, frame: object) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self.listener.stopping()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._seconds = time.perf_counter() - self._began
        if self.interrupted:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        if "loss" in logs:
            speed = self.tokens_per_step / self._seconds
            self.listener.step(
                state.global_step, state.max_steps, logs["loss"], logs["learning_rate"], speed
            )
        if "eval_loss" in logs:
            self.listener.held_out(state.global_step, logs["eval_loss"])


def make_trainer(
    model: Any,
    output: Path,
    settings: Settings,
    train_rows: Rows,
    held_out_rows: Rows | None,
    at_once: int,
    watcher: Watcher,
) -> Q8Trainer:
    """A trainer for a model that is prepared, writing into `output`.

    at_once: rows that go through the model together, a divisor of the batch.
    """
    steps = settings.steps(len(train_rows))
    every = settings.save_every or math.ceil(steps / 10)
    rising = settings.warmup * steps
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=at_once,
        per_device_eval_batch_size=at_once,
        gradient_accumulation_steps=settings.batch_size // at_once,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        # Less than a step is none: the one would be lost, its rate being 0.
        warmup_steps=math.ceil(rising) if rising >= 1 else 0,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        use_cpu=model.device.type == "cpu",
        fp16=model.dtype == torch.float16,
        eval_strategy="steps" if held_out_rows else "no",
        eval_steps=every,
        eval_on_start=bool(held_out_rows) and last_checkpoint(output) is None,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        logging_steps=1,
        # The default hides a NaN behind the losses before it.
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        seed=settings.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else Trainer spreads over all there are
    trainer = Q8Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=train_rows,
        eval_dataset=held_out_rows,
        callbacks=[watcher],
        optimizer_cls_and_kwargs=(AdamW8bit, {"lr": settings.learning_rate}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
