"""lm-evaluation-harness' own class for Hugging Face models, HFLM, takes an attached model as it is, in batches too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from memkit import hf
from tests.hf.test_padding import POLICIES

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install '.[eval]'")

TYPES = ("loglikelihood", "loglikelihood_rolling", "generate_until")
LENGTHS = (70, 9, 41, 25, 33, 58)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """A word for each number from 0 to 210, none the beginning of another."""
    model = Tokenizer(WordLevel({f"w{number:03}": number for number in range(211)}, unk_token="w002"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="w002", pad_token="w000", bos_token="w001", eos_token="w001"
    )


def requests() -> dict[str, list[Any]]:
    """Of each type: texts of unequal length."""
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    random = torch.Generator().manual_seed(1)
    texts = [" ".join(f"w{3 + int(n):03}" for n in torch.randperm(200, generator=random)[:many]) for many in LENGTHS]
    stop = {"until": ["w007"], "max_gen_toks": 12, "do_sample": False}
    arguments: dict[str, list[tuple[Any, ...]]] = {
        "loglikelihood": [(text, " w017 w150 w080") for text in texts],
        "loglikelihood_rolling": [(text,) for text in texts],
        "generate_until": [(text, stop) for text in texts],
    }
    return {
        kind: [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments[kind]] for kind in TYPES
    }


@pytest.mark.parametrize("policy", [*POLICIES])
@torch.no_grad()
def test_batches_say_what_rows_say_alone(tiny: Any, words: PreTrainedTokenizerFast, policy: str):
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    def said(batch: int) -> dict[str, list[Any]]:
        judged = HFLM(pretrained=tiny, tokenizer=words, batch_size=batch, max_length=512)
        return {kind: getattr(judged, kind)(each, disable_tqdm=True) for kind, each in requests().items()}

    tiny.generation_config.eos_token_id = words.eos_token_id  # else a row goes on behind it while others do
    stock = said(1)
    with hf.attach(tiny, POLICIES[policy]):
        one, four = said(1), said(4)
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        alone, together = (torch.tensor(each[kind], dtype=torch.float64) for each in (one, four))
        torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-4)
    assert four["generate_until"] == one["generate_until"]
    assert sum(map(bool, one["generate_until"])) > 3
    if policy == "full":
        assert one["generate_until"] == stock["generate_until"]
        torch.testing.assert_close(
            torch.tensor(one["loglikelihood_rolling"]), torch.tensor(stock["loglikelihood_rolling"])
        )
    else:
        assert one["loglikelihood_rolling"] != stock["loglikelihood_rolling"]


@torch.no_grad()
def test_it_says_what_the_models_own_logits_say(tiny: Any, words: PreTrainedTokenizerFast):
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    context, continuation = requests()["loglikelihood"][0].args
    ids = words(context + continuation, return_tensors="pt")["input_ids"]
    with hf.attach(tiny, POLICIES["merging"]):
        chances = tiny(ids).logits[0].log_softmax(-1)
        judged = HFLM(pretrained=tiny, tokenizer=words, batch_size=4, max_length=512)
        found = judged.loglikelihood(requests()["loglikelihood"], disable_tqdm=True)[0]
    expected = sum(float(chances[at - 1, ids[0, at]]) for at in range(ids.shape[1] - 3, ids.shape[1]))
    assert found[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_task_of_local_files_in_batches(tiny: Any, words: PreTrainedTokenizerFast, tmp_path: Path):
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    asked = [request.args for request in requests()["loglikelihood"]]
    lines = [{"text": text, "choices": [choice, " w005 w006"]} for text, choice in asked]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    (tmp_path / "texts.yaml").write_text(
        "task: local-texts\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'texts.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: 0\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
        encoding="utf-8",
    )
    manager = TaskManager(include_path=str(tmp_path))
    found: list[list[Any]] = []
    with hf.attach(tiny, POLICIES["observed"]):
        for batch in (1, 4):
            judged = HFLM(pretrained=tiny, tokenizer=words, batch_size=batch, max_length=512)
            told = lm_eval.simple_evaluate(judged, tasks=["local-texts"], task_manager=manager, bootstrap_iters=0)
            found.append([sample["filtered_resps"] for sample in told["samples"]["local-texts"]])
            assert 0 <= told["results"]["local-texts"]["acc,none"] <= 1
    one, four = (torch.tensor([[nats for nats, _ in each] for each in batch]) for batch in found)
    assert one.shape == (len(LENGTHS), 2)
    torch.testing.assert_close(four, one, atol=1e-3, rtol=1e-4)
