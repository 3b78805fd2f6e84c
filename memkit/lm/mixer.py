"""What a mixer is: how a layer lets tokens see each other."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from memkit.lm.parts import Span, State

__all__ = ["Mixer"]


class Mixer(nn.Module, ABC):
    """Mixes the tokens of a layer, and carries a state from one call to the next.

    Layers declared with equal mixer specs are of one kind, and stay so when policies change (`ModelSpec.value_layers`).
    The first of a kind computes `first_values` from the embeddings, and every layer of the kind, itself included, may
    mix them into its values.
    """

    @property
    def takes_boundaries(self) -> bool:
        """Whether it reads a span's boundaries: where chunks of tokens end, as the caller says."""
        return False

    @abstractmethod
    def first_values(self, x: Tensor, state: State, span: Span) -> tuple[Tensor | None, State]:
        """v_first [b, t, c] from the layer's norm of the embeddings, [b, t, width], and what to carry on; or None."""

    @abstractmethod
    def forward(self, x: Tensor, first: Tensor | None, state: State, span: Span) -> tuple[Tensor, State]:
        """x [b, t, width] (normed) → what is added to the residual stream, and what to carry on."""

    @abstractmethod
    def initialise(self, layer: int, depth: int) -> None:
        """Set parameters to what training starts from; layers count from 0."""
