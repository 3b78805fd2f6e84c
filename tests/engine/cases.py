"""Small policies and inputs for the engine's tests, and how near two results must be."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import memkit
from memkit.engine.checks import check
from memkit.engine.inputs import AttendInputs
from memkit.pieces import Need
from memkit.pieces.admission import ExpectedAttentionSpec
from memkit.pieces.growth import GrowthSpec, PowerGrowthSpec
from memkit.pieces.window import BlockWindowSpec, SlidingWindowSpec

CHUNK = 8
WIDTH, VALUE_WIDTH = 8, 6

Tensors = dict[str, Tensor]


def scaled(spec: memkit.PolicySpec, chunk: int = CHUNK) -> memkit.PolicySpec:
    """The same policy in small: chunks of `chunk` tokens, and budgets that stand to them as they did before. Where
    slots compete and the window has four chunks or more, both halve: so a short text fills them."""
    changed: dict[str, Any] = {"chunker.size": chunk}
    growth, scale = spec.growth, chunk / spec.chunker.build().size
    if isinstance(spec.window, SlidingWindowSpec):
        changed["window.size"] = 2 * chunk
    if spec.eviction == "weakest" and isinstance(spec.window, BlockWindowSpec) and spec.window.chunks > 3:
        changed["window.chunks"] = spec.window.chunks // 2
        changed["observe.again"] = spec.observe.again // 2
        scale /= 2
    if isinstance(spec.admission, ExpectedAttentionSpec):
        changed["admission.future"] = int(spec.admission.future * scale) // 8
    if isinstance(growth, GrowthSpec):
        # f(n) becomes scale · f(n / scale): the same number of slots per window as before, after as many windows.
        exponent = growth.exponent if isinstance(growth, PowerGrowthSpec) else 0.5
        factors = {
            "slots": scale,
            "limit": scale,
            "per_doubling": scale,
            "start": scale,
            "factor": scale ** (1 - exponent),
        }
        for name in factors.keys() & type(growth).model_fields.keys():
            number = getattr(growth, name)
            changed[f"growth.{name}"] = type(number)(round(number * factors[name], 4))
        if growth.floor:
            changed["growth.floor"] = max(int(growth.floor * scale), spec.sinks + 1)
        if growth.cap is not None:
            changed["growth.cap"] = int(growth.cap * scale)
    return memkit.load_policy(spec, changed)


def small(name: str) -> memkit.PolicySpec:
    """A shipped policy, scaled."""
    return scaled(memkit.load_policy(name))


def awkward_lengths(spec: memkit.PolicySpec) -> list[int]:
    """1, C − 1, C, C + 1, W·C, W·C + 1 and one past a growth step, the third at which slots are added."""
    policy, chunk = spec.build(), spec.chunker.build().size
    span = policy.window.capacity or 2 * chunk
    steps = [n for n in range(span + 1, span + 20 * chunk) if policy.slots_after(n) > policy.slots_after(n - 1)]
    grown = steps[min(2, len(steps) - 1)] if steps else span + 2 * chunk
    return sorted({1, chunk - 1, chunk, chunk + 1, span, span + 1, grown + 1})


@dataclass(frozen=True)
class Case:
    """A call's arguments: the tensors of its tokens, those that the policy has learned, and the rotation."""

    spec: memkit.PolicySpec
    tensors: Tensors
    learned: Tensors
    rotation: memkit.Rotation | None = None

    @property
    def tokens(self) -> int:
        return self.tensors["keys"].shape[2]

    def to(self, dtype: torch.dtype) -> Case:
        return dataclasses.replace(
            self,
            tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()},
            learned={name: tensor.to(dtype) for name, tensor in self.learned.items()},
        )

    def leaves(self) -> Case:
        """The same case with tensors of its own that collect gradients."""
        return dataclasses.replace(
            self,
            tensors={name: tensor.detach().clone().requires_grad_() for name, tensor in self.tensors.items()},
            learned={name: tensor.detach().clone().requires_grad_() for name, tensor in self.learned.items()},
        )

    def row(self, row: int, tokens: int | None = None) -> Case:
        """One row alone, its first `tokens`."""
        return dataclasses.replace(
            self, tensors={name: tensor[row : row + 1, :, :tokens] for name, tensor in self.tensors.items()}
        )

    def part(self, begin: int, end: int) -> Case:
        """Tokens begin … end − 1, at the positions they have."""
        rotation = self.rotation
        if rotation is not None and rotation.positions is not None:
            rotation = dataclasses.replace(rotation, positions=rotation.positions[:, begin:end])
        tensors = {name: tensor[:, :, begin:end] for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors, rotation=rotation)

    def parameters(self) -> memkit.PolicyParameters | None:
        return parameters_from(self.spec, self.learned, self.tensors["queries"].shape[1]) if self.learned else None

    def attend(self, **options: Any) -> tuple[Tensor, memkit.Memory]:
        return memkit.attend(self.spec, **self.tensors, parameters=self.parameters(), rotation=self.rotation, **options)

    def plan_if_any(self) -> memkit.Plan | None:
        """The plan to compare on, where keys alone say where tokens go."""
        return self.plan() if self.spec.build().plans_ahead else None

    def plan(self, **options: Any) -> memkit.Plan:
        given = {name: tensor for name, tensor in self.tensors.items() if name in ("keys", "weights")}
        return memkit.plan(self.spec, **given, parameters=self.parameters(), rotation=self.rotation, **options)

    def oracle_plan(self, **options: Any) -> memkit.Plan:
        """The plan that the oracle makes."""
        from memkit import reference

        given: dict[str, Any] = {"parameters": self.parameters(), "rotation": self.rotation}
        given |= {"weights": self.tensors.get("weights")} | options
        return reference.plan(checked_plan_call(self.spec.build(), self.tensors["keys"], **given))

    def gradients(self, cotangent: Tensor, **options: Any) -> tuple[Tensor, memkit.Memory, Tensors]:
        """Output, memory, and the gradients of Σ output ⊙ cotangent by name."""
        case = self.leaves()
        output, memory = case.attend(**options)
        everything = case.tensors | case.learned
        loss = (output * cotangent).sum() + sum(0 * tensor.sum() for tensor in everything.values())
        found = torch.autograd.grad(loss, list(everything.values()))
        return output.detach(), memory, dict(zip(everything, found, strict=True))


def checked_plan_call(policy: memkit.Policy, keys: Tensor, **given: Any) -> AttendInputs:
    """The arguments of `plan`, checked; None where not given."""
    names = ("weights", "parameters", "rotation", "scale", "memory", "lengths", "plan")
    return check(AttendInputs(policy, None, keys, None, **dict.fromkeys(names) | given))


def parameters_from(spec: memkit.PolicySpec, learned: Tensors, heads: int) -> memkit.PolicyParameters:
    """A policy's parameters that *are* the given tensors, so that gradients reach them."""
    parameters = memkit.PolicyParameters(spec.build(), heads, WIDTH)
    for name, tensor in learned.items():
        delattr(parameters, name)
        setattr(parameters, name, tensor)
    return parameters


def make_case(
    spec: memkit.PolicySpec,
    tokens: int,
    *,
    rows: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    value_width: int = VALUE_WIDTH,
    pairing: Literal["adjacent", "half-split"] = "half-split",
    seed: int = 0,
) -> Case:
    """Random inputs, exact in float32, everything that the policy can use included; half of the keys in clusters."""
    random = torch.Generator().manual_seed(seed)
    policy = spec.build()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float32).double()

    centres = normal(5, WIDTH)[torch.randint(5, (rows, kv_heads, tokens), generator=random)]
    near = torch.rand(rows, kv_heads, tokens, 1, generator=random) < 0.5
    keys = torch.where(near, centres + normal(*centres.shape) / 4, normal(*centres.shape)).float().double()
    tensors = {
        "queries": 2 * normal(rows, heads, tokens, WIDTH),
        "keys": keys,
        "values": normal(rows, kv_heads, tokens, value_width),
    }
    if Need.MERGE_WEIGHTS in policy.needs:
        tensors["weights"] = normal(rows, kv_heads, tokens).exp().float().double()
    of_parameters = memkit.PolicyParameters(policy, heads, WIDTH)
    learned = {
        name: (tensor + 0.3 * normal(*tensor.shape)).detach().float().double()
        for name, tensor in of_parameters.named_parameters()
    }
    rotation = None
    if Need.ROTATION in policy.needs:
        width = 6  # not all channels
        rotation = memkit.Rotation(pairing, width, 0.7 ** torch.arange(width // 2).double())
    return Case(spec, tensors, learned, rotation)


def cotangent(case: Case, seed: int = 1) -> Tensor:
    """A random gradient of the outputs, exact in float32."""
    rows, heads, tokens, _ = case.tensors["queries"].shape
    shape = (rows, heads, tokens, case.tensors["values"].shape[-1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the expected tensor's largest entry where that exceeds 1."""
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    return difference / max(1.0, expected.double().abs().max().item())


def tolerance(dtype: torch.dtype, operations: int = 512) -> float:
    """Rounding that so many operations may add up to if all of it went one way."""
    return operations * torch.finfo(dtype).eps


def assert_close(actual: Tensor, expected: Tensor, limit: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    found = error(actual, expected)
    assert found <= limit, f"{what}: off by {found:.3g}, allowed {limit:.3g}"
    assert not math.isnan(found), f"{what}: not a number"


def assert_same_plan(actual: memkit.Plan, expected: memkit.Plan) -> None:
    assert actual.begin.tolist() == expected.begin.tolist()
    assert actual.length.tolist() == expected.length.tolist()
    assert actual.slots.tolist() == expected.slots.tolist()
    assert torch.equal(actual.founded, expected.founded), "other tokens found slots"
    assert torch.equal(actual.slot, expected.slot), "tokens join other slots"


def slots_of(memory: memkit.Memory) -> tuple[Tensor, Tensor]:
    """Sums and numbers of the live slots."""
    most = int(memory.slots.max())
    return memory.sums[:, :, :most], memory.store.numbers[:, :, :most]
