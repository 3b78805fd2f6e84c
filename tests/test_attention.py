import re
from typing import Any

import pytest
import torch
from torch.nn.functional import layer_norm, scaled_dot_product_attention

import memkit
from memkit import InputError, MemoryAttention
from memkit.attention import RotaryEmbeddingSpec
from memkit.pieces.registry import SpecError

WIDTH, HEADS = 32, 4


def small(name):
    """A shipped policy at a size where 50 tokens leave every window."""
    return memkit.load_policy(name, POLICIES[name])


POLICIES = {
    "full": {},
    "window-512": {"window.size": 11},
    "streaming-4-512": {"window.size": 7, "sinks": 2},
    "kvm-sqrt-16": {"chunker.size": 8, "growth.factor": 3, "growth.floor": 8},
    "untrained-kvm-fixed": {"chunker.size": 8, "growth.slots": 12},
    "ovq-1024": {"chunker.size": 8},
    "block-mean-8": {"chunker.size": 8},
}


def layer(policy, seed=0, **settings) -> Any:
    torch.manual_seed(seed)
    settings = {"kv_heads": 2, "qk_norm": "layer-norm", **settings}
    made = MemoryAttention(policy, width=WIDTH, heads=HEADS, **settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def inputs(rows=2, tokens=50, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, WIDTH, generator=generator)


def rotated(x, width, theta=10_000.0, pairing="half-split", spacing="open", sign=1):
    """Rotary by complex numbers: another way to the same formula. x [b, h, t, d]."""
    tokens = x.shape[2]
    pairs = width // 2
    exponent = torch.arange(pairs).double() / (pairs if spacing == "open" else pairs - 1)
    turn = torch.polar(torch.ones(tokens, pairs).double(), sign * torch.arange(tokens)[:, None] * theta**-exponent)
    first, second = (x[..., 0:width:2], x[..., 1:width:2]) if pairing == "adjacent" else x[..., :width].chunk(2, -1)
    turned = torch.complex(first.double(), second.double()) * turn
    out = x.clone()
    if pairing == "adjacent":
        out[..., 0:width:2], out[..., 1:width:2] = turned.real.float(), turned.imag.float()
    else:
        out[..., :width] = torch.cat((turned.real, turned.imag), -1).float()
    return out


@pytest.mark.parametrize(
    "rotary",
    [
        {},
        {"width": 4, "theta": 100.0, "pairing": "adjacent", "spacing": "closed"},
        {"width": 6, "pairing": "adjacent", "clockwise": True},
        {"width": 0},
    ],
)
def test_full_attention_is_the_textbook_layer(rotary):
    made, x = layer("full", rotary=rotary), inputs()
    spec = {"width": 8, "theta": 10_000.0, "pairing": "half-split", "spacing": "open", **rotary}
    sign = -1 if spec.pop("clockwise", False) else 1
    queries = (x @ made.query.weight.T).unflatten(-1, (HEADS, 8)).transpose(1, 2)
    keys = (x @ made.key.weight.T).unflatten(-1, (2, 8)).transpose(1, 2)
    values = (x @ made.value.weight.T).unflatten(-1, (2, 8)).transpose(1, 2)
    queries = layer_norm(queries, (8,), made.query_norm.weight, made.query_norm.bias)
    keys = layer_norm(keys, (8,), made.key_norm.weight, made.key_norm.bias)
    if spec["width"]:
        queries, keys = rotated(queries, **spec, sign=sign), rotated(keys, **spec, sign=sign)
    expected = scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    expected = expected.transpose(1, 2).flatten(2) @ made.output.weight.T
    torch.testing.assert_close(made(x)[0], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("qk_norm", ["none", "layer-norm", "unit"])
def test_split_equals_whole(policy, qk_norm):
    made, x = layer(small(policy), qk_norm=qk_norm), inputs()
    with torch.no_grad():
        whole, end = made(x)
        memory: Any = None
        parts = []
        for part in x.split([20, 1, 1, 13, 15], dim=1):
            y, memory = made(part, memory)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=5e-6, rtol=1e-4)
    assert memory.seen.tolist() == [50, 50]
    torch.testing.assert_close(memory.slots, end.slots)


@pytest.mark.parametrize("policy", POLICIES)
def test_split_equals_whole_with_gradients(policy):
    made, x = layer(small(policy)).double(), inputs().double()
    gradients = []
    for lengths in ([50], [20, 1, 29]):
        made.zero_grad()
        leaf = x.clone().requires_grad_()
        memory: Any = None
        parts = []
        for part in leaf.split(lengths, dim=1):
            y, memory = made(part, memory)
            parts.append(y)
        torch.cat(parts, 1).square().sum().backward()
        gradients.append([leaf.grad, *(parameter.grad for parameter in made.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_unequal_length_do_not_depend_on_each_other(policy):
    made, x = layer(small(policy)), inputs(rows=3)
    first, second = torch.tensor([30, 7, 0]), torch.tensor([1, 20, 9])
    with torch.no_grad():
        y, memory = made(x[:, :30], lengths=first)
        z, memory = made(x[:, 30:], memory, lengths=second)
        for row in range(3):
            tokens = torch.cat((x[row, : first[row]], x[row, 30 : 30 + second[row]]))
            alone, _ = made(tokens[None])
            together = torch.cat((y[row, : first[row]], z[row, : second[row]]))
            torch.testing.assert_close(together, alone[0], atol=5e-6, rtol=1e-4)
            assert not y[row, first[row] :].any()
    assert memory.seen.tolist() == [31, 27, 9]


@pytest.mark.parametrize("policy", ["full", "kvm-sqrt-16", "ovq-1024", "untrained-kvm-fixed"])
def test_autocast_stays_near_float32(policy):
    made, x = layer(small(policy)), inputs()
    expected = made(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, memory = made(x[:, :30])
        second, memory = made(x[:, 30:], memory)
    assert first.dtype == torch.bfloat16
    assert memory.sums.dtype == torch.float32
    torch.cat((first, second), 1).float().square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in made.parameters())
    # bfloat16 keeps 8 bits; a flipped routing decision moves single tokens further, so look at the typical error.
    error = (torch.cat((first, second), 1).float() - expected).abs()
    assert error.median() < 2**-7 * expected.abs().max()


def test_the_whole_layer_may_be_bfloat16():
    made, x = layer(small("kvm-sqrt-16")).bfloat16(), inputs().bfloat16()
    y, memory = made(x)
    assert y.dtype == torch.bfloat16
    assert memory.keys.dtype == torch.bfloat16
    assert memory.sums.dtype == torch.float32
    # The frequencies are no buffer: rounding them would send long positions astray.
    assert made.rotary.rotation.frequencies.dtype == torch.float64


def test_only_what_the_policy_learns_is_there():
    names = {name.split(".")[0] for name, _ in MemoryAttention("full", width=WIDTH, heads=HEADS).named_parameters()}
    assert names == {"query", "key", "value", "output"}
    kvm = dict(MemoryAttention("kvm-sqrt-16", width=WIDTH, heads=HEADS, kv_heads=2).named_parameters())
    assert kvm["gate.weight"].shape == (2, WIDTH)
    assert kvm["learned.key_norm_weight"].shape == (8,)
    assert kvm["learned.query_scale_memory"].shape == (HEADS,)


def test_weights_saved_under_former_names_load():
    made, other = layer(small("kvm-sqrt-16")), layer(small("kvm-sqrt-16"))
    with torch.no_grad():
        for tensor in made.learned.parameters():
            tensor.uniform_(0.5, 2)
    state = made.state_dict()
    former = {name.replace("query_scale_", "temperature_"): each for name, each in state.items()}
    assert {"learned.temperature_window", "learned.temperature_memory"} <= former.keys()
    other.load_state_dict(former)
    for name, tensor in state.items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert {"learned.temperature_window", "learned.temperature_memory"} <= former.keys()  # the caller's own
    other = memkit.PolicyParameters(made.policy, HEADS, made.head_width)
    other.load_state_dict({name.removeprefix("learned."): each for name, each in former.items() if "learned" in name})
    assert torch.equal(other.query_scale_memory, made.learned.query_scale_memory)


def test_merge_weights_are_one_plus_elu_of_the_gate():
    made, x = layer(small("kvm-sqrt-16")), inputs()
    one = layer(small("kvm-sqrt-16"))
    with torch.no_grad():
        one.gate.weight.zero_()  # 1 + ELU(0) = 1: an unweighted mean
        assert not torch.allclose(made(x)[0][:, 40:], one(x)[0][:, 40:], atol=1e-4)
        made.gate.weight.mul_(1e9)  # some weights are now 0, and none is negative
        assert torch.isfinite(made(x)[0]).all()


def test_values_may_be_wider_than_keys():
    made = layer(small("kvm-sqrt-16"), value_width=12)
    y, memory = made(inputs())
    assert y.shape == (2, 50, WIDTH)
    assert memory.head_widths == (8, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, "width must be a multiple of heads, got 32 and 5"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got 4 and 3"),
        ({"qk_norm": "batch"}, "qk_norm must be 'none', 'layer-norm' or 'unit', got 'batch'"),
        ({"rotary": {"width": 10}}, "rotary.width must be even and at most the head width 8, got 10"),
        ({"head_width": 0}, "head_width must be a whole number, at least 1, got 0"),
        (
            {"policy": "untrained-kvm-sqrt", "rotary": {"width": 0}},
            "rotary rerotate un-rotates keys, but this layer rotates",
        ),
    ],
)
def test_errors(settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        MemoryAttention(**{"policy": "full", "width": WIDTH, "heads": HEADS, **settings})


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (lambda memory: memory, "memory is for 3 rows × 4 heads, got keys of 2 × 4"),
        (lambda memory: (None, memory), "memory must be a memkit.Memory or None, got tuple"),
    ],
)
def test_a_memory_that_is_not_of_these_rows_is_refused(memory, message):
    layer = MemoryAttention("full", width=WIDTH, heads=HEADS)
    _, before = layer(torch.zeros(3, 5, WIDTH))
    with pytest.raises(InputError, match=re.escape(message)):
        layer(torch.zeros(2, 5, WIDTH), memory(before))


def test_odd_rotary_widths_are_refused():
    with pytest.raises(SpecError, match=r"rotary\.width must be even"):
        RotaryEmbeddingSpec(width=7)
