"""The checks: every shipped piece passes, and what a broken one makes them say."""

import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import memkit
from memkit.cli import app
from memkit.errors import PolicyError
from memkit.pieces import Merging, MergingSpec, ReadoutSpec, Weigh
from memkit.pieces.admission import (
    KeyDifferenceSpec,
    KeyNormSpec,
    NoAdmissionSpec,
    NoveltySpec,
    RecencySpec,
    StrideSpec,
)
from memkit.pieces.growth import (
    FixedGrowthSpec,
    LinearGrowthSpec,
    LogGrowthSpec,
    PowerGrowthSpec,
    SaturatingGrowthSpec,
    SqrtGrowthSpec,
)
from memkit.pieces.merging import DropSpec, MeanSpec, WeightedMeanSpec
from memkit.pieces.readout import Readout
from memkit.pieces.registry import kinds
from memkit.pieces.routing import NearestSpec, SegmentSpec
from memkit.pieces.statistics import Numbers
from memkit.testing import CLAIMS, LawBroken, check, check_growth, check_merge_rule, check_policy, examine, laws
from memkit.testing.claims import claimed
from memkit.testing.laws import POLICY_LAWS
from tests.faults import ForgetsMass, NearestAdmitted, NeverLooksBack, Overshoots, SeldomSteps, Shrinks
from tests.testing.ema import Ema

# Fewer, and not made smaller, where the same tests try hundreds of mutants (make mutants).
FEW = "MEMKIT_LAW_EXAMPLES" in os.environ
PIECES = [
    MeanSpec(),
    DropSpec(),
    WeightedMeanSpec(weight="learned"),
    WeightedMeanSpec(weight="key-norm", weigh=Weigh(founders=True, first_chunk=True)),
    WeightedMeanSpec(weight="learned", weigh=Weigh(keys=True, values=False)),
    FixedGrowthSpec(slots=256),
    SqrtGrowthSpec(factor=16.0),
    PowerGrowthSpec(factor=1.0, exponent=0.75, round_down=8),
    LogGrowthSpec(per_doubling=256.0, start=256.0),
    SaturatingGrowthSpec(limit=1024),
    LinearGrowthSpec(fraction=0.1, floor=2, cap=90),
    NoveltySpec(),
    RecencySpec(),
    StrideSpec(),
    KeyNormSpec(),
    KeyDifferenceSpec(),
    NearestSpec(),
    NearestSpec(similarity="cosine"),
    NearestSpec(similarity="l2", new_slots=False),
    SegmentSpec(),
    ReadoutSpec(),
    ReadoutSpec(key="l2", value="birth-radius"),
    ReadoutSpec(key="mean-norm", value="mean-norm", count_bias=True),
    ReadoutSpec(key="layer-norm", value="count-mean", temperatures=True),
    ReadoutSpec(value="count-mean", bias="mass"),
]
EVERY = [getattr(laws, name) for name in laws.__all__ if not name.isupper()]
OF_PIECES = tuple(law for law in EVERY if law not in POLICY_LAWS)


@pytest.mark.parametrize("spec", PIECES, ids=repr)
def test_shipped_pieces_keep_the_laws_of_their_family(spec):
    slow = isinstance(spec, (MergingSpec, ReadoutSpec))  # gradients by differences
    examples = 20 if slow else 60
    assert examine(spec, examples, laws=OF_PIECES, shrink=not FEW).raise_if_broken().verdicts


def test_a_piece_of_every_kind_is_among_them():
    checked = {type(spec) for spec in PIECES} | {NoAdmissionSpec}
    for family in ("growth", "admission", "routing", "merging"):
        known = {
            spec
            for kind, spec in kinds(family).items()
            if spec.__module__.startswith("memkit.")
            and kind not in ("none", "output-error", "attention", "expected-attention")
        }  # those ask what observed queries told, which the laws of a family do not make up
        assert known <= checked


def test_a_moving_average_keeps_what_it_claims():
    report = check_merge_rule(Ema, 15)

    verdicts = {verdict.law.name: verdict.status for verdict in report.verdicts}
    assert verdicts["convexity"] == "held"
    assert verdicts["conservation"] == "not claimed"
    assert verdicts["split = whole"] == "held"
    assert "conservation" in str(report)


def test_a_policy_is_checked_in_small_and_says_so():
    report = check_policy("kvm-sqrt-16", 4)

    assert report.subject == "kvm-sqrt-16"
    assert report.note == "in small: chunks of 4 tokens for 256, budgets in proportion"
    assert [verdict.law for verdict in report.verdicts] == list(POLICY_LAWS)


@pytest.mark.parametrize(("name", "note"), [("window-512", "in small: a window of 8 tokens for 512"), ("full", "")])
def test_a_policy_without_chunks_has_none_in_small(name: str, note: str):
    assert check_policy(name, 1).note == note


def test_of_a_policy_with_a_models_profile_the_layer_is_checked_whose_heads_differ_most():
    named = memkit.load_policy("untrained-observed", {"heads.profile": "smollm2-135m-repeat"})
    report = check_policy(named, 1)
    assert report.note.startswith("layer 18 of the profile, whose heads differ most; in small: ")


def test_a_broken_law_is_shown_as_code_that_runs():
    with pytest.raises(LawBroken, match="broken law: merging, conservation") as caught:
        check_merge_rule(ForgetsMass, 20)

    text = str(caught.value)
    assert "Σ w" in text
    assert "mass[0, 0, 0]: 1, expected 2" in text
    assert "from tests.faults import ForgetsMass\n" in text
    with pytest.raises(LawBroken, match="mass"):
        exec(compile(caught.value.code, "example", "exec"), {})


def test_a_broken_policy_is_shown_as_code_that_runs(monkeypatch):
    begin = memkit.pieces.window.BlockWindow.begin
    monkeypatch.setattr(memkit.pieces.window.BlockWindow, "begin", lambda self, p: begin(self, p) // 2)

    spec = memkit.PolicySpec(chunker={"kind": "fixed", "size": 2}, window={"kind": "block", "chunks": 1}, sinks=1)
    error = examine(spec, 20, laws=(laws.same_plan_same_answer,)).broken[0]

    assert "PolicySpec(\n    chunker={'kind': 'fixed', 'size': 2},\n" in error.code
    with pytest.raises(LawBroken):
        exec(compile(error.code, "example", "exec"), {})
    monkeypatch.undo()
    exec(compile(error.code, "example", "exec"), {})


def test_a_rule_without_a_name_is_shown_in_its_policy():
    error = examine(ForgetsMass, 200, laws=(laws.conservation_in_memory,)).broken[0]

    assert "merging=as_spec(ForgetsMass())" in error.code
    with pytest.raises(LawBroken, match="mass"):
        exec(compile(error.code, "example", "exec"), {})


def test_each_law_names_itself_says_what_it_is_and_why():
    for name in laws.__all__:
        law = getattr(laws, name)
        if name.isupper():
            continue
        assert law.__name__ == name
        assert law.says.endswith("."), name
        assert len((law.__doc__ or "").strip().split("\n\n")) > 1, f"{name} does not say why it matters"
        assert law.claim is None or law.claim in CLAIMS


def test_claims_have_defaults_that_follow_from_additive():
    assert all(claimed(Merging(), claim) for claim in ("conserves", "order_free", "convex", "isotropic", None))
    assert not any(claimed(Ema(), claim) for claim in ("conserves", "order_free", "isotropic"))
    assert claimed(Ema(), "convex")
    assert not claimed(WeightedMeanSpec(weight="learned", weigh=Weigh(keys=True, values=False)).build(), "convex")


def test_a_class_an_object_and_a_spec_are_all_taken():
    for subject in (Merging, Merging(), MeanSpec, MeanSpec()):
        assert check(subject, 2).broken == []


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(PolicyError, match="expected a Growth, its class or its spec, got Merging"):
        check_growth(Merging)
    with pytest.raises(PolicyError, match="stands for no piece at all"):
        check(NoAdmissionSpec)
    with pytest.raises(PolicyError, match="SqrtGrowthSpec cannot be made without arguments"):
        check_growth(SqrtGrowthSpec)
    with pytest.raises(PolicyError, match="what can be checked is a policy"):
        check(3)


def test_a_rule_that_raises_breaks_the_law_it_raises_under():
    class Fails(Merging):
        additive = False

        def combine(self, slot, token):
            raise RuntimeError("no room")

    error = examine(Fails(), 20, laws=(laws.chunks_do_not_matter,)).broken[0]

    assert "raised RuntimeError: no room" in str(error)
    assert isinstance(error.__cause__, RuntimeError)


def test_examining_leaves_the_threads_as_they_were():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    examine(Shrinks, 2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def run(*arguments: str, code: int):
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["check", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_check_prints_a_table_of_laws():
    text = run("kvm-sqrt-16", "--examples", "3", code=0).stdout

    assert "in small" in text
    assert text.count("held") == 10
    assert "split = whole" in text


def test_check_of_a_broken_piece_exits_with_1_and_names_the_law():
    text = run("tests.faults:ForgetsMass", "--examples", "10", code=1).stdout

    assert "broken law: merging, conservation" in text
    assert "not claimed" in text
    assert "laws.conservation(ForgetsMass(), Merge(" in text


def test_check_of_a_file_and_of_its_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(memkit.PolicySpec(window={"kind": "sliding", "size": 3}).to_yaml())

    assert "mine" in run(str(path), "--examples", "2", "--set", "sinks=1", code=0).stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tests.faults:ForgetsMas"], "unknown name 'ForgetsMas'; did you mean 'ForgetsMass'?"),
        (["no_such_module:Rule"], "cannot be imported"),
        (["kvm-sqr-16"], "unknown policy 'kvm-sqr-16'"),
        (["tests.faults:ForgetsMass", "--set", "a=1"], "--set changes a policy's fields"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, says):
    result = run(*arguments, code=2)

    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_importing_memkit_imports_neither_the_kit_nor_hypothesis():
    code = (
        "import sys, memkit, memkit.cli; print([m for m in sys.modules if 'hypothesis' in m or 'memkit.testing' in m])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


class SumsAreRead(Readout):
    """Forgets to divide."""

    def value(self, sums: torch.Tensor, numbers: Numbers) -> torch.Tensor:
        return sums


class SumsAreReadSpec(ReadoutSpec):
    def build(self) -> Readout:
        return SumsAreRead(self)


def test_the_laws_of_policies_are_asked_of_a_readout_that_a_policy_can_have():
    of_family = [law.name for law in laws.READOUT_LAWS]
    report = examine(SumsAreRead(ReadoutSpec()), 10, shrink=False)
    assert [verdict.law.name for verdict in report.verdicts] == of_family  # its spec builds memkit's own
    assert "values keep their size" in [error.law.name for error in report.broken]
    built = examine(SumsAreReadSpec(), 1, laws=POLICY_LAWS[-1:], shrink=False)
    assert [verdict.law for verdict in built.verdicts] == [POLICY_LAWS[-1]]


def test_what_a_piece_keeps_from_earlier_laws_hides_nothing():
    report = examine(NeverLooksBack, 20, laws=laws.GROWTH_LAWS, shrink=False)
    assert [error.law for error in report.broken] == [laws.growth_is_pure]


def test_a_piece_that_breaks_a_law_now_and_then_is_a_broken_law_too():
    torch.manual_seed(0)
    for error in examine(SeldomSteps, 100, laws=(laws.merging_is_pure, laws.chunks_do_not_matter)).broken:
        assert isinstance(error, LawBroken)


def test_admission_is_checked_too():
    error = examine(NearestAdmitted, 20, laws=(laws.novelty,)).broken[0]
    assert "redundancy of those that found" in str(error)
    error = examine(Overshoots, 20, laws=(laws.convexity,)).broken[0]
    assert "its tokens reach from" in str(error)
