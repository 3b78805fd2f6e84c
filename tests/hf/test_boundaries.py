"""A stock model whose chunks end after certain token ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memkit
from memkit import hf
from memkit.hf.names import CACHE, returned_cache

ENDS = (13, 44, 170)
POLICY = memkit.PolicySpec(
    chunker={"kind": "boundaries", "most": 8},
    window={"kind": "block", "chunks": 2},
    sinks=1,
    growth={"kind": "fixed", "slots": 8},
    observe={"queries": 4},
    admission={"kind": "output-error"},
    eviction="weakest",
    merging={"kind": "drop"},
    rotary={"kind": "rerotate"},
)
LAYERS = {"default": POLICY, "at": {"0": "full"}}


@pytest.fixture
def ids(tiny: Any) -> torch.Tensor:
    ids = torch.randint(3, 211, (2, 60), generator=torch.Generator().manual_seed(3))
    ids[0, [4, 5, 17, 40]] = 13
    ids[1, [10, 30, 33, 58]] = 44
    return ids


def begins(cache: Any) -> list[tuple[tuple[int, ...], ...] | None]:
    return [None if each.cuts is None else each.cuts.begins for each in hf.memories(cache)]


@torch.no_grad()
def test_chunks_end_after_the_ids_however_the_text_is_split(tiny: Any, ids: torch.Tensor):
    with hf.attach(tiny, LAYERS, boundaries=set(ENDS)):
        whole = tiny(ids)
        first = tiny(ids[:, :23])
        cache, logits = returned_cache(first), [first.logits]
        for token in range(23, 60):
            output = tiny(ids[:, token : token + 1], **{CACHE: cache})
            cache, logits = returned_cache(output), [*logits, output.logits]
    with hf.attach(tiny, LAYERS):
        without = tiny(ids)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, atol=2e-4, rtol=2e-4)
    assert begins(cache) == begins(returned_cache(whole))
    assert begins(cache)[0] is None
    assert begins(cache)[1] != begins(returned_cache(without))[1]
    assert (whole.logits - without.logits).abs().max() > 1e-2


@torch.no_grad()
def test_padded_rows_end_their_chunks_where_they_would_alone(tiny: Any, ids: torch.Tensor):
    mask = torch.ones_like(ids)
    mask[0, :19] = 0
    mask[1, 20:27] = 0
    with hf.attach(tiny, POLICY, boundaries=list(ENDS)):
        together = tiny(ids, attention_mask=mask)
        for row in range(2):
            there = mask[row].bool()
            alone = tiny(ids[row : row + 1, there])
            torch.testing.assert_close(together.logits[row, there], alone.logits[0], atol=2e-4, rtol=2e-4)
            batch, own = begins(returned_cache(together))[1], begins(returned_cache(alone))[1]
            assert batch is not None
            assert own is not None
            assert batch[row] == own[0]


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_ends_chunks_as_it_writes(tiny: Any, ids: torch.Tensor, beams: int):
    settings: dict[str, Any] = {"max_new_tokens": 25, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    with hf.attach(tiny, POLICY, boundaries=ENDS):
        found = tiny.generate(ids[:1], return_dict_in_generate=True, **settings)
        if beams == 1:
            read = tiny(found.sequences[:, :-1])
            assert begins(returned_cache(found)) == begins(returned_cache(read))
            assert torch.equal(read.logits[:, 59:].argmax(-1), found.sequences[:, 60:])
        assert found.sequences.shape == (1, 85)


def test_what_cannot_be_is_refused(tiny: Any, ids: torch.Tensor):
    with pytest.raises(memkit.InputError, match="no layer's policy takes them; leave them out"):
        hf.attach(tiny, "untrained-kvm-sqrt", boundaries=[13])
    with pytest.raises(memkit.InputError, match=r"boundaries must lie between 0 and 210"):
        hf.attach(tiny, POLICY, boundaries=[211])
    with pytest.raises(memkit.InputError, match="compresses the prompt at once"):
        hf.attach(tiny, POLICY, boundaries=[13], prefill="full")
    with (
        hf.attach(tiny, POLICY, boundaries=[13]),
        pytest.raises(memkit.InputError, match="got a call of inputs_embeds alone; give input_ids"),
    ):
        tiny(inputs_embeds=tiny.get_input_embeddings()(ids))
    assert tiny.config._attn_implementation != "memkit", "a refused attach leaves the model as it was"
