"""Fuzzing what people type and pass: is every bad input refused as it should be, and nothing run?

    python tools/fuzz.py                          # every surface, 100,000 inputs each
    python tools/fuzz.py memory --count 5000      # one surface
    python tools/fuzz.py memory --seed 17         # one input again, and where it goes wrong

An input is a function of its surface and its seed. It is in order where memkit takes it or raises a `MemkitError` (on
the command line: exit code 0, or 2 with one line on standard error), in a few seconds, without importing, running or
writing anything. Whatever else happens is a finding. tests/test_fuzz.py tries a sample of the same inputs.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import string
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
import yaml
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import memkit
from memkit import MemkitError, Memory, MemoryAttention, PolicySpec, Rotation, yaml12
from memkit.catalog import policies_folder
from memkit.cli import app
from memkit.commands.options import parse_overrides
from memkit.lm.catalog import load_model_spec, models_folder
from memkit.lm.model import MemoryLM
from memkit.parameters import PolicyParameters
from memkit.pieces.registry import kinds
from memkit.testing.specs import FAMILIES

SECONDS = 10
"""Of a processor's time: the longest that an input may take."""
MOST_BYTES = 16 << 30
"""Address space of `make fuzz`: an input that makes memkit take more than that is a finding."""
SLICE = 1000
"""Inputs that a process takes at once."""
MOST_SAID = 3000
"""Characters of the longest message that is still one somebody reads."""

Random = random.Random


@dataclass(frozen=True)
class Surface:
    """Where input comes in. draw: an input; use: gives it to memkit, in a folder of its own."""

    draw: Callable[[Random], Any]
    use: Callable[[Any, Path], None]


# Text


AWKWARD_TEXT = (
    "", "~", "null", "true", "no", "on", "0", "-0", "-1", "1", "2", "3", "010", "0o17", "0x1F", "1:30", "1_000", "1e-3",
    "1.0e+308", "1e999", "-1e999", ".inf", "-.inf", ".nan", "1.5", "5e-324", "1e-40", "9" * 20, "9" * 500,
    str(2**31), str(2**40), str(2**53), str(2**63), str(2**64), "1e12", "[]", "{}", "[1, 2]", "{kind: none}",
    "{kind: fixed, slots: 3}", "{a: {b: {c: 1}}}", "'on'", '"\\0"', '"\\ud800"', "!!python/object/apply:os.getcwd []",
    "!!python/name:os.system", "!!binary aGk=", "!!str 5", "!!set {a}", "!mine 3",
    "2020-01-01", "<<: {sinks: 1}", "&a 1", "*a", "&a [*a]",
    "[" * 40, "{a: " * 40, "[" * 3000, "- " * 50, "? [1]\n: 2", "@", "`", "%", "\t", "|\n x", ">-\n x", "# note", "---",
    "...", "é", "\u2028", "\ufeff", "\x00", "\x07", "a: b: c", "self", "kind", "none", "full", "kvm-sqrt-16",
    "/etc/passwd", "../x.yaml", "nowhere.yaml", "x" * 5000, "a.b.c", "..", "__class__", "__init__", "os:system",
)  # fmt: skip
NAMES = tuple(
    sorted({*FAMILIES, "sinks", "kind", "from", "size", "chunks", "factor", "floor", "cap", "slots", "layers"})
)


def text_value(rng: Random) -> str:
    """A value as somebody may write it."""
    if rng.random() < 0.6:
        return rng.choice(AWKWARD_TEXT)
    if rng.random() < 0.5:
        return str(rng.choice((-1, 1)) * rng.choice((rng.randrange(300), 2 ** rng.randrange(80), rng.random())))
    return "".join(rng.choice(string.printable) for _ in range(rng.randrange(12)))


def mutated(rng: Random, text: str) -> str:
    """A text with one to four mistakes in it."""
    for _ in range(rng.randrange(1, 5)):
        lines = text.splitlines() or [""]
        at = rng.randrange(len(lines))
        place = rng.randrange(len(text) + 1)
        words = [word for word in text.replace(",", " ").replace("}", " ").split() if word]
        kind = rng.randrange(9)
        if kind == 0:
            text = text[:place] + text_value(rng) + text[place:]
        elif kind == 1:
            text = text[:place] + text[place + rng.randrange(1, 9) :]
        elif kind == 2:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
            text = "\n".join(lines)
        elif kind == 3:
            lines[at] = rng.choice(NAMES) + ": " + text_value(rng)
            text = "\n".join(lines)
        elif kind == 4:
            del lines[at]
            text = "\n".join(lines)
        elif kind == 5 and words:
            text = text.replace(rng.choice(words), text_value(rng), 1)
        elif kind == 6 and words:
            text = text.replace(rng.choice(words), rng.choice(words), 1)
        elif kind == 7:
            lines[at] = " " * rng.randrange(6) + lines[at]
            text = "\n".join(lines)
        else:
            text = text[:place] + chr(rng.choice((rng.randrange(128), rng.randrange(0xD7FF)))) + text[place + 1 :]
    return text


@functools.cache
def shipped(folder: Path) -> tuple[str, ...]:
    """The texts of the shipped files."""
    return tuple(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.yaml")))


def value(rng: Random, deep: int = 0) -> Any:
    """Plain data: mostly numbers."""
    roll = rng.random()
    if roll < 0.35:
        return rng.choice(
            (0, 1, 2, 3, 4, 8, 16, 64, -1, 10**20, 2**40, 2**40 + 1, 2**63, 10**400, rng.randrange(10**6))
        )
    if roll < 0.6:
        return rng.choice(
            (0.0, 0.5, 1.0, 1.5, -1.0, 1e-40, 5e-324, 1e308, 1e12, float("inf"), float("nan"), rng.random())
        )
    if roll < 0.8:
        return rng.choice((None, True, False, "", "x", "on", "1e-3", "none", "full", "learned", "l2", "\ud800", "a\nb"))
    if deep > 2:
        return []
    if roll < 0.9:
        return [value(rng, deep + 1) for _ in range(rng.randrange(3))]
    return {rng.choice(NAMES): value(rng, deep + 1) for _ in range(rng.randrange(3))}


def family(rng: Random, name: str) -> Any:
    """A family's fields, most of them as they should be."""
    if name == "readout" or rng.random() < 0.05:
        return {rng.choice(("key", "value", "count_bias", "x")): value(rng) for _ in range(rng.randrange(3))}
    kind, spec = rng.choice(sorted(kinds(name).items()))
    found: dict[str, Any] = {"kind": kind}
    for field, info in spec.model_fields.items():
        if field != "kind" and (info.is_required() or rng.random() < 0.3) and rng.random() < 0.95:
            plain = rng.choice((0.5, 1.0)) if info.annotation is float else rng.choice((1, 2, 3, 4, 8))
            found[field] = plain if rng.random() < 0.7 else value(rng)
    return found


def grown(rng: Random) -> dict[str, Any]:
    """A policy put together from the families' kinds."""
    found: dict[str, Any] = {"window": {"kind": "block", "chunks": 1}, "chunker": {"kind": "fixed", "size": 4}}
    for name in FAMILIES:
        if rng.random() < 0.4:
            found[name] = family(rng, name)
    if rng.random() < 0.4:
        found["sinks"] = value(rng) if rng.random() < 0.5 else rng.randrange(5)
    if rng.random() < 0.1:
        found[rng.choice((*NAMES, "self", "model_config", "__init__"))] = value(rng)
    return found


def written(data: Any) -> str:
    """Plain data as YAML 1.1 writes it, whatever it holds."""
    return yaml.safe_dump(data, sort_keys=False)


# Surfaces that read text


def draw_policy_file(rng: Random) -> str:
    """A policy's YAML: a shipped one with mistakes, or families thrown together."""
    if rng.random() < 0.4:
        text = written(grown(rng))
        return mutated(rng, text) if rng.random() < 0.2 else text
    return mutated(rng, rng.choice(shipped(policies_folder())))


def use_policy_file(text: str, folder: Path) -> None:
    """Load it; a policy that loads can be written, read, and asked."""
    spec = memkit.load_policy(put(folder / "policy.yaml", text))
    again = PolicySpec(**yaml12.load(spec.to_yaml(), "again"))
    assert again == spec, "written and read again it is another policy"
    policy = spec.build()
    for tokens in (1, 5, 300):
        policy.slots_after(tokens)
    try_out(spec)


def try_out(spec: PolicySpec) -> None:
    """A few tokens under a policy."""
    policy = spec.build()
    if policy.needs_rotation:
        return
    keys = torch.ones(1, 1, 6, 2)
    with torch.no_grad():
        memkit.attend(spec, keys, keys, keys)


def draw_model_file(rng: Random) -> str:
    """A model's YAML: a shipped one with mistakes, or sizes thrown together."""
    if rng.random() < 0.3:
        mixers: list[Any] = [{"kind": "attention", "policy": rng.choice(("full", "kvm-sqrt-16", value(rng)))}]
        mixers += [{"kind": "rwkv7"}, {"kind": "attention", "policy": {"from": "ovq-1024", "chunker.size": value(rng)}}]
        sizes: dict[str, Any] = {"vocabulary": 8, "width": 16, "depth": 2, "heads": 2}
        sizes |= {name: value(rng) for name in sizes if rng.random() < 0.15}
        more = ("kv_heads", "head_width", "residual_scale", "rotary", "mlp", "rounding", "layers", "self")
        sizes |= {name: value(rng) for name in more if rng.random() < 0.08}
        layers: dict[str, Any] = {"default": rng.choice(mixers)}
        if rng.random() < 0.5:
            layers["overrides"] = [{rng.choice(("every", "at", "first")): value(rng), "mixer": rng.choice(mixers)}]
        return written({"layers": layers, **sizes})
    return mutated(rng, rng.choice(shipped(models_folder())))


def use_model_file(text: str, folder: Path) -> None:
    """Load it; a small model can be made, written and read again."""
    path = put(folder / "made.yaml", text)
    spec = load_model_spec(path)
    assert load_model_spec(put(folder / "again.yaml", spec.to_yaml())) == spec, "written and read again it is another"
    small = (
        spec.width <= 64 and spec.depth <= 4 and spec.vocabulary <= 512 and spec.heads * (spec.head_width or 1) <= 256
    )
    if small and spec.mlp.expansion <= 8 and len(text) % 8 == 0:
        made = memkit.load_model(path)
        made.generate([[0]], max_new_tokens=2)


def draw_set(rng: Random) -> tuple[str, list[str]]:
    """A policy or a model, and what --set may be given."""
    fields = (
        "growth.factor", "growth.slots", "growth", "growth.kind", "growth.floor", "window", "window.size",
        "window.kind", "window.chunks", "sinks", "chunker.size", "readout.key", "merging.weigh.keys", "routing.least",
        "width", "depth",
        "layers.default.policy", "layers.overrides", "mlp.expansion", "rotary.theta", "rotary.width", "kind", "", ".",
        "a..b", "self", "growth.kind.kind", "sinks.x",
    )  # fmt: skip
    changes = [rng.choice(fields) + rng.choice(("=", "=", "=", "=", "", ":")) + text_value(rng)
               for _ in range(rng.randrange(1, 4))]  # fmt: skip
    if rng.random() < 0.2:
        changes = [mutated(rng, change) for change in changes]
    return rng.choice(("kvm-sqrt-16", "full", "window-512", "untrained-kvm-log", "tiny-kvm-sqrt", "tiny-full")), changes


def use_set(given: tuple[str, list[str]], folder: Path) -> None:
    """As the command line reads it."""
    name, changes = given
    if name.startswith("tiny"):
        load_model_spec(name, parse_overrides(changes))
    else:
        memkit.load_policy(name, parse_overrides(changes)).build().slots_after(300)


def draw_command(rng: Random) -> list[str]:
    """A command with awkward options. What would take long where nothing is wrong gets something wrong for certain."""
    options = {
        "list": (), "show": ("--set",), "schema": (), "check": ("--examples", "--set"),
        "cost": ("--tokens", "--heads", "--kv-heads", "--head-width", "--value-width", "--dtype", "--layers", "--rows",
                 "--set"),
        "compare": ("--tokens", "--skip", "--set", "--model", "--text", "--json"),
        "bench": ("--tokens", "--heads", "--kv-heads", "--head-width", "--rows", "--repeats", "--mode", "--set"),
        "generate": ("--prompt-ids", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--stop-ids", "--seed"),
        "import-kvm": ("--bf16-rounding",), "": ("--version", "--help"), "frobnicate": (),
    }  # fmt: skip
    command = rng.choice(tuple(options))
    subject = rng.choice(("full", "kvm-sqrt-16", "tiny-ovq", *AWKWARD_TEXT))
    words = [command, subject if ":" not in subject else "full"] if command else []
    for option in options[command]:
        if rng.random() < 0.5:
            given = f"{rng.choice(NAMES)}={text_value(rng)}" if option == "--set" else text_value(rng)
            words += [option, given]
    if command in ("compare", "bench", "check") or (command in ("show", "list", "cost") and rng.random() < 0.98):
        words += rng.choice(
            (["--set", "sinks=many"], ["--set", "x"], ["--frobnicate"], ["--tokens", "x"], ["--set", "a=["])
        )
    if command == "generate" and rng.random() < 0.9:
        words += ["--max-new-tokens", rng.choice(("0", "2", "-1", "x"))]
    elif command == "generate":
        words += ["--max-new-tokens", "1"]
    return words


@functools.cache
def command_line() -> Any:
    """memkit's commands. Typer puts them together anew for every call otherwise, and evaluates annotations for it."""
    return typer.main.get_command(app)


def run_command(words: list[str]) -> tuple[Any, str, str]:
    """Exit code, standard output and standard error of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command_line().main(words, prog_name="memkit")
        except SystemExit as stop:
            code = stop.code
    return code or 0, out.getvalue(), err.getvalue()


def use_command(words: list[str], folder: Path) -> None:
    """Exit code 0, or 2 and one line."""
    code, out, err = run_command(words)
    assert code in (0, 2), f"exit code {code}"
    if code == 2 and words:
        assert err.count("\n") == 1, f"{err.count(chr(10))} lines: {err[:500]}"
        assert not out, "something on standard output"
        assert len(err) < MOST_SAID, f"{len(err)} characters on standard error"


# Memory files


@functools.cache
def memories() -> tuple[bytes, ...]:
    """Files of memories under five policies that store different things."""
    small = {"chunker.size": 4, "growth.floor": 4}
    policies = [
        (memkit.load_policy("kvm-sqrt-16", {**small, "growth.factor": 2}), 1),
        (memkit.load_policy("untrained-kvm-sqrt", {**small, "growth.factor": 2}), 1),
        (memkit.load_policy("window-512", {"window.size": 4}), 1),
        (memkit.load_policy("streaming-4-512", {"window.size": 4}), 2),
        (memkit.load_policy("full"), 2),
    ]
    files: list[bytes] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for spec, rows in policies:
            keys = torch.arange(rows * 40.0).reshape(rows, 1, 20, 2) % 7
            _, memory = memkit.attend(spec, keys, keys, keys, rotation=rotation_for(spec))
            memory.save(Path(folder) / "memory")
            files.append((Path(folder) / "memory").read_bytes())
    return tuple(files)


def rotation_for(spec: PolicySpec) -> Rotation | None:
    """What `attend` needs to know of keys of two channels."""
    return Rotation("adjacent", 2, torch.ones(1)) if spec.build().needs_rotation else None


def draw_memory(rng: Random) -> bytes:
    """A memory's file with flipped bytes, or put together again from changed parts."""
    data = bytearray(rng.choice(memories()))
    if rng.random() < 0.4:
        head = int.from_bytes(data[:8], "little") + 8
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(head if rng.random() < 0.6 else len(data))
            data[place] ^= 1 << rng.randrange(8)
        return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts = json.loads(header["__metadata__"]["memkit"])
    tensors = load_tensors(bytes(data))
    if rng.random() < 0.95:
        facts.pop("checksum")
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(sorted(tensors))
        kind = rng.randrange(8)
        if kind == 0:
            tensors.pop(name, None)
        elif kind == 1:
            dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8)
            tensors[name] = tensors[name].to(rng.choice(dtypes))
        elif kind == 2:
            tensors[name] = tensors[name][..., : rng.randrange(3)].contiguous()
        elif kind == 3:
            tensors[name] = tensors[name].unsqueeze(0) if rng.random() < 0.5 else tensors[name].flatten()
        elif kind == 4:
            number = rng.choice((-1, 0, 1, 19, 21, 1000, 2**20, 2**31, 2**40, 2**62))
            tensors["seen"] = torch.full((rng.choice((1, 1, 2, 3)),), number, dtype=torch.long)
        elif kind == 5:
            facts[rng.choice(("end", "name", "format", "policy", "checksum"))] = value(rng)
        elif kind == 6:
            facts["end"] = rng.choice((0, 1, 4, 19, 20, 21, 64, 84, 2**40))
        else:
            facts["policy"] = mutated(rng, str(facts["policy"]))
        if not tensors:
            break
    with_surrogates = json.dumps(facts)
    return save_tensors(tensors, metadata={"memkit": with_surrogates})


def use_memory(data: bytes, folder: Path) -> None:
    """Load it; a memory that loads can be asked, gone on with and saved."""
    path = folder / "memory.safetensors"
    path.write_bytes(data)
    memory = Memory.load(path)
    _ = repr(memory), memory.slots, memory.counts, memory.bytes
    rows, heads, _, width = memory.keys.shape
    if rows * heads * width > 1000:
        return
    keys = torch.ones(rows, heads, 1, width, dtype=memory.keys.dtype)
    values = torch.ones(rows, heads, 1, memory.values.shape[-1], dtype=memory.keys.dtype)
    rotation = Rotation("adjacent", 2, torch.ones(1)) if memory.policy.needs_rotation else None
    with torch.no_grad():
        for _ in range(2):
            _, memory = memkit.attend(memory.policy, keys, keys, values, memory=memory, rotation=rotation)
    memory.save(path)


# Arguments


def odd(rng: Random) -> Any:
    """Anything that may be passed by mistake."""
    whole = torch.tensor([0, 1])
    makers: tuple[Callable[[], Any], ...] = (
        lambda: None, lambda: True, lambda: False, lambda: rng.choice((-1, 0, 1, 2, 3, 7)), lambda: 10**20,
        lambda: 10**5000, lambda: 2**63, lambda: -(2**70), lambda: rng.choice((0.0, -0.5, 1.5, 2.0, 1e-40, 5e-324)),
        lambda: rng.choice((float("nan"), float("inf"), float("-inf"), 1e308)), lambda: rng.choice(AWKWARD_TEXT),
        lambda: b"x", list, lambda: [1], lambda: [0, 1], lambda: [1, 0, 5], lambda: [1.0, 2.0],
        lambda: [True, False],
        lambda: [[1, 2], [3]], lambda: ["a"], lambda: (0, 1), lambda: range(2), lambda: {0, 1}, dict, object,
        lambda: {"growth.factor": value(rng)}, lambda: {1: 2}, lambda: whole, lambda: whole.bool(),
        lambda: whole.float(),
        lambda: whole.int(), lambda: whole.to("meta"), lambda: torch.tensor(1), lambda: torch.tensor(0.5),
        lambda: whole.to(torch.complex64), lambda: torch.zeros(0), lambda: torch.zeros(0, dtype=torch.long),
        lambda: torch.tensor([-1, 1]), lambda: torch.tensor([2**40, 0]), lambda: torch.ones(1, 1, 5, 2),
        lambda: torch.ones(2, 1, 5, 2), lambda: torch.ones(1, 2, 0, 2), lambda: torch.ones(2, 2, 5, 2).double(),
        lambda: torch.ones(2, 2, 5), lambda: -torch.ones(2, 2, 5), lambda: torch.full((2, 2, 5, 2), float("nan")),
        lambda: np.array([0, 1]), lambda: np.array([0.5, 1]), lambda: np.array([True, False]), lambda: np.int64(1),
        lambda: np.array(["a"]), lambda: np.float32(0.5), lambda: Path("nowhere.yaml"), lambda: Path("x" * 300),
        lambda: memkit.load_policy("full"), lambda: memkit.load_policy("full").build(), lambda: int, lambda: len,
        lambda: torch.ones(2, 2, 5, 2, requires_grad=True),
    )  # fmt: skip
    return rng.choice(makers)()


def with_odd_ones(rng: Random, right: dict[str, Any], more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Arguments of which one to three are something else; `more` are those that are usually left out."""
    given = dict(right)
    for _ in range(rng.randrange(1, 4)):
        given[rng.choice((*right, *more))] = odd(rng)
    return given


POLICIES = ("kvm-fixed-256", "untrained-kvm-sqrt", "block-mean-8", "streaming-4-512", "full", "ovq-1024")


@functools.cache
def small(name: str) -> PolicySpec:
    """A shipped policy over chunks of two tokens."""
    spec = memkit.load_policy(name)
    if spec.window.kind == "sliding":
        return memkit.load_policy(spec, {"window.size": 3})
    changes: dict[str, Any] = {"chunker.size": 2, "sinks": min(spec.sinks, 1)}
    return memkit.load_policy(spec, changes | ({"growth.fraction": 0.5} if spec.growth.kind == "linear" else {}))


def draw_call(rng: Random) -> dict[str, Any]:
    """Arguments of `attend`."""
    spec = small(rng.choice(POLICIES))
    tokens = rng.choice((0, 1, 5, 5))
    tensor = torch.arange(tokens * 8.0).reshape(2, 2, tokens, 2) % 5
    right = {"policy": spec, "queries": tensor, "keys": tensor, "values": tensor, "rotation": rotation_for(spec)}
    if rng.random() < 0.3 and tokens:
        earlier = torch.ones(2, 2, 3, 2)
        with torch.no_grad():
            for _ in range(rng.choice((1, 2))):
                right["memory"] = memkit.attend(
                    spec, earlier, earlier, earlier, rotation=right["rotation"], memory=right.get("memory")
                )[1]
    if rng.random() < 0.2:
        right["lengths"] = [min(tokens, 1), tokens]
    if rng.random() < 0.2:
        wanted = {name: each for name, each in right.items() if name not in ("queries", "values")}
        right["plan"] = changed_plan(rng, memkit.plan(**wanted))
    more = ("weights", "parameters", "rotation", "scale", "memory", "lengths", "plan", "backend")
    given = with_odd_ones(rng, right, more) if rng.random() < 0.9 else right
    if rng.random() < 0.05:
        given["rotation"] = ("rotation", odd(rng), odd(rng), odd(rng), odd(rng))
    return given


def changed_plan(rng: Random, plan: memkit.Plan) -> Any:
    """A plan, or what becomes of it where a field is something else (a function: making it may be refused)."""
    if rng.random() < 0.3:
        return plan
    name = rng.choice(("slot", "founded", "begin", "length", "slots"))
    if name == "slot" and rng.random() < 0.5:
        return dataclasses.replace(plan, slot=plan.slot + rng.choice((-2, -1, 1, 5, 2**40)))
    if name in ("begin", "length") and rng.random() < 0.5:
        array = getattr(plan, name) + rng.choice((-1, 1, 2**40, -(2**40)))
        return lambda: dataclasses.replace(plan, **{name: array})
    other = odd(rng)
    return lambda: dataclasses.replace(plan, **{name: other})


def made(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments, those made that may be refused when made."""
    done = {name: each() if type(each) is type(made) and name == "plan" and each is not len else each
            for name, each in given.items()}  # fmt: skip
    if isinstance(done.get("rotation"), tuple) and done["rotation"][0] == "rotation":
        done["rotation"] = Rotation(*done["rotation"][1:])
    return done


def use_attend(given: dict[str, Any], folder: Path) -> None:
    """Attend, with gradients where an argument wants them."""
    memkit.attend(**made(given))


def use_plan(given: dict[str, Any], folder: Path) -> None:
    """Plan with the same arguments, short of those that only `attend` has."""
    only = ("queries", "values", "scale", "plan", "backend")
    memkit.plan(**made({name: each for name, each in given.items() if name not in only}))


def draw_cost(rng: Random) -> dict[str, Any]:
    """Arguments of `cost`, seldom all right: that takes a while."""
    right: dict[str, Any] = {"policy": "window-512", "tokens": 100}
    more = ("heads", "kv_heads", "head_width", "value_width", "dtype", "layers", "rows", "tokens")
    given = with_odd_ones(rng, right, more)
    if rng.random() < 0.5:
        given["dtype"] = rng.choice(("int8", "", None, 5))
    return given


def use_cost(given: dict[str, Any], folder: Path) -> None:
    """Count, and write down."""
    found = memkit.cost(**given)
    for each in found if isinstance(found, list) else [found]:
        json.dumps(each.to_dict())


def draw_load(rng: Random) -> tuple[str, dict[str, Any]]:
    """Arguments of functions that load or make something."""
    kind = rng.choice(
        ("policy", "policy", "model", "memory", "rotation", "parameters", "layer", "spec", "reorder", "save")
    )
    right: dict[str, dict[str, Any]] = {
        "policy": {"policy": rng.choice(("kvm-sqrt-16", small("full"))), "overrides": {"growth.factor": value(rng)}},
        "model": {
            "model": "tiny-full",
            "overrides": {rng.choice(("width", "depth", "heads", "rotary.width")): value(rng)},
        },
        "memory": {"path": "nowhere", "policy": None},
        "rotation": {"pairing": "adjacent", "width": 4, "frequencies": torch.ones(2), "positions": None},
        "parameters": {"policy": small("kvm-fixed-256"), "heads": 2, "head_width": 4},
        "layer": {"policy": "full", "width": 8, "heads": 2},
        "spec": grown(rng),
        "reorder": {"rows": [0, 1]},
        "save": {"path": "no/such/folder"},
    }
    more = {"layer": ("kv_heads", "head_width", "value_width", "qk_norm", "rotary"), "model": ("seed",)}
    given = with_odd_ones(rng, right[kind], more.get(kind, ()))
    if kind in ("policy", "model") and rng.random() < 0.3:
        given["overrides"] = {rng.choice(("growth", "window.size", "a", "", "..", 5)): odd(rng)}
    return kind, given


@functools.cache
def remembered() -> tuple[Memory, Any]:
    """A memory of two rows, and a model's."""
    keys = torch.ones(2, 1, 9, 2)
    with torch.no_grad():
        memory = memkit.attend(small("kvm-fixed-256"), keys, keys, keys)[1]
        return memory, tiny()(torch.zeros(2, 5, dtype=torch.long))[1]


def use_load(given: tuple[str, dict[str, Any]], folder: Path) -> None:
    """Load or make it."""
    kind, arguments = given
    if kind == "model":
        load_model_spec(arguments["model"], arguments["overrides"])
        return
    if kind == "reorder":
        for memory in remembered():
            memory.reorder(**arguments)
        return
    if kind == "save":
        path = arguments["path"]
        remembered()[0].save(folder / str(path)[:300].lstrip("/.") if isinstance(path, (str, Path)) else path)
        return
    if kind in ("layer", "parameters"):
        sizes = [each for each in arguments.values() if isinstance(each, int) and not isinstance(each, bool)]
        with torch.device("meta") if max(sizes, default=0) > 1000 else torch.device("cpu"):
            (MemoryAttention if kind == "layer" else PolicyParameters)(**arguments)
        return
    makers: dict[str, Any] = {
        "policy": memkit.load_policy,
        "memory": Memory.load,
        "rotation": Rotation,
        "spec": PolicySpec,
    }
    makers[kind](**arguments)


@functools.cache
def tiny() -> MemoryLM:
    """A language model of two small layers."""
    sizes = {"vocabulary": 32, "width": 8, "depth": 2, "heads": 2, "rotary.width": 4, "layers.default.policy": "full"}
    return memkit.load_model("tiny-full", sizes)


def draw_generate(rng: Random) -> dict[str, Any]:
    """Arguments of `generate`, a call's and a loss's."""
    prompts = rng.choice(([[1, 2], [3]], torch.tensor([[1, 2, 3], [4, 5, 6]]), [[1]]))
    right: dict[str, Any] = {"prompts": prompts, "max_new_tokens": 2}
    more = ("mask", "lengths", "temperature", "top_k", "top_p", "stop_ids", "pad_id", "seed", "frobnicate")
    given = with_odd_ones(rng, right, more)
    limit = given["max_new_tokens"]
    if isinstance(limit, (int, np.integer)) and limit > 2:  # whoever asks for 10**20 tokens gets them, in time
        given["max_new_tokens"] = 2
    return given


def use_generate(given: dict[str, Any], folder: Path) -> None:
    """Generate; and read the prompts, where they are a tensor."""
    if isinstance(given["prompts"], torch.Tensor) or "lengths" in given:
        with torch.no_grad():
            tiny()(given["prompts"], lengths=given.get("lengths"))
            tiny().loss(given["prompts"], lengths=given.get("lengths"), documents=given.get("mask"))
    tiny().generate(**given)


SURFACES: dict[str, Surface] = {
    "policy": Surface(draw_policy_file, use_policy_file),
    "model": Surface(draw_model_file, use_model_file),
    "set": Surface(draw_set, use_set),
    "command": Surface(draw_command, use_command),
    "memory": Surface(draw_memory, use_memory),
    "attend": Surface(draw_call, use_attend),
    "plan": Surface(draw_call, use_plan),
    "cost": Surface(draw_cost, use_cost),
    "load": Surface(draw_load, use_load),
    "generate": Surface(draw_generate, use_generate),
}


# Verifying


class TooLong(BaseException):
    """An input that takes longer than it may. Nobody catches it by mistake."""


class Watch:
    """Notes what is imported, run or written while an input is in use (safetensors writes unseen, in Rust)."""

    RUNS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect", "os.remove",
            "os.rename", "os.mkdir", "os.rmdir", "shutil.rmtree", "exec")  # fmt: skip

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python's audit events, of which those count that an input must not cause."""
        if self.folder is None:
            return
        if event == "import" or event in self.RUNS:
            self.seen.append(f"{event} {arguments[0]!r}"[:200])
        elif event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2]:
            path = os.fsdecode(arguments[0])
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not path.startswith(self.folder):
                self.seen.append(f"open for writing {path}"[:200])

    @contextmanager
    def on(self, folder: Path) -> Iterator[list[str]]:
        """Watch for a while; writing is allowed in one folder."""
        self.seen, self.folder = [], str(folder)
        try:
            yield self.seen
        finally:
            self.folder = None


@functools.cache
def watch() -> Watch:
    """The one watch of this process: an audit hook cannot be taken out again."""
    return Watch()


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Raises `TooLong` in what takes longer."""

    def over(*_: Any) -> None:
        raise TooLong(f"longer than {seconds} s")

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # a processor's time: a busy machine changes no verdict
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def tried(name: str, seed: int, folder: Path) -> str | None:
    """What goes wrong with an input; None where nothing does."""
    surface, rng = SURFACES[name], Random(f"{name} {seed}")
    given = surface.draw(rng)
    with watch().on(folder) as seen:
        try:
            with no_longer_than(SECONDS):
                surface.use(given, folder)
        except MemkitError as error:
            if len(str(error)) > MOST_SAID:
                return f"a message of {len(str(error)):,} characters"
        except (Exception, TooLong) as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "memkit" in frame.filename]
            last = frames[-1] if frames else None
            where = f" in {Path(last.filename).name}:{last.lineno}" if last else ""
            return f"{type(error).__name__}: {str(error)[:200]}{where}"
    return f"it made memkit {', '.join(sorted(set(seen)))}" if seen else None


def warm_up(folder: Path) -> None:
    """Everything that loads when first used, before it is watched."""
    for name, surface in SURFACES.items():
        for seed in range(-40, 0):
            try:
                surface.use(surface.draw(Random(f"{name} {seed}")), folder)
            except Exception as error:  # whatever it is, the verifier sees the like of it again
                del error
    long = (["compare"], ["bench"], ["check", "full"], ["import-kvm", "nowhere", "nowhere", "out"])
    for words in (
        ["show", "full"],
        ["show", "tiny-full"],
        ["list"],
        ["cost", "full"],
        *([*each, "--set", "sinks=x"] for each in long),
    ):
        run_command(words)


def put(path: Path, text: str) -> Path:
    """Write a text as it is, halves of surrogate pairs included."""
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


def main() -> int:
    """Try inputs, and print what is found. Exit code 1 where something is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("surface", nargs="*", help=f"of {', '.join(SURFACES)}; left out: all")
    parser.add_argument("--count", type=int, default=100_000, help="inputs per surface")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, help="try this one alone, and print it")
    options = parser.parse_args()
    if unknown := set(options.surface) - set(SURFACES):
        parser.error(f"unknown surface {sorted(unknown)[0]}; known: {', '.join(SURFACES)}")
    if options.seed is not None:
        with tempfile.TemporaryDirectory() as scratch:
            for name in options.surface or SURFACES:
                again(name, options.seed, Path(scratch))
        return 0
    found = 0
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for name in options.surface or SURFACES:
            start = time.monotonic()
            last = options.first + options.count
            slices = [(name, first, min(first + SLICE, last)) for first in range(options.first, last, SLICE)]
            kinds_found: dict[str, list[tuple[int, str]]] = {}
            for wrongs in pool.imap(many, slices):
                for seed, wrong in wrongs:
                    kinds_found.setdefault(re.sub(r"[0-9]+", "0", wrong)[:100], []).append((seed, wrong))
            several = sum(len(each) for each in kinds_found.values())
            took = time.monotonic() - start
            print(f"{name}: {options.count:,} inputs in {took:.0f} s, {several} findings", flush=True)
            for each in sorted(kinds_found.values(), key=len, reverse=True)[:40]:
                print(f"  {len(each)}× --seed {each[0][0]}: {each[0][1]}"[:400], flush=True)
            found += several
    return 1 if found else 0


def many(inputs: tuple[str, int, int]) -> list[tuple[int, str]]:
    """The findings among a surface's inputs first … stop − 1, in a process of its own."""
    name, first, stop = inputs
    folder = prepared()
    wrongs = ((seed, tried(name, seed, folder)) for seed in range(first, stop))
    return [(seed, wrong) for seed, wrong in wrongs if wrong is not None]


@functools.cache
def prepared() -> Path:
    """A folder of this process, everything loaded, and its memory limited."""
    torch.set_num_threads(1)
    scratch = tempfile.TemporaryDirectory()
    atexit.register(scratch.cleanup)
    warm_up(Path(scratch.name))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, resource.RLIM_INFINITY))
    return Path(scratch.name)


def again(name: str, seed: int, folder: Path) -> None:
    """Print one input and what comes of it, with the traceback where there is one."""
    given = SURFACES[name].draw(Random(f"{name} {seed}"))
    print(f"{name} {seed}: {given!r}"[:5000])
    print(tried(name, seed, folder) or "in order")
    try:
        SURFACES[name].use(SURFACES[name].draw(Random(f"{name} {seed}")), folder)
    except MemkitError as error:
        print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main())
