"""The published procedure, written plainly, to measure against: float32, contiguous layout, a live teacher.

As there: each image is cropped, flipped and normalised by itself (PIL and torchvision) in a DataLoader's processes, and
the teacher's graph is recorded by autograd although nothing is trained through it. `graph=False` leaves that out.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from factor_transfer.method import Paraphraser, Translator, factor_transfer_loss

Pixels = np.ndarray


class Cifar(Dataset[tuple[Tensor, int]]):
    """Decoded images (N, 32, 32, 3) as torchvision's CIFAR10 holds and shows them."""

    def __init__(self, pixels: Pixels, labels: np.ndarray, mean: list[float], std: list[float]) -> None:
        self.pixels, self.labels = pixels, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


class Reference:
    """The loop.

    Args:
        teacher: gives (logits, feature).
        student: likewise.
        paraphraser: its encoder makes the teacher's factors.
        images: what is shown.
        graph: let autograd record the teacher's pass, as the published program does.
        workers: processes of the DataLoader.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        paraphraser: Paraphraser,
        images: Cifar,
        *,
        graph: bool,
        workers: int = 2,
    ) -> None:
        self.teacher, self.student, self.paraphraser = teacher.eval(), student.train(), paraphraser.eval()
        self.translator, self.graph = Translator(64, 32), graph
        self.loader = DataLoader(images, batch_size=128, shuffle=True, num_workers=workers)
        self.optimizers = [
            torch.optim.SGD(part.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
            for part in (self.student, self.translator)
        ]

        self._stream = self._endless()

    def run_pass(self) -> None:
        """Train for one pass."""
        for images, labels in self.loader:
            self.step(images, labels)

    def run(self, steps: int) -> None:
        """Train for some steps; the loader's processes go on from where they were."""
        for images, labels in islice(self._stream, steps):
            self.step(images, labels)

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.loader

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One update of student and translator."""
        with torch.set_grad_enabled(self.graph):
            factor = self.paraphraser.encode(self.teacher(images)[1])
        logits, feature = self.student(images)
        loss = F.cross_entropy(logits, labels) + 500 * factor_transfer_loss(self.translator(feature), factor.detach())
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(loss)
        for optimizer in self.optimizers:
            optimizer.step()
        loss.item()  # as there, printed as a running mean
