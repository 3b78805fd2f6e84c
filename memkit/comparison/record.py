"""What a comparison found: a measurement of each policy, and the settings."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from memkit.errors import InputError, ModelError, short
from memkit.plain_json import as_json
from memkit.rendering import render

if TYPE_CHECKING:
    import pandas

__all__ = ["Comparison", "Measurement"]

SHOWN_SETTINGS = (
    "model", "parameters", "dtype", "context", "text", "tokens", "skip", "scored", "decoded", "overrides", "seed",
    "load_seconds", "device", "machine", "cores", "threads", "versions",
)  # fmt: skip
"""Settings without which a comparison cannot be shown."""


@dataclass(frozen=True)
class Measurement:
    """What one policy cost, and how well the model predicted under it.

    policy: its name.
    loss: nats per token, the mean over the scored positions.
    difference: `loss` minus that of full attention at the same positions; difference_error: its standard error, taking
        positions for independent. Both None where full attention was not compared; so are the shares below.
    gap_closed: how much of the loss between StreamingLLM (`streaming-4-512`) and full attention it saves: 0 as the one,
        1 as the other; gap_error: its standard error, paired by position. None where one of the two was not compared,
        where full attention predicts no better, or where a loss is no finite number.
    second_loss, second_gap_closed, second_gap_error: the same for the second text; None where there is none.
    slots, window: slots, and tokens seen exactly, once the text is read: the mean over layers and heads, rounded.
    held_share: slots + window as a share of full attention's.
    bytes: all that the memories of all layers hold then, room to grow included; bytes_share: of full attention's.
    peak_bytes: the most they held after reading or after any decoded token.
    read_seconds: to read the text, logits excluded; tokens_per_second: tokens read in one of them.
    decode_ms: milliseconds per token decoded after reading, logits included; the median of `settings["decoded"]`.
    front: no other policy holds at most as many bytes and loses at most as much, one of the two strictly; and the loss
        is a finite number.
    """

    policy: str
    loss: float
    difference: float | None
    difference_error: float | None
    slots: int
    window: int
    held_share: float | None
    bytes: int
    bytes_share: float | None
    read_seconds: float
    decode_ms: float
    front: bool = False
    peak_bytes: int = 0
    tokens_per_second: float = 0.0
    gap_closed: float | None = None
    gap_error: float | None = None
    second_loss: float | None = None
    second_gap_closed: float | None = None
    second_gap_error: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The measurements of one run, in the order asked for, and its settings.

    settings: model, parameters, dtype, context (tokens the model was trained for, or None), text, text_sha256,
    second_text, second_text_sha256 (None without one), tokens, skip, prefill, rows, share, bytes, scored (positions in
    the loss), decoded, overrides, seed, load_seconds, device, machine, cores, threads, versions.
    """

    settings: dict[str, Any]
    policies: tuple[Measurement, ...]

    def to_dict(self) -> dict[str, Any]:
        """`{"settings": {…}, "policies": [{"policy": …, "loss": …, …}]}`; keys as in this class and `Measurement`."""
        return {"settings": self.settings, "policies": [asdict(measurement) for measurement in self.policies]}

    def to_json(self) -> str:
        """`to_dict()` as indented JSON. What was not measured, or is no finite number, is null."""
        return as_json(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """What `to_json` wrote. Raises `InputError` for anything else."""
        try:
            data = json.loads(text)
            settings, rows = dict(data["settings"]), [Measurement(**_with_loss(row)) for row in data["policies"]]
            if missing := [name for name in SHOWN_SETTINGS if name not in settings]:
                raise KeyError(missing[0])
            if not rows:
                raise ValueError("no policies")
        except (TypeError, ValueError, KeyError) as error:
            raise InputError(
                f"a comparison must be the JSON that memkit compare --json writes, got {type(error).__name__}: "
                f"{short(str(error))}"
            ) from None
        return cls(settings, tuple(rows))

    def to_pandas(self) -> pandas.DataFrame:
        """One row per policy, one column per field of `Measurement`; the settings are in `.attrs`."""
        try:
            import pandas
        except ImportError:
            raise ModelError("to_pandas needs pandas, which is not installed; run: pip install pandas") from None
        frame = pandas.DataFrame([asdict(measurement) for measurement in self.policies])
        frame.attrs.update(self.settings)
        return frame

    def table(self) -> Any:
        """A rich table sorted by memory with the memory–loss front marked, settings below: `rich.print(c.table())`."""
        return render(self, "table")

    def plot(self, axes: Any = None) -> Any:
        """Loss against memory, the front drawn as a line; into matplotlib `axes`, or into a new figure; the axes.

        Raises `ModelError` where matplotlib is not installed.
        """
        return render(self, "plot", axes)


def _with_loss(row: dict[str, Any]) -> dict[str, Any]:
    """A measurement as JSON has it, its loss a number again where that was none."""
    return {**row, "loss": math.nan} if row["loss"] is None else row
