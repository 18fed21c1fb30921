"""`summary.json`, the result of a finished run: written and read here, so that other code uses attributes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from factor_transfer.method.presets import BASELINE
from factor_transfer.tasks.classification import Classification
from factor_transfer.tasks.metric import Metric
from factor_transfer.training.compute import Compute, compute_of
from factor_transfer.training.price import Price
from factor_transfer.training.run_folder import DEFAULTS, saved_summary
from factor_transfer.util.errors import RunError

VERSION = 1
"""Raise it when a reader of today would misread the file."""

ROLES = ("teacher", "baseline", "student")
"""The networks of a run, and what they are called: the baseline is the same student, trained on labels only."""

STAGES = ("teacher", "paraphraser", "hint", "student", "baseline")
"""The stages of a run in order; further paraphrasers have a number."""


@dataclass(frozen=True, kw_only=True)
class NetworkSummary:
    """What is known of one network. `measured` and `more` lie in the file beside the other fields."""

    name: str
    parameters: int
    size_bytes: int
    latency_ms: float
    layer: str
    img_size: Any
    mean: list[float]
    std: list[float]
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    output: str | None = None
    is_module: bool = False
    fingerprint: str | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    """Metrics by key; none, where there are no labels or the head was not trained."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else its stage recorded (views, beta, factor_channels), and how far student.pt2 differs."""

    def to_json(self) -> dict[str, Any]:
        """As in the file."""
        own = {name: value for name, value in asdict(self).items() if name not in {"measured", "more"}}
        if self.weights is None:
            del own["weights"]
        return {**own, **self.measured, **self.more}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], metrics: tuple[Metric, ...]) -> NetworkSummary:
        """From the file."""
        names, keys = {each.name for each in fields(cls)}, {metric.key for metric in metrics}
        own = {name: value for name, value in values.items() if name in names}
        measured = {name: value for name, value in values.items() if name in keys}
        more = {name: value for name, value in values.items() if name not in names | keys}
        return cls(**own, measured=measured, more=more)


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """What is known of the images."""

    name: str
    train: int
    validation: int
    img_size: Any
    classes: list[str]
    unlabelled: int = 0
    """Images without labels beside the training images."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of a run."""

    teacher: NetworkSummary
    student: NetworkSummary
    baseline: NetworkSummary | None = None
    data: DataSummary
    settings: dict[str, Any]
    seconds: dict[str, float]
    fingerprints: dict[str, str]
    environment: dict[str, Any]
    method: str = "Factor Transfer"
    metrics: tuple[Metric, ...] = Classification.metrics
    """Of the task; the first one is the headline. A file without them is of a run of classification."""
    loss_name: str = "cross_entropy"
    """Of the loss with the labels, in metrics.jsonl."""
    paraphraser: dict[str, Any] | None = None
    terms: list[dict[str, Any]] = field(default_factory=list)
    """Of the student's loss: name, label and weight of each."""
    pairs: list[dict[str, Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    price: dict[str, Any] | None = None
    """Multiply-adds and parameters of the parts, and what a step costs: see `training/price.py`."""
    compute: Compute | None = None
    """What its training computed; None where that is not known, as of runs before parts were priced."""
    version: int = VERSION

    @property
    def metric(self) -> Metric:
        """The headline metric."""
        return self.metrics[0]

    @property
    def networks(self) -> dict[str, NetworkSummary]:
        """The networks that there are, by role."""
        found = {"teacher": self.teacher, "baseline": self.baseline, "student": self.student}
        return {role: network for role, network in found.items() if network is not None}

    def value(self, role: str) -> float | None:
        """A network's headline metric; None where it was not measured, or there is no such network."""
        network = self.networks.get(role)
        return None if network is None else network.measured.get(self.metric.key)

    def gain(self, role: str) -> float | None:
        """How much better the student is than another network; None where one of the two was not measured."""
        own, other = self.value("student"), self.value(role)
        return None if own is None or other is None else self.metric.gain(own, other)

    def label(self, role: str) -> str:
        """What a network is called in tables: the student by its method."""
        return f"student by {self.method}" if role == "student" else role

    def to_json(self) -> dict[str, Any]:
        """As in the file."""
        own = {name: value for name, value in vars(self).items() if name not in ROLES}
        networks = {role: network.to_json() for role, network in self.networks.items()}
        compute = self.compute.to_json() if self.compute else None
        metrics = [asdict(metric) for metric in self.metrics]
        return {**own, **networks, "data": asdict(self.data), "metrics": metrics, "compute": compute}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Summary:
        """From the file; fields that are not known are left out."""
        metrics = tuple(Metric(**each) for each in values.get("metrics", ())) or Classification.metrics
        own = {each.name: values[each.name] for each in fields(cls) if values.get(each.name) is not None}
        size = {"img_size": own["data"]["img_size"]}  # of networks that see the images at the size of the data
        networks = {role: NetworkSummary.from_json({**size, **own[role]}, metrics) for role in ROLES if role in own}
        names = [each.name for each in fields(DataSummary) if each.name != "unlabelled" or each.name in own["data"]]
        data = DataSummary(**{name: own["data"][name] for name in names})
        method = BASELINE if own.get("method") == "labels alone" else own.get("method", cls.method)  # as once written
        more = {"method": method, "compute": _compute(own, networks["student"], data)}
        return cls(**{**own, **networks, **more, "data": data, "metrics": metrics})


def _compute(own: Mapping[str, Any], student: NetworkSummary, data: DataSummary) -> Compute | None:
    """What the file says; of a run whose version priced its parts and counted no images, what its settings tell."""
    if "compute" in own:
        return Compute.from_json(own["compute"])
    if "price" not in own:
        return None
    records = {stage: {"seconds": seconds} for stage, seconds in own["seconds"].items()}
    records["student"] = {**records.get("student", {}), "views": student.more.get("views", 0)}
    return compute_of(records, Price.from_json(own["price"]), DEFAULTS | own["settings"], data.train)


def read_summary(folder: Path) -> Summary:
    """The result of the finished run in `folder`. A file without a version is read too.

    Raises:
        RunError: the run is not finished, or the file is damaged or of a newer version.
    """
    values, path = saved_summary(folder), str(folder / "summary.json")
    version = values.get("version", VERSION)
    if not isinstance(version, int) or version > VERSION:
        raise RunError(path, found=f"version {version}", valid=f"version {VERSION} or earlier",
                       hint="read it with the newer factor-transfer that wrote it")  # fmt: skip
    try:
        return Summary.from_json(values)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise RunError(path, found=f"a damaged file: {error}", hint="restore it, or use another --out") from error
