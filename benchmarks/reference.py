"""The published procedure, written plainly, to measure against: float32, contiguous layout, a live teacher.

As there: each image is cropped, flipped and normalised by itself (PIL and torchvision) in a DataLoader's processes, the
residual blocks make their ReLUs beside the maps and their sums in them (the authors' program, Models/resnet.py), and
the teacher's graph is recorded by autograd although nothing is trained through it. `graph=False` leaves that out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, multiprocessing, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from factor_transfer.method.factor_transfer import Paraphraser, Translator
from factor_transfer.zoo.resnet import BasicBlock

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


class PublishedBlock(BasicBlock):
    """A residual block that computes as the authors' program does, whatever the zoo saves."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return F.relu(y)


def as_published(network: nn.Module) -> nn.Module:
    """The network itself, its blocks published ones."""
    for module in network.modules():
        if type(module) is BasicBlock:
            module.__class__ = PublishedBlock
    return network


class Reference:
    """The loop.

    Args:
        teacher: gives (logits, feature).
        student: likewise.
        paraphraser: its encoder makes the teacher's factors.
        translator: makes the student's.
        images: what is shown.
        graph: let autograd record the teacher's pass, as the published program does.
        workers: processes of the DataLoader.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        paraphraser: Paraphraser,
        translator: Translator,
        images: Cifar,
        *,
        graph: bool,
        workers: int = 2,
    ) -> None:
        self.teacher, self.student = as_published(teacher).eval(), as_published(student).train()
        self.paraphraser = paraphraser.eval()
        self.translator, self.graph = translator, graph
        self.loader = DataLoader(
            images, batch_size=128, shuffle=True, num_workers=workers, multiprocessing_context="fork"
        )
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
        ours, theirs = (F.normalize(each.flatten(1)) for each in (self.translator(feature), factor.detach()))
        loss = F.cross_entropy(logits, labels) + 500 * F.l1_loss(ours, theirs)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(loss)
        for optimizer in self.optimizers:
            optimizer.step()
        loss.item()  # as there, printed as a running mean


class Loop(Protocol):
    """What trains with the published procedure."""

    def run(self, steps: int) -> None:
        """Train for some steps."""

    def run_pass(self) -> None:
        """Train for one pass."""


class _Remote:
    """A `Reference` in another process, which does one thing at a time and is waited for."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def run(self, steps: int) -> None:
        self.pipe.send(steps)
        self.pipe.recv()

    def run_pass(self) -> None:
        self.run(0)


@contextmanager
def apart(threads: int, **parts: Any) -> Iterator[Loop]:
    """A `Reference` of these parts in a process of its own, as it would be run: our settings of memory touch it not."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, threads, parts))
    process.start()
    theirs.close()
    try:
        yield _Remote(ours)
    finally:
        ours.close()
        process.join()


def _serve(pipe: Connection, threads: int, parts: Mapping[str, Any]) -> None:
    torch.set_num_threads(threads)
    reference = Reference(**parts)
    while True:
        try:
            steps = pipe.recv()
        except EOFError:
            return
        if steps:
            reference.run(steps)
        else:
            reference.run_pass()
        pipe.send(None)
