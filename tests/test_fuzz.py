"""A sample of what `make fuzz` tries: bad input is refused in one line, quickly, and nothing is run."""

from pathlib import Path

import pytest

from memkit import MemkitError
from tools import fuzz

SAMPLE = 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("fuzz")
    fuzz.warm_up(scratch)
    return scratch


@pytest.mark.parametrize("surface", fuzz.SURFACES)
def test_a_sample_of_inputs(surface: str, folder: Path):
    wrong = {seed: fuzz.tried(surface, seed, folder) for seed in range(SAMPLE)}
    assert {seed: said for seed, said in wrong.items() if said is not None} == {}


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda given, folder: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda given, folder: __import__("this_module_is_not_there"), "ModuleNotFoundError"),
        (lambda given, folder: Path(folder.parent / "beside").write_text("x"), "it made memkit open for writing"),
        (lambda given, folder: exec("pass"), "it made memkit exec"),
        (lambda given, folder: [None for _ in iter(int, 1)], "TooLong"),
        (lambda given, folder: (_ for _ in ()).throw(MemkitError("x" * 9999)), "a message of 9,999 characters"),
        (lambda given, folder: fuzz.use_command(["list", "--frobnicate"], folder), None),
        (lambda given, folder: (_ for _ in ()).throw(MemkitError("refused")), None),
    ],
    ids=["traceback", "import", "write", "exec", "endless", "long", "one line", "refused"],
)
def test_the_verifier_finds_what_is_wrong(use, said, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(fuzz.SURFACES, "tried", fuzz.Surface(lambda rng: None, use))
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    found = fuzz.tried("tried", 0, folder)
    assert found is None if said is None else (found or "").startswith(said)


@pytest.mark.parametrize("surface", fuzz.SURFACES)
def test_an_input_is_a_function_of_its_seed(surface: str):
    draw = fuzz.SURFACES[surface].draw
    one, two = (repr(draw(fuzz.Random(f"{surface} 3"))) for _ in range(2))
    if " at 0x" not in one and "Memory" not in one:
        assert one == two
    assert repr(draw(fuzz.Random(f"{surface} 4"))) != one
