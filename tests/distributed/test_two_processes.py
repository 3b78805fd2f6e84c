"""Two processes on this machine (gloo) find the losses and gradients of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memkit import InputError, hf
from memkit.lm import split_text
from memkit.training import TrainingSpec, train
from tests.distributed import workers

ROOT = Path(__file__).parents[2]


def together(folder: Path) -> dict[str, Any]:
    """What process 0 of two found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.distributed.workers", str(folder)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=500)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All that two processes found, by what they did."""
    return together(tmp_path_factory.mktemp("found"))


def agree(found: dict[str, Any], model: nn.Module, loss: torch.Tensor) -> None:
    torch.testing.assert_close(found["loss"], loss.detach())
    expected = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert set(found["gradients"]) == set(expected)
    assert sum(bool(each.abs().sum() > 0) for each in expected.values()) > 0.9 * len(expected)
    size = max(float(each.abs().max()) for each in expected.values())
    for each, gradient in expected.items():
        torch.testing.assert_close(found["gradients"][each], gradient, rtol=1e-4, atol=1e-5 * size, msg=each)


@pytest.mark.parametrize("name", ["data_parallel", "fully_sharded"])
def test_losses_and_gradients_are_those_of_one_process(name: str, found: dict[str, Any]):
    model = workers.made()
    loss = model.loss(workers.batch())
    loss.backward()
    agree(found[name], model, loss)


@pytest.mark.parametrize("name", ["attached_data_parallel", "attached_fully_sharded"])
def test_a_stock_model_under_a_policy_is_that_of_one_process(name: str, found: dict[str, Any]):
    model = workers.stock()
    with hf.attach(model, workers.STOCK_POLICY):
        loss = workers.StockLoss(model)(workers.batch())
        loss.backward()
    agree(found[name], model, loss)


@pytest.mark.parametrize("kind", list(workers.KINDS))
@pytest.mark.parametrize("how", ["heads_split", "text_split"])
def test_split_heads_and_texts_are_those_of_one_process(how: str, kind: str, found: dict[str, Any]):
    model = workers.made(workers.KINDS[kind])
    loss = model.loss(workers.batch())
    loss.backward()
    agree(found[f"{how} {kind}"], model, loss)
    with torch.no_grad():
        expected, _ = model(workers.batch())
    torch.testing.assert_close(found[f"{how} {kind}"]["logits"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("heads", "unit"), ("sharded", None)])
def test_a_split_model_is_saved_whole(name: str, kind: str | None, found: dict[str, Any]):
    expected = workers.made(None if kind is None else workers.KINDS[kind]).state_dict()
    for there in found["saved"][name]:
        assert set(there) == set(expected)
        assert all(torch.equal(there[each], tensor) for each, tensor in expected.items())


def test_what_cannot_be_split_is_refused_by_name(found: dict[str, Any]):
    said = found["refused"]
    for name, message in {
        "rwkv": "heads are split in attention alone, got a layer of RWKV7Mixer",
        "three": "heads must be a multiple of the 2 processes, got 3 of queries and 3 of keys and values",
        "uneven": "got a head profile",
    }.items():
        assert [message in each for each in said[name]] == [True, True], said[name]
    assert "as many tokens of a text as the others, got [20, 21]" in said["unequal"]
    assert "give neither lengths nor boundaries" in said["padded"]
    assert "give ids alone" in said["packed"]


def test_one_process_splits_no_text():
    with pytest.raises(InputError, match="split over processes, got one"):
        split_text(workers.made())


def test_a_run_launched_as_two_processes_has_the_curve_of_one(tmp_path: Path):
    """As the documentation says it: two rows for each process, four for one alone."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 60)
    sizes = [f"--set={name}={size}" for name, size in workers.SIZES.items()]
    settings = [f"--{name.replace('_', '-')}={setting}" for name, setting in workers.TEXT.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]  # which is torchrun
    command = ["-m", "memkit", "train", "tiny-kvm-sqrt", "--text", str(text), "--out", str(tmp_path / "two"), *sizes]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*launch, *command, *settings, "--batch=2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("parameters, loss") == 1
    assert "processes: 2" in (tmp_path / "two" / "training.yaml").read_text()
    found = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    alone = TrainingSpec(**workers.TEXT, batch=4)
    one = train("tiny-kvm-sqrt", tmp_path / "one", text=[text], settings=alone, overrides=workers.SIZES)
    curve = [(line["step"], line["loss"]) for line in found if "loss" in line]
    assert [step for step, _ in curve] == [step for step, _ in one.losses]
    for (_, loss), (_, expected) in zip(curve, one.losses, strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)


def test_context_parallel_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(InputError, match="context parallel splits a text over processes"):
        train("tiny-full", tmp_path / "out", task={"kind": "mqar"})
    assert not (tmp_path / "out").exists()
