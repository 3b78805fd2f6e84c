"""Costs: what a spec promises against what the engine allocates, and against counting one query after another."""

import json
from typing import Any

import pytest
import torch

import memkit
from memkit.costing import FITTED_LENGTHS, cost
from memkit.pieces import Need
from memkit.rendering import render
from tests.counting import calls_made

POLICIES = memkit.policy_names()
SMALL = {"chunker.size": 8}
AWKWARD = (1, 7, 8, 9, 16, 17, 24, 25, 100, 257)


def carried(policy: memkit.Policy, tokens: int, dtype: torch.dtype, **shape: int) -> memkit.Memory:
    """The memory after a prefill of random tokens."""
    rows, heads, kv_heads = shape["rows"], shape["heads"], shape["kv_heads"]
    generator = torch.Generator().manual_seed(tokens)

    def random(heads: int, width: int) -> torch.Tensor:
        return torch.randn(rows, heads, tokens, width, generator=generator).to(dtype)

    queries, keys = random(heads, shape["head_width"]), random(kv_heads, shape["head_width"])
    return memkit.attend(policy, queries, keys, random(kv_heads, shape["value_width"]), rotation=rotation(policy))[1]


def rotation(policy: memkit.Policy) -> memkit.Rotation | None:
    return memkit.Rotation("half-split", 4, torch.tensor([1.0, 0.1])) if Need.ROTATION in policy.needs else None


def one_token(
    rows: int, heads: int, kv_heads: int, head_width: int, value_width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of one token."""
    return (
        torch.empty(rows, heads, 1, head_width),
        torch.empty(rows, kv_heads, 1, head_width),
        torch.empty(rows, kv_heads, 1, value_width),
    )


def assert_equal_to_the_engine(policy: memkit.Policy, lengths: tuple[int, ...], dtype: torch.dtype, **shape: int):
    for said in cost(policy, lengths, dtype=dtype, **shape):
        memory = carried(policy, said.tokens, dtype, **shape)
        assert said.slots == int(memory.slots[0])
        assert said.window == int(memory.held_rows[0])
        assert said.bytes == memory.bytes
        assert said.slot_bytes == sum(part.untyped_storage().nbytes() for part in memory.store.tensors())
        most, generator = 0, torch.Generator().manual_seed(0)
        for _ in range(policy.chunk + 2):
            token = [torch.randn(*part.shape, generator=generator).to(dtype) for part in one_token(**shape)]
            memory = memkit.attend(policy, *token, memory=memory, rotation=rotation(policy))[1]
            most = max(most, memory.bytes)
        assert (said.decoding_bytes, said.peak_bytes) == (most, max(most, said.bytes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_slots_and_bytes_are_the_engines(name: str, dtype: torch.dtype):
    policy = memkit.load_policy(name).build()
    shape = {"rows": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "value_width": 6}
    lengths = (1, 1024) if dtype == torch.float32 else (600,)
    assert_equal_to_the_engine(policy, lengths, dtype, **shape)


@pytest.mark.parametrize(
    "overrides",
    [
        {"rotary": {"kind": "unrotate"}},
        {"rotary": {"kind": "rerotate"}, "merging": {"kind": "weighted-mean", "weight": "key-norm"}},
        {"merging.kind": "drop", "sinks": 3},
        {"growth": {"kind": "none"}, "sinks": 11},
        {"growth": {"kind": "none"}, "window": {"kind": "sliding", "size": 5}, "sinks": 3},
        {"growth": {"kind": "fixed", "slots": 0}, "merging.kind": "drop", "sinks": 0},
        {"growth": {"kind": "log", "per_doubling": 9, "start": 3, "cap": 20, "round_down": 4}},
        {"readout": {"key": "mean-norm", "value": "birth-radius", "count_bias": True}},
    ],
    ids=str,
)
def test_bytes_of_other_policies_are_the_engines(overrides: dict[str, Any]):
    policy = memkit.load_policy("kvm-sqrt-16", SMALL | {"growth.floor": 4, "growth.factor": 1} | overrides).build()
    shape = {"rows": 1, "heads": 3, "kv_heads": 3, "head_width": 4, "value_width": 4}
    assert_equal_to_the_engine(policy, AWKWARD, torch.float32, **shape)


def counted(policy: memkit.Policy, tokens: int) -> list[tuple[int, int]]:
    """For texts of 0 … `tokens` tokens: Σ over queries of what each sees, Σ over leaving tokens of slots compared."""
    seen = compared = absorbed = 0
    totals = [(0, 0)]
    for position in range(tokens):
        begin = int(policy.window.begin(position))
        seen += len(range(begin, position + 1)) + policy.slots_after(position + 1)
        while policy.chunk and absorbed < begin:
            index = absorbed // policy.chunk
            before, after = policy.slots_after_chunk(index - 1), policy.slots_after_chunk(index)
            joins = policy.merging.joins
            for _ in range(policy.chunk - (after - before)):  # who founds nothing
                if policy.competes or (policy.routing.compares and not policy.sinks_only):
                    compared += after if joins else 0
            novel = not policy.sinks_only and policy.admission is not None and policy.admission.compares
            if novel and before < after < before + policy.chunk:
                compared += (after - before) * before if joins and policy.routing.compares else policy.chunk * before
            absorbed += policy.chunk
        totals.append((seen, compared))
    return totals


@pytest.mark.parametrize("name", POLICIES)
def test_operations_are_those_of_counting(name: str):
    overrides = SMALL if memkit.load_policy(name).window.kind == "block" else {}
    spec = memkit.load_policy(name, overrides)
    policy, totals = spec.build(), counted(spec.build(), 601)
    for said in cost(spec, (*AWKWARD, 600), heads=6, kv_heads=3, head_width=10, value_width=4, layers=2, rows=5):
        (seen, compared), (more, _) = totals[said.tokens : said.tokens + 2]
        assert said.prefill.attention == 2 * 5 * 2 * 6 * (10 + 4) * seen
        asked, expects = policy.observation.queries, policy.expects is not None
        per_row, per_chunk = 2 * asked * (10 + 2 * 4) + 2 * (20 + 100) * expects, 4 * asked * 100 * expects
        observed = sum(
            6 * (per_row * (totals[end][0] - totals[end - 1][0]) + per_chunk)
            for end in (range(policy.chunk, said.tokens + 1, policy.chunk) if policy.observes else ())
        )
        assert said.prefill.routing == 2 * 5 * (2 * 3 * 10 * compared + observed)
        assert said.prefill.total == said.prefill.attention + said.prefill.routing
        assert said.decode.attention == 2 * 5 * 2 * 6 * (10 + 4) * (more - seen)


def test_full_attention_is_the_causal_half_of_the_square():
    said = cost("full", 1000, heads=1, head_width=64)
    assert said.prefill.attention == 2 * (64 + 64) * (1000 * 1001 // 2)
    assert said.decode.attention == 2 * (64 + 64) * 1001
    assert (said.prefill.routing, said.decode.routing) == (0, 0)
    assert (said.slots, said.window, said.bytes) == (0, 1000, 1000 * 128 * 4)


def test_a_decoded_token_pays_its_share_of_routing():
    """Decoding a chunk's worth of tokens routes one chunk."""
    spec = memkit.load_policy("untrained-kvm-fixed")
    shares = [said.decode.routing for said in cost(spec, range(64 * 40, 64 * 41), heads=1)]
    one_more = cost(spec, 64 * 41 + 1, heads=1).prefill.routing - cost(spec, 64 * 40 + 1, heads=1).prefill.routing
    assert sum(shares) == one_more == 2 * 64 * 64 * 256


@pytest.mark.parametrize("name", POLICIES)
def test_exponents(name: str):
    exponent, linear = cost(name, 4096).exponent, ("observed", "recall", "reread", "fixed-256", "-512")
    if name == "full":
        assert exponent == pytest.approx(2, abs=0.005)
    elif name.startswith(("window", "block-window")) or name.endswith(linear):
        assert exponent == pytest.approx(1, abs=0.02)
    elif "sqrt" in name:
        assert 1.40 <= exponent <= 1.52
    elif "log" in name:
        assert 1.0 <= exponent <= 1.25
    elif name in ("kvm-saturating-1024", "ovq-1024"):
        assert 1.0 <= exponent <= 1.1
    elif name == "kvm-power-075":
        assert 1.6 <= exponent <= 1.75
    else:
        assert memkit.load_policy(name).growth.kind == "linear"
        assert 1.8 <= exponent <= 2


def test_the_exponent_is_the_slope_of_the_costs_it_is_fitted_to():
    assert (FITTED_LENGTHS[0], FITTED_LENGTHS[-1]) == (4096, 1_048_576)
    costs = cost("kvm-log-256", FITTED_LENGTHS)
    x = torch.tensor([entry.tokens for entry in costs]).double().log()
    y = torch.tensor([entry.prefill.total for entry in costs]).double().log()
    design = torch.stack((x, torch.ones_like(x)), dim=1)
    slope = torch.linalg.lstsq(design, y[:, None]).solution[0].item()
    assert [entry.exponent for entry in costs] == pytest.approx([slope] * len(costs), abs=1e-9)


@pytest.mark.parametrize("name", POLICIES)
def test_a_million_tokens_are_looked_at_quickly(name: str):
    policy = memkit.Policy(memkit.load_policy(name))  # a new one, which has not counted its slots yet
    # Slots are counted chunk by chunk, of 8 tokens in one policy; through tokens it is hundreds for each.
    assert calls_made(lambda: cost(policy, 1_000_000)) < 3_000_000


def test_several_lengths_are_as_many_costs():
    lengths = [4096, 1, 1_500_000, 300]
    together = cost("kvm-sqrt-16", lengths, heads=2)
    assert together == [cost("kvm-sqrt-16", tokens, heads=2) for tokens in lengths]
    assert cost("full", iter([5])) == [cost("full", 5)]
    assert cost("full", []) == []


def test_what_may_stand_for_a_policy():
    spec = memkit.load_policy("full")
    assert cost("full", 10) == cost(spec, 10) == cost(spec.build(), 10)
    assert cost(memkit.PolicySpec(), 10).policy == "unnamed"


def test_shapes():
    base = cost("kvm-sqrt-16", 5000, heads=4)
    assert cost("kvm-sqrt-16", 5000, heads=4, kv_heads=4, value_width=64, dtype=torch.float32) == base
    assert cost("kvm-sqrt-16", 5000, heads=4, layers=3, rows=2).bytes == 6 * base.bytes
    assert cost("kvm-sqrt-16", 5000, heads=4, layers=3, rows=2).prefill.total == 6 * base.prefill.total
    grouped = cost("kvm-sqrt-16", 5000, heads=4, kv_heads=1)
    assert 4 * grouped.bytes == base.bytes
    assert grouped.prefill.attention == base.prefill.attention
    assert 4 * grouped.prefill.routing == base.prefill.routing
    half = cost("kvm-sqrt-16", 5000, heads=4, dtype="bfloat16")
    assert 2 * half.window_bytes == base.window_bytes
    # Key sums in float32, keys and values as read, four bits more of values, and by how much these are stretched.
    assert half.slot_bytes - base.slot_bytes == 4 * half.slots * (64 * (4 + 2 + 2) + 32 + 4 - 128 * 4)
    assert str(grouped.shape) == "1 layer of 4 heads over 1 key/value heads, width 64, float32, 1 row"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens must be a whole number, at least 1, got 0"),
        ({"tokens": [10, -1]}, "tokens must be a whole number, at least 1, got -1"),
        ({"tokens": [1.5]}, "tokens must be a whole number, at least 1, got 1.5"),
        ({"heads": 0}, "heads must be a whole number, at least 1, got 0"),
        ({"heads": 6, "kv_heads": 4}, "heads must be a multiple of the 4 kv_heads, got 6"),
        ({"value_width": 0}, "value_width must be a whole number, at least 1, got 0"),
        ({"layers": 0}, "layers must be"),
        ({"rows": True}, "rows must be"),
        ({"dtype": "int8"}, "dtype must be one of float32, float64, bfloat16, float16, got int8"),
    ],
)
def test_numbers_that_do_not_fit(arguments: dict[str, Any], message: str):
    with pytest.raises(memkit.InputError, match=message):
        cost("full", **({"tokens": 10} | arguments))


def test_costs_render_and_serialise():
    said = cost("kvm-sqrt-16", 1_000_000, kv_heads=2)
    html = render(said, "html")
    assert "1,000,000 tokens" in html
    assert f"{said.slots:,}" in html
    data = json.loads(json.dumps(said.to_dict()))
    assert data["bytes"] == said.bytes == data["slot_bytes"] + data["window_bytes"]
    assert data["prefill"] == {"attention": said.prefill.attention, "routing": said.prefill.routing}
    assert data["shape"]["kv_heads"] == 2
