"""Language models, and layers, whose chunks end where the caller says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memkit

CUT = {
    "from": "kvm-sqrt-16",
    "chunker": {"kind": "boundaries", "most": 6},
    "growth.factor": 2,
    "growth.floor": 4,
}
ENDS = (10, 46)


@pytest.fixture(scope="module")
def made() -> Any:
    overrides = {"width": 32, "depth": 2, "heads": 2, "rotary.width": 8, "layers.default.policy": CUT}
    made = memkit.load_model("tiny-kvm-rwkv7", overrides)
    torch.manual_seed(5)
    with torch.no_grad():  # away from the initialisation, where every block adds nothing
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.fixture
def ids() -> torch.Tensor:
    ids = torch.randint(50, 256, (2, 45), generator=torch.Generator().manual_seed(1))
    ids[0, [2, 3, 20, 31]] = 10
    ids[1, [7, 9, 25]] = 46
    return ids


def ends(ids: torch.Tensor) -> torch.Tensor:
    return torch.isin(ids, torch.tensor(ENDS))


@torch.no_grad()
def test_splits_equal_the_whole_text(made: Any, ids: torch.Tensor):
    whole, remembered = made(ids, boundaries=ends(ids))
    memory, parts = None, []
    for start, stop in ((0, 17), *((token, token + 1) for token in range(17, 45))):
        part = ids[:, start:stop]
        logits, memory = made(part, memory, boundaries=ends(part))
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)
    assert memory is not None
    cuts = [[each and each.cuts for each in found.memories] for found in (memory, remembered)]
    assert cuts[0] == cuts[1]
    assert (made(ids)[0] - whole).abs().max() > 1e-3, "without boundaries chunks have 6 tokens"


@torch.no_grad()
def test_generation_reads_what_it_wrote_with_its_boundaries(made: Any, ids: torch.Tensor):
    prompts = [ids[0, :30].tolist(), ids[1, :11].tolist()]
    found = made.generate(prompts, max_new_tokens=12, boundary_ids={10, 46, 120})
    for prompt, new in zip(prompts, found, strict=True):
        text = torch.tensor([[*prompt, *new.tolist()]])
        logits, _ = made(text, boundaries=torch.isin(text, torch.tensor([10, 46, 120])))
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == new.tolist()


def test_losses_of_packed_documents_end_chunks_in_each(made: Any, ids: torch.Tensor):
    documents = (torch.arange(45) >= 21).long().expand(2, -1)
    packed = made.read_packed(ids, documents, ends(ids))
    for part in (slice(0, 21), slice(21, 45)):
        alone, _ = made(ids[:, part], boundaries=ends(ids[:, part]))
        torch.testing.assert_close(packed[:, part], alone, atol=1e-4, rtol=1e-4)
    assert made.loss(ids, documents=documents, boundaries=ends(ids)) != made.loss(ids, documents=documents)
    assert made.loss(ids, boundaries=ends(ids)) != made.loss(ids)


@torch.no_grad()
def test_a_layer_takes_boundaries(ids: torch.Tensor):
    layer = memkit.MemoryAttention(memkit.load_policy(CUT["from"], {k: v for k, v in CUT.items() if k != "from"}),
                                   width=16, heads=2)  # fmt: skip
    x = torch.randn(2, 45, 16)
    whole, memory = layer(x, boundaries=ends(ids))
    first, begun = layer(x[:, :20], boundaries=ends(ids)[:, :20])
    rest, after = layer(x[:, 20:], begun, boundaries=ends(ids)[:, 20:])
    torch.testing.assert_close(torch.cat((first, rest), dim=1), whole, atol=1e-4, rtol=1e-4)
    assert after.cuts == memory.cuts
    assert memory.cuts is not None
    assert memory.cuts.begins[0] == (38, 44), "a chunk ends after token 31, and the next have 6 tokens each"


def test_what_does_not_fit_is_refused(made: Any, ids: torch.Tensor):
    with pytest.raises(memkit.InputError, match=r"boundaries must be true or false for each of ids, \(2, 45\)"):
        made(ids, boundaries=ends(ids)[:, :3])
    with pytest.raises(memkit.InputError, match="boundary_ids must lie between 0 and 255"):
        made.generate([[1]], max_new_tokens=1, boundary_ids=[256])
    plain = memkit.load_model("tiny-kvm-rwkv7", {"width": 32, "depth": 1, "heads": 2, "rotary.width": 8})
    with pytest.raises(memkit.InputError, match="no layer of this model takes boundaries; leave them out"):
        plain(ids, boundaries=ends(ids))
    with pytest.raises(memkit.InputError, match="no layer of this model takes boundaries; leave them out"):
        plain.generate([[1]], max_new_tokens=1, boundary_ids=[10])
