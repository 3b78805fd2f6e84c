"""Law 10, round trip."""

from __future__ import annotations

import tempfile
from pathlib import Path

from memkit import yaml12
from memkit.catalog import as_policy
from memkit.errors import MemoryStateError
from memkit.memory import Memory
from memkit.policy import Policy, PolicySpec
from memkit.testing.agreement import identical
from memkit.testing.cases import Case
from memkit.testing.law import Broken, law
from memkit.testing.laws.policy.comparing import compare, contents

__all__ = ["round_trip"]


@law("round trip", "policy")
def round_trip(policy: Policy, case: Case) -> None:
    """spec → YAML → spec is the identity; memory → file → memory is bitwise; another policy's memory is refused.

    A run is resumed, and an experiment repeated, from what was written.
    """
    policy = as_policy(policy)
    spec = policy.spec
    again = PolicySpec(**yaml12.load(spec.to_yaml(), "written"))
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
        if after[name].dtype != tensor.dtype:
            raise Broken(f"{name}, read again: {after[name].dtype}, before: {tensor.dtype}")
        identical(after[name], f"{name}, read again", tensor, "before", nan=True)
    if loaded.seen.tolist() != memory.seen.tolist():
        raise Broken(f"tokens seen, read again: {loaded.seen.tolist()}, before: {memory.seen.tolist()}")
    if loaded.cuts != memory.cuts:
        raise Broken(f"chunks, read again: {loaded.cuts}, before: {memory.cuts}")
    if cut < case.tokens:
        rest = inputs.part(cut, case.tokens)
        here, there = rest.attend(policy, memory=memory)[0], rest.attend(policy, memory=loaded)[0]
        compare(policy, case, inputs, {"output": there}, {"output": here}, None, "going on from the file: ")
