"""Classes of unequal size: weights of their images in the loss, and passes that show all classes alike.

Shapes: n images, N classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml

from factor_transfer.data.splits import Batch, Split, View
from factor_transfer.data.views import permutation
from factor_transfer.util.console import say
from factor_transfer.util.errors import ConfigError, listed
from factor_transfer.util.seeds import part_seed

BALANCED = "balanced"

VALID = f"{BALANCED}, or a YAML or JSON file with a number above 0 for every class: `cat: 2.5`"


def class_weights(given: str | None, labels: np.ndarray, classes: Sequence[str]) -> tuple[float, ...]:
    """The weight of each class, in index order.

    Balanced weights are scikit-learn's: n / (number of classes x images of the class). Their mean over images is 1, and
    a class without images has 1.

    Args:
        given: `balanced`, or the file that names them; None: all images count alike, and there are no weights.
        labels: of the training images, (n,).
        classes: names in index order.

    Raises:
        ConfigError: the file is missing or damaged, or has other classes.

    >>> class_weights("balanced", np.array([0, 0, 0, 1]), ("cat", "dog"))
    (0.6666666666666666, 2.0)
    """
    if given is None:
        return ()
    if given == BALANCED:
        counts = np.bincount(labels, minlength=len(classes))
        there = int((counts > 0).sum())
        made = tuple(len(labels) / (there * int(count)) if count else 1.0 for count in counts)
        least, most = int(np.argmin(made)), int(np.argmax(made))
        say(f"class weights: from {made[least]:.3g} ({classes[least]}) to {made[most]:.3g} ({classes[most]})")
        return made
    flag = f"--class-weights {given}"
    try:
        read = yaml.safe_load(Path(given).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(flag, found=str(error), valid=VALID) from error
    if not isinstance(read, dict):
        raise ConfigError(flag, found=f"a {type(read).__name__}", valid=VALID)
    found = {str(name): value for name, value in read.items()}
    other, lacking = [name for name in found if name not in classes], [name for name in classes if name not in found]
    if other or lacking:
        what = f"no such class: {listed(other)}" if other else f"no weight of {listed(lacking)}"
        raise ConfigError(flag, found=what, valid=listed(list(classes)))
    bad = [name for name, value in found.items() if type(value) not in {int, float} or not 0 < value < float("inf")]
    if bad:
        raise ConfigError(flag, found=f"{bad[0]}: {found[bad[0]]}", valid="a number above 0")
    return tuple(float(found[name]) for name in classes)


class Balanced(Split):
    """The images of a split, in passes of as many images that show every class equally often.

    The images of a class come in turn, in an order that is drawn anew whenever all were shown. So over a run all images
    of a class are shown equally often, or once more. A pass is a function of seed and number.

    Raises:
        ConfigError: there is one class only.

    >>> from factor_transfer.config import DataConfig
    >>> from factor_transfer.data.dataset import open_data
    >>> split = Balanced(open_data(DataConfig(data="digits"), default_size=lambda: 8).train)
    >>> int(np.bincount(split.labels[split.order(seed=0, epoch=3)]).min()), len(split) // 10
    (125, 125)
    """

    def __init__(self, split: Split) -> None:
        self._split, self.labels = split, split.labels
        self._members = [np.flatnonzero(split.labels == label) for label in np.unique(split.labels)]
        if len(self._members) < 2:
            raise ConfigError("--sampler balanced", found="images that are not of several classes", hint="leave it out")
        each, rest = divmod(len(split), len(self._members))
        self._quotas = [each + (place < rest) for place in range(len(self._members))]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """See `Split`; some images come several times, others not at all."""
        drawn = []
        for place, (members, quota) in enumerate(zip(self._members, self._quotas, strict=True)):
            turns, places = np.divmod(np.arange(epoch * quota, (epoch + 1) * quota), len(members))
            own = part_seed(seed, "balanced", place)
            orders = {turn: permutation(own, turn, len(members)) for turn in np.unique(turns).tolist()}
            drawn.append(members[[orders[turn][at] for turn, at in zip(turns.tolist(), places.tolist(), strict=True)]])
        found: np.ndarray = np.concatenate(drawn)[permutation(seed, epoch, len(self))]
        return found

    def batches(self, chunks: Iterable[np.ndarray], view: View | None) -> Iterator[Batch]:
        """See `Split`."""
        return self._split.batches(chunks, view)

    def hidden(self, passes: int) -> int:
        """How many images so many passes do not show."""
        return sum(max(0, len(each) - passes * quota) for each, quota in zip(self._members, self._quotas, strict=True))

    def told(self, passes: int) -> str:
        """What a user is told of it."""
        most = max(-(-quota // len(each)) for each, quota in zip(self._members, self._quotas, strict=True))
        return (
            f"sampler balanced: a pass shows each of {len(self._members)} classes {min(self._quotas):,} times, an "
            f"image up to {most:,} times; {self.hidden(1):,} of {len(self):,} images are not in it, and "
            f"{self.hidden(passes):,} in none of {passes} passes"
        )
