"""transformers' Trainer for memkit's models: which parameters decay, and what is shown as it runs."""

from __future__ import annotations

import sys
import time
from typing import Any

import psutil
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from memkit.training.settings import TrainingSpec

__all__ = ["MemoryTrainer", "ProgressBar", "arguments"]

SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "cosine": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    "linear": ("linear", {}),
    "constant": ("constant_with_warmup", {}),
}
"""How transformers calls ours."""
KEPT = 2
"""Checkpoints kept: should the machine stop while the newest is written, the one before is whole."""


def arguments(settings: TrainingSpec, folder: str, rows: int) -> TrainingArguments:
    """The settings as transformers has them. rows: examples per batch of the data set."""
    schedule, more = SCHEDULES[settings.schedule]
    return TrainingArguments(
        output_dir=folder,
        max_steps=settings.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=more,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.clip,
        use_cpu=not torch.cuda.is_available(),
        bf16=settings.precision == "bfloat16",
        fp16=settings.precision == "float16",
        seed=settings.seed,
        data_seed=settings.seed,
        save_steps=settings.save_every,
        save_total_limit=KEPT,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        eval_strategy="no",
    )


class MemoryTrainer(Trainer):
    """Trainer, but that weights decay where they are matrices, and a bar of ours shows how it goes."""

    def __init__(self, *given: Any, progress: bool = False, **settings: Any) -> None:
        super().__init__(*given, **settings)
        for each in (PrinterCallback, ProgressCallback):
            self.remove_callback(each)
        self.add_callback(LineAtCheckpoint())
        if progress:
            self.add_callback(ProgressBar())

    def _run_epoch(self, *given: Any, **settings: Any) -> None:
        """None once all steps are done: transformers looks after a step, not before a resumed run's first."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*given, **settings)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices, embeddings among them; no vector decays, be it a bias, a norm or a factor per channel.

        A factor per channel may be written head by head, on two axes, as RWKV-7's `bonus`; matrices are called weight.
        """
        named = model.named_parameters()
        return [name for name, parameter in named if parameter.ndim >= 2 and name.endswith(".weight")]


class LineAtCheckpoint(TrainerCallback):
    """A checkpoint ends a line of the log: a sum that it cut in two would begin at zero in the run that goes on."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Where the step is saved, its line is written first."""
        control.should_log = control.should_log or control.should_save


class ProgressBar(TrainerCallback):
    """One line: steps, loss, tokens per second, memory."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.begun, self.before = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A bar that begins at the step where the run goes on."""
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr)
        self.begun, self.before = time.perf_counter(), state.num_input_tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step further."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """What the log says, behind the bar."""
        if self.bar is None or "loss" not in (logs or {}):
            return
        rate = (state.num_input_tokens_seen - self.before) / (time.perf_counter() - self.begun)
        self.bar.set_postfix_str(
            f"loss {float(logs['loss']):.4f}, {rate:,.0f} tok/s, {memory_in_use() / 1e6:,.0f} MB", refresh=True
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The bar ends."""
        if self.bar is not None:
            self.bar.close()


def memory_in_use() -> int:
    """Bytes: the most that a GPU held so far, else what the process holds now."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
