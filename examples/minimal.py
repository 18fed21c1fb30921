"""Factor Transfer as a plain loop: teacher, paraphraser, student, on scikit-learn's digits. Runs in about a minute.

The equations are in `factor_transfer.method.factor_transfer`; everything else here is ordinary PyTorch.
"""

from collections.abc import Iterator

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import factor_transfer.zoo  # noqa: F401 (registers the paper's CIFAR networks with timm)
from factor_transfer import Paraphraser, Translator, factor_transfer_loss, reconstruction_loss

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1).repeat(1, 3, 2, 2) / 8 - 1  # (1797, 3, 16, 16)
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels))
train, held_out = order[:1257], order[1257:]


def batches(epochs: int) -> Iterator[Tensor]:
    """Indices of 64 training images at a time, in a new order each pass."""
    for _ in range(epochs):
        yield from torch.split(train[torch.randperm(len(train))], 64)


def sgd(*modules: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    """The authors' optimizer: plain momentum, weight decay on everything."""
    return torch.optim.SGD([p for m in modules for p in m.parameters()], lr, momentum=0.9, weight_decay=5e-4)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One update."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


@torch.no_grad()
def top1(network: nn.Module) -> float:
    """Percent of the held-out images that the network gets right."""
    right = network.eval()(images[held_out]).argmax(1) == labels[held_out]
    return 100 * float(right.float().mean())


teacher = timm.create_model("cifar_resnet20")  # last feature map: (B, 64, 4, 4)
optimizer = sgd(teacher)
for batch in batches(epochs=10):
    step(optimizer, F.cross_entropy(teacher(images[batch]), labels[batch]))
teacher.eval().requires_grad_(False)

paraphraser = Paraphraser(in_channels=64, factor_channels=32)  # k = 0.5
optimizer = sgd(paraphraser)
for batch in batches(epochs=10):
    feature = teacher.forward_features(images[batch])
    step(optimizer, reconstruction_loss(paraphraser(feature), feature))  # equation 1
paraphraser.requires_grad_(False)

student = timm.create_model("cifar_resnet20", layers=(1, 1, 1), channels=(4, 8, 16))
translator, beta = Translator(in_channels=16, factor_channels=32), 60
optimizer = sgd(student, translator)
for batch in batches(epochs=20):
    feature = student.forward_features(images[batch])
    factor = paraphraser.encode(teacher.forward_features(images[batch]))
    factor_loss = factor_transfer_loss(translator(feature), factor)  # equation 4
    step(optimizer, F.cross_entropy(student.forward_head(feature), labels[batch]) + beta * factor_loss)  # equation 2

print(f"teacher {top1(teacher):.2f} %, student by Factor Transfer {top1(student.eval()):.2f} %")
