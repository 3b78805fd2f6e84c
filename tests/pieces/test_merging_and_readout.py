"""Merging weighs tokens; readout turns sums into keys and values by the formulas it documents."""

import pytest
import torch
from torch.nn.functional import layer_norm

from memkit.pieces.merging import DropSpec, MeanSpec, WeightedMeanSpec
from memkit.pieces.readout import ReadoutSpec
from memkit.pieces.statistics import COUNT, KEY_NORM, MASS, RADIUS, VALUE_NORM

SUMS = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-1.0, 2.0]], dtype=torch.float64)
NUMBERS = {
    MASS: torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64),
    COUNT: torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64),
    RADIUS: torch.tensor([7.0, 0.0, 3.0], dtype=torch.float64),
    KEY_NORM: torch.tensor([12.0, 0.0, 5.0], dtype=torch.float64),
    VALUE_NORM: torch.tensor([10.0, 0.0, 6.0], dtype=torch.float64),
}


def test_weights():
    keys = torch.tensor([[[[3.0, 4.0], [0.0, 1.0]]]])
    weights = torch.tensor([[[0.5, 2.0]]])
    assert MeanSpec().build().weight(keys, weights) is None
    assert DropSpec().build().weight(keys, weights) is None
    assert WeightedMeanSpec(weight="learned").build().weight(keys, weights) is weights
    norms = WeightedMeanSpec(weight="key-norm").build().weight(keys, None)
    assert norms is not None
    assert norms.tolist() == [[[5.0, 1.0]]]


def test_what_rules_declare():
    mean, drop, learned = (
        spec.build() for spec in (MeanSpec(), DropSpec(), WeightedMeanSpec(weight="learned", weigh={"values": False}))
    )
    assert (mean.additive, mean.joins, mean.learned) == (True, True, False)
    assert (drop.additive, drop.joins, drop.learned) == (True, False, False)
    assert (learned.additive, learned.joins, learned.learned) == (True, True, True)
    assert (learned.weighs.keys, learned.weighs.values, learned.weighs.founders) == (True, False, False)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [[1.5, 2.0], [0, 0], [-2, 4]]),
        ("l2", [[0.6, 0.8], [0, 0], [-(5**-0.5), 2 * 5**-0.5]]),
        ("mean-norm", [[3.6, 4.8], [0, 0], [-10 * 5**-0.5, 20 * 5**-0.5]]),
    ],
)
def test_keys(how, expected):
    key = ReadoutSpec(key=how).build().key(SUMS, NUMBERS, None)
    torch.testing.assert_close(key, torch.tensor(expected, dtype=torch.float64))


def test_layer_norm_acts_on_the_sum_with_the_learned_weight_and_bias():
    weight, bias = torch.tensor([2.0, 0.5]), torch.tensor([0.1, -0.1])
    key = ReadoutSpec(key="layer-norm").build().key(SUMS, NUMBERS, (weight, bias))
    torch.testing.assert_close(key, layer_norm(SUMS, (2,), weight.double(), bias.double(), 1e-5))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [[1.5, 2.0], [0, 0], [-2, 4]]),
        ("count-mean", [[0.75, 1.0], [0, 0], [-1, 2]]),
        ("birth-radius", [[4.2, 5.6], [0, 0], [-3 * 5**-0.5, 6 * 5**-0.5]]),
        ("mean-norm", [[3.0, 4.0], [0, 0], [-12 * 5**-0.5, 24 * 5**-0.5]]),
    ],
)
def test_values(how, expected):
    value = ReadoutSpec(value=how).build().value(SUMS, NUMBERS)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))


def test_count_bias_is_nothing_for_single_tokens_and_empty_slots():
    assert ReadoutSpec().build().bias(NUMBERS) is None
    bias = ReadoutSpec(count_bias=True).build().bias(NUMBERS)
    torch.testing.assert_close(bias, torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64).log())


def test_slots_keep_only_the_numbers_that_are_read():
    assert ReadoutSpec().build().statistics == ()
    assert ReadoutSpec(key="layer-norm", value="birth-radius").build().statistics == (RADIUS,)
    assert ReadoutSpec(key="mean-norm", value="mean-norm").build().statistics == (KEY_NORM, VALUE_NORM)
