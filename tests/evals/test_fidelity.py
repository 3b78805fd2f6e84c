"""Fidelity: limits that must be 0 or 1, sums that must be whole, and the bound."""

from itertools import product
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import memkit
from memkit import InputError, MemoryLM, PolicySpec
from memkit.errors import EvenSharesWarning
from memkit.evals import error_bound, fidelity
from memkit.evals.bound import read_merged
from memkit.evals.recording import recorded_calls
from memkit.lm import load_model_spec
from memkit.pieces import ReadoutSpec
from memkit.pieces.heads import HeadsSpec
from memkit.testing import LawBroken, Merged, laws, merged_tokens
from tests.hf.tiny import randomised, tiny_config

MEAN = PolicySpec(
    chunker={"kind": "fixed", "size": 8},
    window={"kind": "block", "chunks": 2},
    sinks=2,
    growth={"kind": "fixed", "slots": 12},
    readout={"bias": "count"},
)
IDS = torch.randint(211, (1, 90), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stock() -> LlamaForCausalLM:
    return randomised(LlamaForCausalLM(tiny_config()))


@pytest.fixture(scope="module")
def made() -> MemoryLM:
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 2, "heads": 2, "rotary.width": 8}
    policy = {"from": "kvm-sqrt-16", "chunker.size": 8, "growth.factor": 1.0, "growth.floor": 8}
    model = MemoryLM(load_model_spec("tiny-kvm-sqrt", {**sizes, "layers.default.policy": policy}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def test_full_attention_has_no_error(stock):
    for head in fidelity(stock, IDS, "full", every=30):
        assert head.error < 1e-5
        assert (head.window, head.slots, head.sinks, head.merges) == (pytest.approx(1), 0, 0, 0)


def test_what_is_counted(stock):
    found = fidelity(stock, IDS, MEAN, every=20, queries=5)
    assert [(each.layer, each.tokens, each.head) for each in found] == [
        (layer, tokens, head) for layer in range(2) for tokens in (20, 40, 60, 80) for head in range(4)
    ]
    for each in found:
        assert each.sinks + each.slots + each.window == pytest.approx(1)
        assert min(each.sinks, each.slots, each.window) > 0
        assert each.error > 0
    # Two chunks of 8 are the window; what left it and is no slot of the 12 has joined one.
    assert [each.merges for each in found if each.layer == each.head == 0] == [0, 20, 36, 60]


def test_heads_with_shares_of_their_own_are_judged_by_these(stock):
    shares = MEAN.with_ratios(0.5, 1.5)
    found = fidelity(stock, IDS, shares, every=40, queries=5)
    few, many = (fidelity(stock, IDS, one, every=40, queries=5) for _, one in shares.build().head_policies)
    assert [(each.layer, each.tokens, each.head) for each in found] == [
        (layer, tokens, head) for layer in range(2) for tokens in (40, 80) for head in range(4)
    ]
    for own, less, more in zip(found, few, many, strict=True):
        alone = less if own.head < 2 else more
        assert own.error == pytest.approx(alone.error, rel=1e-5)
        assert own.merges == alone.merges
        assert own.slots == pytest.approx(alone.slots, rel=1e-5)


def test_a_head_profile_is_looked_for(stock):
    with pytest.warns(EvenSharesWarning, match="no head profile is shipped for this model"):
        fidelity(stock, IDS, MEAN.model_copy(update={"heads": HeadsSpec(profile="auto")}), every=80)


def test_the_bound_holds_and_is_not_always_asked(stock):
    assert all(
        each.bound is not None and each.error <= each.bound + 1e-5 for each in fidelity(stock, IDS, MEAN, every=20)
    )
    assert {each.bound for each in fidelity(stock, IDS, "streaming-4-512", every=40)} == {None}


def test_slots_of_single_tokens_are_exact_in_all_respects(stock):
    policy = PolicySpec(
        chunker={"kind": "fixed", "size": 8},
        window={"kind": "block", "chunks": 1},
        growth={"kind": "linear", "fraction": 1.0},
    )
    for each in fidelity(stock, IDS, policy, every=33):
        assert each.error < 1e-4
        assert each.bound == pytest.approx(0, abs=1e-4)
        assert each.slots > 0.05


def test_a_memkit_model_is_judged_under_its_own_policy(made):
    found = fidelity(made, IDS, every=25)
    assert {each.layer for each in found} == {0, 1}
    assert all(each.error > 0 and each.bound is None for each in found)  # it scales queries for window and slots
    with pytest.raises(InputError, match="leave policy out"):
        fidelity(made, IDS, "full", every=25)


def test_outputs_by_hand_are_those_of_the_engine(made):
    """The shares are of the softmax that the engine took: with them, its outputs come out."""
    from memkit.evals.fidelity import _Place

    _, call = recorded_calls(made, IDS, None)[1]
    with torch.no_grad():
        _, memory = memkit.attend(call.policy, **call.part(0, 41))
        output, memory = memkit.attend(call.policy, **call.part(41, 45), memory=memory)
    place = _Place(call, memory, 41, 45)
    assert place.view is not None
    for head in range(2):
        window, slots = place._scales(head)
        keys, values = call.keys[0, head, :45].double(), call.values[0, head, :45].double()
        scores = (place.scale * window * place.queries[head] @ keys.T).masked_fill(~place.windowed, -torch.inf)
        of_slots = place.scale * slots * place.remembering[0, head].double() @ place.view.keys[0, head].double().T
        shares = torch.cat((of_slots, scores), 1).softmax(-1)
        expected = shares @ torch.cat((place.view.values[0, head].double(), values))
        torch.testing.assert_close(output[0, head].double(), expected, atol=1e-4, rtol=1e-4)


def test_listening_leaves_nothing_behind(made, stock):
    recorded_calls(made, IDS, None)
    assert all(block.mixer.attention.listener is None for block in made.blocks)
    before = stock.config._attn_implementation
    fidelity(stock, IDS, MEAN, every=45)
    assert stock.config._attn_implementation == before


def test_errors(stock):
    with pytest.raises(InputError, match="a stock model has no policy"):
        fidelity(stock, IDS, every=20)
    with pytest.raises(InputError, match="every must be less than the text's 90 tokens, got 90"):
        fidelity(stock, IDS, "full", every=90)
    with pytest.raises(InputError, match="ids must be one text"):
        fidelity(stock, IDS.expand(2, -1), "full", every=9)


# The bound

READOUTS = [
    ReadoutSpec(key=key, value=value, bias=bias)
    for key, value, bias in product(
        *(get_args(ReadoutSpec.model_fields[field].annotation) for field in ("key", "value", "bias"))
    )
]
"""Every readout of the vocabulary."""


@pytest.mark.parametrize("spec", READOUTS, ids=str)
@settings(max_examples=20)
@given(example=merged_tokens())
def test_no_readout_is_more_wrong_than_the_bound(spec: ReadoutSpec, example: Merged):
    laws.reading_error_bound(spec.build(), example)


@settings(max_examples=30)
@given(example=merged_tokens().map(lambda each: Merged(each.counts, each.exact, each.width, each.seed, 0.0, each.size)))
def test_equal_tokens_lose_nothing(example: Merged):
    queries, keys, values, slot = example.tensors()
    many = len(slot)
    first = torch.tensor([int((slot == each).nonzero()[0]) for each in range(len(example.counts))])
    slots = (keys[first], values[first], torch.tensor(example.counts, dtype=torch.float64).log())
    exact = (keys[many:], values[many:])
    bound = error_bound(queries, exact, (keys[:many], values[:many], slot), slots, 1.0)
    found, _ = read_merged(queries, exact, slots, 1.0)
    expected = (queries @ keys.T).softmax(-1) @ values
    assert float(bound.max()) < 1e-9 * example.size
    torch.testing.assert_close(found, expected)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), spread=st.sampled_from([0.01, 0.1]))
def test_the_bound_shrinks_with_the_spread(seed: int, spread: float):
    """To first order it is linear in how far the tokens of a slot lie apart."""
    values = []
    for factor in (1.0, 0.01):
        example = Merged((3, 4), 2, 3, seed, spread * factor)
        queries, keys, vectors, slot = example.tensors()
        counts = torch.tensor(example.counts, dtype=torch.float64)
        slots = tuple(
            torch.zeros(2, 3, dtype=torch.float64).index_add(0, slot, each[:7]) / counts[:, None]
            for each in (keys, vectors)
        )
        bound = error_bound(
            queries, (keys[7:], vectors[7:]), (keys[:7], vectors[:7], slot), (*slots, counts.log()), 1.0
        )
        values.append(bound)
    assert bool((values[1] < 0.03 * values[0]).all())


def test_a_wrong_bound_would_be_noticed(monkeypatch: pytest.MonkeyPatch):
    from memkit.testing.laws import merged

    monkeypatch.setattr(merged, "error_bound", lambda *given: 0.05 * error_bound(*given))
    example = Merged(counts=(3, 2), spread=0.3, exact=0, queries=20)
    with pytest.raises(LawBroken, match="exceed their bounds"):
        laws.reading_error_bound(ReadoutSpec(bias="count").build(), example)
