"""Training runs: the same curve again, after a kill too, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from memkit import InputError, load_model, yaml12
from memkit.cli import app
from memkit.lm import MemoryLM, load_model_spec
from memkit.training import Trained, TrainingSpec, load_settings, train
from memkit.training.data import collate_sequences, text_sequences
from memkit.training.trainer import MemoryTrainer

ROOT = Path(__file__).parents[2]
SMALL = {"width": 32, "depth": 1, "heads": 2, "rotary.width": 8}
TASK = {"kind": "mqar", "vocabulary": 64, "settings": [{"tokens": 80, "pairs": 4}, {"tokens": 96, "pairs": 6}]}
FAST = TrainingSpec(steps=6, batch=2, warmup=2, log_every=1, save_every=3)


def run(out: Path, settings: TrainingSpec = FAST, **others):
    return train("tiny-kvm-sqrt", out, overrides=SMALL, settings=settings, **({"task": TASK} | others))


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory):
    return run(tmp_path_factory.mktemp("runs") / "once")


def test_the_same_seed_gives_the_same_curve(once, tmp_path: Path):
    again = run(tmp_path / "again")
    assert again.losses == once.losses
    assert len(once.losses) == 6
    other = run(tmp_path / "other", FAST.model_copy(update={"seed": 1}))
    assert other.losses != once.losses


def test_the_model_is_read_back(once):
    loaded = load_model(once.folder)
    assert loaded.spec == once.model.spec
    assert all(map(torch.equal, loaded.state_dict().values(), once.model.state_dict().values()))


def test_a_run_goes_on_where_it_was_killed(once, tmp_path: Path):
    """The process is killed without warning after the checkpoint of step 3; the next one has the same curve."""
    program = (
        "import sys, time; from tests.training.test_train import *; from pathlib import Path\n"
        "from memkit.training.trainer import MemoryTrainer\n"
        "step = MemoryTrainer.training_step\n"
        "def slow(self, *given):\n"
        "    if self.state.global_step == 4: print('now', flush=True); time.sleep(600)\n"
        "    return step(self, *given)\n"
        "MemoryTrainer.training_step = slow\n"
        "torch.set_num_threads(1); run(Path(sys.argv[1]))"
    )
    out = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(out)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    (out / "checkpoint-6").mkdir()  # another kill, while a checkpoint was being written: it has no state yet
    resumed = run(out)
    assert resumed.resumed == 3
    assert [step for step, _ in resumed.losses] == [step for step, _ in once.losses]
    for (_, found), (_, expected) in zip(resumed.losses, once.losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    for found, expected in zip(resumed.model.state_dict().values(), once.model.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_finished_run_is_not_run_again(once):
    again = run(once.folder)
    assert again.resumed == 6
    assert again.losses == once.losses


@pytest.fixture
def text(tmp_path: Path) -> list[Path]:
    """Eight batches an epoch, as `TEXT` reads it."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 24)
    return [tmp_path / "text.txt"]


TEXT = TrainingSpec(steps=5, batch=2, length=64, warmup=2, log_every=1, save_every=3)


def test_a_run_that_ended_within_an_epoch_is_not_run_again(text: list[Path], tmp_path: Path):
    first = run(tmp_path / "out", TEXT, task=None, text=text)
    (first.folder / "model.safetensors").unlink()  # a kill after the last checkpoint, before the model was written
    again = run(tmp_path / "out", TEXT, task=None, text=text)
    assert again.resumed == 5
    assert again.losses == first.losses
    loaded = load_model(again.folder)
    assert all(map(torch.equal, loaded.state_dict().values(), first.model.state_dict().values()))
    state = json.loads((again.folder / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (5, 5)


def test_lines_of_the_log_are_whole_after_a_stop(text: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Checkpoints at 3, 6 and the end, lines of two steps: none spans a checkpoint, so a stop at 5 changes none."""
    settings = TEXT.model_copy(update={"steps": 7, "log_every": 2})
    whole = run(tmp_path / "whole", settings, task=None, text=text)
    assert [step for step, _ in whole.losses] == [1, 2, 3, 4, 6, 7]
    each = run(tmp_path / "each", settings.model_copy(update={"log_every": 1}), task=None, text=text)
    alone = dict(each.losses)
    assert whole.losses[4][1] == pytest.approx((alone[5] + alone[6]) / 2, rel=1e-4)

    step = MemoryTrainer.training_step

    def stopping(self, *given):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(MemoryTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", settings, task=None, text=text)
    resumed = run(tmp_path / "stopped", settings, task=None, text=text)
    assert resumed.resumed == 3
    assert [step for step, _ in resumed.losses] == [step for step, _ in whole.losses]
    for (_, found), (_, expected) in zip(resumed.losses, whole.losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_of_answers_alone(tmp_path: Path):
    settings = FAST.model_copy(update={"steps": 1, "learning_rate": 1e-9, "warmup": 0})
    found = run(tmp_path / "out", settings)
    from memkit.evals import task

    drawn = task(TASK).batch(2, seed=0, index=_first_index(found.folder), tokenizer=None)
    loss = load_model("tiny-kvm-sqrt", SMALL, seed=0).loss(drawn.ids, targets=drawn.targets)
    assert found.losses[0][1] == pytest.approx(float(loss.detach()), rel=1e-4)


def _first_index(folder: Path) -> int:
    """With one step there is one batch."""
    assert json.loads((folder / "trainer_state.json").read_text())["max_steps"] == 1
    return 0


@pytest.mark.parametrize("sequences", ["packed", "documents"])
def test_text_is_learned(tmp_path: Path, sequences: str):
    for name, text in (("one.txt", "abcdefgh" * 40), ("two.txt", "zyxwvu" * 30)):
        (tmp_path / name).write_text(text)
    settings = TrainingSpec(steps=12, batch=2, length=64, warmup=2, log_every=4, sequences=sequences)
    found = run(tmp_path / "out", settings, task=None, text=[tmp_path / "one.txt", tmp_path / "two.txt"])
    assert found.losses[-1][1] < 0.8 * found.losses[0][1]


def test_packed_sequences_span_documents_and_others_do_not():
    from memkit.lm import ByteTokenizer

    texts = ["abcdef", "ghijk"]
    packed = text_sequences(texts, ByteTokenizer(), 4, packed=True)
    apart = text_sequences(texts, ByteTokenizer(), 4, packed=False)
    assert [bytes(each.tolist()) for each in packed.sequences] == [b"abcd", b"efgh"]
    assert [bytes(each.tolist()) for each in apart.sequences] == [b"abcd", b"ef", b"ghij"]
    batch = collate_sequences([apart[0], apart[1]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 98, 99, 100], [-100, 102, -100, -100]]
    with pytest.raises(InputError, match="the text must have 400 tokens at least, got 11"):
        text_sequences(texts, ByteTokenizer(), 400, packed=True)


def test_accumulated_batches_are_one_step(tmp_path: Path):
    """Two batches of two are the step of one batch of four: text, so that every token counts."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 40)
    text = [tmp_path / "text.txt"]
    one = TrainingSpec(steps=3, batch=4, length=64, warmup=0, log_every=1, schedule="constant")
    two = one.model_copy(update={"batch": 2, "accumulate": 2})
    whole, halves = (run(tmp_path / name, each, task=None, text=text) for name, each in (("one", one), ("two", two)))
    for (_, expected), (_, found) in zip(whole.losses, halves.losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_mixed_precision_is_close(once, tmp_path: Path):
    found = run(tmp_path / "half", FAST.model_copy(update={"precision": "bfloat16"}))
    assert found.losses[0][1] == pytest.approx(once.losses[0][1], rel=0.05)
    assert found.losses != once.losses
    assert found.model.head.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["tiny-kvm-sqrt", "tiny-kvm-rwkv7", "tiny-ovq"])
def test_vectors_do_not_decay(name: str):
    """What multiplies vectors decays, and the embedding; nothing else."""

    class Bare(MemoryTrainer):
        def __init__(self):
            pass

    model = MemoryLM(load_model_spec(name, {"depth": 2}))
    matrices = [each for each, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    names = Bare().get_decay_parameter_names(model)
    assert sorted(names) == sorted(f"{each}.weight" for each in matrices)
    axes = {each: parameter.ndim for each, parameter in model.named_parameters() if each not in names}
    assert 1 in axes.values()
    assert {each for each, number in axes.items() if number > 1} == (
        {"blocks.0.mixer.bonus"} if name == "tiny-kvm-rwkv7" else set()
    )


def test_weights_to_begin_with(once, tmp_path: Path):
    settings = FAST.model_copy(update={"steps": 1, "learning_rate": 1e-9})
    found = train(once.folder, tmp_path / "on", task=TASK, settings=settings, from_weights=True)
    torch.testing.assert_close(found.model.head.weight, once.model.head.weight)
    fresh = train(once.folder, tmp_path / "fresh", task=TASK, settings=settings)
    assert not torch.allclose(fresh.model.head.weight, once.model.head.weight)


# What is refused


def test_weights_to_begin_with_that_are_not_there(tmp_path: Path):
    for model, overrides, message in (
        (
            "tiny-ovq",
            {"width": 32, "heads": 2},
            "from_weights needs weights that fit .*, got 'tiny-ovq', which has none",
        ),
        ("tiny-kvm-sqrt", {"width": 64}, "got 'tiny-kvm-sqrt' under overrides that change more than policies, which"),
    ):
        with pytest.raises(InputError, match=message):
            train(model, tmp_path / "out", task=TASK, settings=FAST, overrides=overrides, from_weights=True)
    assert not (tmp_path / "out").exists()


def test_weights_are_begun_with_under_another_policy(tmp_path: Path):
    settings = FAST.model_copy(update={"steps": 1, "learning_rate": 1e-9})
    overrides = {"layers.overrides": [{"at": [1], "mixer": {"kind": "attention", "policy": "window-512"}}]}
    found = train("tiny-full", tmp_path / "on", task=TASK, settings=settings, overrides=overrides, from_weights=True)
    torch.testing.assert_close(found.model.head.weight, load_model("tiny-full").head.weight)
    assert found.model.spec.value_layers == [0] * 4


def test_another_run_in_the_folder(once, tmp_path: Path):
    with pytest.raises(InputError, match=r"holds a run with another settings, {'seed': \d+} instead of {'seed': 3}; "):
        run(once.folder, FAST.model_copy(update={"seed": 3}))
    with pytest.raises(InputError, match="holds a run with another task"):
        run(once.folder, task={"kind": "mqar"})
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        run(tmp_path)


def test_how_texts_are_cut_says_nothing_of_a_task(tmp_path: Path):
    for named, value in (("length", 64), ("sequences", "documents")):
        settings = FAST.model_copy(update={named: value})
        with pytest.raises(InputError, match=f"^{named} says how texts are cut, and a task makes sequences of its own"):
            train("tiny-full", tmp_path / "out", task={"kind": "mqar"}, settings=settings)
    assert not (tmp_path / "out").exists()
    reloaded = TrainingSpec(**FAST.model_dump(mode="json"))  # as a sweep's runs get theirs: all fields are set
    with pytest.raises(InputError, match="vocabulary must be at least"):  # the next thing that is looked at
        train("tiny-full", tmp_path / "out", task={"kind": "mqar", "vocabulary": 999}, settings=reloaded)


def test_another_text_or_other_weights_under_the_same_name(text: list[Path], tmp_path: Path):
    settings = TEXT.model_copy(update={"steps": 1})
    for seed in (0, 1):
        load_model("tiny-kvm-sqrt", SMALL, seed=seed).save_pretrained(tmp_path / f"model {seed}")

    def again() -> Trained:
        return train(tmp_path / "model 0", tmp_path / "out", text=text, settings=settings, from_weights=True)

    first = again()
    assert again().losses == first.losses
    written = text[0].read_text()
    text[0].write_text(written + "; and more")
    with pytest.raises(InputError, match=r"holds a run with another sha256 of text, .*; name another folder"):
        again()
    text[0].write_text(written)
    (tmp_path / "model 1" / "model.safetensors").replace(tmp_path / "model 0" / "model.safetensors")
    with pytest.raises(InputError, match=r"holds a run with another sha256 of weights, .*; name another folder"):
        again()


def test_arguments_that_do_not_fit(tmp_path: Path):
    with pytest.raises(InputError, match="exactly one of text and task says what to train on, got neither"):
        run(tmp_path / "out", task=None)
    with pytest.raises(InputError, match="got both"):
        run(tmp_path / "out", text=["default"])
    with pytest.raises(InputError, match="vocabulary must be at least the 999 token ids of the task, got 256"):
        run(tmp_path / "out", task={"kind": "mqar", "vocabulary": 999})
    with pytest.raises(InputError, match="must be a folder with a tokenizer"):
        run(tmp_path / "out", task=None, text=["default"], tokenizer=tmp_path)
    assert not (tmp_path / "out").exists()


def test_settings_from_a_file(tmp_path: Path):
    file = tmp_path / "settings.yaml"
    file.write_text("steps: 9\nbetas: [0.8, 0.9]\n")
    assert load_settings(file, {"seed": 4}) == TrainingSpec(steps=9, betas=(0.8, 0.9), seed=4)
    for text, message in (
        ("stps: 9", r"settings\.yaml: stps: unknown field; did you mean 'steps'"),
        ("betas: [0.9, 1.0]", "betas must be at least 0 and below 1"),
        ("- 1", "training settings are a mapping of fields, got list"),
        ("steps: 0", "steps: must be greater than or equal to 1"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            load_settings(file, {})


def test_the_command(tmp_path: Path):
    task = tmp_path / "task.yaml"
    task.write_text("kind: mqar\nvocabulary: 64\nsettings: [{tokens: 32, pairs: 4}]\n")
    sizes = [f"--set={name}={value}" for name, value in SMALL.items()]
    command = ["train", "tiny-full", "--out", str(tmp_path / "out"), "--task", str(task), "--steps", "2", *sizes]
    result = CliRunner().invoke(app, [*command, "--batch", "2", "--log-every", "1"])
    assert result.exit_code == 0, result.output
    assert "parameters, loss " in result.stdout
    assert "at step 2" in result.stdout
    assert load_model(tmp_path / "out").spec.width == 32
    refused = CliRunner().invoke(app, [*command, "--schedule", "square"])
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert "schedule: must be 'cosine', 'linear' or 'constant'" in refused.stderr


def test_texts_as_a_shell_expands_them_and_a_folder_of_the_models_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "c.txt"):
        Path(name).write_text(f"text {name} " * 40)
    (tmp_path / "mine.yaml").write_text((ROOT / "models" / "tiny-kvm-sqrt.yaml").read_text())
    sizes = [f"--set={name}={value}" for name, value in SMALL.items()]
    command = ["train", "mine.yaml", "--text", "a.txt", "b.txt", "c.txt", "--steps=1", "--batch=2", "--length=32"]
    result = CliRunner().invoke(app, [*command, *sizes])
    assert result.exit_code == 0, result.output
    assert yaml12.read(Path("runs", "mine", "training.yaml"), InputError)["text"] == ["a.txt", "b.txt", "c.txt"]
    refused = CliRunner().invoke(app, ["train", "mine.yaml", "a.txt", "--task", "mqar"])
    assert refused.exit_code == 2
    assert "texts are given with --text, got a.txt without it; write --text a.txt" in refused.stderr
