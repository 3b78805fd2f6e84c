"""One training run: a model's declaration and data in, a folder out; begun anew, or gone on with where it stopped."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed
from transformers.utils import logging

from memkit import yaml12
from memkit.errors import InputError, short, shown
from memkit.evals import TaskSpec, task
from memkit.hf import MemkitForCausalLM
from memkit.lm import MemoryLM, ModelSpec, Tokenizer, load_model_spec
from memkit.lm.catalog import weights_file
from memkit.lm.loading import load_model, with_its_weights
from memkit.texts import default_text, read_text
from memkit.training.data import TaskBatches, collate_batches, collate_sequences, text_sequences
from memkit.training.settings import TrainingSpec
from memkit.training.tokenizers import load_tokenizer, save_tokenizer
from memkit.training.trainer import MemoryTrainer, arguments

__all__ = ["Trained", "first_process", "train"]

RECORD = "training.yaml"
DEFAULT = "default"
STATE = "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")


@dataclass(frozen=True)
class Trained:
    """A run that ended.

    model: in evaluation mode, in float32, on the CPU. folder: where it lies, with `training.yaml` and the log,
    `trainer_state.json`. losses: (step, mean loss since the line before), the whole log. resumed: the step at which
    this call went on with a former one's; 0: it began anew.
    """

    model: MemoryLM
    folder: Path
    losses: tuple[tuple[int, float], ...]
    resumed: int


def train(
    model: str | Path | ModelSpec,
    out: str | Path,
    *,
    text: Sequence[str | Path] = (),
    task: Mapping[str, Any] | TaskSpec | None = None,
    settings: TrainingSpec | None = None,
    overrides: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    from_weights: bool = False,
    progress: bool = False,
) -> Trained:
    """Train a model on text or on a task, and write it to a folder that `memkit.load_model` reads.

    Called again with the same arguments, it goes on from the newest whole checkpoint in `out`, after a kill too, and
    the curve is the one it would have had. Under `accelerate launch` every process calls it: gradients are averaged
    over processes (DDP, or FSDP2 as accelerate's configuration says), and each reads its own sequences.

    Args:
        model: a shipped name, a YAML file, a folder, or a declaration.
        out: the folder; made where it is missing.
        text: UTF-8 files, each a document; `default` for the topics of Python's own help.
        task: a task, or a mapping as YAML has it; exactly one of text and task is given.
        settings: None: the defaults of `TrainingSpec`.
        overrides: fields of the model to change, by dotted path.
        tokenizer: the folder of a Hugging Face tokenizer; None: bytes.
        from_weights: begin with the weights that lie beside the model's YAML; else initialise, by the settings' seed.
        progress: show a bar on standard error.

    Raises:
        InputError: arguments that do not fit each other, no weights to begin with, or a folder that holds another run.
        ModelError, PolicyError: as `load_model` does.
    """
    settings = TrainingSpec() if settings is None else settings
    _check_parallelism()
    folder, chosen = Path(out), _task(text, task)
    for name in ("length", "sequences") if chosen is not None else ():
        if getattr(settings, name) != TrainingSpec.model_fields[name].default:
            raise InputError(
                f"{name} says how texts are cut, and a task makes sequences of its own; leave it out, or set the "
                "task's fields"
            )
    encoder = load_tokenizer(tokenizer)
    spec, weights = _declared(model, overrides, from_weights)
    _check_vocabulary(spec, chosen, encoder)
    texts = [default_text() if str(file) == DEFAULT else read_text(Path(file)) for file in text]
    if chosen is not None:
        batches = settings.steps * settings.accumulate * _processes()
        data: Any = TaskBatches(chosen, settings.batch, settings.seed, batches, encoder)
    else:
        data = text_sequences(texts, encoder, settings.length, settings.sequences == "packed")
    record = {
        "model": spec.model_dump(mode="json"),
        "text": [str(file) for file in text],
        "sha256_of_text": [sha256(each.encode()).hexdigest() for each in texts],
        "task": None if chosen is None else chosen.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json"),
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "from_weights": from_weights,
        "sha256_of_weights": None if weights is None else _sha256(weights),
        "processes": _processes(),
    }
    checkpoint = _begin(folder, record)

    set_seed(settings.seed)
    if weights is None:
        made = MemoryLM(spec)
    else:
        assert not isinstance(model, ModelSpec)
        made = load_model(model, overrides, dtype=torch.float32)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    trainer = MemoryTrainer(
        model=MemkitForCausalLM.wrap(made.train(), use_cache=False),
        args=arguments(settings, str(folder), settings.batch if chosen is None else 1),
        train_dataset=data,
        data_collator=collate_sequences if chosen is None else collate_batches,
        progress=progress,
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trained = _whole_model(trainer, spec)
    if trainer.is_world_process_zero():
        trainer.save_state()
        trained.save_pretrained(folder)
        save_tokenizer(encoder, folder)
    trainer.accelerator.wait_for_everyone()
    losses = tuple((int(line["step"]), float(line["loss"])) for line in trainer.state.log_history if "loss" in line)
    return Trained(trained, folder, losses, 0 if checkpoint is None else _step(checkpoint))


def _declared(
    model: str | Path | ModelSpec, overrides: Mapping[str, Any] | None, from_weights: bool
) -> tuple[ModelSpec, Path | None]:
    """The model's declaration, and the file with the weights to begin with; None: initialise."""
    if isinstance(model, ModelSpec):
        if overrides or from_weights:
            raise InputError("overrides and from_weights need a model by name or path, got a ModelSpec")
        return model, None
    if not from_weights:
        return load_model_spec(model, overrides), None
    spec, weights = with_its_weights(model, overrides)
    if weights is None:
        changed = " under overrides that change more than policies" if overrides and weights_file(model) else ""
        raise InputError(
            f"from_weights needs weights that fit beside the model's YAML, got {shown(str(model))}{changed}, which has "
            "none; leave it out to initialise, or name another model"
        )
    return spec, weights


def _task(text: Sequence[str | Path], given: Mapping[str, Any] | TaskSpec | None) -> TaskSpec | None:
    if isinstance(text, (str, Path)):
        raise InputError(f"text must be a list of files, got {shown(text)}; write [{shown(str(text))}]")
    if bool(text) == (given is not None):
        raise InputError(f"exactly one of text and task says what to train on, got {'both' if text else 'neither'}")
    return None if given is None else task(given)


def _check_vocabulary(spec: ModelSpec, chosen: TaskSpec | None, tokenizer: Tokenizer) -> None:
    """Raise where the model has not as many token ids as the data."""
    needed = (chosen.needed_vocabulary if chosen is not None else 0) or tokenizer.vocabulary
    if needed > spec.vocabulary:
        raise InputError(
            f"vocabulary must be at least the {needed} token ids of the {'text' if chosen is None else 'task'}, "
            f"got {spec.vocabulary}; --set vocabulary={needed}"
        )


def _check_parallelism() -> None:
    """Raise where accelerate is told to split what cannot be split."""
    for name, what in (("CP", "context parallel"), ("SP", "sequence parallel")):
        size = os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1")
        if size != "1":
            raise InputError(
                f"{what} splits a text over processes, and a memory must read it from its beginning, got "
                f"{name.lower()}_size {short(size)}; use data parallel or FSDP2, or "
                "memkit.lm.split_heads and split_text in a loop of your own"
            )


def _processes() -> int:
    """How many processes train together, as a launcher says."""
    return _state().num_processes


def first_process() -> bool:
    """Whether this is the first of the processes that train together: the one that has the model, and speaks."""
    return _state().is_main_process


def _state() -> PartialState:
    """What accelerate knows of the processes, as the trainer's settings would make it: without that word about the CPU,
    processes that have no GPU do not know of each other."""
    return PartialState(cpu=not torch.cuda.is_available())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def _begin(folder: Path, record: dict[str, Any]) -> Path | None:
    """Make the folder and write down all that decides the run; the checkpoint to go on from, where it is this run's."""
    state = _state()
    if state.is_main_process:
        _check_folder(folder, record)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RECORD).write_text(yaml12.dump(record), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror}); name a folder of yours") from None
    state.wait_for_everyone()
    return _newest_checkpoint(folder)


def _check_folder(folder: Path, record: dict[str, Any]) -> None:
    """Raise where the folder holds something else than this run."""
    path = folder / RECORD
    if path.is_file():
        held = yaml12.read(path, InputError)
        held = held if isinstance(held, dict) else {}
        for name, value in record.items():
            if held.get(name) != value:
                what, was = name.replace("_", " "), held.get(name)
                if isinstance(value, dict) and isinstance(was, dict):  # what differs, and not all of it
                    was, value = _unlike(was, value), _unlike(value, was)
                raise InputError(
                    f"{folder}: holds a run with another {what}, {shown(was)} instead of {shown(value)}; "
                    "name another folder, or remove this one"
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: is not empty and holds no run of memkit train; name another folder")


def _unlike(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What one says that the other does not."""
    return {name: value for name, value in one.items() if name not in other or other[name] != value}


def _newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: its state is written last."""
    for path in sorted((path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name)), key=_step, reverse=True):
        try:
            json.loads((path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def _step(checkpoint: Path) -> int:
    found = CHECKPOINT.fullmatch(checkpoint.name)
    assert found is not None
    return int(found[1])


def _whole_model(trainer: MemoryTrainer, spec: ModelSpec) -> MemoryLM:
    """The trained model on the CPU, put together where it was split over processes."""
    state: dict[str, Any] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    with torch.device("meta"):
        made = MemoryLM(spec)
    if trainer.is_world_process_zero():
        own = {name.removeprefix("model."): tensor.detach().cpu().clone() for name, tensor in state.items()}
        made.load_state_dict(own, assign=True)
    return made.requires_grad_().eval()
