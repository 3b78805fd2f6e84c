"""Lanes whose window slides, with sinks at most: there is nothing but READ, by `memkit/loops/reading.py`."""

from __future__ import annotations

from memkit import loops
from memkit.engine.inputs import AttendInputs
from memkit.engine.keysets import Queries
from memkit.engine.lanes import BEFORE, Lane, Lanes, Part, askable, of_lanes
from memkit.engine.leaving import LeavingTokens
from memkit.engine.schedule import Schedule, Step
from memkit.memory.rows import SlotRules
from memkit.memory.slots import SlotStore
from memkit.memory.window import Timeline

__all__ = ["SlidingLanes"]

QUERIES = 16
"""Of each head, from which on a step of four rows takes no longer than by operations; one takes twice as long. So bands
that are narrower, whose steps are as narrow, go by operations."""


class SlidingLanes(Lanes):
    """The lanes of one call whose queries see a band of the newest tokens each.

    PyTorch's kernels take a mask for it, and read what it hides; a window of whole chunks, and one that still holds all
    tokens, they read as fast as loops do.
    """

    def __init__(
        self, inputs: AttendInputs, schedule: Schedule, rules: SlotRules, timeline: Timeline, leaving: LeavingTokens
    ) -> None:
        super().__init__(inputs, schedule, rules, timeline, leaving)
        asked = askable(inputs.keys) and rules.valued and schedule.most_leaving > 0 and self.enough
        slides = self.policy.sinks_only and self.policy.window.band is not None
        self.known = asked and slides and loops.with_products()

    def knows(self, step: Step) -> bool:
        """Whether no sink is founded, so that nothing is folded, and queries are worth the setting up."""
        return not step.leaving and step.stop - step.start >= QUERIES

    def go_through(self, part: Part, queries: Queries, store: SlotStore) -> None:
        """READ."""
        run, dtype, view = loops.of_reading(), part.outputs.dtype, store.read(self.rules)
        slots = of_lanes(*(None if each is None else each.to(dtype) for each in (view.keys, view.values, view.bias)))
        plans, lanes = [self._plan(part, row) for row in range(len(part.outputs))], list[Lane]()
        for (row, _, asked, heads), (keys, values, bias) in zip(self._asked(part, queries), slots, strict=True):
            count = int(plans[row][0, BEFORE])  # before all steps: none of them folds
            met = run.Met(count, keys, keys.shape[1], values, values.shape[1], bias[:count])
            lanes.append(Lane(plans[row], (met, asked, heads)))
        self._go_through(lanes, run.steps, self.policy.window.band)
