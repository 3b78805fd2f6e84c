"""Who may import whom: nothing upward, sibling pieces not at all, and `import memkit` nothing heavy."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import memkit

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "memkit"

# From the bottom up. A module may import what stands on its own line or below, a package's own modules included.
LEVELS = [
    {"errors", "rendering", "version"},
    {"loops", "machine", "plain_json", "processes", "whole", "yaml12", "texts"},
    {"pieces"},
    {"policy"},
    {"catalog", "schema"},
    {"profiles"},
    {"layers"},
    {"memory", "parameters"},
    {"engine"},
    {"reference"},
    {"attention", "costing", "holding"},
    {"budgets"},
    {"hf", "lm", "interop"},
    {"evals"},
    {"testing", "training"},
    {"subject", "comparison", "passkey", "benchmark", "trained"},
    {"viz"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}

# Packages from outside that only some parts of memkit may import, wherever in a module.
OUTSIDE = {
    "hypothesis": {"testing"},
    "matplotlib": {"viz"},
    "numba": {"loops"},
    "rich": {"viz"},
    "transformers": {"hf", "evals", "training"},
    "triton": {"engine"},
    "typer": {"cli", "commands"},
}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

ORACLE = ("memkit.engine.api", "memkit.reference")
"""The one import upward: `attend(backend="reference")`, inside the function."""


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, in functions and for type checkers alone too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def part(module: str) -> str:
    """`memkit.engine.plan` → `engine`; the public names themselves: the empty string."""
    return module.split(".")[1] if "." in module else ""


EDGES = [(module, imported) for module, path in MODULES.items() for imported in imports(path)]
INSIDE = [edge for edge in EDGES if edge[1].split(".")[0] == "memkit"]


def test_the_docs_say_which_way_imports_go():
    page = " ".join((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split())
    assert f"Imports go one way: `{' → '.join(', '.join(sorted(level)) for level in reversed(LEVELS))}`" in page


def test_every_module_has_its_level():
    unknown = {part(module) for module in MODULES} - {""} - set(LEVEL)
    assert not unknown, f"put {unknown} on a level of LEVELS and into docs/architecture.md"


def test_nothing_imports_upward():
    upward = [
        f"{module} imports {imported}"
        for module, imported in INSIDE
        if part(module) and LEVEL.get(part(imported), -1) > LEVEL.get(part(module), -1)
        if (module, imported) != ORACLE
    ]
    assert upward == []


def test_nothing_imports_in_a_circle():
    """Not even inside a package, in a function or for type checkers alone."""
    graph = {module: {imported for who, imported in INSIDE if who == module} - {module} for module in MODULES}

    def back(module: str, goal: str) -> bool:
        seen, waiting = {module}, [module]
        while waiting:
            found = graph[waiting.pop()] & set(MODULES) - seen
            seen |= found
            waiting += found
        return goal in seen

    assert [(module, imported) for module in graph for imported in graph[module] if back(imported, module)] == []


def test_the_public_names_are_for_users():
    inside = {module for module, imported in INSIDE if not part(imported)}
    # `testing` is a user itself.
    assert {part(module) for module in inside} <= {"testing"}


def test_the_public_names_come_from_light_parts():
    heavy = {"hf", "evals", "training", "testing", "viz", "commands", "cli"}
    assert not {part(imported) for module, imported in INSIDE if module == "memkit"} & heavy


SHARED = {f"memkit.pieces.{name}" for name in ("chunk", "evidence", "needs", "registry", "similarity", "statistics")}
"""What the families have in common; no piece is in there."""


def test_sibling_pieces_do_not_import_each_other():
    siblings = [
        f"{module} imports {imported}"
        for module, imported in INSIDE
        if part(module) == part(imported) == "pieces" and module != "memkit.pieces"
        if imported not in {*SHARED, module}
    ]
    assert siblings == []


def test_only_the_engines_door_imports_the_oracle():
    users = {(module, imported) for module, imported in INSIDE if part(imported) == "reference" != part(module)}
    assert users == {ORACLE}


def test_the_oracle_shares_no_code_with_the_fast_path():
    used = {imported for module, imported in INSIDE if part(module) == "reference"}
    assert {module for module in used if part(module) == "engine"} <= {"memkit.engine.inputs"}


@pytest.mark.parametrize("package", OUTSIDE)
def test_packages_that_only_some_parts_import(package: str):
    assert {part(module) for module, path in MODULES.items() if package in _outside(path)} <= OUTSIDE[package]


def _outside(path: Path) -> set[str]:
    return {imported.split(".")[0] for imported in imports(path)}


def test_the_tests_of_stock_models_need_no_others():
    """They also run where only the extras `hf` and `testing` are (make test-hf-floor, make test-hf-newest)."""
    found = {each for path in (ROOT / "tests/hf").glob("*.py") for each in imports(path) if each.startswith("tests.")}
    assert {each for each in found if not each.startswith("tests.hf.")} == set()


def test_importing_memkit_loads_nothing_heavy():
    program = f"import sys, memkit; print([name for name in {(*OUTSIDE, 'pandas')} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_public_names():
    assert len(set(memkit.__all__)) == len(memkit.__all__)
    assert set(memkit.__all__) >= {
        "MemkitError", "Memory", "MemoryAttention", "Plan", "Policy", "PolicySpec", "Rotation",
        "attend", "compare", "cost", "load_policy", "plan", "policy_names", "register",
    }  # fmt: skip
    for name in memkit.__all__:
        thing = getattr(memkit, name)
        assert not inspect.ismodule(thing), name
        assert inspect.getdoc(thing), name
    for name in ("__version__", "__all__"):
        assert isinstance(getattr(memkit, name), str | list)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_and_what_it_exports(module: str):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), module
    exported = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    defined = {name for node in ast.walk(tree) for name in _bound(node)}
    for name in (name for names in exported for name in names):
        assert name in defined, f"{module} exports {name} and does not have it"


def _bound(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            yield from (alias.asname or alias.name for alias in names)
        case ast.Name(id=name, ctx=ast.Store()):
            yield name
        case _:
            pass
