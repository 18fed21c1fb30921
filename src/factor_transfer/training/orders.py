"""Whether a trained head numbers the classes as the data does here, found on a sample of images before any training.

timm sorts class folders by number and without case (`2, 10`; `apple, Zebra`), torchvision and Keras as plain strings
(`10, 2`; `Zebra, apple`): the same folder, other labels. A good network then scores little, and nothing fails.

Shapes: n images, N classes.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest

from factor_transfer.config import Config
from factor_transfer.data.dataset import Dataset
from factor_transfer.data.images import natural
from factor_transfer.data.splits import Sample
from factor_transfer.networks.pair import Pair, Side
from factor_transfer.tasks.base import task_of
from factor_transfer.training.engine import Engine
from factor_transfer.training.evaluation import answers
from factor_transfer.training.run_folder import Run
from factor_transfer.util.console import say, warn
from factor_transfer.util.errors import ModelError, listed
from factor_transfer.util.files import write_atomic

SAMPLE, A_CLASS, MOST = 512, 4, 2048
"""Images that are looked at: so many, or so many of each class, but never more than MOST."""

RISK = 1e-4
"""Chance of a false alarm: the exact one-sided test of McNemar must be below it, divided by the orders tried."""

NAMED, FITTED = 0.25, 0.5
"""How far an order must lead from chance to all right, in the mean over classes: one that has a name, and one that is
made to fit half of the images, on the other half."""

FITTABLE = 2000
"""Most classes for which an order is made to fit."""

SHOWN = 40
"""Most classes that are written into a message."""


@dataclass(frozen=True)
class Order:
    """An order of the classes in which a head is clearly better than in the data's."""

    name: str
    classes: tuple[str, ...]
    """The class of each output."""
    images: int
    right: float
    """Percent of right answers, in this order."""
    here: float
    """Percent of right answers, as the data numbers the classes."""
    sure: bool = True
    """Each class's place is certain, so that the order can be used."""


def check_orders(pair: Pair, data: Dataset, config: Config, run: Run, engine: Engine) -> None:
    """Look at both heads, before anything is computed.

    Raises:
        ModelError: the teacher's head has another order. (A student's is trained, so there it is a warning.)
    """
    for side in (pair.teacher, pair.student):
        error = misordered(side, data, config, run, engine)
        if error is not None and side.role == "teacher":
            raise error
        if error is not None:
            warn(f"{error.given}: {error.found} (next: {error.hint})")


def misordered(side: Side, data: Dataset, config: Config, run: Run, engine: Engine) -> ModelError | None:
    """What is to be said of a head whose order is another one; None where it is right, or nothing tells.

    All processes come to the same: each answers for its part of the images, and has the answers of all.

    Args:
        side: teacher or student.
        data: images and classes.
        config: all settings.
        run: beside its folder the order is written, as a --class-map.
        engine: where to compute.
    """
    if not (side.network.knows_classes and data.classes) or task_of(config.task).dense:
        return None  # (a label for each image is what the orders are compared by)
    named = _named_orders(side, data)
    if data.labelled:
        count = min(max(SAMPLE, A_CLASS * len(data.classes)), MOST)
        model = deepcopy(side.network.classifier)  # a look leaves no trace, such as another device
        images, size = Sample(data.validation, count), min(64, config.batch_size)
        said, labels = answers(model, images, engine, task_of(config.task), batch_size=size)
        order = find_order(said, labels, data.classes, named)
    elif side.role == "teacher" and config.kd_weight and OWN in named:
        order = Order(OWN, tuple(named[OWN]), 0, 0.0, 0.0)
    else:
        if side.role == "teacher" and config.kd_weight:
            say("teacher: without labels nothing tells whether its head has the order of the class map")
        return None
    return None if order is None else _error(side, order, data, config, run)


OWN = "the order of the label_names that came with it"
STRINGS = "plain string order, which is torchvision's and Keras's"


def _named_orders(side: Side, data: Dataset) -> dict[str, Sequence[str]]:
    """The orders in which these classes are usually numbered, the likelier first; those like the data's left out."""
    classes = data.classes
    own = (getattr(side.network.module, "pretrained_cfg", None) or {}).get("label_names") or ()
    first = np.unique(data.train.labels, return_index=True)
    whole = [str(part) for part in classes]
    found: dict[str, Sequence[str]] = {
        OWN: [str(name) for name in own],
        STRINGS: sorted(whole),
        "natural order without case, which is timm's": sorted(whole, key=natural),
        "string order without case": sorted(whole, key=lambda name: (name.casefold(), name)),
        "natural order with case": sorted(whole, key=partial(natural, case=True)),
        "the order of their first images": [classes[at] for at in first[0][np.argsort(first[1])]],
        "the data's, one output later": [classes[-1], *classes[:-1]],
        "the data's, one output earlier": [*classes[1:], classes[0]],
    }
    kept: dict[str, Sequence[str]] = {}
    for name, order in found.items():
        new = tuple(order) != classes and not any(tuple(order) == tuple(other) for other in kept.values())
        if new and sorted(order) == sorted(classes):
            kept[name] = order
    return kept


def find_order(
    said: np.ndarray, labels: np.ndarray, classes: Sequence[str], named: Mapping[str, Sequence[str]]
) -> Order | None:
    """The order in which a head is clearly better than in the data's; None where there is none.

    Args:
        said: the output that was largest for each image, (n,).
        labels: the classes of the images as the data numbers them, (n,).
        classes: their names, by number.
        named: orders to try, by name: the class of each output.

    An order is clearly better where the images on which only one of the two is right say so by McNemar's exact test,
    and it is right on a fair share of every class: a head that always gives one answer has no order.
    """
    place = {name: number for number, name in enumerate(classes)}
    tried: list[tuple[str, np.ndarray]] = []
    for name, order in named.items():
        output_of = np.empty(len(classes), np.int64)  # the output that stands for each class
        output_of[[place[each] for each in order]] = np.arange(len(order))
        tried.append((name, output_of))
    risk = RISK / (len(tried) + 1)
    better = [each for each in tried if _better(said, labels, each[1], risk, NAMED)]
    right = {name: 100 * float((said == output_of[labels]).mean()) for name, output_of in tried}
    here = 100 * float((said == labels).mean()) if len(labels) else 0.0
    if better:
        name, _ = max(better, key=lambda each: right[each[0]])
        return Order(name, tuple(named[name]), len(labels), right[name], here)
    return _fitted(said, labels, classes, here, risk)


def _better(said: np.ndarray, labels: np.ndarray, output_of: np.ndarray, risk: float, share: float) -> bool:
    right, here = said == output_of[labels], said == labels
    for_it, against = int((right & ~here).sum()), int((here & ~right).sum())
    if not for_it or binomtest(for_it, for_it + against, alternative="greater").pvalue > risk:
        return False
    classes = np.unique(labels)
    mean = float(np.mean([right[labels == each].mean() for each in classes]))
    chance = 1 / len(output_of)
    return (mean - chance) / (1 - chance) >= share


def _fitted(said: np.ndarray, labels: np.ndarray, classes: Sequence[str], here: float, risk: float) -> Order | None:
    """The order that fits best on half of the images, if it is clearly better on the other half."""
    if len(classes) > FITTABLE:
        return None
    ranks = np.argsort(np.argsort(labels, kind="stable"), kind="stable")
    half = ranks % 2 == 0  # of each class
    if not _better(said[~half], labels[~half], _assigned(said[half], labels[half], len(classes)), risk, FITTED):
        return None
    output_of = _assigned(said, labels, len(classes))
    names = [""] * len(classes)
    for number, output in enumerate(output_of):
        names[output] = classes[number]
    hits = [said[labels == number] == output_of[number] for number in range(len(classes))]
    sure = all(each.sum() >= 2 and each.mean() > 0.5 for each in hits)
    name = "an order that was found on the images" + ("" if sure else ", of which not every place is sure")
    return Order(name, tuple(names), len(labels), 100 * float((said == output_of[labels]).mean()), here, sure)


def _assigned(said: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The output that goes best with each class, each output with one."""
    hits = np.zeros((count, count))
    np.add.at(hits, (labels, said), 1)
    return np.asarray(linear_sum_assignment(-hits)[1])


# -- what is said


def _error(side: Side, order: Order, data: Dataset, config: Config, run: Run) -> ModelError:
    """With the file that puts it right, or the command that makes it."""
    found = f"its outputs are in another order of the classes, {order.name}: {listed(order.classes)}"
    if order.images:
        found += (
            f". Of {order.images:,} validation images it is right on {order.here:.1f} % as the data numbers the "
            f"classes, on {order.right:.1f} % in that order"
        )
    given = f" (--class-map {config.class_map})" if config.class_map else ""
    return ModelError(
        f"--{side.role} {side.network.name}",
        found=found,
        valid=f"outputs in the order of the data's classes{given}",
        hint=_mended(side, order, run),
    )


def _mended(side: Side, order: Order, run: Run) -> str:
    if not order.sure:
        return "give the list of classes that it was trained with, one a line, in its order: --class-map FILE"
    features = f"; or use its features alone: --{side.role}-args num_classes=0" if side.role == "teacher" else ""
    file = run.folder.resolve().with_name(f"{run.folder.resolve().name}.classes.txt")
    try:
        if run.writes:
            write_atomic(file, "".join(f"{name}\n" for name in order.classes))
            return f"--class-map {shlex.quote(str(file))}, which now has that order{features}"
    except (OSError, UnicodeEncodeError):
        pass
    if len(order.classes) > SHOWN:
        return f"--class-map FILE with that order, one class a line; `distill` writes it{features}"
    names = " ".join(map(shlex.quote, order.classes))
    return f"--class-map classes.txt, after: printf '%s\\n' {names} > classes.txt{features}"
