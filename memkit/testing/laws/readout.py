"""Laws of readouts: how a slot's sums become a key and a value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import memkit
from memkit.parameters import PolicyParameters
from memkit.pieces.readout import Readout
from memkit.pieces.statistics import COUNT, FOUNDER_MASS, KEY_NORM, MASS, RADIUS, VALUE_NORM, Numbers
from memkit.testing.agreement import agree, by_differences, identical, show
from memkit.testing.cases import DATA, Case, Data, make
from memkit.testing.law import Broken, law
from memkit.testing.scaling import least_policy

__all__ = [
    "READOUT_LAWS",
    "Sums",
    "alone_it_is_itself",
    "bias_of_single_tokens",
    "finite_reading",
    "reading_gradients",
    "slots_are_read_apart",
    "sums_of_slots",
    "temperature_one",
    "values_keep_their_size",
]


@dataclass(frozen=True)
class Sums:
    """Slots, each the sum of some tokens.

    counts: tokens in each slot (0 for an empty one); width; data: kind of keys and values; seed; weighted: whether
    tokens weigh other than 1.
    """

    counts: tuple[int, ...] = (1, 2)
    width: int = 2
    data: Data = "integers"
    seed: int = 0
    weighted: bool = False

    def tensors(self) -> tuple[Tensor, Tensor, Numbers]:
        """Key sums and value sums [m, d], and the slots' numbers by statistic, each [m]; float64."""
        generator = torch.Generator().manual_seed(self.seed)
        sums, rows = [], []
        for many in self.counts:
            keys, values = (make(self.data, (1, 1, max(many, 1), self.width), generator)[0, 0] for _ in range(2))
            weight = torch.full((max(many, 1),), float(many > 0), dtype=torch.float64)
            if self.weighted:
                weight = weight * torch.randint(1, 9, weight.shape, generator=generator) / 4
            sums.append(((weight[:, None] * keys).sum(0), (weight[:, None] * values).sum(0)))
            norms = [float((weight * tensor.norm(dim=-1)).sum()) for tensor in (keys, values)]
            radius = float(values[0].norm()) * float(many > 0)
            rows.append([many, float(weight.sum()), radius, *norms, float(weight[0])])
        statistics = (COUNT, MASS, RADIUS, KEY_NORM, VALUE_NORM, FOUNDER_MASS)
        columns = torch.tensor(rows, dtype=torch.float64).unbind(-1)
        keys, values = (torch.stack(column) for column in zip(*sums, strict=True))
        return keys, values, dict(zip(statistics, columns, strict=True))


@st.composite
def sums_of_slots(draw: st.DrawFn, single: bool = False) -> Sums:
    """Up to four slots of up to five tokens each, empty ones included; or, with `single`, of one token each."""
    many = draw(st.integers(1, 4))
    counts = (1,) * many if single else tuple(draw(st.lists(st.integers(0, 5), min_size=many, max_size=many)))
    return Sums(
        counts=counts,
        width=draw(st.integers(1, 4)),
        data=draw(st.sampled_from(DATA)),  # type: ignore[arg-type]
        seed=draw(st.integers(0, 999)),
        weighted=draw(st.booleans()),
    )


@law("finite", "readout")
def finite_reading(readout: Readout, example: Sums) -> None:
    """Keys, values and biases are finite, for an empty slot, one whose tokens cancel, and magnitudes of 1e-12 and 1e12.

    One NaN in one slot is a NaN in every later output.
    """
    keys, values, numbers = example.tensors()
    found = {"key": readout.key(keys, numbers, None), "value": readout.value(values, numbers)}
    bias = readout.bias(numbers)
    if bias is not None:
        found["bias"] = bias
    for name, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise Broken(f"{name}:\n{show(tensor)}\nof sums\n{show(keys if name == 'key' else values)}\n{numbers}")


@law("a token alone", "readout")
def alone_it_is_itself(readout: Readout, example: Sums) -> None:
    """A slot of one token reads as that token: its value exactly, its key up to the norm the readout asks for.

    V of one token is v; K is k for `mean` and `mean-norm`, k/‖k‖ for `l2`, LN(k) for `layer-norm`. Memory of which
    nothing has been merged should be no other memory than the window.
    """
    keys, values, numbers = Sums((1,) * len(example.counts), example.width, example.data, example.seed).tensors()
    # Directions of vectors shorter than 1e-12 are not taken: see the readout's formulas.
    sound = (values.norm(dim=-1, keepdim=True) > 1e-11) & (keys.norm(dim=-1, keepdim=True) > 1e-11)
    values, keys = values * sound, keys * sound
    numbers = {
        which: number * (sound[:, 0] | (which in (COUNT, MASS, FOUNDER_MASS))) for which, number in numbers.items()
    }
    size = float(values.abs().max())
    agree({"value": readout.value(values, numbers)}, {"value": values}, scales={"value": size}, eps=2**-40)
    read = readout.key(keys, numbers, None)
    match readout.spec.key:
        case "l2":
            expected = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        case "layer-norm":
            return  # a memory key is normed already; what LN makes of it again is measured against the reference
        case _:
            expected = keys
    agree({"key": read}, {"key": expected}, scales={"key": float(expected.abs().max())}, eps=2**-40)


@law("bias of single tokens", "readout")
def bias_of_single_tokens(readout: Readout, example: Sums) -> None:
    """The bias is log(count), or log(mass / founder's mass): 0 for sinks and single tokens, 0 for an empty slot.

    A slot of n tokens draws as much attention as n equal tokens would; one token draws what it did before it left.
    """
    _, _, numbers = example.tensors()
    bias = readout.bias(numbers)
    if bias is None:
        return
    expected = torch.tensor([max(count, 1) for count in example.counts], dtype=torch.float64)
    if readout.spec.bias == "mass":
        alone = expected == 1
        expected = torch.where(alone, 1, numbers[MASS] / torch.where(alone, 1, numbers[FOUNDER_MASS])).clamp(min=1)
    expected = expected.log()
    agree({"bias": bias}, {"bias": expected}, scales={"bias": 1.0}, eps=2**-40)


@law("values keep their size", "readout")
def values_keep_their_size(readout: Readout, example: Sums) -> None:
    """No slot's value is longer than its tokens' values: ‖V_i‖ ≤ Σ w·‖v‖ / mass, or the founder's radius.

    With `count-mean`, Σ w·‖v‖ / count. A readout that returns sums instead of means shouts louder with every token.
    """
    _, values, numbers = example.tensors()
    read = readout.value(values, numbers).norm(dim=-1)
    match readout.spec.value:
        case "birth-radius":
            bound = numbers[RADIUS]
        case "count-mean":
            bound = numbers[VALUE_NORM] / numbers[COUNT].clamp(min=1)
        case _:
            bound = numbers[VALUE_NORM] / torch.where(numbers[MASS] > 0, numbers[MASS], 1)
    if bool((read > bound * (1 + 1e-9)).any()):
        raise Broken(f"values of length {read.tolist()}, at most {bound.tolist()}")


@law("slots are read apart", "readout")
def slots_are_read_apart(readout: Readout, example: Sums) -> None:
    """A slot's reading does not depend on other slots: read(π S) = π read(S), and axes in front change nothing.

    The engine reads again only the slots that a chunk has touched.
    """
    keys, values, numbers = example.tensors()
    turn = torch.arange(len(example.counts)).flip(0)
    turned = {which: number[turn] for which, number in numbers.items()}
    deep = {which: number[None, None] for which, number in numbers.items()}
    readings = {
        "key": lambda s, given: readout.key(s, given, None),
        "value": readout.value,
    }
    for name, read in readings.items():
        sums = keys if name == "key" else values
        here = read(sums, numbers)
        for what, there in (
            ("reversed", read(sums[turn], turned)[turn]),
            ("deeper", read(sums[None, None], deep)[0, 0]),
        ):
            identical(there, f"{name} of slots {what}", here, "expected")


@law("gradients", "readout")
def reading_gradients(readout: Readout, example: Sums) -> None:
    """The gradient of a reading is finite, and exact where no sum is zero.

    By differences in float64. An empty slot or one whose tokens cancel must not turn a training step into NaN.
    """
    keys, values, numbers = example.tensors()
    ways = {
        "key": (keys, lambda s: readout.key(s, numbers, None)),
        "value": (values, lambda s: readout.value(s, numbers)),
    }
    for name, (sums, read) in ways.items():
        leaf = sums.clone().requires_grad_()
        weighing = torch.linspace(-1, 2, sums.numel(), dtype=torch.float64).view_as(sums)
        found = torch.autograd.grad((read(leaf) * weighing).sum(), leaf)[0]
        if not bool(found.isfinite().all()):
            raise Broken(f"gradient of {name}:\n{show(found)}\nat\n{show(sums)}")
        if example.data != "normal" or min(example.counts) == 0 or float(sums.norm(dim=-1).min()) < 0.1:
            continue
        numeric = by_differences(lambda s, read=read, weighing=weighing: read(s) * weighing, sums, 1e-6)
        # The LayerNorm of two equal channels is steep: its eps of 1e-5 makes for derivatives of 300.
        if not bool(((found - numeric).abs() <= 1e-4 * (1 + numeric.abs().max())).all()):
            raise Broken(f"gradient of {name}:\n{show(found)}\nby differences:\n{show(numeric)}")


@law("temperature one", "readout")
def temperature_one(readout: Readout, example: Sums) -> None:
    """Temperatures of 1 (and a LayerNorm of weight 1, bias 0) change nothing.

    attend(parameters = 1, 0, 1) = attend(parameters = none): a policy that has just been put into a model starts as
    one that has learned nothing.
    """
    policy = least_policy(2, 2, readout=readout.spec)
    case = Case(lengths=(5,), width=example.width, value_width=example.width, seed=example.seed, dtype="float64")
    inputs = case.inputs(policy)
    plain = inputs.attend(policy)[0]
    learned = PolicyParameters(policy, 1, example.width)
    found = memkit.attend(policy, inputs.queries, inputs.keys, inputs.values, parameters=learned)[0]
    agree({"output": found}, {"output": plain}, scales={"output": 2.0}, eps=2**-45, what="query scales of 1: ")


READOUT_LAWS = (
    finite_reading,
    alone_it_is_itself,
    bias_of_single_tokens,
    values_keep_their_size,
    slots_are_read_apart,
    reading_gradients,
    temperature_one,
)
