"""Growth changed at test time: models of a sweep, each read with other schedules than the one it was trained with.

    memkit sweep sweeps/ablations.yaml --out build/sweep-ablations
    python tools/growth.py sweeps/ablations.yaml build/sweep-ablations kvm growth-sqrt growth-linear

Accuracy on the task's last setting, mean and standard deviation over seeds; and the slots that there are at the end.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from memkit.catalog import load_policy
from memkit.evals import evaluate
from memkit.lm import load_model
from memkit.policy import PolicySpec
from memkit.training.sweep import SweepSpec, load_sweep, policy_of, run_folder

GROWTHS: dict[str, dict[str, Any]] = {
    "fixed, 16": {"kind": "fixed", "slots": 16},
    "fixed, 32": {"kind": "fixed", "slots": 32},
    "fixed, 48": {"kind": "fixed", "slots": 48},
    "log, 12 a doubling": {"kind": "log", "per_doubling": 12, "start": 16, "floor": 16},
    "sqrt, 3·√t": {"kind": "sqrt", "factor": 3, "floor": 16},
    "linear, t/2": {"kind": "linear", "fraction": 0.5, "floor": 16},
}
"""The schedules that models are read with, besides full attention."""


def read_with(own: PolicySpec) -> dict[str, PolicySpec]:
    """A policy with each of the schedules, and full attention."""
    first_chunk = own.model_dump()["growth"]["first_chunk"]
    policies = {
        label: load_policy(own, {"growth": {**growth, "first_chunk": first_chunk}}) for label, growth in GROWTHS.items()
    }
    return {**policies, "full": load_policy("full")}


def accuracies(spec: SweepSpec, folder: Path, label: str, rate: float, policy: PolicySpec) -> list[float]:
    """Of the runs of one of the sweep's policies, under another policy; one for each seed."""
    task = spec.task.model_copy(update={"settings": spec.task.settings[-1:]})
    models = (load_model(run_folder(folder, label, rate, seed), policy=policy) for seed in spec.seeds)
    return [evaluate(model, task, sequences=spec.sequences).scores[-1].accuracy for model in models]


def main() -> None:
    """Print a line per schedule that models were trained with, and per one that they are read with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("policies", nargs="+", help="labels of the sweep's policies")
    parser.add_argument("--learning-rate", type=float, help="of the runs; left out: the sweep's, if it has but one")
    given = parser.parse_args()
    spec = load_sweep(given.sweep)
    rate = given.learning_rate
    if rate is None:
        if len(spec.learning_rates) != 1:
            parser.error(f"--learning-rate must be one of {list(spec.learning_rates)}, got none")
        (rate,) = spec.learning_rates
    tokens = spec.task.settings[-1].tokens
    for label in given.policies:
        for name, policy in read_with(policy_of(spec.policies[label])).items():
            found = accuracies(spec, given.folder, label, rate, policy)
            slots = "" if name == "full" else f"{policy.build().slots_after(tokens)} slots"
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            print(f"trained {label:13} read {name:18} {slots:10} {statistics.mean(found):.3f} ± {spread:.3f}")


if __name__ == "__main__":
    main()
