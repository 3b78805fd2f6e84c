"""What slots are worth at the second coming of a passage: models of a sweep, on a text that they were not trained on.

    memkit sweep sweeps/repeats.yaml --out build/sweep-repeats
    python tools/repeats.py sweeps/repeats.yaml build/sweep-repeats --text hamlet_gut.txt

For each policy and setting: accuracy and loss on the passage, mean and standard deviation over seeds; and the same with
the slots deleted, where there are any.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from memkit.evals import Score, TaskSpec, evaluate, without_slots
from memkit.lm import load_model
from memkit.policy import PolicySpec
from memkit.training.sweep import SweepSpec, load_sweep, policy_of, run_folder


def scores(
    spec: SweepSpec, folder: Path, label: str, rate: float, task: TaskSpec, policy: PolicySpec
) -> list[tuple[Score, ...]]:
    """Of the runs of one of the sweep's policies, under a policy; for each seed its settings' scores."""
    models = (load_model(run_folder(folder, label, rate, seed), policy=policy) for seed in spec.seeds)
    return [evaluate(model, task, sequences=spec.sequences).scores for model in models]


def spread(numbers: Sequence[float]) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.mean(numbers):.3f} ± {deviation:.3f}"


def main() -> None:
    """Print a line per policy, with its slots and without, and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", help="a UTF-8 file; left out: the task's own text")
    given = parser.parse_args()
    spec = load_sweep(given.sweep)
    task = spec.task if given.text is None else spec.task.model_copy(update={"text": given.text})
    if len(spec.learning_rates) != 1:
        parser.error(f"the sweep must have one learning rate, got {list(spec.learning_rates)}")
    (rate,) = spec.learning_rates
    for label, declared in spec.policies.items():
        own = policy_of(declared)
        ways = {label: own}
        if not own.build().sinks_only:
            ways[f"{label}, slots deleted"] = without_slots(own)
        for name, policy in ways.items():
            of_seeds = scores(spec, given.folder, label, rate, task, policy)
            for setting in zip(*of_seeds, strict=True):
                right, nats = spread([each.accuracy for each in setting]), spread([each.nats for each in setting])
                print(f"{name:30} {setting[0].setting:40} {setting[0].bytes / 1000:6.1f} kB  {right}  {nats} nats")


if __name__ == "__main__":
    main()
