"""A headless, self-supervised teacher and students of it on the digits: with labels, and without any.

The teacher learns which way up an image is (RotNet; Gidaris, Singh, Komodakis, ICLR 2018), without class labels. Its
weights go without their head. One student has labels; one sees a flat folder of the same images and nothing else.
What has no head is measured by a linear classifier on its pooled features, fitted on the training images.

    python benchmarks/label_free.py [--out results/label-free.json] [--seeds 3]
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from cyclopts import App
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import nn

from factor_transfer import distill
from factor_transfer.config import DataConfig
from factor_transfer.data.dataset import Dataset, open_data
from factor_transfer.data.splits import Split
from factor_transfer.distillation import evaluate_run
from factor_transfer.networks.load import Network, load_network
from factor_transfer.training.run_folder import environment
from factor_transfer.util.seeds import seeded

TEACHER: dict[str, Any] = {"layers": (2, 2, 2), "channels": (16, 32, 64)}
STUDENT: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 8, 16)}
SIZE = 16
app = App()


def whole(split: Split) -> tuple[torch.Tensor, np.ndarray]:
    """All images of a split, uint8 (N, 3, S, S), and their labels (N,)."""
    (batch,) = split.batches([np.arange(len(split))], view=None)
    return batch.image, batch.label.numpy()


def rotation_teacher(data: Dataset, passes: int) -> nn.Module:
    """A network that tells four rotations apart; it is shown no label."""
    images, _ = whole(data.train)
    with seeded(0):
        network = timm.create_model("cifar_resnet20", **TEACHER, num_classes=4)
        norm = Network(network, "", (SIZE, SIZE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True).norm
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        for _ in range(passes):
            for chunk in torch.randperm(len(images)).split(32):  # type: ignore[no-untyped-call]
                turned = torch.cat([torch.rot90(images[chunk], turn, (2, 3)) for turn in range(4)])
                loss = nn.functional.cross_entropy(network(norm(turned)), torch.arange(4).repeat_interleave(len(chunk)))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    network.eval()
    return network  # type: ignore[no-any-return]


@torch.no_grad()
def probe(module: nn.Module, norm: nn.Module, data: Dataset) -> float:
    """Top-1, in percent, of a linear classifier on pooled features."""
    module.eval()
    (train, labels), (held_out, wanted) = whole(data.train), whole(data.validation)
    features = [module.forward_features(norm(images)).mean((2, 3)).numpy() for images in (train, held_out)]  # type: ignore[operator]
    scale = features[0].std(0) + 1e-6
    fitted = LogisticRegression(max_iter=2000).fit(features[0] / scale, labels)
    return 100 * float((fitted.predict(features[1] / scale) == wanted).mean())


def flat_folder(data: Dataset, folder: Path) -> Path:
    """The training images as files, in no class folder."""
    folder.mkdir()
    for number, image in enumerate(whole(data.train)[0]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:04}.png")
    return folder


@app.default
def run(*, out: Path = Path("results/label-free.json"), seeds: int = 3, passes: int = 10, epochs: int = 20) -> None:
    """Train, distil and measure."""
    torch.set_num_threads(1)
    data = open_data(DataConfig(data="digits", img_size=SIZE), default_size=lambda: SIZE)
    found: dict[str, list[float]] = {
        "labelled student": [],
        "same student alone": [],
        "label-free student": [],
        "untrained student": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        teacher = rotation_teacher(data, passes)
        weights = {name: value for name, value in teacher.state_dict().items() if not name.startswith("linear")}
        save_file(weights, here / "rotnet.safetensors")
        images = flat_folder(data, here / "flat")
        settings: dict[str, Any] = {
            "teacher_weights": str(here / "rotnet.safetensors"), "teacher_args": TEACHER, "student_args": STUDENT,
            "img_size": SIZE, "hflip": 0.0, "crop_padding": 2, "epochs": epochs, "paraphraser_epochs": 20,
            "batch_size": 64, "lr": 0.05, "threads": 1, "device": "cpu",
        }  # fmt: skip
        norm = load_network("cifar_resnet20", role="student", num_classes=10, img_size=SIZE, args=STUDENT).norm
        for seed in range(seeds):
            named = here / f"labelled-{seed}"
            distill("cifar_resnet20", "cifar_resnet20", "digits", **settings, seed=seed, baseline=True, out=str(named))
            measured = evaluate_run(named)
            found["labelled student"].append(measured["student"]["top1"])
            found["same student alone"].append(measured["baseline"]["top1"])
            free = distill("cifar_resnet20", "cifar_resnet20", images, **settings, seed=seed, label_weight=0.0,
                           out=str(here / f"free-{seed}"))  # fmt: skip
            found["label-free student"].append(probe(free.student, norm, data))
            fresh = load_network(
                "cifar_resnet20", role="student", num_classes=10, img_size=SIZE, args=STUDENT, seed=seed
            )
            found["untrained student"].append(probe(fresh.module, norm, data))
        result = {
            "command": f"python benchmarks/label_free.py --seeds {seeds} --passes {passes} --epochs {epochs}",
            "teacher, linear probe": probe(teacher, norm, data),
            **{name: {"top1": values, "mean": float(np.mean(values))} for name, values in found.items()},
            "environment": environment(),
        }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    app()
