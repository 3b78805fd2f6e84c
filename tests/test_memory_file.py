"""A memory's file: what is damaged is refused, whatever is damaged."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import memkit
from memkit import Memory, MemoryStateError, Rotation

SPEC = memkit.load_policy("untrained-kvm-sqrt", {"chunker.size": 4, "growth.floor": 5, "growth.factor": 1})
ROTATION = Rotation("adjacent", 2, torch.ones(1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    keys = torch.arange(80.0).reshape(2, 1, 20, 2) % 7
    with torch.no_grad():
        _, memory = memkit.attend(SPEC, keys, keys, keys, rotation=ROTATION, lengths=[20, 17])
    memory.save(tmp_path / "memory.safetensors")
    return tmp_path / "memory.safetensors"


def parts(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(str(path), "pt") as file:
        return json.loads(file.metadata()["memkit"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def put_together(path: Path, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, str(path), metadata={"memkit": json.dumps(facts)})


def refused(path: Path) -> str:
    with pytest.raises(MemoryStateError) as refusal:
        Memory.load(path)
    said = str(refusal.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    return said.removeprefix(f"{path}: ")


def test_every_flipped_byte_is_noticed(path: Path):
    whole = path.read_bytes()
    rng = random.Random(0)
    for place in [*range(8), *rng.sample(range(8, len(whole)), 300)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            Memory.load(path)
        except MemoryStateError:
            continue
        # Blanks between the header and the tensors, and the order of JSON's members, say nothing.
        path.write_bytes(whole)
        before = parts(path)
        path.write_bytes(damaged)
        after = parts(path)
        assert before[0] == after[0]
        assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


def test_a_file_cut_short_is_refused(path: Path):
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert refused(path).startswith("cannot be read as a memory: ")


@pytest.mark.parametrize("name", ["keys", "values", "sums", "numbers", "seen", "positions", "next_positions"])
def test_a_file_without_one_of_its_tensors_is_refused(path: Path, name: str):
    facts, tensors = parts(path)
    del tensors[name]
    put_together(path, facts, tensors)
    assert refused(path) == "damaged: its checksum is not that of what it holds; save the memory again"
    del facts["checksum"]
    put_together(path, facts, tensors)
    assert refused(path).startswith("damaged: ")
    assert name in refused(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(keys=t["keys"].long()), "damaged: keys must be float32, float64, bfloat16 or float16"),
        (lambda t: t.update(keys=t["keys"][0]), "damaged: keys must have 4 axes, got (1, 17, 2)"),
        (lambda t: t.update(keys=t["keys"][:, :0]), "damaged: keys must have a row, a head and a channel at least"),
        (lambda t: t.update(values=t["values"].double()), "damaged: values must be torch.float32"),
        (lambda t: t.update(values=t["values"][..., :0]), "damaged: sums must be torch.float32 (2, 1, "),
        (lambda t: t.update(sums=t["sums"][..., :3]), "damaged: sums must be torch.float32 (2, 1, "),
        (lambda t: t.update(sums=t["sums"].half()), "damaged: sums must be torch.float32 (2, 1, "),
        (lambda t: t.update(numbers=t["numbers"].float()), "damaged: numbers must be torch.float64"),
        (lambda t: t.update(numbers=t["numbers"][..., :1]), "damaged: numbers must be torch.float64"),
        (lambda t: t.update(positions=t["positions"][:1]), "damaged: positions must be torch.float64 (2, "),
        (lambda t: t.update(weights=t["keys"][..., 0]), "damaged: its tensors must be keys, next_positions, numbers"),
        (lambda t: t.update(seen=t["seen"].int()), "damaged: seen must be torch.int64 (2,), got torch.int32 (2,)"),
        (lambda t: t.update(seen=t["seen"][:1]), "damaged: seen must be torch.int64 (2,), got torch.int64 (1,)"),
        (lambda t: t.update(seen=-t["seen"]), "damaged: seen must lie between 0 and "),
        (lambda t: t.update(seen=t["seen"] + 2**60), "damaged: seen must lie between 0 and "),
        (lambda t: t.update(seen=t["seen"] + 4000), "damaged: after 4020 tokens there must be room for "),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_policy_are_refused(path: Path, change: Any, message: str):
    facts, tensors = parts(path)
    del facts["checksum"]
    change(tensors)
    put_together(path, facts, {name: tensor.contiguous() for name, tensor in tensors.items()})
    assert refused(path).startswith(message)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"end": 2}, "damaged: a window of 16 tokens must end at or after column 16, got end 2"),
        ({"end": 10**9}, "damaged: end must be a whole number up to the window's room, "),
        ({"end": "4"}, "damaged: end must be a whole number up to the window's room, "),
        ({"end": True}, "damaged: end must be a whole number up to the window's room, "),
        ({"policy": "sinks: -1"}, "its policy: sinks: must be greater than or equal to 0, got -1"),
        ({"policy": "sinks: 1\nsinks: 2"}, "its policy: the file: sinks: line 2: is given twice"),
        ({"policy": "window: {kind: all}"}, "damaged: "),
        ({"policy": "- 1"}, "its policy: must be a mapping of families, got [1]"),
        ({"policy": 3}, "its policy: must be YAML and its name text or null, got 3 and "),
        ({"name": []}, "its policy: must be YAML and its name text or null"),
        ({"format": "memkit-memory-0"}, "not a memory saved by memkit (no format memkit-memory-2)"),
    ],
)
def test_facts_that_do_not_fit_are_refused(path: Path, facts: dict[str, Any], message: str):
    before, tensors = parts(path)
    del before["checksum"]
    put_together(path, before | facts, tensors)
    assert refused(path).startswith(message)


def test_a_file_of_before_there_was_a_checksum_loads(path: Path):
    facts, tensors = parts(path)
    del facts["checksum"]
    put_together(path, facts, tensors)
    assert Memory.load(path, SPEC).seen.tolist() == [20, 17]


def test_other_files_are_no_memories(tmp_path: Path):
    assert refused(tmp_path / "nowhere").startswith("cannot be read as a memory: ")
    assert refused(tmp_path).startswith("cannot be read as a memory: ")
    save_file({"x": torch.ones(1)}, str(tmp_path / "x"))
    assert refused(tmp_path / "x").startswith("not a memory saved by memkit")
    save_file({"x": torch.ones(1)}, str(tmp_path / "x"), metadata={"memkit": "[" * 100_000})
    assert refused(tmp_path / "x").startswith("cannot be read as a memory: ")
    with pytest.raises(MemoryStateError, match="path must be a file's, got 3"):
        Memory.load(3)


def test_a_memory_is_not_saved_where_there_is_no_folder(path: Path, tmp_path: Path):
    memory = Memory.load(path)
    with pytest.raises(MemoryStateError, match=re.escape(f"there is no folder {tmp_path / 'no'}; make it first")):
        memory.save(tmp_path / "no" / "memory")
    with pytest.raises(MemoryStateError, match="cannot be written: "):
        memory.save(tmp_path)
    with pytest.raises(MemoryStateError, match="path must be a file's, got None"):
        memory.save(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", memkit.policy_names())
def test_every_shipped_policys_memory_is_taken(name: str, backend: Any, dtype: torch.dtype, tmp_path: Path):
    spec = memkit.load_policy(name)
    changes = {"window.size": 3} if spec.window.kind == "sliding" else {"chunker.size": 8}
    spec = memkit.load_policy(name, changes)
    rotation = ROTATION if spec.build().needs_rotation else None
    for tokens in (0, 5, 40):
        keys = (torch.arange(4.0 * tokens).reshape(2, 1, tokens, 2) % 7).to(dtype)
        with torch.no_grad():
            _, memory = memkit.attend(spec, keys, keys, keys, rotation=rotation, backend=backend)
        memory.save(tmp_path / "memory")
        again = Memory.load(tmp_path / "memory", spec)
        assert again.seen.tolist() == memory.seen.tolist()
        assert torch.equal(again.keys, memory.keys)
        assert torch.equal(again.sums, memory.sums)
