"""A prompt kept in a folder, and asked in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import memkit
from memkit import hf
from memkit.hf import MemoryCache
from memkit.hf.names import CACHE, returned_cache
from tests.hf.tiny import randomised, tiny_config

POLICIES = {
    "default": memkit.load_policy("untrained-observed", {"chunker.size": 8, "growth.slots": 20, "observe.queries": 8}),
    "at": {0: "full"},
}
ROOT = Path(__file__).parents[2]
ASK = """
import sys, torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM
from memkit import hf
from memkit.hf.names import CACHE
from tests.hf.test_kept import POLICIES, questions

folder, torch_threads = sys.argv[1], torch.set_num_threads(1)
model = LlamaForCausalLM.from_pretrained(folder + "/model")
with torch.no_grad(), hf.attach(model, POLICIES):
    kept = hf.MemoryCache.load(folder + "/kept")
    answers = [model(asked, **{CACHE: kept.fork()}).logits for asked in questions()]
save_file({str(number): each for number, each in enumerate(answers)}, folder + "/answers.safetensors")
"""


def questions() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [3 + torch.randint(208, (2, tokens), generator=generator) for tokens in (1, 9, 20)]


@torch.no_grad()
def test_three_questions_in_another_process_have_the_same_answers(tiny: Any, ids: torch.Tensor, tmp_path: Path):
    tiny.save_pretrained(tmp_path / "model")
    mask = torch.ones_like(ids)
    mask[0, :7] = 0  # rows of unequal length
    with hf.attach(tiny, POLICIES):
        cache = returned_cache(tiny(ids, attention_mask=mask, use_cache=True))
        cache.save(tmp_path / "kept")
        expected = [tiny(asked, **{CACHE: cache.fork()}).logits for asked in questions()]
    subprocess.run([sys.executable, "-c", ASK, str(tmp_path)], cwd=ROOT, check=True)
    answers = load_file(tmp_path / "answers.safetensors")
    for number, each in enumerate(expected):
        torch.testing.assert_close(answers[str(number)], each, atol=1e-5, rtol=0)
    note = json.loads((tmp_path / "kept" / "cache.json").read_text())
    assert (note["seen"], note["columns"], note["layers"]) == ([83, 90], 90, 2)
    assert not list((tmp_path / "kept").glob("*.p*"))


@torch.no_grad()
def test_a_cache_that_generate_made_is_kept_and_decodes_on(tiny: Any, ids: torch.Tensor, tmp_path: Path):
    with hf.attach(tiny, POLICIES):
        made = tiny.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        MemoryCache.of(returned_cache(made)).save(tmp_path)
        options = {"max_new_tokens": 8, "do_sample": False}
        kept = MemoryCache.load(tmp_path)
        again = tiny.generate(made.sequences, **options, **{CACHE: kept})
        assert torch.equal(again, tiny.generate(made.sequences, **options, **{CACHE: returned_cache(made)}))


@torch.no_grad()
def test_what_does_not_fit_is_refused(tiny: Any, ids: torch.Tensor, tmp_path: Path):
    with hf.attach(tiny, POLICIES):
        cache = returned_cache(tiny(ids, use_cache=True))
        cache.save(tmp_path / "kept")
    with hf.attach(tiny, "full"), pytest.raises(memkit.MemoryStateError, match="must be of the attached policy, full"):
        tiny(ids[:, :1], **{CACHE: MemoryCache.load(tmp_path / "kept")})
    other = randomised(LlamaForCausalLM(tiny_config(vocab_size=212)))
    with (
        hf.attach(other, POLICIES),
        pytest.raises(memkit.MemoryStateError, match=r"of this model, {'vocab_size': 212}"),
    ):
        other(ids[:, :1], **{CACHE: MemoryCache.load(tmp_path / "kept")})
    with pytest.raises(memkit.MemoryStateError, match="must have read something"):
        MemoryCache([]).save(tmp_path / "none")
    with pytest.raises(memkit.MemoryStateError, match=r"not a cache saved by memkit: cache\.json cannot be read"):
        MemoryCache.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "no format memkit-cache-1"),
        ({"more": 1}, "no format memkit-cache-1"),
        ({"layers": True}, "layers must be a whole number from 1 on, got True"),
        ({"layers": 3}, "layer-002"),
        ({"seen": [1, 1]}, r"layer 0 has read \[90, 90\] tokens, not \[1, 1\]"),
        ({"policies": "0"}, "its policies are not those it was saved with"),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_damaged_folder_is_refused_in_one_line(
    tiny: Any, ids: torch.Tensor, tmp_path: Path, change: dict[str, Any], message: str
):
    with hf.attach(tiny, POLICIES):
        returned_cache(tiny(ids, use_cache=True)).save(tmp_path)
    note = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps(note | change))
    with pytest.raises(memkit.MemoryStateError, match=message) as caught:
        MemoryCache.load(tmp_path)
    assert "\n" not in str(caught.value)
