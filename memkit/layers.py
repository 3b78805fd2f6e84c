"""A policy for each layer of a model: one for most, others for some of them by number, and what sliding layers do.

```yaml
default: untrained-observed            # every layer that is not named below
at: {"0,1,-1": full}                   # layers by number, from 0; negative: from the end
sliding: keep                          # layers that the model itself lets see its newest tokens alone
```
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from memkit.catalog import POLICIES, Catalog, load_policy
from memkit.errors import PolicyError, short, shown
from memkit.pieces.registry import NamedSpec
from memkit.pieces.window import SlidingWindowSpec
from memkit.policy import Policy, PolicySpec
from memkit.profiles import per_layer

__all__ = ["KEEP", "AnyLayers", "LayerPoliciesSpec", "as_layers", "layer_policies"]

KEEP: Final = "keep"
"""Stands for a policy: the layer attends as it does in the stock model."""

NUMBERS = re.compile(r"\s*-?[0-9]{1,6}\s*(,\s*-?[0-9]{1,6}\s*)*", re.ASCII)


class _Changed(BaseModel):
    """For the schema: a policy by name, with some fields changed."""

    model_config = ConfigDict(extra="allow")
    source: str = Field(alias="from", description="a policy's name or path; other fields are changes of it")


def _policy(given: Any) -> Any:
    """What may stand for a layer's policy → a PolicySpec or `keep`."""
    if isinstance(given, Policy):
        return given.spec
    if isinstance(given, dict) and "from" in given:
        return load_policy(given["from"], {field: each for field, each in given.items() if field != "from"})
    if isinstance(given, dict):
        return PolicySpec(**given)
    if isinstance(given, PolicySpec) or given == KEEP:
        return given
    if not isinstance(given, (str, Path)):
        raise PolicyError(
            f"must be a policy's name or path, a PolicySpec, a mapping of one, or keep, got {shown(given)}"
        )
    return load_policy(given)


LayerPolicy: TypeAlias = Annotated[
    PolicySpec | Literal["keep"], BeforeValidator(_policy, json_schema_input_type=str | PolicySpec | _Changed)
]


class LayerPoliciesSpec(NamedSpec):
    """Which policy each layer has.

    A layer's policy is a shipped policy's name, a path, the policy itself, a shipped one with changes
    (`{from: untrained-observed, growth.slots: 64}`), or `keep`: the layer attends as in the stock model.
    """

    default: LayerPolicy = Field(description="the policy of every layer that neither `at` nor `sliding` is about")
    at: dict[str, LayerPolicy] = Field(
        default_factory=dict, description="layers by number, as in '0,1,-1' (negative: from the end), and their policy"
    )
    sliding: LayerPolicy | None = Field(
        default=None,
        description="the policy of layers that slide in the stock model, where `at` does not name them; left out: keep",
    )

    def __init__(self, /, **data: Any) -> None:
        at = data.get("at")
        if isinstance(at, Mapping):  # YAML and Python may write one layer as a number
            twice = [layer for layer in at if type(layer) is int and str(layer) in at]
            if twice:
                raise PolicyError(f"at: layer {twice[0]} is named twice, as a number and as text; leave one out")
            at = {str(layer) if type(layer) is int else layer: policy for layer, policy in at.items()}
            data["at"] = at
        super().__init__(**{name: each for name, each in data.items() if name != "sliding" or each is not None})

    @field_validator("at", mode="after")
    @classmethod
    def _numbers(cls, at: dict[str, Any]) -> dict[str, Any]:
        for layers in at:
            if not NUMBERS.fullmatch(layers):
                raise ValueError(
                    f"must name layers by numbers with commas between them, as '0,1,-1', got {shown(layers)}"
                )
        return at

    @property
    def label(self) -> str:
        """A name to show: the file's, or which policies there are."""
        if self.name is not None:
            return self.name
        others = [f"{layers}: {_label(policy)}" for layers, policy in self.at.items()]
        if self.sliding is not None and self.sliding != KEEP:
            others.append(f"sliding: {_label(self.sliding)}")
        return short("; ".join([_label(self.default), *others]))

    @property
    def policies(self) -> list[PolicySpec]:
        """The policies that it names."""
        return [each for each in (self.default, *self.at.values(), self.sliding) if isinstance(each, PolicySpec)]

    def mapped(self, change: Callable[[PolicySpec], PolicySpec]) -> LayerPoliciesSpec:
        """The same with every policy changed; layers that are kept stay so."""

        def changed(policy: PolicySpec | Literal["keep"] | None) -> PolicySpec | Literal["keep"] | None:
            return change(policy) if isinstance(policy, PolicySpec) else policy

        at = {layers: changed(policy) for layers, policy in self.at.items()}
        return self.model_copy(update={"default": changed(self.default), "at": at, "sliding": changed(self.sliding)})

    def of(self, layers: int, slides: Sequence[bool]) -> list[PolicySpec | Literal["keep"]]:
        """Each layer's policy, of a model of so many; slides: which of them slide in the stock model.

        Raises `PolicyError` for a layer that is not there, or is named twice.
        """
        sliding = KEEP if self.sliding is None else self.sliding
        chosen: list[PolicySpec | Literal["keep"]] = [sliding if slide else self.default for slide in slides]
        named: dict[int, str] = {}
        for key, policy in self.at.items():
            for number in (int(part) for part in key.split(",")):
                if not -layers <= number < layers:
                    raise PolicyError(
                        f"{self._said}at: must name layers from 0 to {layers - 1} (negative: from the end), "
                        f"got {number}"
                    )
                layer = number % layers
                if layer in named:
                    raise PolicyError(
                        f"{self._said}at: layer {layer} is named twice, in '{named[layer]}' and '{key}'; leave one out"
                    )
                named[layer], chosen[layer] = key, policy
        return chosen

    @property
    def _said(self) -> str:
        return f"{short(self.name)}: " if self.name else ""


def _label(policy: PolicySpec | Literal["keep"]) -> str:
    return (policy.name or "unnamed") if isinstance(policy, PolicySpec) else policy


LayerFunction: TypeAlias = Callable[[int], Any]
AnyLayers: TypeAlias = str | Path | PolicySpec | Policy | LayerPoliciesSpec | Mapping[str, Any]
"""What may stand for the policies of a model's layers."""

LAYERS = Catalog(
    what="file of layers' policies",
    spec=LayerPoliciesSpec,
    error=PolicyError,
    folder="policies",
    given="a path, a mapping or a LayerPoliciesSpec",
    files="a YAML file",
    looked_for="the path of a YAML file or one of",
)


def as_layers(given: AnyLayers, overrides: Mapping[str, Any] | None = None) -> LayerPoliciesSpec:
    """The policies of a model's layers: a policy by itself is that of all layers.

    given: a policy's name, a path of a policy's YAML or of such a file, a PolicySpec, a Policy, a mapping
    `{"default": …, "at": {…}, "sliding": …}` or a LayerPoliciesSpec. overrides: fields to change, by dotted path
    (`default.growth.slots` where layers differ). Raises `PolicyError`.
    """
    if isinstance(given, Mapping):
        given = LayerPoliciesSpec(**given)
    if isinstance(given, (str, Path)) and "default" in POLICIES.read(POLICIES.path(given)):
        given = LAYERS.load(given)
    if isinstance(given, LayerPoliciesSpec):
        return LAYERS.load(given, overrides) if overrides else given
    if isinstance(given, Policy):
        given = given.spec
    if not isinstance(given, (str, Path, PolicySpec)):
        raise PolicyError(
            f"a policy is a name, a path, a PolicySpec, a Policy, or a mapping of layers, got {type(given).__name__}"
        )
    policy = load_policy(given, overrides) if overrides or not isinstance(given, PolicySpec) else given
    return LayerPoliciesSpec(default=policy).named(policy.name)


def layer_policies(
    given: AnyLayers | LayerFunction,
    layers: int,
    kv_heads: int,
    facts: Mapping[str, Any] | None = None,
    windows: Sequence[int | None] | None = None,
) -> list[Policy]:
    """The policy of each layer of a model, first layer first, profiles' ratios put in.

    Args:
        given: as for `as_layers`; or a function that says each layer's policy, a name or `keep` for one, by number.
        layers, kv_heads: of the model.
        facts: what its config says, by which `heads: {profile: auto}` finds a profile.
        windows: tokens that each layer sees in the stock model, the query's own included; None: all of them.

    Raises `PolicyError` for a layer that is not there or named twice, and for a policy that no layer would have.
    """
    windows = [None] * layers if windows is None else windows
    slides = [window is not None for window in windows]
    if callable(given):
        chosen = [LayerPoliciesSpec(default=given(layer)).default for layer in range(layers)]
    else:
        spec = as_layers(given)
        chosen = spec.of(layers, slides)
        if all(slides) and not spec.at and spec.sliding is None:
            raise PolicyError(
                f"every layer of this model sees its newest {windows[0]} tokens alone, and none would have policy "
                f"{spec.label}; give {{'default': 'full', 'sliding': …}}: the policy, or 'keep'"
            )
    each = [
        policy if isinstance(policy, PolicySpec) else _as_stock(window)
        for policy, window in zip(chosen, windows, strict=True)
    ]
    built: dict[PolicySpec, list[Policy]] = {}
    for policy, _ in itertools.groupby(each):
        if policy not in built:
            built[policy] = per_layer(policy, layers, kv_heads, facts)
    return [built[policy][layer] for layer, policy in enumerate(each)]


def _as_stock(window: int | None) -> PolicySpec:
    """What a stock layer does: attend to all tokens, or to the newest so many."""
    if window is None:
        return load_policy("full")
    return PolicySpec(window=SlidingWindowSpec(size=window)).named(f"window-{window}")
