"""Small steps on one thread, and everything as it was afterwards."""

from collections.abc import Iterator

import pytest
import torch

import memkit
from memkit.engine import lanes
from memkit.engine.threads import SMALL, one_thread
from memkit.memory.slots import SlotStore

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """PyTorch on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("numbers", "device", "threads"), [(SMALL - 1, CPU, 1), (SMALL, CPU, 2), (1, torch.device("cuda"), 2)]
)
def test_few_numbers_on_the_cpu_take_one_thread(numbers: int, device: torch.device, threads: int) -> None:
    with one_thread(numbers, device):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_an_error_leaves_the_threads_as_they_were() -> None:
    with pytest.raises(ZeroDivisionError), one_thread(1, CPU):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("heads", "threads"), [(1, 1), (64, 2)])
def test_small_folds_take_one_thread(heads: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "ENABLED", False)
    seen: list[int] = []
    add = SlotStore.add
    monkeypatch.setattr(SlotStore, "add", lambda *given: (seen.append(torch.get_num_threads()), add(*given))[1])
    queries, keys, values = (torch.randn(1, heads, 300, 8) for _ in range(3))
    policy = memkit.load_policy("kvm-fixed-256", {"chunker.size": 64, "growth.slots": 64})
    memkit.attend(policy, queries, keys, values)
    assert seen
    assert set(seen) == {threads}
    assert torch.get_num_threads() == 2
