"""A third mixer is one spec and one module of its own: this file has both, and nothing of memkit knows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

import memkit
from memkit.lm import MemoryLM, Mixer, MixerSpec, ModelSpec, load_model, load_model_spec
from memkit.lm.footprint import memory_bytes
from memkit.lm.parts import Span, State, tensor
from memkit.viz.models import details
from tests.viz.test_tables import printed

YAML = """
vocabulary: 32
width: 16
depth: 3
heads: 2
layers:
  default: {kind: moving-average, rate: 0.25}
  overrides: [{at: [1], mixer: {kind: attention, policy: full}}]
"""


class MovingAverageSpec(MixerSpec):
    """s_t = s_{t−1} + rate · (value_t − s_{t−1}), and s_t is read."""

    kind: Literal["moving-average"] = "moving-average"
    rate: float = Field(gt=0, le=1)

    def build(self, model: ModelSpec, layer: int) -> MovingAverage:
        return MovingAverage(self.rate, model.width)

    def memory_bytes(self, model: ModelSpec, lengths: Sequence[int], dtype: torch.dtype, rows: int) -> list[int]:
        return [rows * model.width * dtype.itemsize] * len(lengths)


class MovingAverage(Mixer):
    def __init__(self, rate: float, width: int) -> None:
        super().__init__()
        self.rate = rate
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)

    def first_values(self, x: Tensor, state: State, span: Span) -> tuple[Tensor | None, State]:
        return None, {}

    def forward(self, x: Tensor, first: Tensor | None, state: State, span: Span) -> tuple[Tensor, State]:
        values, valid = self.value(x), span.valid(x.shape[1])
        last = tensor(state, "average")
        average = torch.zeros_like(values[:, 0]) if last is None else last
        read: list[Tensor] = []
        for index in range(x.shape[1]):
            step = self.rate * (values[:, index] - average)
            average = average + (step if valid is None else step * valid[:, index])
            read.append(average)
        return self.output(torch.stack(read, dim=1)), {"average": average}

    @torch.no_grad()
    def initialise(self, layer: int, depth: int) -> None:
        nn.init.orthogonal_(self.value.weight)


@pytest.fixture(autouse=True)
def _registered():
    memkit.register(MovingAverageSpec)  # conftest takes it out again


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "averaging.yaml"
    path.write_text(YAML)
    return path


def test_it_is_declared_in_yaml(file: Path):
    spec = load_model_spec(file)
    assert [mixer.kind for mixer in spec.mixers] == ["moving-average", "attention", "moving-average"]
    assert spec.layers.default == MovingAverageSpec(rate=0.25)
    assert load_model_spec(file, {"layers.default.rate": 0.5}).layers.default == MovingAverageSpec(rate=0.5)
    with pytest.raises(memkit.ModelError, match=r"layers\.default\.rate: must be less than or equal to 1, got 2"):
        load_model_spec(file, {"layers.default.rate": 2})


def test_it_trains(file: Path):
    torch.manual_seed(0)
    model = load_model(file).train()
    ids = torch.randint(32, (4, 24))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses: list[float] = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = model.loss(ids)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    mixer: Any = model.blocks[0].mixer  # type: ignore[union-attr]
    assert mixer.value.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_it_splits_decodes_and_pads(file: Path):
    torch.manual_seed(0)
    model = load_model(file)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(32, (2, 12))
    whole, _ = model(ids)
    memory, logits = None, []
    for index in range(12):
        one, memory = model(ids[:, index : index + 1], memory)
        logits.append(one)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole)
    padded, memory = model(ids, lengths=[5, 12])
    torch.testing.assert_close(padded[0, :5], whole[0, :5])
    torch.testing.assert_close(model(ids[:, 5:6], memory.reorder([0, 0]))[0][:1], whole[:1, 5:6])
    prompts = [[1, 2, 3], [4]]
    both = model.generate(prompts, max_new_tokens=6)
    assert both.tolist() == [model.generate([prompt], max_new_tokens=6)[0].tolist() for prompt in prompts]


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 40])
def test_its_memory_is_known_beforehand_and_shown(file: Path, tokens: int):
    spec = load_model_spec(file)
    _, memory = MemoryLM(spec)(torch.zeros(2, tokens, dtype=torch.long))
    assert sum(memory_bytes(spec, [tokens], rows=2)[0]) == memory.bytes
    text = printed(details(spec, ""))
    assert "moving-average: 0, 2" in text
    assert "full: 1" in text


def test_it_is_saved_and_read_again(file: Path, tmp_path: Path):
    model = load_model(file)
    model.save_pretrained(tmp_path / "out")
    again = MemoryLM.from_pretrained(tmp_path / "out")
    assert again.spec == model.spec
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids)[0], model(ids)[0])
