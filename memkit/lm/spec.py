"""ModelSpec: a decoder-only language model, declared."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator

from memkit.attention import RotaryEmbeddingSpec
from memkit.lm.mixer import Mixer
from memkit.lm.parts import MlpSpec
from memkit.pieces.registry import AnyOf, FamilySpec, NamedSpec, Spec
from memkit.policy import PolicySpec

__all__ = ["LayersSpec", "MixerSpec", "ModelSpec", "OverrideSpec"]

MOST_VOCABULARY, MOST_WIDTH, MOST_DEPTH = 2**24, 2**20, 2**10
"""Far more than any model has; whether one of these sizes fits this machine is found out when it is made."""


class MixerSpec(FamilySpec):
    """Declares how a layer mixes tokens. A mixer is this and the `Mixer` it builds; nothing else knows the kinds."""

    family: ClassVar[str] = "mixer"

    @abstractmethod
    def build(self, model: ModelSpec, layer: int) -> Mixer:
        """The mixer of that layer."""

    @abstractmethod
    def memory_bytes(self, model: ModelSpec, lengths: Sequence[int], dtype: torch.dtype, rows: int) -> list[int]:
        """Bytes that a layer carries on after one prefill of each length, `rows` rows in `dtype`."""

    def first_memory_bytes(self, model: ModelSpec, dtype: torch.dtype, rows: int) -> int:
        """Bytes that the first layer of a kind carries besides, for `Mixer.first_values`; none unless it says so."""
        return 0

    @property
    def label(self) -> str:
        """The mixer in a word or two, for tables."""
        return self.kind

    def under(self, policy: PolicySpec) -> MixerSpec:
        """The same mixer under another policy; itself where it has none."""
        return self

    def takes_values_of(self, other: MixerSpec, model: ModelSpec) -> bool:
        """Whether a layer with this mixer may mix in the first values of a layer with the other."""
        return type(self) is type(other)

    def check(self, model: ModelSpec) -> None:
        """Raise `ValueError` where the mixer does not fit the model's sizes."""


class OverrideSpec(Spec):
    """Layers that differ from the default: every n-th, or those listed."""

    every: int | None = Field(
        default=None, ge=2, le=MOST_DEPTH, description="layers first, first + every, … (0 is the first layer)"
    )
    first: int = Field(default=0, ge=0, le=MOST_DEPTH, description="where `every` begins")
    at: tuple[int, ...] | None = Field(default=None, description="layers by number, from 0; negative: from the end")
    mixer: Annotated[MixerSpec, AnyOf("mixer")] = Field(description="their mixer")

    @model_validator(mode="before")
    @classmethod
    def _a_list_will_do(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("at"), list):
            return {**data, "at": tuple(data["at"])}
        return data

    @model_validator(mode="after")
    def _one_of_two(self) -> OverrideSpec:
        if (self.every is None) == (self.at is None):
            raise ValueError(
                f"exactly one of every and at says which layers are meant, got every {self.every} and at {self.at}"
            )
        return self

    def layers(self, depth: int) -> list[int]:
        """The layers meant, of so many."""
        if self.at is None:
            return list(range(self.first, depth, self.every or 1))
        return [layer % depth for layer in self.at]


class LayersSpec(Spec):
    """Which mixer each layer has."""

    default: Annotated[MixerSpec, AnyOf("mixer")] = Field(description="the mixer of every layer that no override names")
    overrides: tuple[OverrideSpec, ...] = Field(default=(), description="layers that differ; later ones win")

    @model_validator(mode="before")
    @classmethod
    def _a_list_will_do(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("overrides"), list):
            overrides = [OverrideSpec(**each) if isinstance(each, dict) else each for each in data["overrides"]]
            return {**data, "overrides": tuple(overrides)}
        return data


class ModelSpec(NamedSpec):
    """A decoder-only language model; `MemoryLM(spec)` makes it.

    x = LN(embedding[ids]); per block x += mixer(LN(x)), x += mlp(LN(x)); logits = head(LN(x)). All LayerNorms have
    weight and bias, projections have no bias, and embedding and head are not tied (the backbone of arXiv 2605.09877).
    """

    vocabulary: int = Field(ge=1, le=MOST_VOCABULARY, description="token ids, 0 … vocabulary − 1")
    width: int = Field(ge=1, le=MOST_WIDTH, description="channels of the residual stream")
    depth: int = Field(ge=1, le=MOST_DEPTH, description="blocks")
    heads: int = Field(ge=1, le=MOST_WIDTH, description="query heads of a layer")
    kv_heads: int | None = Field(
        default=None, ge=1, le=MOST_WIDTH, description="key/value heads; left out: as many as heads"
    )
    head_width: int | None = Field(
        default=None, ge=1, le=MOST_WIDTH, description="channels of a head; left out: width / heads"
    )
    rotary: RotaryEmbeddingSpec = Field(default=RotaryEmbeddingSpec(), description="how queries and keys are rotated")
    mlp: MlpSpec = Field(default=MlpSpec(), description="the MLP of every block")
    residual_scale: float = Field(default=1.0, gt=0, description="factor on what mixers and MLPs add")
    rounding: Literal["none", "bfloat16"] = Field(
        default="none",
        description="bfloat16: cos and sin, and slot values read by birth-radius, are rounded to bfloat16 whatever the "
        "model's dtype, as in the training of the published Key-Value Means checkpoints",
    )
    layers: LayersSpec = Field(description="which mixer each layer has")
    first_values: tuple[int, ...] | None = Field(
        default=None,
        description="for each layer the number of the one whose first values it mixes in; left out: of the first with "
        "an equal mixer. It is written where policies were changed since, for trained layers belong together as before",
    )

    @property
    def value_layers(self) -> list[int]:
        """For each layer the one whose first values it mixes in: a former one, or itself."""
        mixers = self.mixers
        return [mixers.index(mixer) for mixer in mixers] if self.first_values is None else list(self.first_values)

    def valued_as(self, trained: ModelSpec) -> ModelSpec:
        """The same model, but that first values come from the same layers as in `trained`, which has as many.

        Itself where its own declaration says where they come from, or where its mixers could not take them.
        """
        wanted, mixers = trained.value_layers, self.mixers
        if self.first_values is not None or self.depth != trained.depth or self.value_layers == wanted:
            return self
        if not all(mixer.takes_values_of(mixers[first], self) for mixer, first in zip(mixers, wanted, strict=True)):
            return self
        return self.model_copy(update={"first_values": tuple(wanted)})

    @property
    def mixers(self) -> list[MixerSpec]:
        """Every layer's mixer, first layer first."""
        mixers = [self.layers.default] * self.depth
        for override in self.layers.overrides:
            for layer in override.layers(self.depth):
                mixers[layer] = override.mixer
        return mixers

    @field_validator("first_values", mode="before")
    @classmethod
    def _a_list_will_do(cls, given: Any) -> Any:
        return tuple(given) if isinstance(given, list) else given

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}; or set head_width")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if not self.mlp.hidden(self.width):
            raise ValueError(
                f"mlp: expansion × width must reach multiple_of channels, got {self.mlp.expansion} × {self.width} and "
                f"multiple_of {self.mlp.multiple_of}; lower multiple_of"
            )
        for mixer in (self.layers.default, *(override.mixer for override in self.layers.overrides)):
            mixer.check(self)
        for number, override in enumerate(self.layers.overrides):
            for layer in override.at or ():
                if not -self.depth <= layer < self.depth:
                    raise ValueError(
                        f"layers.overrides.{number}.at: must name layers from 0 to {self.depth - 1} "
                        f"(negative: from the end), got {layer}"
                    )
        if self.first_values is not None:
            self._check_first_values(self.first_values)
        return self

    def _check_first_values(self, firsts: tuple[int, ...]) -> None:
        """Raise where a layer mixes in what no layer before it has computed, or what does not fit it."""
        remedy = "or leave it out"
        if len(firsts) != self.depth:
            raise ValueError(f"first_values must name a layer for each of {self.depth}, got {len(firsts)}; {remedy}")
        mixers = self.mixers
        for layer, first in enumerate(firsts):
            if not 0 <= first <= layer or firsts[first] != first:
                raise ValueError(
                    f"first_values.{layer}: must be {layer}, or a layer before it that mixes in its own, got {first}; "
                    f"{remedy}"
                )
            if not mixers[layer].takes_values_of(mixers[first], self):
                raise ValueError(
                    f"first_values.{layer}: must be a layer with a mixer of the same kind and as many values, got "
                    f"{first}; {remedy}"
                )
