"""What became of the laws: a verdict on each, and the report of an examination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memkit.rendering import render
from memkit.testing.law import Law, LawBroken

__all__ = ["Report", "Verdict"]


@dataclass(frozen=True)
class Verdict:
    """What became of one law. error: the counter-example, where it is broken."""

    law: Law
    status: Literal["held", "broken", "not claimed"]
    error: LawBroken | None = None


@dataclass(frozen=True)
class Report:
    """The verdicts on one subject. note: what the reader must know about how it was examined."""

    subject: str
    verdicts: tuple[Verdict, ...]
    note: str = ""

    @property
    def broken(self) -> list[LawBroken]:
        """The counter-examples, in the order of the laws."""
        return [verdict.error for verdict in self.verdicts if verdict.error is not None]

    def raise_if_broken(self) -> Report:
        """The report itself where every law held; else raises the first counter-example."""
        if self.broken:
            raise self.broken[0]
        return self

    def _repr_html_(self) -> str:
        return render(self, "html")

    def __str__(self) -> str:
        width = max(len(_title(verdict.law)) for verdict in self.verdicts)
        lines = [f"{_title(verdict.law):<{width}}  {verdict.status}" for verdict in self.verdicts]
        return "\n".join([self.subject, *([self.note] if self.note else []), *lines])


def _title(law: Law) -> str:
    return f"{law.family}: {law.name}"
