"""The ten laws of a policy, shipped or a user's.

Laws 1 and 3 hold to rounding given equal plans, so both sides are given one plan; that plans are equal is judged apart,
on data whose decisions have a margin.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.nn.functional import layer_norm, pad, scaled_dot_product_attention

from memkit.catalog import as_policy
from memkit.errors import MemoryStateError
from memkit.memory import Memory
from memkit.pieces.admission import NoveltySpec
from memkit.pieces.growth import LinearGrowthSpec, NoGrowthSpec
from memkit.pieces.merging import MeanSpec
from memkit.pieces.readout import LAYER_NORM_EPS, ReadoutSpec
from memkit.pieces.rotary import KeepSpec
from memkit.pieces.routing import NearestSpec
from memkit.pieces.window import BlockWindowSpec
from memkit.plan import Plan
from memkit.policy import Policy, PolicySpec
from memkit.testing.agreement import Results, agree, eps_of, show
from memkit.testing.cases import Case, Inputs, part_of_plan
from memkit.testing.law import Broken, law

__all__ = [
    "POLICY_LAWS",
    "budget",
    "causality",
    "conservation_in_memory",
    "determinism",
    "limits",
    "round_trip",
    "rows_are_strangers",
    "same_plan_same_answer",
    "sinks",
    "split_equals_whole",
]


@law("split = whole", "policy")
def split_equals_whole(policy: Policy, case: Case) -> None:
    """attend(a ++ b) = attend(a), then attend(b, memory), for every split.

    Outputs, the memory at the end and (where the case asks) gradients; one token at a time is a split, too, and rows
    may get out of step. A model is trained on whole texts and used one token at a time: where the two differ, it is
    used as something it never learned.
    """
    policy = as_policy(policy)
    inputs = case.inputs(policy)
    plan = inputs.plan(policy)
    if _has_margin(case):
        _same_plans(policy, case, inputs, plan)

    def whole(inputs: Inputs) -> tuple[Tensor, Memory]:
        return inputs.attend(policy, plan=plan)

    def parts(inputs: Inputs) -> tuple[Tensor, Memory]:
        outputs: list[list[Tensor]] = [[] for _ in case.lengths]
        memory = None
        for spans in case.pieces_of_rows():
            output, memory = inputs.parts(spans).attend(policy, memory=memory, plan=plan)
            for row, (start, stop) in enumerate(spans):
                outputs[row].append(output[row, :, : stop - start])
        assert memory is not None
        rows = [torch.cat(row, dim=1) for row in outputs]
        longest = inputs.keys.shape[2]
        return torch.stack([pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows]), memory

    def results(inputs: Inputs, way: Way = whole) -> Results:
        if _judges_gradients(policy, case, inputs):
            return _with_gradients(inputs, way)
        output, memory = way(inputs)
        return {"output": output, **contents(memory)}

    _compare(policy, case, inputs, results(inputs, parts), results(inputs), results)


def _same_plans(policy: Policy, case: Case, inputs: Inputs, plan: Plan) -> None:
    """The plans of the pieces, put together, are the plan of the whole."""
    memory = None
    slot, founded = torch.full_like(plan.slot, -1), torch.zeros_like(plan.founded)
    for spans in case.pieces_of_rows():
        part = inputs.parts(spans)
        now = part.plan(policy, memory=memory)
        for row in range(len(case.lengths)):
            first, many = int(now.begin[row]), int(now.length[row])
            slot[row, :, first : first + many] = now.slot[row, :, :many]
            founded[row, :, first : first + many] = now.founded[row, :, :many]
        memory = part.attend(policy, memory=memory)[1]
    _equal_plans("plan of the pieces", (slot, founded), "of the whole", (plan.slot, plan.founded))


@law("causality", "policy")
def causality(policy: Policy, case: Case) -> None:
    """Output t depends on tokens ≤ t alone.

    ∂output[t] / ∂token[s] = 0 for s > t: other tokens after t change neither outputs up to t nor the plan of the chunks
    that have left by then. A model that sees what it must predict looks wonderful in training and fails afterwards.
    """
    policy = as_policy(policy)
    inputs = case.inputs(policy)
    cut = case.tokens // 2 or 1
    other = dataclasses.replace(case, seed=case.seed + 1000).inputs(policy)

    def changed(name: str, tensor: Tensor) -> Tensor:
        later = other.leaves.get(name)
        if later is None or tensor.ndim < 3:
            return tensor
        return torch.cat((tensor[:, :, :cut], later[:, :, cut:] * (1 if name == "weights" else 3)), dim=2)

    plan, plan_changed = inputs.plan(policy), inputs.mapped(changed).plan(policy)
    for row, length in enumerate(case.lengths):
        known = _left(policy, min(cut, length)) if length else 0
        _equal_plans(
            f"plan of row {row} after other tokens follow",
            (plan_changed.slot[row, :, :known], plan_changed.founded[row, :, :known]),
            "before",
            (plan.slot[row, :, :known], plan.founded[row, :, :known]),
        )
    output, changed_output = inputs.attend(policy)[0][:, :, :cut], inputs.mapped(changed).attend(policy)[0][:, :, :cut]
    _compare(policy, case, inputs, {"output": changed_output}, {"output": output}, None)


@law("rows are strangers", "policy")
def rows_are_strangers(policy: Policy, case: Case) -> None:
    """A row's result does not depend on its neighbours in the batch, their lengths, padding, or other heads.

    attend(batch)[row] = attend(row alone), for each row and each key/value head; a NaN in one row stays there; whatever
    stands in padding changes nothing. Else the same text gets another answer in another batch.
    """
    policy = as_policy(policy)
    inputs = case.inputs(policy)
    plan = inputs.plan(policy)
    output, memory = inputs.attend(policy, plan=plan)
    for row, length in enumerate(case.lengths):
        alone, rows = inputs.row(row), slice(row, row + 1)
        for heads in (slice(None), *(slice(g, g + 1) for g in range(case.kv_heads) if case.kv_heads > 1)):
            one = alone if heads.start is None else alone.head(heads.start)
            queries = slice(None) if heads.start is None else slice(heads.start * case.group, heads.stop * case.group)
            mine = part_of_plan(plan, rows=rows, heads=heads)
            if _has_margin(case):
                own, length_left = one.plan(policy), int(plan.length[row])
                _equal_plans(
                    f"plan of row {row} alone",
                    (own.slot[0], own.founded[0]),
                    "in the batch",
                    (mine.slot[0, :, :length_left], mine.founded[0, :, :length_left]),
                )

            def results(inputs: Inputs, mine: Plan = mine) -> Results:
                output, memory = inputs.attend(policy, plan=mine)
                return {"output": output, **contents(memory)}

            in_batch = {"output": output[rows, queries, :length]}
            in_batch |= {
                name: tensor[heads] if tensor.ndim > 1 else tensor for name, tensor in contents(memory, row).items()
            }
            _compare(policy, case, one, in_batch, results(one), results, f"row {row}: ")
    _nothing_leaks(policy, case, inputs)


def _nothing_leaks(policy: Policy, case: Case, inputs: Inputs) -> None:
    """NaN in padding and in the last row change no other row."""
    output = inputs.attend(policy)[0]
    valid = torch.arange(case.tokens) < inputs.lengths[:, None]

    def poisoned(name: str, tensor: Tensor) -> Tensor:
        if name == "weights" or tensor.ndim < 4:
            return tensor
        return tensor.masked_fill(~valid[:, None, :, None], torch.nan)

    padded = inputs.mapped(poisoned).attend(policy)[0]
    if not torch.equal(padded, output):
        raise Broken(f"outputs with NaN in the padding:\n{show(padded)}\nwith numbers in it:\n{show(output)}")
    if len(case.lengths) > 1:
        ill = inputs.mapped(
            lambda name, t: t if t.ndim < 4 else torch.cat((t[:-1], torch.full_like(t[-1:], torch.nan)))
        )
        found = ill.attend(policy)[0][:-1]
        if not torch.equal(found, output[:-1]):
            raise Broken(f"outputs beside a row of NaN:\n{show(found)}\nbeside a row of numbers:\n{show(output[:-1])}")


@law("budget", "policy")
def budget(policy: Policy, case: Case) -> None:
    """slots ≤ max(budget, C if the first chunk founds whole), and room for slots ≤ 2 × that + one chunk.

    m ← m + min(C, max(0, min(max(S, budget(n)), b + C) − m)) as the chunk at b leaves, so slots never shrink either.
    A memory that outgrows its budget fails at the length where it was needed.
    """
    policy = as_policy(policy)
    inputs = case.inputs(policy)
    memory = None
    for start, stop in case.cuts():
        memory = inputs.part(start, stop).attend(policy, memory=memory)[1]
        for row, seen in enumerate(memory.seen.tolist()):
            left = _left(policy, seen)
            allowed, most = _slots(policy, left)
            slots = int(memory.slots[row])
            if slots != allowed:
                raise Broken(
                    f"row {row} has {slots} slots after {seen} tokens, of which {left} left; granted {allowed}"
                )
            if slots > most:
                raise Broken(f"row {row} has {slots} slots after {seen} tokens; the budget is {most}")
            filled = memory.counts[row]
            if filled.shape[-1] and (bool((filled[:, :slots] < 1).any()) or bool((filled[:, slots:] != 0).any())):
                raise Broken(f"row {row}: {slots} slots hold these counts of tokens:\n{show(filled)}")
        room, bound = memory.sums.shape[2], 2 * max(_slots(policy, _left(policy, s))[1] for s in memory.seen.tolist())
        if room > bound + policy.chunk:
            raise Broken(f"room for {room} slots after {stop} tokens; the bound is {bound} + {policy.chunk}")


@law("conservation in memory", "policy", claim="conserves")
def conservation_in_memory(policy: Policy, case: Case) -> None:
    """Counts sum to the tokens absorbed and not dropped, masses to their weights, sums to Σ weight·key and ·value.

    Σ_i K_i = Σ_j w_j k̄_j over the tokens j that a slot took, and likewise V, mass and count. What is lost here, the
    model can never read again; what is counted twice drowns the rest.
    """
    policy = as_policy(policy)
    inputs = case.inputs(policy)
    plan = inputs.plan(policy)
    memory = inputs.attend(policy, plan=plan)[1]
    norm = None if inputs.parameters is None else inputs.parameters.key_norm
    for row, length in enumerate(case.lengths):
        left = _left(policy, length)
        left = left if not policy.exact_slots else min(left, policy.sinks)
        keys, values = inputs.keys[row, :, :left].double(), inputs.values[row, :, :left].double()
        taken = plan.slot[row, :, :left] >= 0
        founded = plan.founded[row, :, :left]
        if left and not bool((taken | (not policy.merging.joins)).all()):
            raise Broken(f"row {row}: every token joins, but these have no slot:\n{show(plan.slot[row, :, :left])}")
        for_keys, for_values, mass = _weights(policy, inputs, row, left, founded)
        if not policy.exact_slots:
            keys = _memory_keys(policy, inputs, row, keys, norm)
        expected = {
            "key_sum": _total(keys * for_keys.unsqueeze(-1), taken),
            "value_sum": _total(values * for_values.unsqueeze(-1), taken),
            "count": taken.double().sum(-1),
            "mass": (mass * taken).sum(-1),
        }
        slots = int(memory.slots[row])
        sums = memory.sums[row, :, :slots].double()
        got = {"key_sum": sums[..., : case.width].sum(1), "value_sum": sums[..., case.width :].sum(1)}
        got["count"] = memory.counts[row].double().sum(-1)
        if "mass" in policy.columns:
            got["mass"] = memory.scalar("mass")[row, :, :slots].sum(-1)
        scales = {
            "key_sum": _size(keys * for_keys.unsqueeze(-1)) * max(left, 1),
            "value_sum": _size(values * for_values.unsqueeze(-1)) * max(left, 1),
            "count": 0.0,
            "mass": _size(mass) * max(left, 1),
        }
        eps = (
            max(eps_of(inputs.keys.dtype), eps_of(torch.float32)) if case.dtype != "bfloat16" else eps_of(torch.float32)
        )
        agree(got, {name: expected[name] for name in got}, scales=scales, eps=eps, what=f"row {row}: ")


@law("sinks", "policy")
def sinks(policy: Policy, case: Case) -> None:
    """A sink's slot never changes: slot i < S is token i alone, for ever.

    The first tokens gather attention that has nowhere else to go (arXiv 2309.17453); once one of them is blurred, every
    later softmax shifts.
    """
    policy = as_policy(policy)
    inputs = case.inputs(policy)
    memory, before = None, None
    for start, stop in case.cuts():
        memory = inputs.part(start, stop).attend(policy, memory=memory)[1]
        now = contents(memory)
        for row, seen in enumerate(memory.seen.tolist()):
            there = min(policy.sinks, _left(policy, seen))
            counts = memory.counts[row, :, :there]
            if bool((counts != 1).any()):
                raise Broken(f"row {row}: its {there} sinks hold these counts of tokens after {seen}:\n{show(counts)}")
            if before is None:
                continue
            for name in (f"sums of row {row}", f"scalars of row {row}"):
                old = before[name][:, : policy.sinks]
                new = now[name][:, : min(policy.sinks, old.shape[1])]
                if not torch.equal(old, new):
                    raise Broken(f"{name}, sinks after {stop} tokens:\n{show(new)}\nbefore:\n{show(old)}")
        before = {name: tensor.clone() for name, tensor in now.items()}
    _sinks_hold_their_tokens(policy, inputs, memory)


def _sinks_hold_their_tokens(policy: Policy, inputs: Inputs, memory: Memory | None) -> None:
    if memory is None:
        return
    norm = None if inputs.parameters is None else inputs.parameters.key_norm
    for row, seen in enumerate(memory.seen.tolist()):
        there = min(policy.sinks, _left(policy, seen))
        founded = torch.ones(inputs.keys.shape[1], there, dtype=torch.bool)
        keys, values = inputs.keys[row, :, :there].double(), inputs.values[row, :, :there].double()
        for_keys, for_values, _ = _weights(policy, inputs, row, there, founded)
        if not policy.exact_slots:
            keys = _memory_keys(policy, inputs, row, keys, norm)
        expected = torch.cat((keys * for_keys.unsqueeze(-1), values * for_values.unsqueeze(-1)), dim=-1)
        eps = max(eps_of(inputs.keys.dtype), eps_of(torch.float32)) if inputs.keys.dtype.itemsize > 2 else 2.0**-23
        scale = {"sink": max(_size(expected), 1e-30)}
        agree(
            {"sink sums": memory.sums[row, :, :there]},
            {"sink sums": expected},
            scales=scale,
            eps=eps,
            what=f"row {row}: ",
        )


@law("limits", "policy")
def limits(policy: Policy, case: Case) -> None:
    """One slot per token is full attention; no slots is the window and the sinks.

    With growth `linear` 1.0, novelty, readout `mean`/`mean`, unweighted, rotary `keep` or `rerotate`, output = softmax
    over all tokens ≤ t. With growth `none`, over the first S and those that the window shows. These are the two ends
    of the space that every policy lies in, and the only ones with a closed form.
    """
    spec = as_policy(policy).spec
    if isinstance(spec.growth, NoGrowthSpec):
        full, window = spec.model_copy(update={"window": BlockWindowSpec(chunks=2)}), spec
    else:
        full, window = spec, spec.model_copy(update={"growth": NoGrowthSpec()})
    founds = full.routing.build().founds
    full = PolicySpec(
        chunker=full.chunker,
        window=full.window,
        sinks=full.sinks,
        growth=LinearGrowthSpec(fraction=1.0, counts=getattr(full.growth, "counts", "seen")),
        admission=full.admission if founds else NoveltySpec(),
        routing=full.routing if founds else NearestSpec(similarity=getattr(full.routing, "similarity", "dot")),
        merging=MeanSpec(),
        readout=ReadoutSpec(count_bias=full.readout.count_bias),
        rotary=full.rotary if full.rotary.kind == "rerotate" else KeepSpec(),
    )
    plain = dataclasses.replace(case, weights="none", learned=False, width=max(case.width, 2))
    for limit in (full.build(), window.build()):
        inputs = plain.inputs(limit)
        for rerun in (True, False):  # in one call, then in pieces
            outputs, memory = [], None
            for start, stop in [(0, plain.tokens)] if rerun else plain.cuts():
                output, memory = inputs.part(start, stop).attend(limit, memory=memory)
                outputs.append(output)

            def expected(inputs: Inputs, limit: Policy = limit) -> Results:
                return {"output": _masked_attention(limit, inputs)}

            what = f"{'full attention' if limit.growth is not None else 'window and sinks'}, "
            what += "one call: " if rerun else f"pieces of {plain.pieces}: "
            _compare(limit, plain, inputs, {"output": torch.cat(outputs, dim=2)}, expected(inputs), expected, what)


def _masked_attention(policy: Policy, inputs: Inputs) -> Tensor:
    """Softmax over what a policy without slots (or with one per token) shows, in float64."""
    tokens = inputs.keys.shape[2]
    position = torch.arange(tokens)
    seen = position[None, :] <= position[:, None]
    if policy.growth is None:
        begin = torch.tensor([int(policy.window.begin(p)) for p in range(tokens)])
        seen = seen & ((position[None, :] >= begin[:, None]) | (position < policy.sinks)[None, :])
    group = inputs.queries.shape[1] // inputs.keys.shape[1]
    keys, values = (tensor.double().repeat_interleave(group, 1) for tensor in (inputs.keys, inputs.values))
    output = scaled_dot_product_attention(inputs.queries.double(), keys, values, attn_mask=seen)
    valid = position < inputs.lengths[:, None]
    return output.masked_fill(~valid[:, None, :, None], 0)


@law("same plan, same answer", "policy")
def same_plan_same_answer(policy: Policy, case: Case) -> None:
    """Given a plan, every backend agrees with the reference: outputs, memory and gradients.

    On data whose decisions have a margin the reference, asked to decide itself, decides alike. The reference is written
    token by token from the definitions and shares nothing with the fast engine, so that one mistake is not made twice.
    """
    policy = as_policy(policy)
    inputs = case.inputs(policy)
    plan = inputs.plan(policy)

    def results(inputs: Inputs, backend: str = "reference", plan: Plan | None = plan) -> Results:
        def way(inputs: Inputs) -> tuple[Tensor, Memory]:
            return inputs.attend(policy, plan=plan, backend=backend)

        if _judges_gradients(policy, case, inputs):
            return _with_gradients(inputs, way)
        output, memory = way(inputs)
        return {"output": output, **contents(memory)}

    expected = results(inputs)
    _compare(policy, case, inputs, results(inputs, "torch"), expected, results)
    if _has_margin(case) and case.dtype == "float64":
        own = inputs.attend(policy, backend="reference")[1]
        if policy.columns and not torch.equal(own.counts, inputs.attend(policy)[1].counts):
            raise Broken(
                f"tokens per slot, as the reference decides:\n{show(own.counts)}\n"
                f"as the plan does:\n{show(inputs.attend(policy)[1].counts)}"
            )
        _compare(policy, case, inputs, results(inputs, "torch", None), expected, results, "each with its own plan: ")


@law("determinism", "policy")
def determinism(policy: Policy, case: Case) -> None:
    """Two runs are bitwise equal.

    attend(x) = attend(x), outputs, plan, memory and gradients. Else nobody can find a mistake a second time.
    """
    policy = as_policy(policy)
    runs: list[Results] = []
    for _ in range(2):
        inputs = case.inputs(policy)
        plan = inputs.plan(policy)
        output, memory = inputs.attend(policy)
        found = {"output": output, "plan's slots": plan.slot, "plan's founders": plan.founded, **contents(memory)}
        if _judges_gradients(policy, case, inputs):
            found |= _with_gradients(inputs, lambda inputs: inputs.attend(policy))
        runs.append(found)
    for name, first in runs[0].items():
        if not torch.equal(first, runs[1][name]) and not _both_nan(first, runs[1][name]):
            raise Broken(f"{name}, first run:\n{show(first)}\nsecond run:\n{show(runs[1][name])}")


@law("round trip", "policy")
def round_trip(policy: Policy, case: Case) -> None:
    """spec → YAML → spec is the identity; memory → file → memory is bitwise; another policy's memory is refused.

    A run is resumed, and an experiment repeated, from what was written.
    """
    policy = as_policy(policy)
    spec = policy.spec
    again = PolicySpec(**yaml.safe_load(spec.to_yaml()))
    if again != spec or hash(again) != hash(spec) or again.to_yaml() != spec.to_yaml():
        raise Broken(f"written and read again:\n{again.to_yaml()}\nbefore:\n{spec.to_yaml()}")
    inputs = case.inputs(policy)
    cut = max(case.tokens - 1, 1)
    memory = inputs.part(0, cut).attend(policy)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        memory.save(path)
        loaded = Memory.load(path, spec)
        other = spec.model_copy(update={"sinks": spec.sinks + 1})
        try:
            Memory.load(path, other)
        except MemoryStateError:
            pass
        else:
            raise Broken(f"the memory of\n{spec.to_yaml()}\nwas read as one of\n{other.to_yaml()}")
    before, after = contents(memory), contents(loaded)
    for name, tensor in before.items():
        if after[name].dtype != tensor.dtype or not (
            torch.equal(after[name], tensor) or _both_nan(after[name], tensor)
        ):
            raise Broken(f"{name}, read again:\n{show(after[name])}\nbefore:\n{show(tensor)}")
    if loaded.seen.tolist() != memory.seen.tolist():
        raise Broken(f"tokens seen, read again: {loaded.seen.tolist()}, before: {memory.seen.tolist()}")
    if cut < case.tokens:
        rest = inputs.part(cut, case.tokens)
        here, there = rest.attend(policy, memory=memory)[0], rest.attend(policy, memory=loaded)[0]
        _compare(policy, case, inputs, {"output": there}, {"output": here}, None, "going on from the file: ")


POLICY_LAWS = (
    split_equals_whole,
    causality,
    rows_are_strangers,
    budget,
    conservation_in_memory,
    sinks,
    limits,
    same_plan_same_answer,
    determinism,
    round_trip,
)
"""The ten, in their order."""


# What several laws need

Way = Callable[[Inputs], tuple[Tensor, Memory]]


def contents(memory: Memory, only: int | None = None) -> Results:
    """What a memory holds, row by row: sums and scalars of live slots, and the window.

    With `only`, that row's alone, named as the first.
    """
    found: Results = {}
    rows = range(len(memory.seen_rows)) if only is None else [only]
    for name_of_row, row in enumerate(rows):
        slots, held = int(memory.slots[row]), int(memory.held_rows[row])
        window = slice(memory.end - held, memory.end)
        tensors: dict[str, Tensor | None] = {
            "sums": memory.sums[row, :, :slots],
            "scalars": memory.scalars[row, :, :slots],
            "window_keys": memory.keys[row, :, window],
            "window_values": memory.values[row, :, window],
            "window_weights": None if memory.weights is None else memory.weights[row, :, window],
            "window_positions": None if memory.positions is None else memory.positions[row, window],
        }
        found |= {f"{name} of row {name_of_row}": tensor for name, tensor in tensors.items() if tensor is not None}
    return found


def _with_gradients(inputs: Inputs, way: Way) -> Results:
    """Outputs, and the gradients of a fixed random weighing of them."""
    leaves = inputs.differentiable()
    output = way(leaves)[0]
    generator = torch.Generator().manual_seed(1)
    weighing = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    if not output.requires_grad:
        return {"output": output.detach()}
    named = leaves.leaves
    found = torch.autograd.grad(output, list(named.values()), weighing, allow_unused=True)
    return {
        "output": output.detach(),
        **{
            f"gradient of {name}": torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(named.items(), found, strict=True)
        },
    }


def _compare(
    policy: Policy,
    case: Case,
    inputs: Inputs,
    got: Results,
    expected: Results,
    again: Callable[[Inputs], Results] | None,
    what: str = "",
) -> None:
    """Outputs, gradients and memories agree; `again`: inputs → results, the computation of `expected`."""
    keys, score = _key_and_score(policy, inputs)
    values, queries = _size(inputs.values), _size(inputs.queries)
    many = inputs.keys.shape[2] * (inputs.queries.shape[1] // max(inputs.keys.shape[1], 1))
    weight = 1.0 if inputs.weights is None else max(1.0, _size(inputs.weights))
    sums = many * weight * (max(keys, 1) if policy.merging.learned or not policy.weighted else max(keys, 1) ** 2)
    scales = {
        "output": (1 + score) * values,
        "gradient": (1 + score) * max(1.0, values) * max(1.0, queries, keys) * many,
        "sums": sums * max(keys, values),
        "scalars": sums * max(keys, values, inputs.keys.shape[2]),
    }
    eps = eps_of(inputs.keys.dtype)
    moved = None if again is None else (lambda change: again(inputs.mapped(change)))
    agree(got, expected, scales=scales, eps=eps, moved=moved, what=what)


def _key_and_score(policy: Policy, inputs: Inputs) -> tuple[float, float]:
    """Bounds of what a key and a score can be."""
    keys = max(_size(inputs.keys), 4 * inputs.keys.shape[-1] ** 0.5 if policy.readout.layer_norm else 0)
    return keys, _size(inputs.queries) * keys * inputs.keys.shape[-1] ** 0.5 * 2


def _judges_gradients(policy: Policy, case: Case, inputs: Inputs) -> bool:
    """Whether the case asks for gradients, and scores are small enough to have some.

    Scores near 1/eps have no digit left behind the point: a softmax over them is a guess, its gradient more so.
    """
    return case.gradients and _key_and_score(policy, inputs)[1] * eps_of(inputs.keys.dtype) < 1


def _has_margin(case: Case) -> bool:
    """Whether no two decisions are so close that rounding decides."""
    return case.keys == "normal" and case.width > 2 and case.dtype != "bfloat16"


def _equal_plans(what: str, got: tuple[Tensor, Tensor], other: str, expected: tuple[Tensor, Tensor]) -> None:
    for name, mine, right in zip(("slots", "founders"), got, expected, strict=True):
        if not torch.equal(mine, right):
            raise Broken(f"{name} in the {what}:\n{show(mine)}\n{other}:\n{show(right)}")


def _left(policy: Policy, seen: int) -> int:
    """Tokens that have left the window of a row that has seen so many."""
    return int(policy.window.begin(seen - 1)) if seen > 0 else 0


def _slots(policy: Policy, left: int) -> tuple[int, int]:
    """Slots once `left` tokens have left, and the most that the budget allows, from the definition."""
    if policy.growth is None:
        return min(policy.sinks, left), policy.sinks
    growth, size = policy.growth.spec, policy.chunk
    slots = most = 0
    for begin in range(0, left, size):
        seen = begin + (policy.window.capacity or 0)
        allowed = policy.growth.budget(seen if growth.counts == "seen" else begin + size)
        allowed = min(max(policy.sinks, allowed), begin + size)
        whole = begin == 0 and growth.first_chunk == "whole"
        slots += size if whole else min(size, max(0, allowed - slots))
        most = max(most, allowed, size if growth.first_chunk == "whole" else 0)
    return slots, most


def _weights(policy: Policy, inputs: Inputs, row: int, tokens: int, founded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of a row's first tokens in key sum, value sum and mass, from the definition; each [g, tokens]."""
    ones = torch.ones(founded.shape, dtype=torch.float64)
    keys = inputs.keys[row : row + 1, :, :tokens]
    learned = None if inputs.weights is None else inputs.weights[row : row + 1, :, :tokens]
    if policy.exact_slots or tokens == 0:
        return ones, ones, ones
    if learned is None and policy.merging.learned:
        learned = torch.ones(keys.shape[:3], dtype=keys.dtype)
    found = policy.merging.weight(keys, learned)
    if found is None:
        return ones, ones, ones
    weighs = policy.merging.weighs
    first = torch.arange(tokens) < policy.chunk
    counts = ~founded | torch.where(first, weighs.first_chunk, weighs.founders)
    weight = torch.where(counts, found[0].double(), ones)
    for_keys, for_values = weight if weighs.keys else ones, weight if weighs.values else ones
    return for_keys, for_values, weight if weighs.keys or weighs.values else ones


def _memory_keys(policy: Policy, inputs: Inputs, row: int, keys: Tensor, norm: tuple[Tensor, Tensor] | None) -> Tensor:
    """Memory keys [g, n, d] of a row's first n tokens: after the rotary treatment, then the LayerNorm."""
    positions = None
    if inputs.rotation is not None:
        given = inputs.rotation.positions
        positions = torch.arange(keys.shape[1]).double() if given is None else given[row, : keys.shape[1]]
        positions = positions[None, None]
    keys = policy.rotary.memory_keys(keys[None], inputs.rotation, positions)[0]
    if policy.readout.layer_norm:
        weight, bias = (None, None) if norm is None else (part.detach().double() for part in norm)
        keys = layer_norm(keys, keys.shape[-1:], weight, bias, LAYER_NORM_EPS)
    return keys


def _total(vectors: Tensor, taken: Tensor) -> Tensor:
    return (vectors * taken.unsqueeze(-1)).sum(1)


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def _both_nan(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())
