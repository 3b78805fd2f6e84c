"""`memkit import-kvm` and `memkit generate`, on files as the authors publish them."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from memkit import load_model
from memkit.cli import app

GOLDEN = Path(__file__).parents[1] / "golden" / "model" / "kvm-sqrt4.safetensors"


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return (result.stdout if code == 0 else result.stderr).strip()


def unpack(folder):
    with safe_open(GOLDEN, "pt") as file:
        info = json.loads(file.metadata()["info"])
        names = [name for name in file.keys() if name.startswith("weights.")]  # noqa: SIM118
        save_file({name.removeprefix("weights."): file.get_tensor(name) for name in names}, folder / "w.safetensors")
    (folder / "config.json").write_text(json.dumps({**info["config"], "model_type": "rwkv7backbone"}))
    return folder / "config.json", folder / "w.safetensors"


def test_import_and_generate(tmp_path):
    out = tmp_path / "out"
    said = run("import-kvm", *unpack(tmp_path), out)
    model = load_model(out)
    assert said == f"{out}: {model.parameter_count:,} parameters in 2 layers"
    assert model.spec.rounding == "none"
    assert load_model(out)(torch.tensor([[1, 2, 3]]))[0].shape == (1, 3, 97)
    expected = model.generate([[1, 2, 3], [4]], max_new_tokens=8).tolist()
    lines = run("generate", out, "--prompt-ids", "1,2,3", "--prompt-ids", "4", "--max-new-tokens", 8).splitlines()
    assert [[int(token) for token in line.split(",")] for line in lines] == expected
    stopped = run("generate", out, "--prompt-ids", "1,2,3", "--max-new-tokens", 8, "--stop-ids", expected[0][2])
    first = expected[0].index(expected[0][2])
    assert stopped == ",".join(str(token) for token in expected[0][: first + 1])


def test_rounding_is_saved_with_the_model(tmp_path):
    run("import-kvm", *unpack(tmp_path), tmp_path / "out", "--bf16-rounding")
    with safe_open(GOLDEN, "pt") as file, torch.no_grad():
        logits, _ = load_model(tmp_path / "out")(file.get_tensor("input_ids"))
        torch.testing.assert_close(logits, file.get_tensor("logits_bf16_rounded"), atol=5e-4, rtol=0)


def test_bad_input_is_one_line(tmp_path):
    config, weights = unpack(tmp_path)
    config.write_text(json.dumps({**json.loads(config.read_text()), "token_mixer": "kda"}))
    said = run("import-kvm", config, weights, tmp_path / "out", code=2)
    assert said.startswith("config: token_mixer must be one of kvm,")
    assert "\n" not in said
    assert "must be token ids with commas between them" in run("generate", "tiny-full", "--prompt-ids", "1 2", code=2)
    assert "unknown model 'tiny-ful'" in run("generate", "tiny-ful", "--prompt-ids", "1", code=2)
    assert "ids must lie between 0 and 255" in run("generate", "tiny-full", "--prompt-ids", "256", code=2)
