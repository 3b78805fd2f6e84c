"""Tasks: what is drawn is what the declaration says, and every answer can be known from what stands before it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memkit import InputError
from memkit.evals import (
    MqarSpec,
    NoisyRecallSpec,
    NoisySetting,
    PairsSetting,
    ScatteredPairsSpec,
    SelectiveCopySpec,
    TaskSpec,
    task,
)
from memkit.evals.evaluator import JUDGING_SEED
from memkit.pieces.registry import kinds
from memkit.texts import default_text
from memkit.training.sweep import VALIDATION_SEED

KINDS = ("mqar", "scattered-pairs", "noisy-recall", "selective-copy", "passkey", "needle", "repeated-passage")


def test_every_kind_is_known():
    assert set(kinds("task")) >= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_function_of_its_seed_and_number(kind: str):
    chosen = task({"kind": kind})
    first = chosen.batch(3, seed=1, index=5)
    again = chosen.batch(3, seed=1, index=5)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.targets, again.targets)
    assert first.setting == again.setting
    others = [chosen.batch(3, seed=1, index=6), chosen.batch(3, seed=2, index=5)]
    assert all(other.ids.shape != first.ids.shape or not torch.equal(other.ids, first.ids) for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_streams_that_models_are_judged_on_are_no_training_streams(kind: str):
    chosen = task({"kind": kind})
    seeds = (0, 1, 2, JUDGING_SEED, VALIDATION_SEED, -1, 2**63 + 1)
    drawn = [chosen.batch(2, seed=seed, index=index, setting=0).ids for seed in seeds for index in range(3)]
    for number, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[:number])


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_targets(kind: str):
    chosen = task({"kind": kind})
    needed = chosen.needed_vocabulary or 256
    for setting, declared in enumerate(chosen.settings):
        drawn = chosen.batch(2, seed=0, index=0, setting=setting)
        assert drawn.ids.shape == drawn.targets.shape == (2, declared.tokens)
        assert drawn.targets.any(1).all()
        assert not drawn.targets[:, 0].any()
        assert 0 <= int(drawn.ids.min()) <= int(drawn.ids.max()) < needed
        assert f"{declared.tokens} tokens" in declared.label


def test_all_settings_are_drawn():
    chosen = MqarSpec()
    assert {chosen.batch(1, seed=0, index=index).setting for index in range(64)} == set(range(len(chosen.settings)))


def known_before(ids: list[int], at: int) -> bool:
    """Whether the two tokens that end at `at` stood side by side before, and the first with no other behind it."""
    return {ids[j + 1] for j in range(at - 1) if ids[j] == ids[at - 1]} == {ids[at]}


@settings(max_examples=30)
@given(seed=st.integers(0, 2**20), fillers=st.sampled_from([1, 7]), setting=st.integers(0, 1))
def test_recall_is_asked_for_what_was_said(seed: int, fillers: int, setting: int):
    sizes = (PairsSetting(tokens=32, pairs=4), PairsSetting(tokens=40, pairs=10))
    noisy = (NoisySetting(tokens=33, keys=3, noise=0.3), NoisySetting(tokens=40, keys=5, noise=0.0))
    tasks: list[TaskSpec] = [
        MqarSpec(vocabulary=40, fillers=fillers, settings=sizes),
        ScatteredPairsSpec(vocabulary=40, fillers=fillers, settings=sizes),
        NoisyRecallSpec(vocabulary=40, fillers=fillers, settings=noisy),
    ]
    for chosen in tasks:
        drawn = chosen.batch(2, seed=seed, index=0, setting=setting)
        for ids, targets in zip(drawn.ids, drawn.targets, strict=True):
            assert all(known_before(ids.tolist(), at) for at in targets.nonzero()[:, 0].tolist())


def test_pairs_are_as_many_as_declared():
    for chosen in (MqarSpec(), ScatteredPairsSpec()):
        for setting, declared in enumerate(chosen.settings):
            drawn = chosen.batch(4, seed=3, index=0, setting=setting)
            assert drawn.targets.sum(1).tolist() == [declared.pairs] * 4
            assert (drawn.ids >= chosen.fillers).sum(1).tolist() == [4 * declared.pairs] * 4


def test_mqar_asks_early_more_often_than_late():
    chosen = MqarSpec(settings=(PairsSetting(tokens=128, pairs=4),))
    drawn = chosen.batch(200, seed=0, index=0)
    gaps = (drawn.targets.nonzero()[:, 1] - 1 - 8) // 2
    assert (gaps < 10).float().mean() > 2 * (gaps >= 50).float().mean()
    even = MqarSpec(settings=(PairsSetting(tokens=128, pairs=4),), power=1.0).batch(200, seed=0, index=0)
    places = (even.targets.nonzero()[:, 1] - 1 - 8) // 2
    assert abs(float(places.float().mean()) - 29.5) < 2.5  # 60 places alike; 800 drawn: a standard error of 0.6


def test_scattered_pairs_stand_anywhere_and_are_asked_for_at_the_end():
    chosen = ScatteredPairsSpec(settings=(PairsSetting(tokens=64, pairs=4),))
    drawn = chosen.batch(300, seed=0, index=0)
    assert not drawn.targets[:, :57].any()
    firsts = (drawn.ids[:, :56] > 0).nonzero()[:, 1]
    assert firsts.float().mean().sub(27.5).abs() < 2
    assert firsts.min() == 0
    assert firsts.max() == 55


def test_selective_copy_repeats_its_items_in_order():
    drawn = SelectiveCopySpec().batch(5, seed=0, index=1, setting=0)
    for ids, targets in zip(drawn.ids, drawn.targets, strict=True):
        marker = int((ids == 1).nonzero())
        assert torch.equal(ids[:marker][ids[:marker] > 1], ids[targets])


@pytest.mark.parametrize("kind", ["passkey", "needle"])
def test_needles_stand_at_their_depth_and_are_asked_for(kind: str):
    chosen = task({"kind": kind, "settings": [{"tokens": 300, "depth": 0.0}, {"tokens": 300, "depth": 1.0}]})
    for setting, depth in enumerate((0.0, 1.0)):
        drawn = chosen.batch(3, seed=0, index=0, setting=setting)
        assert drawn.depths is not None
        assert drawn.depths.tolist() == [depth] * 3
        for ids, targets in zip(drawn.ids, drawn.targets, strict=True):
            text = bytes(ids.tolist()).decode("utf-8", errors="replace")
            answer = bytes(ids[targets].tolist()).decode()
            assert text.endswith(answer)
            assert text.count(answer) == 2
            assert (text.index(answer) < 60) == (depth == 0)


def test_a_passage_comes_twice_and_is_asked_for_behind_its_cue():
    sizes = [{"tokens": 128, "passage": 24, "depth": depth} for depth in (0.0, 0.5, 1.0)]
    chosen = task({"kind": "repeated-passage", "cue": 5, "settings": sizes})
    for setting, begin in enumerate((0, 40, 80)):
        drawn = chosen.batch(3, seed=0, index=0, setting=setting)
        assert drawn.targets.nonzero()[:, 1].view(3, -1).tolist() == [list(range(109, 128))] * 3
        assert torch.equal(drawn.ids[:, begin : begin + 24], drawn.ids[:, 104:])
        text = default_text().encode()
        assert all(bytes(ids[:104].tolist()) in text for ids in drawn.ids)


def test_a_passage_stands_anywhere_where_no_depth_is_given():
    settings = [{"tokens": 96, "passage": 16}]
    drawn = task({"kind": "repeated-passage", "settings": settings}).batch(60, seed=0, index=0)
    assert drawn.depths is not None
    assert drawn.depths.min() < 0.1
    assert drawn.depths.max() > 0.9


def test_text_of_ones_own(tmp_path):
    file = tmp_path / "filler.txt"
    file.write_text("xyz " * 2000)
    drawn = task({"kind": "passkey", "text": str(file), "settings": [{"tokens": 200}]}).batch(1, seed=0, index=0)
    assert bytes(drawn.ids[0].tolist()).count(b"xyz") > 15
    with pytest.raises(InputError, match=r"missing\.txt must be a text file"):
        task({"kind": "passkey", "text": str(tmp_path / "missing.txt")}).batch(1, seed=0, index=0)


def test_long_sequences_begin_anywhere_in_the_text(tmp_path):
    """Filler of numbered words: the first of a sequence says where that begins, among some 160 places."""
    file = tmp_path / "numbered.txt"
    file.write_text("".join(f"{number:03d} " for number in range(1000)))
    chosen = task({"kind": "needle", "text": str(file), "settings": [{"tokens": 3400, "depth": 1.0}]})
    begins = [int(_word(chosen.batch(1, seed=0, index=index).ids[0])) for index in range(40)]
    assert min(begins) < 40 < 120 < max(begins)
    assert len(set(begins)) > 20
    with pytest.raises(InputError, match=r"numbered\.txt: must have at least \d+ tokens, got 4000; give a longer text"):
        task({"kind": "needle", "text": str(file), "settings": [{"tokens": 4300}]}).batch(1, seed=0, index=0)
    task({"kind": "needle", "text": str(file), "settings": [{"tokens": 4000}]}).batch(1, seed=0, index=0)


def _word(ids: torch.Tensor) -> str:
    """The first whole word."""
    return bytes(ids[:8].tolist()).decode().split(" ")[1]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("mqar", "a task must be a mapping with its kind, got 'mqar'"),
        ({"kind": "mqr"}, "task: kind: unknown task kind 'mqr'; did you mean 'mqar'"),
        ({"kind": "mqar", "setings": []}, "task: setings: unknown field; did you mean 'settings'"),
        ({"kind": "mqar", "settings": []}, "settings: must hold at least one setting"),
        ({"kind": "mqar", "settings": [{"tokens": 128, "pars": 4}]}, r"settings.0.pars: unknown field"),
        ({"kind": "mqar", "settings": [{"tokens": 15, "pairs": 4}]}, r"settings.0.tokens: must be at least 4 × pairs"),
        ({"kind": "mqar", "vocabulary": 8}, r"settings.0.pairs: must be at most the 3 keys"),
        ({"kind": "scattered-pairs", "vocabulary": 8, "fillers": 7}, "vocabulary must leave a key and a value"),
        ({"kind": "noisy-recall", "settings": [{"tokens": 8, "keys": 4}]}, "must hold more pairs than keys"),
        ({"kind": "selective-copy", "settings": [{"tokens": 8, "items": 4}]}, "must be at least 2 × items"),
        ({"kind": "passkey", "settings": [{"tokens": 300, "depth": 2}]}, "settings.0.depth: must be less than"),
        ({"kind": "repeated-passage", "settings": [{"tokens": 64, "passage": 33}]}, "must be at least 2 × passage, 66"),
        ({"kind": "repeated-passage", "cue": 40}, "passage: must be more than the 40 tokens of the cue, got 32"),
        ({"kind": "needle", "text": ""}, "text must be a file's path or 'default'"),
    ],
)
def test_declarations_that_are_wrong(declared, message: str):
    with pytest.raises(InputError, match=message):
        task(declared)


def test_arguments_that_are_wrong():
    with pytest.raises(InputError, match="setting must be a whole number, at most 3"):
        MqarSpec().batch(1, seed=0, index=0, setting=4)
    with pytest.raises(InputError, match="must leave room for text besides the sentence"):
        task({"kind": "passkey", "digits": 18, "settings": [{"tokens": 64}]}).batch(1, seed=0, index=0)
