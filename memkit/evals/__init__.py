"""Judging models: recall tasks, needles in text, loss by position, and how far a memory is from full attention."""

from memkit.evals.bound import error_bound
from memkit.evals.copying import CopySetting, SelectiveCopySpec
from memkit.evals.evaluator import Evaluation, Score, evaluate
from memkit.evals.fidelity import HeadFidelity, fidelity
from memkit.evals.needle import NeedleSpec, PasskeySpec
from memkit.evals.over_text import DepthSetting
from memkit.evals.positions import Stretch, documents_of, loss_by_position, stretches, without_slots
from memkit.evals.recall import MqarSpec, NoisyRecallSpec, NoisySetting, PairsSetting, ScatteredPairsSpec
from memkit.evals.repeats import PassageSetting, RepeatedPassageSpec
from memkit.evals.task import Batch, SettingSpec, TaskSpec, task

__all__ = [
    "Batch",
    "CopySetting",
    "DepthSetting",
    "Evaluation",
    "HeadFidelity",
    "MqarSpec",
    "NeedleSpec",
    "NoisyRecallSpec",
    "NoisySetting",
    "PairsSetting",
    "PassageSetting",
    "PasskeySpec",
    "RepeatedPassageSpec",
    "ScatteredPairsSpec",
    "Score",
    "SelectiveCopySpec",
    "SettingSpec",
    "Stretch",
    "TaskSpec",
    "documents_of",
    "error_bound",
    "evaluate",
    "fidelity",
    "loss_by_position",
    "stretches",
    "task",
    "without_slots",
]
