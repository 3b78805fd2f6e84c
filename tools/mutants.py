"""Mutation testing of the code that decides: growth, admission, routing, merging, plan, schedule, folds together.

Changes one operator, comparison, constant or call at a time, runs the tests against each change, and prints the share
that some test notices. A mutant never touches the working tree: a child process compiles the changed source in place
of the file. The parent has imported the heavy packages once, and forks.

    python tools/mutants.py [--count 400] [--seed 0] [--workers 2] [--out mutants.json] [--only file:line]
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import functools
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAWS = "tests/test_laws.py::test_drawn_policies"
FAMILY = "tests/testing/test_checks.py::test_shipped_pieces_keep_the_laws_of_their_family"
SEES = ["tests/engine/test_compress.py", "tests/engine/test_heads_as_rows.py", "tests/engine/test_observing.py"]
GOLDEN = ["tests/engine/test_golden.py"]
GPU = f"{LAWS}_as_on_a_gpu"
TOGETHER = ["tests/engine/test_devices.py", "-k", "together"]
AGREE = f"{LAWS}[same_plan_same_answer]"
PLANS = ["tests/engine/test_plan.py", "-k", "not float64"]
CHOICES = "tests/pieces/test_admission_and_routing.py"
ROWS = ["tests/engine/test_rows.py", "tests/engine/test_decode.py"]
WEIGHTS = "tests/engine/test_weights.py"
TARGETS = {
    "memkit/pieces/growth.py": [
        ["tests/pieces/test_growth.py"],
        [FAMILY, "-k", "Growth"],
        ["tests/test_policy.py"],
        [LAWS],
    ],
    "memkit/pieces/admission.py": [
        [CHOICES],
        [AGREE],
        [FAMILY, "-k", "Novelty or Recency or Stride"],
        [LAWS],
        SEES,
        GOLDEN,
        PLANS,
    ],
    "memkit/pieces/chunk.py": [[CHOICES], [AGREE], [FAMILY, "-k", "Nearest or Novelty"], [LAWS], SEES, GOLDEN, PLANS],
    "memkit/pieces/similarity.py": [
        [CHOICES],
        [AGREE],
        [FAMILY, "-k", "Nearest or Novelty"],
        [LAWS],
        SEES,
        GOLDEN,
        PLANS,
    ],
    "memkit/pieces/routing.py": [[CHOICES], [AGREE], [FAMILY, "-k", "Nearest or Segment"], [LAWS], SEES, GOLDEN, PLANS],
    "memkit/pieces/merging.py": [
        ["tests/pieces/test_merging_and_readout.py"],
        [AGREE],
        [FAMILY, "-k", "Mean or Drop"],
        ["tests/engine/test_validation.py"],
    ],
    "memkit/engine/plan.py": [[CHOICES], [WEIGHTS], [AGREE], [LAWS], PLANS, ROWS, SEES, GOLDEN],
    "memkit/engine/schedule.py": [[WEIGHTS], [AGREE], [LAWS], PLANS, ROWS, SEES, GOLDEN],
    "memkit/engine/stretch.py": [TOGETHER, [GPU], ["tests/engine/test_fused.py"]],
    "memkit/engine/together.py": [TOGETHER, [GPU], ["tests/engine/test_fused.py"]],
}
"""What is mutated, and the tests that verify it, the quickest first."""

PYTEST = ["-x", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
"""Whether a test fails is all that matters here."""

LIMIT = 240
"""Seconds after which a mutant that hangs counts as noticed."""

SWAPS: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Add],
    ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.FloorDiv],
    ast.Pow: [ast.Mult],
    ast.MatMult: [ast.Add],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
    ast.BitAnd: [ast.BitOr],
    ast.BitOr: [ast.BitAnd],
}
NAMES = {
    "min": "max", "max": "min", "amax": "amin", "amin": "amax", "floor": "ceil", "any": "all", "all": "any",
    "maximum": "minimum", "minimum": "maximum", "zeros_like": "ones_like", "ones_like": "zeros_like",
    "flatnonzero": "nonzero", "append": "insert",
}  # fmt: skip
DROPPED = {"clamp", "expand", "masked_fill", "copy"}
"""Method calls that a mutant leaves out: x.clamp(…) becomes x."""

SPARED = {"__all__", "AT_ONCE", "BAND_STEP", "MANY", "RUN"}
"""Names whose values are not changed: a list of names, and how much is done at once, which changes no result."""


@dataclass(frozen=True)
class Mutant:
    """One change: the file, the line, what was there and what is there now; which of its site's changes it is."""

    file: str
    line: int
    before: str
    after: str
    site: int
    change: int


def sites(tree: ast.AST) -> list[ast.AST]:
    """Nodes that may be changed; no docstrings, annotations, messages or declarations."""
    found: list[ast.AST] = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Raise, ast.Import, ast.ImportFrom, ast.Assert, ast.JoinedStr)):
                continue  # a message's wording is no decision
            if isinstance(child, ast.AnnAssign):
                if child.value is not None and not isinstance(child.value, ast.Call):
                    visit(child.value)
                    found.append(child.value)
                continue
            if isinstance(node, ast.ClassDef) and child in node.decorator_list:
                continue  # frozen or not: a declaration
            if isinstance(child, ast.arg) or (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
                continue
            if isinstance(child, ast.FunctionDef):
                for part in child.body:
                    wrapper = ast.Module(body=[part], type_ignores=[])
                    visit(wrapper)
                found.extend(child.args.defaults)
                continue
            if isinstance(child, ast.Assign) and SPARED & {
                name.id for target in child.targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }:
                continue
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id in ("Field", "cast"):
                continue
            found.append(child)
            visit(child)

    visit(tree)
    return found


def changes(node: ast.AST) -> list[ast.AST]:
    """What a node may become."""
    out: list[ast.AST] = []

    def changed(edit) -> None:
        twin = copy.deepcopy(node)
        edit(twin)
        out.append(twin)

    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in SWAPS.get(type(op), []):
                changed(lambda twin, i=i, other=other: twin.ops.__setitem__(i, other()))
    elif isinstance(node, ast.BinOp) and isinstance(node.left, ast.Name) and node.left.id == "int":
        pass  # a union of types
    elif isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)):
        for other in SWAPS.get(type(node.op), []):
            changed(lambda twin, other=other: setattr(twin, "op", other()))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        out.append(copy.deepcopy(node.operand))
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        changed(lambda twin: setattr(twin, "value", node.value + 1))
        if node.value:
            changed(lambda twin: setattr(twin, "value", node.value - 1))
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        changed(lambda twin: setattr(twin, "value", not node.value))
    elif isinstance(node, ast.IfExp):
        out += [copy.deepcopy(node.body), copy.deepcopy(node.orelse)]
    elif isinstance(node, ast.If):
        changed(lambda twin: setattr(twin, "test", ast.Constant(value=False)))
        changed(lambda twin: setattr(twin, "test", ast.UnaryOp(op=ast.Not(), operand=twin.test)))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in NAMES:
            changed(lambda twin: setattr(twin.func, "attr", NAMES[node.func.attr]))
        if node.func.attr in DROPPED:
            out.append(copy.deepcopy(node.func.value))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        changed(lambda twin: setattr(twin.func, "id", NAMES[node.func.id]))
    return out


def mutants(file: str) -> list[Mutant]:
    """All of a file's mutants."""
    found: list[Mutant] = []
    for site, node in enumerate(sites(ast.parse((ROOT / file).read_text(encoding="utf-8")))):
        for change, new in enumerate(changes(node)):
            before, after = (ast.unparse(each).splitlines()[0] for each in (node, new))
            if before != after:
                found.append(Mutant(file, getattr(node, "lineno", 0), before, after, site, change))
    return found


def changed(mutant: Mutant) -> ast.Module:
    """The syntax tree of the mutant's file, with its change."""
    tree = ast.parse((ROOT / mutant.file).read_text(encoding="utf-8"))
    node = sites(tree)[mutant.site]
    _Replace(node, changes(node)[mutant.change]).visit(tree)
    return ast.fix_missing_locations(tree)


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.copy_location(self.new, node) if node is self.old else super().generic_visit(node)


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a syntax tree."""

    def __init__(self, module: str, tree: ast.Module, file: str) -> None:
        self.module, self.tree, self.file = module, tree, str(ROOT / file)

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.module:
            return None
        return importlib.util.spec_from_file_location(fullname, self.file, loader=self)

    def create_module(self, spec):
        return None

    def exec_module(self, module) -> None:
        exec(compile(self.tree, self.file, "exec"), module.__dict__)


def failing(stages: list[list[str]]) -> str:
    """In a forked child: the first of some test runs that fails, or nothing."""
    import pytest

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    return next((stage[0] for stage in stages if pytest.main([*PYTEST, *stage]) != 0), "")


def noticed(mutant: Mutant) -> str:
    """In a forked child: the first test run that notices the mutant, or nothing."""
    module = mutant.file.removesuffix(".py").replace("/", ".")
    sys.meta_path.insert(0, _Changed(module, changed(mutant), mutant.file))
    return failing(TARGETS[mutant.file])


def in_child(task: Callable[[], str]) -> tuple[int, int]:
    """Start a task in a child of its own: its process number, and where what it returns can be read ("-": nothing)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.setpgrp()
        with contextlib.suppress(BaseException):
            os.write(writer, task().encode() or b"-")
        os._exit(0)
    os.close(writer)
    return child, reader


def run(chosen: list[Mutant], workers: int) -> list[dict[str, object]]:
    """Every mutant in a child of its own, so many at a time."""
    waiting, running, results = list(reversed(chosen)), {}, []
    start = time.time()
    while waiting or running:
        while waiting and len(running) < workers:
            mutant = waiting.pop()
            child, reader = in_child(functools.partial(noticed, mutant))
            running[child] = (mutant, reader, time.time())
        for child, (mutant, reader, begun) in list(running.items()):
            done, _ = os.waitpid(child, os.WNOHANG)
            if not done and time.time() - begun < LIMIT:
                continue
            by = "time limit"
            if done:
                by = os.read(reader, 1000).decode() or "crash"
            else:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
            os.close(reader)
            del running[child]
            results.append({**asdict(mutant), "noticed_by": "" if by == "-" else by, "seconds": time.time() - begun})
            mark = "SURVIVED" if by == "-" else "noticed"
            print(f"{len(results)}/{len(chosen)} {time.time() - start:.0f} s {mark} {mutant.file}:{mutant.line}: "
                  f"{mutant.before}  →  {mutant.after}", flush=True)  # fmt: skip
        time.sleep(0.05)
    return results


def main() -> None:
    """Draw mutants, try them, print the score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400, help="mutants to try, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write every mutant and what noticed it as JSON")
    parser.add_argument("--only", help="file:line, all mutants of one line")
    given = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MEMKIT_LAW_EXAMPLES", "20")
    os.environ.setdefault("MEMKIT_HYPOTHESIS_PROFILE", "verify")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # Heavy packages once, memkit never: each child imports it with its own change.
    for module in ("einops", "hypothesis", "numpy", "pydantic", "pytest", "safetensors.torch", "torch", "yaml"):
        importlib.import_module(module)
    gc.freeze()  # a child need not look through what it was given
    everything = [mutant for file in TARGETS for mutant in mutants(file)]
    chosen = everything
    if given.only:
        chosen = [mutant for mutant in everything if f"{mutant.file}:{mutant.line}" == given.only]
    elif len(everything) > given.count:
        chosen = random.Random(given.seed).sample(everything, given.count)
    stages = [list(stage) for stage in dict.fromkeys(tuple(stage) for file in TARGETS for stage in TARGETS[file])]
    child, reader = in_child(lambda: failing(stages))
    os.waitpid(child, 0)
    if (failed := os.read(reader, 1000).decode()) != "-":
        raise SystemExit(f"{failed or 'a test run'} fails without any mutant: nothing can be verified by it")
    print(f"{len(everything)} mutants, {len(chosen)} of them tried (seed {given.seed})", flush=True)
    results = run(chosen, given.workers)
    survived = [result for result in results if not result["noticed_by"]]
    files = Counter(str(result["file"]) for result in results)
    missed = Counter(str(result["file"]) for result in survived)
    for file in sorted(files):
        print(f"{file:32} {files[file] - missed[file]:4} of {files[file]:4} noticed")
    print(f"{len(results) - len(survived)} of {len(results)} noticed, {1 - len(survived) / max(len(results), 1):.1%}")
    if given.out:
        given.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
