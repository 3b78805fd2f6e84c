"""lm-evaluation-harness on a task made of local files, in an environment that has it: pip install '.[eval]'."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from memkit import InputError, MemoryLM, hf
from memkit.cli import app
from memkit.evals.harness import _generated, _likelihood, run_harness
from memkit.lm import ByteTokenizer, load_model_spec
from tests.hf.tiny import randomised, tiny_config

try:
    import lm_eval  # pyright: ignore[reportMissingImports]
except ImportError:
    lm_eval = None
needs_harness = pytest.mark.skipif(lm_eval is None, reason="lm_eval is not installed: pip install '.[eval]'")


@pytest.fixture(scope="module")
def made() -> MemoryLM:
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 1, "heads": 2, "rotary.width": 8}
    return MemoryLM(load_model_spec("tiny-kvm-sqrt", sizes)).eval()


def test_likelihoods_by_hand(made: MemoryLM):
    context, continuation = ByteTokenizer().encode("ab"), ByteTokenizer().encode("cde")
    with torch.no_grad():
        chances = log_softmax(made(torch.tensor([context + continuation]))[0][0], -1)
    expected = sum(float(chances[1 + at, byte]) for at, byte in enumerate(continuation))
    found, greedy = _likelihood(made, context, continuation)
    assert found == pytest.approx(expected, rel=1e-5)
    assert not greedy
    best = int(chances[1].argmax())
    assert _likelihood(made, context, [best])[1]


def test_generation_stops_at_what_it_is_told(made: MemoryLM):
    whole = _generated(made, ByteTokenizer(), 10, "abc", {"max_gen_toks": 12})
    assert len(whole) > 0
    stop = whole[len(whole) // 2 :][:1]
    assert _generated(made, ByteTokenizer(), 10, "abc", {"max_gen_toks": 12, "until": [stop]}) == whole.split(stop)[0]


def test_generation_without_a_context_begins_after_the_prefix(made: MemoryLM):
    settings = {"max_gen_toks": 6}
    assert _generated(made, ByteTokenizer(), 10, "", settings) == _generated(made, ByteTokenizer(), 10, "\n", settings)


def test_stock_models_generate_too():
    class Ids:
        vocabulary = 211

        def encode(self, text):
            return [int(each) for each in text.split()]

        def decode(self, ids):
            return " ".join(str(int(each)) for each in ids)

    stock = randomised(LlamaForCausalLM(tiny_config()))
    plain = _generated(stock, Ids(), 1, "3 4 5", {"max_gen_toks": 4})
    assert len(plain.split()) == 4
    with hf.attach(stock, "full"):
        assert _generated(stock, Ids(), 1, "3 4 5", {"max_gen_toks": 4}) == plain


@pytest.mark.skipif(lm_eval is not None, reason="lm_eval is installed")
def test_without_the_harness_one_line_says_what_to_install(made: MemoryLM):
    with pytest.raises(InputError, match=re.escape("pip install 'memkit-attention[eval]'")):
        run_harness(made, ByteTokenizer(), ["any"], prefix_id=10)
    result = CliRunner().invoke(app, ["eval", "--model", "tiny-kvm-sqrt", "--tasks", "any"])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A task of three questions with two answers each."""
    lines = [
        {"question": "The colour of grass is", "choices": ["green", "qzxqzx"], "answer": 0},
        {"question": "The name of the", "choices": ["qqqqzz", "function"], "answer": 1},
        {"question": "If the value is", "choices": ["None", "jjqqzz"], "answer": 0},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "questions.yaml").write_text(
        "task: local-questions\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'questions.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return tmp_path


@needs_harness
def test_a_task_of_local_files(folder: Path):
    out = folder / "out.json"
    command = ["eval", "--model", "tiny-kvm-sqrt", "--tasks", "local-questions", "--include", str(folder)]
    result = CliRunner().invoke(app, [*command, "--json", str(out)])
    assert result.exit_code == 0, result.output
    # English words are likelier than letters that never follow each other.
    assert json.loads(out.read_text())["local-questions"]["acc,none"] == 1.0
    assert "local-questions" in result.stdout
    under = CliRunner().invoke(app, [*command, "--policy", "window-512"])
    assert under.exit_code == 0, under.output
    wrong = CliRunner().invoke(app, ["eval", "--model", "tiny-kvm-sqrt", "--tasks", "no-such"])
    assert wrong.exit_code == 2
    assert "unknown task 'no-such'" in wrong.stderr
