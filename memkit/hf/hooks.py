"""Hooks that a model carries while it is attached, and how they are gone afterwards, from its copies too.

A copy of an attached model has its hooks, and is under the policy as well. When the original is detached, a copy's next
call finds out and puts the copy right, before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from memkit.errors import ModelError
from memkit.hf.decoder import NAME

__all__ = ["Life", "allow_batches", "end", "forbid_batches", "hook", "put_right", "unhook"]

REGISTRIES = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip

BATCHES = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""transformers' ways into continuous batching."""


class Life:
    """Whether an attachment lasts; a model and its copies share it. implementation: of attention in the stock model.

    A model that is written to a file and read again has one that is over: no handle reaches it.
    """

    def __init__(self, implementation: str) -> None:
        self.implementation, self.over = implementation, False

    @classmethod
    def ended(cls, implementation: str) -> Life:
        """One that is over."""
        life = cls(implementation)
        life.over = True
        return life

    def __reduce__(self) -> tuple[Any, ...]:
        return Life.ended, (self.implementation,)

    def __copy__(self) -> Life:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Life:
        return self


class _Hook:
    """Calls a function while the attachment lasts. Copies of a model share it."""

    def __init__(self, life: Life, function: Callable[..., Any]) -> None:
        self.life, self.function = life, function

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        if self.life.over:
            put_right(module)
            return None
        return self.function(module, args, kwargs, *output)

    def __copy__(self) -> _Hook:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self


def hook(module: nn.Module, life: Life, before: Callable[..., Any], after: Callable[..., Any]) -> None:
    """Have functions called before and after a module's forward, with its keyword arguments."""
    module.register_forward_pre_hook(_Hook(life, before), with_kwargs=True)
    module.register_forward_hook(_Hook(life, after), with_kwargs=True)


class _NoBatches:
    """Stands for a way into continuous batching, which brings keys, values and attention of its own."""

    def __init__(self, life: Life) -> None:
        self.life = life

    def __call__(self, *_: Any, **__: Any) -> Any:
        if self.life.over:
            raise ModelError(
                "this is a copy of a model that was attached; let it read anything once, and it is a stock model again"
            )
        raise ModelError(
            "continuous batching keeps keys and values of its own, in pages, which no policy sees; use model.generate "
            "with rows padded on the left, or detach the model"
        )

    def __copy__(self) -> _NoBatches:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _NoBatches:
        return self


def forbid_batches(module: Any, life: Life) -> None:
    """While the attachment lasts, a model refuses continuous batching, which may put in attention of its own."""
    for name in BATCHES:
        if hasattr(module, name):
            vars(module)[name] = _NoBatches(life)


def allow_batches(module: Any) -> None:
    """Take that back."""
    for name in BATCHES:
        if isinstance(vars(module).get(name), _NoBatches):
            del vars(module)[name]


def _ours(module: nn.Module) -> list[tuple[int, Life]]:
    hooks = [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]
    return [(number, each.life) for number, each in hooks if isinstance(each, _Hook)]


def unhook(modules: Iterable[nn.Module], life: Life) -> None:
    """Take an attachment's hooks off these modules."""
    for module in modules:
        for number, each in _ours(module):
            if each is life:
                for registry in REGISTRIES:
                    getattr(module, registry).pop(number, None)


def end(model: nn.Module) -> None:
    """End every attachment that a model carries, and make it a stock model."""
    for module in model.modules():
        for _, life in _ours(module):
            life.over = True
    put_right(model)


def put_right(model: Any) -> None:
    """Make a copy, of a model that is no longer attached, a stock model."""
    for module in model.modules():
        for _, life in _ours(module):
            if life.over:
                unhook([module], life)
                allow_batches(module)
                if getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME:
                    module.set_attn_implementation(life.implementation)
