"""The shipped checkpoint: it loads, has learned something, and is compared with itself under other policies."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import memkit
from memkit import InputError, ModelError
from memkit.cli import app
from memkit.lm import ByteTokenizer, load_model_spec
from memkit.lm.catalog import models_folder
from memkit.texts import default_text
from memkit.trained import compare_trained

TRAINED = sorted(path.stem for path in models_folder().glob("*.safetensors"))


def test_there_are_trained_models():
    assert "tiny-kvm-sqrt" in TRAINED


@pytest.mark.parametrize("name", TRAINED)
def test_checkpoints_are_small_and_have_learned(name: str):
    file = models_folder() / f"{name}.safetensors"
    assert file.stat().st_size <= 3_000_000
    model = memkit.load_model(name)
    assert model.head.weight.dtype == torch.float32
    ids = torch.tensor([ByteTokenizer().encode(default_text()[50_000:50_400])])
    with torch.no_grad():
        assert float(model.loss(ids)) < 2.3  # ln 256 = 5.5 before training


def test_other_sizes_are_another_model():
    small = memkit.load_model("tiny-kvm-sqrt", {"depth": 1})
    assert small.spec.depth == 1
    trained = memkit.load_model("tiny-kvm-sqrt")
    assert not torch.equal(small.embedding.weight, trained.embedding.weight)
    changed = memkit.load_model("tiny-kvm-sqrt", policy="full")
    assert torch.equal(changed.embedding.weight, trained.embedding.weight)


def test_comparing_a_model_with_itself():
    found = compare_trained("tiny-kvm-sqrt", tokens=300, skip=100, decoded=2, text=default_text()[1000:1400])
    own, deleted, full = found.policies
    assert [own.policy, deleted.policy, full.policy] == ["as trained", "slots deleted", "full"]
    assert (full.window, full.slots, full.difference) == (300, 0, 0.0)
    # The window is two chunks of 32. The last chunk to leave it began at 224: there may be 4·√(224 + 64) slots.
    assert (own.window, own.slots) == (44, 67)
    assert deleted.slots == 1
    assert own.bytes > deleted.bytes
    assert own.loss != deleted.loss
    model = memkit.load_model("tiny-kvm-sqrt")
    ids = torch.tensor([ByteTokenizer().encode(default_text()[1000:1300])])
    targets = torch.zeros_like(ids, dtype=torch.bool)
    targets[:, 100:] = True
    with torch.no_grad():
        assert own.loss == pytest.approx(float(model.loss(ids, targets=targets)), rel=1e-4)


def test_what_cannot_be_compared(tmp_path: Path):
    with pytest.raises(ModelError, match="tiny-rwkv7: has no attention layer, so that there is no policy to compare"):
        compare_trained("tiny-rwkv7")
    with pytest.raises(ModelError, match="tiny-ovq: no weights beside it"):
        compare_trained("tiny-ovq")
    with pytest.raises(InputError, match=r"tokens must be at least skip \+ 1, 6, got 5"):
        compare_trained("tiny-kvm-sqrt", tokens=5, skip=5)
    with pytest.raises(InputError, match="tokens must be at most 3, the bytes of given text, got 9"):
        compare_trained("tiny-kvm-sqrt", text="abc", tokens=9, skip=2)
    sizes = {"width": 8, "depth": 1, "heads": 2, "rotary.width": 2, "vocabulary": 300, "mlp.multiple_of": 8}
    memkit.MemoryLM(load_model_spec("tiny-full", sizes)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="must read bytes, 256 token ids, got 300"):
        compare_trained(tmp_path)
    result = CliRunner().invoke(app, ["generate", str(tmp_path), "--prompt", "a"])
    assert result.exit_code == 2
    assert "has no tokenizer beside it, and 300 token ids are no bytes" in result.stderr


def test_the_commands(tmp_path: Path):
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(default_text()[:600])
    command = ["compare", "full", "--model", "tiny-kvm-sqrt", "--text", str(text), "--tokens", "200", "--skip", "100"]
    result = CliRunner().invoke(app, [*command, "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "as trained" in result.stdout
    assert [each["policy"] for each in json.loads(out.read_text())["policies"]] == ["as trained", "full"]
    refused = CliRunner().invoke(app, [*command, "--passkey"])
    assert "--passkey is for stock models, got tiny-kvm-sqrt" in refused.stderr
    said = CliRunner().invoke(app, ["generate", "tiny-kvm-sqrt", "--prompt", "The func", "--max-new-tokens", "4"])
    assert said.stdout == "tion\n"
    both = CliRunner().invoke(app, ["generate", "tiny-kvm-sqrt", "--prompt", "a", "--prompt-ids", "1"])
    assert "give --prompt-ids or --prompt, got both" in both.stderr
