"""Rotary: what memory keys are, and that rotating back undoes rotating."""

import math

import pytest
import torch

import memkit
from memkit.pieces import Need
from memkit.pieces.rotary import KeepSpec, RerotateSpec, Rotation, UnrotateSpec, ZeroSpec

FREQUENCIES = torch.tensor([1.0, 0.3, 0.01])


@pytest.fixture
def keys() -> torch.Tensor:
    return torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def positions() -> torch.Tensor:
    return torch.tensor([[0, 1, 2, 3, 4], [7, 8, 1000, 100_000, 3]])[:, None]


def rotation(pairing: str, width: int = 6) -> Rotation:
    return Rotation(pairing, width, FREQUENCIES[: width // 2])


@pytest.mark.parametrize("pairing", ["adjacent", "half-split"])
def test_rotation_turns_each_pair_by_its_angle(pairing, keys, positions):
    turned = rotation(pairing).apply(keys, positions)
    for pair, frequency in enumerate(FREQUENCIES.double().tolist()):
        i, j = (2 * pair, 2 * pair + 1) if pairing == "adjacent" else (pair, pair + 3)
        angle = positions[1, 0, 2].item() * frequency
        x, y = keys[1, 2, 2, i].item(), keys[1, 2, 2, j].item()
        assert turned[1, 2, 2, i].item() == pytest.approx(x * math.cos(angle) - y * math.sin(angle))
        assert turned[1, 2, 2, j].item() == pytest.approx(y * math.cos(angle) + x * math.sin(angle))
    assert torch.equal(turned[..., 6:], keys[..., 6:])


@pytest.mark.parametrize("pairing", ["adjacent", "half-split"])
@pytest.mark.parametrize("width", [2, 6])
def test_rotating_back_undoes_rotating(pairing, width, keys, positions):
    turn = rotation(pairing, width)
    torch.testing.assert_close(turn.apply(turn.apply(keys, positions), positions, inverse=True), keys)


def test_angles_are_exact_far_out(keys):
    far = torch.tensor([10_000_000.0])
    single = rotation("adjacent").apply(keys.float(), far)
    double = rotation("adjacent").apply(keys, far)
    torch.testing.assert_close(single.double(), double, atol=1e-6, rtol=1e-6)


def test_keep_changes_nothing(keys, positions):
    rotary = KeepSpec().build()
    assert rotary.memory_keys(keys, None, None) is keys
    assert not rotary.needs


@pytest.mark.parametrize(("spec", "width"), [(ZeroSpec(share=0.5), 4), (ZeroSpec(width=6), 6), (ZeroSpec(share=1), 8)])
def test_zero_clears_the_rotated_channels(spec, width, keys):
    cleared = spec.build().memory_keys(keys, None, None)
    assert (cleared[..., :width] == 0).all()
    assert torch.equal(cleared[..., width:], keys[..., width:])


def test_zero_must_fit_the_head(keys):
    with pytest.raises(memkit.InputError, match=r"rotary.width must be at most the head width 8, got 10"):
        ZeroSpec(width=10).build().memory_keys(keys, None, None)


@pytest.mark.parametrize("fields", [{}, {"share": 0.5, "width": 4}])
def test_zero_takes_exactly_one_measure(fields):
    with pytest.raises(memkit.PolicyError, match="exactly one of share and width"):
        ZeroSpec(**fields)


@pytest.mark.parametrize("spec", [UnrotateSpec(), RerotateSpec()])
def test_memory_keys_are_unrotated(spec, keys, positions):
    turn, rotary = rotation("half-split"), spec.build()
    assert rotary.needs == {Need.ROTATION}
    torch.testing.assert_close(rotary.memory_keys(turn.apply(keys, positions), turn, positions), keys)


def test_unrotated_slots_are_read_with_unrotated_queries(keys, positions):
    turn, rotary = rotation("half-split"), UnrotateSpec().build()
    torch.testing.assert_close(rotary.memory_queries(turn.apply(keys, positions), turn, positions), keys)
    assert rotary.slot_keys(keys, turn, positions) is keys
    assert not rotary.rotates_slots


def test_rerotated_slots_stand_at_their_mean_position(keys):
    turn, rotary = rotation("half-split"), RerotateSpec().build()
    mean = torch.full((2, 3, 5), 2.5)
    torch.testing.assert_close(rotary.slot_keys(keys, turn, mean), turn.apply(keys, mean))
    assert rotary.memory_queries(keys, turn, mean) is keys
    assert rotary.rotates_slots


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sideways", 6, FREQUENCIES), "rotation.pairing must be 'adjacent' or 'half-split', got 'sideways'"),
        (("adjacent", 5, FREQUENCIES), "rotation.width must be an even number of channels, at least 2, got 5"),
        (("adjacent", 8, FREQUENCIES), r"one number per pair of channels, shape \(4,\), got \(3,\)"),
    ],
)
def test_rotation_checks_itself(arguments, message):
    with pytest.raises(memkit.InputError, match=message):
        Rotation(*arguments)


@pytest.mark.parametrize("pairing", ["adjacent", "half-split"])
@pytest.mark.parametrize("of_angles", [False, True])
def test_gradients_flow_through_turning_twice_if_need_be(pairing, of_angles):
    torch.manual_seed(0)
    rotation = Rotation(pairing, 4, torch.ones(2))
    vectors = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = (torch.randn(2, 1, 5, 2, dtype=torch.float64, requires_grad=of_angles) for _ in range(2))
    assert torch.autograd.gradcheck(rotation.turn, (vectors, cos, sin))
    assert torch.autograd.gradgradcheck(rotation.turn, (vectors, cos, sin))


def test_vectors_of_one_row_turn_to_the_angles_of_several():
    rotation = Rotation("half-split", 4, torch.ones(2))
    vectors, positions = torch.randn(1, 3, 5, 4), torch.arange(10.0).view(2, 1, 5)
    turned = rotation.apply(vectors, positions)
    assert torch.equal(turned, rotation.apply(vectors.expand(2, -1, -1, -1), positions))
