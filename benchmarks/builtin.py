"""Make the images and the teacher that the package carries: --data fashion, --teacher cifar_resnet20.fashion.

    python benchmarks/builtin.py images IMAGES    # writes src/factor_transfer/builtin/fashion.npz
    python benchmarks/builtin.py teacher IMAGES   # trains in runs/builtin-teacher; the safetensors file beside it

IMAGES holds the four files of Fashion-MNIST (Debian's dataset-fashion-mnist puts them in
/usr/share/datasets/fashion-mnist). The teacher sees the first 20,000 training images. The package's training images are
2,000 others of the training set. Its validation images are the first 2,000 of the test set: no network was trained on
them, and no setting was chosen on them.
"""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from factor_transfer import distill
from factor_transfer.data.sources import FASHION_CLASSES
from factor_transfer.networks.weightfiles import read_tensors

FOLDER = Path(__file__).parents[1] / "src/factor_transfer/builtin"
TEACHER = slice(0, 20_000)
"""Of the training set: what the teacher is trained on."""
STUDENT = slice(40_000, 42_000)
"""Of the training set: the package's training images."""
MEASURED = slice(56_000, 60_000)
"""Of the training set: what the teacher is measured on while it is trained."""
VALIDATION = slice(0, 2_000)
"""Of the test set: the package's validation images."""


def main() -> None:
    """Make what is asked for."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "images":
        images(folder)
    else:
        os.environ["FASHION"] = str(folder)
        teacher()


def part(folder: Path, name: str, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 28, 28) and class indices (n,) of `train` or `t10k`."""
    pixels, labels = (
        np.frombuffer(gzip.decompress((folder / f"{name}-{kind}-ubyte.gz").read_bytes())[skip:], np.uint8)
        for kind, skip in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return pixels.reshape(-1, 28, 28)[rows], labels[rows]


def images(folder: Path) -> None:
    """The package's images, as arrays."""
    (train, labels), (validation, answers) = part(folder, "train", STUDENT), part(folder, "t10k", VALIDATION)
    path = FOLDER / "fashion.npz"
    np.savez_compressed(path, train=train, train_labels=labels, validation=validation, validation_labels=answers)


def teachers_images() -> tuple[list[tuple[Image.Image, int]], list[tuple[Image.Image, int]], tuple[str, ...]]:
    """What the teacher is trained and measured on, as --data takes it."""
    found = []
    for rows in (TEACHER, MEASURED):
        pixels, labels = part(Path(os.environ["FASHION"]), "train", rows)
        found.append([(Image.fromarray(image), int(label)) for image, label in zip(pixels, labels, strict=True)])
    return found[0], found[1], FASHION_CLASSES


def teacher() -> None:
    """Train it. (The job also trains a tiny student for one pass, which is not used.)"""
    distill(
        "cifar_resnet20", "cifar_resnet20", "builtin:teachers_images", teacher_epochs=4, hflip=0.5, epochs=1, beta=0.0,
        student_args={"layers": (1, 1, 1), "channels": (4, 4, 8)}, val_interval=4, precision="fp32", device="cpu",
        threads=1, log_with="none", out="runs/builtin-teacher",
    )  # fmt: skip
    made = read_tensors(Path("runs/builtin-teacher/teacher.safetensors"), "the teacher")
    save_file(
        {name: tensor.contiguous() for name, tensor in made.by_name.items()},
        FOLDER / "cifar_resnet20.fashion.safetensors",
    )


if __name__ == "__main__":
    main()
