"""The wheel as a user gets it: installed with nothing but its own requirements, used from an empty folder."""

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What `import memkit` must not load, and what a user without extras does not have. rich is a requirement.
LAZY = ["hypothesis", "matplotlib", "numba", "rich", "transformers"]
EXTRAS = ["accelerate", "gguf", "hypothesis", "matplotlib", "numba", "pandas", "pytest", "transformers"]


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed. No PYTHONPATH or the like of this process reaches it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["COLUMNS"] = "200"  # tables do not wrap
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(*arguments: str, into: Path) -> Path:
    """The one wheel that `python -m build` leaves in a folder."""
    run(sys.executable, "-m", "build", "--no-isolation", *arguments, "--outdir", into, ROOT, cwd=into)
    (wheel,) = into.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, bytes]:
    """File name to bytes."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("--wheel", into=tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def python(wheel: Path) -> Iterator[Path]:
    """The interpreter of a new environment with the wheel and its requirements; about 1 GB, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="memkit-wheel-") as folder:
        venv.create(folder, with_pip=True)
        interpreter = Path(folder) / "bin" / "python"
        # --no-compile: byte-compiling all of torch takes 15 s, what is imported of it 3 s.
        install = [interpreter, "-m", "pip", "install", "--quiet", "--no-compile"]
        run(*install, "--constraint", ROOT / "constraints.txt", wheel, cwd=Path(folder))
        yield interpreter


def test_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path):
    assert contents(build(into=tmp_path)) == contents(wheel)


def test_wheel_holds_modules_policies_marker_and_licence_only(wheel: Path):
    policies = {f"memkit/{path.relative_to(ROOT)}" for path in (ROOT / "policies").rglob("*.yaml")}
    profiles = {f"memkit/profiles/{path.name}" for path in (ROOT / "profiles").glob("*.yaml")}
    names = set(contents(wheel))
    assert policies
    assert profiles == {name for name in names if name.startswith("memkit/profiles/")}
    assert {name for name in names if name.startswith("memkit/policies/")} == policies
    assert "memkit/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"memkit", "memkit_attention", "memkit_command.py"}


def test_installed_package_is_the_wheels_and_loads_nothing_heavy(python: Path, tmp_path: Path):
    program = (
        "import importlib.util, sys, memkit; print(memkit.__file__);"
        f"print([name for name in {LAZY} if name in sys.modules]);"
        f"print([name for name in {EXTRAS} if importlib.util.find_spec(name)])"
    )
    file, loaded, installed = run(python, "-c", program, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(python.parents[1])
    assert (loaded, installed) == ("[]", "[]")


def test_import_loads_nothing_heavy_where_everything_is_installed(tmp_path: Path):
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import memkit; print([n for n in {LAZY} if n in sys.modules])"
    )
    assert run(sys.executable, "-c", program, cwd=tmp_path) == "[]\n"


def test_installed_package_knows_every_policy(python: Path, tmp_path: Path):
    listed = run(python, "-c", "import memkit; print(*memkit.policy_names(), sep='\\n')", cwd=tmp_path).splitlines()
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "policies").glob("*.yaml"))


def test_installed_command_works_without_extras(wheel: Path, python: Path, tmp_path: Path):
    memkit = python.with_name("memkit")
    assert wheel.name.split("-")[1] in run(memkit, "--version", cwd=tmp_path)
    listed = run(memkit, "list", cwd=tmp_path)
    assert [path.stem for path in (ROOT / "policies").glob("*.yaml") if path.stem not in listed] == []
    assert run(memkit, "cost", "full", cwd=tmp_path).strip()


@pytest.mark.parametrize("extra", ["hf", "testing"])
def test_a_missing_extra_is_named_in_python(python: Path, tmp_path: Path, extra: str):
    program = f"import memkit\ntry: memkit.{extra}\nexcept ImportError as error: print(error)"
    missing = {"hf": "transformers", "testing": "hypothesis"}[extra]
    assert run(python, "-c", program, cwd=tmp_path) == (
        f"memkit.{extra} needs {missing}, which is not installed; run: pip install 'memkit-attention[{extra}]'\n"
    )


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("profile",), "hf"),
        (("compare", "full"), "hf"),
        (("compare", "--passkey"), "hf"),
        (("train", "tiny-full", "--text", "text.txt", "--out", "out"), "train"),
        (("eval", "--model", "folder", "--tasks", "copa"), "hf"),
        (("cost", "full", "--plot", "cost.png"), "notebook"),
        (("check", "full"), "testing"),
    ],
)
def test_a_missing_extra_is_named_by_the_command(python: Path, tmp_path: Path, command: tuple[str, ...], extra: str):
    done = subprocess.run(
        [python.with_name("memkit"), *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert f"pip install 'memkit-attention[{extra}]'" in done.stderr


def test_requirements_agree_with_each_other(python: Path, tmp_path: Path):
    assert "No broken requirements" in run(python, "-m", "pip", "check", cwd=tmp_path)
