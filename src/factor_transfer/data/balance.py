"""Classes of unequal size: weights of their images in the loss.

Shapes: n images, N classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from factor_transfer.util.console import say
from factor_transfer.util.errors import ConfigError, listed

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
