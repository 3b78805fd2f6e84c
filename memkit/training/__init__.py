"""Models trained under their policy, on transformers' Trainer: text or a task in, a folder out.

Importing this package imports transformers; `import memkit` does not.
"""

from memkit.training.run import Trained, train
from memkit.training.settings import TrainingSpec, load_settings
from memkit.training.sweep import Sweep, SweepSpec, load_sweep, sweep

__all__ = ["Sweep", "SweepSpec", "Trained", "TrainingSpec", "load_settings", "load_sweep", "sweep", "train"]
