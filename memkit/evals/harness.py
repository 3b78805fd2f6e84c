"""lm-evaluation-harness on memkit's models and on attached ones, through the harness' own interface for models."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memkit.errors import InputError
from memkit.evals.reading import losses, own_model, read
from memkit.lm import Tokenizer
from memkit.whole import whole_number

__all__ = ["harness_model", "run_harness"]

INSTALL = "pip install 'memkit-attention[eval]'"
MAX_NEW_TOKENS = 256
"""Tokens generated at most, where a task does not say."""


def harness_model(model: Any, tokenizer: Tokenizer, prefix_id: int) -> Any:
    """The model as lm-evaluation-harness takes one: an `lm_eval.api.model.LM`.

    Texts are never cut: however long, they are read from their beginning, as a memory should.

    Args:
        model: a `MemoryLM`, its Hugging Face wrapper, or a causal language model of transformers, attached or not.
        tokenizer: of the model.
        prefix_id: the token before a text that has no context, as a beginning-of-text token.

    Raises `InputError` where lm_eval is not installed.
    """
    base: Any = _lm_eval("lm_eval.api.model").TemplateLM

    class Judged(base):
        """Log-likelihoods, rolling log-likelihoods and greedy generation."""

        @property
        def eot_token_id(self) -> int:
            return prefix_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            return [_likelihood(model, context, continuation) for _texts, context, continuation in requests]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            texts = (tokenizer.encode(request.args[0]) for request in requests)
            return [_likelihood(model, [prefix_id], text)[0] for text in texts]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return [_generated(model, tokenizer, prefix_id, *request.args) for request in requests]

    return Judged()


def run_harness(
    model: Any,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    prefix_id: int,
    include: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Judge a model by the harness' tasks: {task: {metric: number}}, as `lm_eval.simple_evaluate` names them.

    Args:
        model, tokenizer, prefix_id: as for `harness_model`.
        tasks: names of tasks, the harness' own or those of files in `include`.
        include: a folder with tasks' YAML files.
        limit: documents of each task at most; None: all.
        seed: of what a task draws.

    Raises `InputError`: lm_eval is not installed, or an unknown task.
    """
    library = _lm_eval("lm_eval")
    limit = None if limit is None else whole_number("limit", limit, 1)
    if not tasks:
        raise InputError("tasks must name at least one task, got none")
    if include is not None and not include.is_dir():
        raise InputError(f"include must be a folder with tasks' YAML files, got {include}")
    manager = _lm_eval("lm_eval.tasks").TaskManager(include_path=None if include is None else str(include))
    for task in tasks:
        if task not in manager.all_tasks:
            raise InputError(
                f"unknown task '{task}'; lm_eval ls tasks lists the harness' own, --include adds a folder's"
            )
    found = library.simple_evaluate(
        model=harness_model(model, tokenizer, prefix_id),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return found["results"]


def _lm_eval(module: str) -> Any:
    """A module of the harness, which is an extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"judging by tasks of lm-evaluation-harness needs it, got: {error}; {INSTALL}") from None


def _likelihood(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """ln p(continuation | context), and whether it is the likeliest token at each step."""
    ids = torch.tensor([[*context, *continuation]])
    targets = torch.arange(ids.shape[1])[None] >= len(context)
    nats, right = losses(read(model, ids), ids, targets)
    return -float(nats.sum()), bool(right.all())


def _generated(model: Any, tokenizer: Tokenizer, prefix_id: int, context: str, settings: dict[str, Any]) -> str:
    """The likeliest continuation, up to the first of the texts at which to stop; of an empty context, the prefix's."""
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    most = int(settings.get("max_gen_toks", MAX_NEW_TOKENS))
    prompt = torch.tensor([tokenizer.encode(context) or [prefix_id]])
    text = tokenizer.decode(_new_tokens(model, prompt, most))
    ends = [text.index(stop) for stop in until if stop in text]
    return text[: min(ends)] if ends else text


def _new_tokens(model: Any, prompt: Tensor, most: int) -> Tensor:
    own = own_model(model)
    if own is not None:
        return own.generate(prompt, max_new_tokens=most)[0]
    prompt = prompt.to(model.device)
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=most, do_sample=False)
    return made[0, prompt.shape[1] :]
