"""A text read in full and compressed at once: published rows, and the memory goes on as any other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import memkit
from memkit.engine import next_readers, repeat_readers
from memkit.engine.compress import AT_ONCE, row_worth
from memkit.memory.rows import SlotRules, read_slots
from memkit.pieces.statistics import POSITION
from tests.engine.cases import CHUNK, assert_close, make_case, small, tolerance
from tests.engine.test_observing import golden, golden_rotation

LIMIT = tolerance(torch.float64, 2048)


def policy_of(info: dict[str, Any]) -> memkit.PolicySpec:
    merging = {"kind": "weighted-mean", "weight": "share", "of": "values"} if info["merging"] else {"kind": "drop"}
    return memkit.PolicySpec(
        chunker={"kind": "fixed", "size": info["window"]},
        window={"kind": "block", "chunks": 1},
        sinks=info["sinks"],
        growth={"kind": "fixed", "slots": info["rows"] - info["window"]},
        observe={"queries": info["window"]},
        admission={"kind": "output-error"},
        eviction="weakest",
        routing={"kind": "nearest", "similarity": "cosine"},
        merging=merging,
        readout={"bias": "mass" if info["merging"] else "none"},
        rotary={"kind": "rerotate"},
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["full-dropping", "full-merging"])
def test_rows_values_and_biases_are_as_published(name: str):
    tensors, info = golden(name)
    spec, rotation = policy_of(info), golden_rotation(info)
    asked = tensors["queries"][:, :, tensors["reference_index"]]
    readers = rotation.apply(asked, tensors["reference_position"] - tensors["reference_index"])
    given = [tensors[each] for each in ("queries", "keys", "values")]
    memory = memkit.compress(spec, *given, rotation=rotation, scale=info["scale"], readers=readers)
    slots, window, sinks = info["rows"] - info["window"], info["window"], info["sinks"]
    assert int(memory.slots[0]) == slots
    order = tensors["slot_position"].sort(-1)
    position = memory.number(POSITION)[:, :, sinks:slots]
    assert torch.equal(position.round().long(), order.values)
    wanted = {each: tensors[f"row_{each}"].clone() for each in ("keys", "values", "bias")}
    for tensor in wanted.values():
        rest = tensor[:, :, sinks:slots]
        index = order.indices if rest.ndim == 3 else order.indices[..., None].expand_as(rest)
        tensor[:, :, sinks:slots] = rest.gather(2, index)
    rules = SlotRules(spec.build(), tensors["keys"].shape[-1], tensors["keys"].dtype, None, rotation, valued=True)
    view = read_slots(rules, memory.sums, memory.store.numbers)
    keys = torch.cat((view.keys[:, :, :slots], memory.window.last(window)["keys"]), dim=2)
    values = torch.cat((view.values[:, :, :slots], memory.window.last(window)["values"]), dim=2)
    assert_close(keys, wanted["keys"], 2e-5, "keys")
    assert_close(values, wanted["values"], 2e-5, "values")
    if view.bias is not None:
        assert_close(view.bias[:, :, :slots], wanted["bias"][:, :, :slots], 2e-5, "bias")
        assert not wanted["bias"][:, :, slots:].any()


NAMES = ["kvm-sqrt-16", "ovq-1024", "untrained-observed", "caote-512", "keydiff-512", "streaming-4-512", "block-mean-8"]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_what_is_compressed_has_the_policys_size_and_goes_on_in_any_pieces(name: str):
    case = make_case(small(name), 90)
    policy, prompt, rest = case.spec.build(), case.part(0, 61), case.part(61, 90)
    given = prompt.tensors | {"parameters": prompt.parameters(), "rotation": prompt.rotation}
    memory = memkit.compress(case.spec, **given)
    assert memory.slots.tolist() == [policy.slots_after(61)] * 2
    assert memory.seen.tolist() == [61, 61]
    tokens = 61 - int(memory.held_rows[0])
    assert (memory.counts.sum(-1) == (tokens if policy.merging.joins else int(memory.slots[0]))).all()
    expected, _ = rest.attend(memory=memory.fork())
    outputs = []
    for begin, end in ((61, 62), (62, 80), (80, 81), (81, 90)):
        output, memory = case.part(begin, end).attend(memory=memory)
        outputs.append(output)
    assert_close(torch.cat(outputs, 2), expected, LIMIT, "output")


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_text_within_the_window_is_what_attend_keeps(name: str):
    case = make_case(small(name), CHUNK + 3)
    given = case.tensors | {"parameters": case.parameters(), "rotation": case.rotation}
    memory, rest = memkit.compress(case.spec, **given), make_case(small(name), 40, seed=1)
    _, expected = case.attend()
    assert torch.equal(memory.counts, expected.counts)
    output, _ = rest.attend(memory=memory)
    wanted, _ = rest.attend(memory=expected)
    if not case.spec.build().observes:  # readers have judged where nobody has yet
        assert_close(output, wanted, LIMIT, "output")


@torch.no_grad()
def test_each_head_is_compressed_as_it_would_be_alone():
    from tests.engine.test_heads import RATIOS, alone, uneven

    case = uneven("untrained-observed")
    rotation = case.rotation
    readers = torch.randn(2, 8, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    memory = memkit.compress(case.spec, **case.tensors, rotation=rotation, readers=readers)
    for head in range(len(RATIOS)):
        one = alone(case, head)
        own = memkit.compress(one.spec, **one.tensors, rotation=rotation, readers=readers[:, 2 * head : 2 * head + 2])
        assert torch.equal(memory.counts[:, head : head + 1, : own.counts.shape[2]], own.counts)
        assert_close(memory.sums[:, head : head + 1, : own.sums.shape[2]], own.sums, LIMIT, "sums")


def test_those_who_go_on_stand_behind_the_text():
    rotation = memkit.Rotation("half-split", 8, 0.5 ** torch.arange(4).double())
    plain = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(0)).double().expand(-1, -1, 600, -1)
    queries = rotation.apply(plain, torch.arange(600))
    readers = next_readers(queries, rotation)
    assert readers.shape == (1, 2, 512, 8)
    back = [rotation.apply(readers, torch.full((512,), 600 + ahead), inverse=True) for ahead in range(256)]
    off = torch.stack([(each - plain[:, :, :1]).abs().amax((0, 1, 3)) for each in back])
    assert (off.amin(0) < 1e-9).all()
    assert off.argmin(0).unique().numel() > 150
    short = next_readers(queries[:, :, :3], rotation)
    assert short.shape[2] == 6


@pytest.mark.parametrize(
    ("name", "readers", "message"),
    [
        ("untrained-observed", torch.randn(2, 3, 5, 8).double(), "readers must be floats"),
        ("untrained-observed", torch.randn(2, 4, 5, 7).double(), "readers must be floats"),
        ("untrained-observed", torch.ones(2, 4, 5, 8).long(), "readers must be floats"),
        ("untrained-observed", torch.randn(2, 4, 0, 8).double(), "of one query at least"),
        ("untrained-observed", 3, "of one query at least, or several, got int"),
        ("untrained-observed", [], "of one query at least, or several, got list"),
        ("untrained-observed", [torch.randn(2, 4, 5, 8).double(), torch.randn(2, 4, 5, 7)], "readers must be floats"),
        ("untrained-kvm-fixed", torch.randn(2, 4, 5, 8).double(), "observes no queries"),
    ],
)
def test_readers_must_fit(name: str, readers: Any, message: str):
    case = make_case(small(name), 40)
    with pytest.raises(memkit.InputError, match=message):
        memkit.compress(case.spec, **case.tensors, rotation=case.rotation, readers=readers)


@pytest.mark.parametrize("missing", ["queries", "values"])
def test_all_tensors_are_needed(missing: str):
    case = make_case(small("untrained-observed"), 40)
    with pytest.raises(memkit.InputError, match=f"{missing} must be a tensor"):
        memkit.compress(case.spec, **case.tensors | {missing: None}, rotation=case.rotation)


@torch.no_grad()
def test_several_readers_tell_the_mean_of_what_each_tells():
    case = make_case(small("untrained-observed"), CHUNK)  # all of it stays in the window
    groups = [torch.randn(2, 4, n, 8, generator=torch.Generator().manual_seed(n)).double() for n in (5, 9)]
    evidence = [
        memkit.compress(case.spec, **case.tensors, rotation=case.rotation, readers=readers).window.last(CHUNK)[
            "evidence"
        ]
        for readers in (*groups, groups, tuple(groups[:1]))
    ]
    assert (evidence[0] - evidence[1]).abs().max() > 1e-3
    assert_close(evidence[2], (evidence[0] + evidence[1]) / 2, LIMIT, "evidence")
    assert torch.equal(evidence[3], evidence[0])


def test_the_second_readings_queries_are_evenly_spaced():
    queries = torch.arange(1300.0)[None, None, :, None]
    asked = repeat_readers(queries)[0, 0, :, 0]
    assert len(asked) == 512
    assert asked[-1] == 1299
    assert set(asked.diff().tolist()) == {2.0, 3.0}
    assert torch.equal(repeat_readers(queries[:, :, :7]), queries[:, :, :7])
    longer = torch.arange(4001.0)[None, None, :, None]  # one in four of them
    asked = repeat_readers(longer)[0, 0, :, 0]
    assert len(asked) == 1000
    assert asked[-1] == 4000
    assert set(asked.diff().tolist()) == {4.0, 5.0}


@pytest.mark.parametrize("hides", [False, True])
def test_many_readers_are_asked_in_parts(hides: bool):
    generator = torch.Generator().manual_seed(3)
    readers, keys, values = (
        torch.randn(2, heads, tokens, 8, generator=generator, dtype=torch.float64)
        for heads, tokens in ((4, 2 * AT_ONCE + 7), (2, 30), (2, 30))
    )
    seen = torch.rand(readers.shape[2], 30, generator=generator) < 0.5
    seen[:, 0] = True
    hidden = ~seen if hides else None
    shares = torch.einsum("bgnqd,bgtd->bgnqt", readers.unflatten(1, (2, 2)), keys) / 3
    shares = (shares if hidden is None else shares.masked_fill(hidden, -torch.inf)).softmax(-1)
    moved = values[:, :, None, None] - (shares @ values[:, :, None])[..., None, :]
    errors = (shares.square() * moved.square().sum(-1)).mean((2, 3))
    root, share = row_worth(readers, keys, values, 1 / 3, hidden, neighbours=1)
    assert_close(root, errors.sqrt(), LIMIT, "roots of errors")
    assert_close(share, shares.mean((2, 3)), LIMIT, "shares")


@torch.no_grad()
def test_readers_ask_as_sharply_as_the_layer_has_learned():
    spec = memkit.load_policy(small("untrained-observed"), {"readout.temperatures": True, "merging": {"kind": "drop"}})
    spec = memkit.load_policy(spec, {"readout.bias": "none"})
    case = make_case(spec, 90)
    scale = case.learned["query_scale_window"]
    assert (scale - 1).abs().max() > 0.1
    plain = dataclasses.replace(case, learned={name: torch.ones_like(each) for name, each in case.learned.items()})
    sharper = case.tensors | {"queries": case.tensors["queries"] * scale[:, None, None]}
    memory, wanted = (
        memkit.compress(spec, **tensors, parameters=one.parameters(), rotation=case.rotation)
        for one, tensors in ((case, case.tensors), (plain, sharper))
    )
    held = int(memory.held_rows[0])
    assert_close(memory.window.last(held)["evidence"], wanted.window.last(held)["evidence"], LIMIT, "evidence")
    assert_close(memory.sums, wanted.sums, LIMIT, "sums")


@torch.no_grad()
def test_autocast_changes_nothing():
    case = make_case(small("untrained-observed"), 90).to(torch.float32)
    expected = memkit.compress(case.spec, **case.tensors, rotation=case.rotation)
    with torch.autocast("cpu", torch.bfloat16):
        memory = memkit.compress(case.spec, **case.tensors, rotation=case.rotation)
    assert torch.equal(memory.counts, expected.counts)
    assert_close(memory.sums, expected.sums, tolerance(torch.float32), "sums")
