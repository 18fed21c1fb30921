"""One figure by which a network is judged: its key in files, how it is written, and which direction is better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A named figure of a network.

    >>> error = Metric("mae", "mean absolute error", "grades", digits=3, higher_is_better=False)
    >>> error.shown(0.25), error.heading, error.gain(0.2, 0.25) > 0
    ('0.250 grades', 'mean absolute error, grades', True)
    """

    key: str
    """In summary.json, exports.json, compare.json; in metrics.jsonl after `train_` and `validation_`."""
    label: str
    unit: str = ""
    digits: int = 2
    higher_is_better: bool = True
    hub: str = ""
    """What the Hugging Face hub calls it, for the model card. Default: the key."""

    @property
    def heading(self) -> str:
        """Label and unit: the head of a column."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def axis(self) -> str:
        """The heading of a plot's axis, with the direction where it is not the usual one."""
        return self.heading if self.higher_is_better else f"{self.heading} (lower is better)"

    @property
    def points(self) -> str:
        """The unit of a difference: percent differ by points."""
        return "points" if self.unit == "%" else self.unit

    def number(self, value: float | None) -> str:
        """A value without its unit, for a table; `-` where there is none."""
        return "-" if value is None else f"{value:.{self.digits}f}"

    def shown(self, value: float) -> str:
        """A value with its unit, for a sentence."""
        return f"{self.number(value)} {self.unit}".rstrip()

    def gain(self, one: float, other: float) -> float:
        """How much better `one` is than `other`; below 0 where it is worse."""
        return one - other if self.higher_is_better else other - one

    def signed(self, gain: float) -> str:
        """A gain with its sign and unit: `+1.20 points`."""
        return f"{gain:+.{self.digits}f} {self.points}".rstrip()

    def against(self, one: float, other: float) -> str:
        """How `one` differs from `other`, in words.

        >>> Metric("top1", "top-1", "%").against(89.0, 90.0)
        '1.00 points less top-1'
        >>> Metric("mae", "error", "grades", higher_is_better=False).against(1.5, 1.25)
        '0.25 grades more error (worse)'
        """
        words = [f"{abs(one - other):.{self.digits}f}", self.points, "more" if one >= other else "less", self.label]
        if not self.higher_is_better and one != other:
            words.append("(better)" if one < other else "(worse)")
        return " ".join(word for word in words if word)
