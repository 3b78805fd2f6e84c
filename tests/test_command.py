"""What the command settles before PyTorch is imported."""

from __future__ import annotations

import os
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
