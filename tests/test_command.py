"""What the command settles before PyTorch is imported."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import memkit.cli
import memkit_command

SPINS = "GOMP_SPINCOUNT"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What the environment says once the command line is asked to run; it does nothing."""
    seen: list[str | None] = []
    monkeypatch.setattr(memkit.cli, "app", lambda: seen.append(os.environ.get(SPINS)))
    for name in (SPINS, "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    return seen


def test_waiting_threads_soon_sleep(started: list[str | None]):
    memkit_command.main()

    assert started == [memkit_command.SPINS]


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), (SPINS, "7")])
def test_what_the_user_has_set_stays(started: list[str | None], monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv(name, value)

    memkit_command.main()

    assert started == ["7" if name == SPINS else None]
    assert os.environ[name] == value


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """What glibc is told, of a user who has said nothing."""
    told: dict[int, int] = {}
    for name in [name for name in os.environ if name.startswith("MALLOC_")] + ["GLIBC_TUNABLES", "LD_PRELOAD"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memkit_command, "_mallopt", lambda: lambda option, value: told.update({option: value}))
    return told


def test_freed_memory_is_kept(started: list[str | None], options: dict[int, int]):
    memkit_command.main()

    assert options == {-3: 2**25, -1: 2**29}
    assert started


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_an_allocator_of_the_users_is_left_alone(options: dict[int, int], monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "1")

    memkit_command.keep_freed_memory()

    assert not options


def test_another_c_library_is_none_of_its_business(options: dict[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    monkeypatch.setattr(memkit_command.ctypes, "CDLL", lambda name: object())

    memkit_command.keep_freed_memory()  # no `mallopt` there


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_glibc_takes_what_it_is_told():
    set_option = memkit_command._mallopt()

    assert set_option is not None
    assert set_option(memkit_command.MMAP_THRESHOLD, memkit_command.LARGEST_OF_HEAP) == 1
    assert set_option(memkit_command.TRIM_THRESHOLD, memkit_command.FREE_AT_MOST) == 1


def test_nothing_of_pytorch_is_imported_before():
    code = "import sys, memkit_command; print(sorted(name for name in sys.modules if name in ('torch', 'memkit')))"

    run = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(memkit_command.__file__).parent,
    )

    assert run.stdout.strip() == "[]"
