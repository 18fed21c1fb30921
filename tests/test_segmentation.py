"""Segmentation: masks beside images, their views, the measure against numpy, and a whole run with all that follows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from factor_transfer.config import Config, DataConfig
from factor_transfer.data.dataset import Dataset, open_data
from factor_transfer.data.masks import IGNORED
from factor_transfer.distillation import evaluate_run, run_distillation
from factor_transfer.doctor import diagnose
from factor_transfer.export.predict import predict_images
from factor_transfer.export.shipping import Choices, export_run
from factor_transfer.method.losses import SoftTargets
from factor_transfer.method.term import StudentOutputs
from factor_transfer.networks.layers import find_groups, find_layer
from factor_transfer.networks.load import load_network
from factor_transfer.report.html import write_report
from factor_transfer.tasks.base import task_of
from factor_transfer.util.errors import FactorTransferError
from processes import leave_out

TASK = task_of("segmentation")
COLOURS = np.array([[200, 20, 20], [20, 200, 20], [20, 20, 200], [90, 90, 90]], np.uint8)
"""Of each class, and of pixels that count nowhere: so that a mask can be read from its image."""


def scene(random: np.random.Generator, side: tuple[int, int]) -> np.ndarray:
    """A mask of blocks of three classes, with pixels that count nowhere along the top."""
    mask = np.zeros(side, np.uint8)
    for index in (1, 2):
        top, left = random.integers(0, side[0] // 2), random.integers(0, side[1] // 2)
        mask[top : top + side[0] // 2, left : left + side[1] // 2] = index
    mask[: side[0] // 8] = IGNORED
    return mask


def write(folder: Path, name: str, mask: np.ndarray, images: str = "images", masks: str = "masks") -> None:
    for where in (images, masks):
        (folder / where).mkdir(parents=True, exist_ok=True)
    Image.fromarray(COLOURS[np.minimum(mask, 3)]).save(folder / images / f"{name}.png")
    Image.fromarray(mask).save(folder / masks / f"{name}.png")


def make(folder: Path, side: tuple[int, int] = (16, 24), train: int = 8, validation: int = 4) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        for number in range(count):
            write(folder / split, f"{number:02}", scene(random, side))
    (folder / "classes.txt").write_text("ground\nblock\nstone\n")
    return folder


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("blocks"))


def opened(data: Path, **settings: Any) -> Dataset:
    return open_data(DataConfig(**{"data": str(data), "workers": 0, **settings}), lambda: 224, masked=True)


# -- data


@pytest.mark.parametrize(("side", "mode"), [((16, 24), None), ((120, 180), None), ((120, 180), "border")])
def test_views__move_images_and_masks_together(tmp_path: Path, side: tuple[int, int], mode: str | None) -> None:
    """A mask that is read from the colours of the transformed image is the transformed mask, but along edges."""
    size = {"img_size": (128, 128)} if mode else {}
    split = opened(make(tmp_path, side), crop_mode=mode, **size).train
    for view in (0, 1, None):
        (batch,) = split.batches([np.arange(8)], view)
        assert batch.mask is not None
        pixels = batch.image.permute(0, 2, 3, 1).float()
        read = (pixels[..., None, :] - torch.from_numpy(COLOURS).float()).square().sum(-1).argmin(-1)
        truth = torch.where(batch.mask == IGNORED, 3, batch.mask)
        kept = truth != 3  # borders are black or grey, and count nowhere
        assert float((read == truth)[kept].float().mean()) > 0.97
        assert 0.3 < float(kept.float().mean()) < 1


def test_views__are_a_function_of_seed_sample_and_view(blocks: Path) -> None:
    split = opened(blocks).train
    (whole,) = split.batches([np.arange(8)], view=3)
    parts = list(split.batches([np.array([5]), np.array([2, 5])], view=3))
    assert whole.mask is not None
    for part in parts:
        assert part.mask is not None
        torch.testing.assert_close(part.mask, whole.mask[part.index])
        torch.testing.assert_close(part.image, whole.image[part.index])
    (other,) = split.batches([np.arange(8)], view=4)
    assert not torch.equal(other.mask, whole.mask)  # type: ignore[arg-type]


def renamed(blocks: Path, folder: Path, layout: str) -> Path:
    """The same images in another layout."""
    images, masks = ("JPEGImages", "SegmentationClass") if layout == "voc" else ("images", "masks")
    lists = folder / "ImageSets" / "Segmentation" if layout == "voc" else folder
    lists.mkdir(parents=True, exist_ok=True)
    for split, short in (("train", "train"), ("validation", "val")):
        for kind, name in (("images", images), ("masks", masks)):
            where = folder / name / split if layout == "inside" else folder / name
            where.mkdir(parents=True, exist_ok=True)
            for path in (blocks / split / kind).iterdir():
                shutil.copy(path, where / (path.name if layout == "inside" else f"{split}{path.name}"))
        if layout != "inside":
            names = sorted(path.stem for path in (blocks / split / "images").iterdir())
            (lists / f"{short}.txt").write_text("".join(f"{split}{name}\n" for name in names))
    shutil.copy(blocks / "classes.txt", folder)
    return folder


@pytest.mark.parametrize("layout", ["lists", "voc", "inside"])
def test_layouts__give_the_same_images(blocks: Path, tmp_path: Path, layout: str) -> None:
    wanted, found = opened(blocks), opened(renamed(blocks, tmp_path / "data", layout))
    assert found.classes == wanted.classes == ("ground", "block", "stone")
    assert found.pixels == wanted.pixels
    for ours, theirs in ((found.train, wanted.train), (found.validation, wanted.validation)):
        (one,), (other,) = (split.batches([np.arange(4)], view=None) for split in (ours, theirs))
        torch.testing.assert_close(one.mask, other.mask)
        torch.testing.assert_close(one.image, other.image)


def test_layouts__a_list_is_a_set_of_its_own(blocks: Path, tmp_path: Path) -> None:
    folder = renamed(blocks, tmp_path / "data", "lists")
    config, known = DataConfig(data=str(folder / "val.txt"), workers=0), ("ground", "block", "stone")
    found = open_data(config, lambda: 0, known=known, masked=True)
    assert len(found.validation) == 4


def test_fingerprint__covers_masks(blocks: Path, tmp_path: Path) -> None:
    shutil.copytree(blocks, tmp_path / "data")
    path = tmp_path / "data" / "train" / "masks" / "03.png"
    mask = np.array(Image.open(path))
    mask[-1, -1] = 1 - min(mask[-1, -1], 1)
    Image.fromarray(mask).save(path)
    assert opened(tmp_path / "data").fingerprint != opened(blocks).fingerprint


def removed(path: Path) -> None:
    path.unlink()


def smaller(path: Path) -> None:
    Image.open(path).resize((5, 7), Image.Resampling.NEAREST).save(path)


def unknown(path: Path) -> None:
    Image.fromarray(np.full((16, 24), 9, np.uint8)).save(path)


def in_colours(path: Path) -> None:
    Image.open(path).convert("RGB").save(path)


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("fault", [removed, smaller, unknown, in_colours, damaged])
def test_faults__name_the_file(blocks: Path, tmp_path: Path, fault: Callable[[Path], None]) -> None:
    shutil.copytree(blocks, tmp_path / "data")
    fault(tmp_path / "data" / "train" / "masks" / "05.png")
    with pytest.raises(FactorTransferError, match=r"05\.png"):
        opened(tmp_path / "data")


def test_faults__what_does_not_go_together_is_refused(blocks: Path) -> None:
    for settings in ({"transform": "os:getcwd"}, {"label_weight": 0.0}, {"data_dir": "x"}):
        with pytest.raises(FactorTransferError):
            opened(blocks, **settings)
    with pytest.raises(FactorTransferError, match="--task segmentation"):
        open_data(DataConfig(data=str(blocks)), lambda: 8)
    with pytest.raises(FactorTransferError, match="no masks"):
        open_data(DataConfig(data="digits", ignore_index=3), lambda: 8)


# -- loss and measure


def test_measure__is_that_of_numpy() -> None:
    """Over two batches of other sizes, with ignored pixels, a class that is nowhere and a map smaller than the mask."""
    torch.manual_seed(0)
    sums: dict[str, Any] = {}
    both, truth, said = 0, [], []
    for count in (3, 2):
        outputs, targets = torch.randn(count, 4, 4, 6), torch.randint(0, 3, (count, 8, 12))
        outputs[:, 3] = -9
        targets[:, :2] = IGNORED
        for name, value in TASK.sums(outputs, targets).items():
            sums[name] = sums.get(name, 0) + value
        large = F.interpolate(outputs, size=(8, 12), mode="bilinear", align_corners=False)
        truth.append(targets.numpy().ravel())
        said.append(large.argmax(1).numpy().ravel())
        both += count
    labels, answers = np.concatenate(truth), np.concatenate(said)
    labels, answers = labels[labels != IGNORED], answers[labels != IGNORED]
    wanted = [
        100 * ((labels == each) & (answers == each)).sum() / ((labels == each) | (answers == each)).sum()
        for each in range(3)
    ]
    found = TASK.values(sums, both)
    assert TASK.by_class(sums) == [*map(pytest.approx, wanted), None]
    assert float(found["miou"]) == pytest.approx(np.mean(wanted))
    assert float(found["pixel_accuracy"]) == pytest.approx(100 * (labels == answers).mean())


def test_loss__is_cross_entropy_of_pixels_and_finite_without_any() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    torch.testing.assert_close(TASK.loss(outputs, targets), F.cross_entropy(outputs, targets))
    targets[0, 0] = IGNORED
    changed = outputs.clone()
    changed[0, :, 0] += torch.randn(3, 4)
    torch.testing.assert_close(TASK.loss(outputs, targets), TASK.loss(changed, targets))
    targets[:] = IGNORED
    assert TASK.loss(outputs, targets) == 0


def test_soft_targets__are_compared_pixel_by_pixel_where_the_mask_counts() -> None:
    torch.manual_seed(0)
    ours, theirs, masks = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    masks[:, 2:] = IGNORED
    student, temperature = StudentOutputs(ours.requires_grad_(), torch.zeros(1)), 2.0
    found = SoftTargets(0.5, temperature)(student, {"logits": theirs}, masks)
    p, q = (torch.softmax(x.double() / temperature, 1) for x in (theirs, ours))
    wanted = 0.5 * temperature**2 * (p * (p.log() - q.log())).sum(1)[:, :2].mean()
    torch.testing.assert_close(found, wanted.float())
    found.backward()
    assert ours.grad is not None
    assert (ours.grad[:, :, 2:] == 0).all()
    assert (ours.grad[:, :, :2] != 0).all()


# -- networks

SMALL = {"layers": (1, 1, 1), "channels": (4, 8, 16), "head_channels": 8}


def network(name: str, **more: Any) -> Any:
    settings: dict[str, Any] = {"role": "student", "num_classes": 3, "img_size": (32, 64), "dense": True}
    return load_network(name, **{**settings, **more})


@pytest.mark.parametrize(
    ("name", "args", "layer", "shape"),
    [
        ("lraspp/cifar_resnet20", SMALL, "encoder", (16, 8, 16)),
        ("deeplab/lcnet_035", {"head_channels": 8}, "encoder", (176, 1, 2)),
        ("torchvision/lraspp_mobilenet_v3_large", None, "backbone.16", (960, 2, 4)),
    ],
)
def test_networks__give_maps_of_logits_and_an_encoders_last_map(
    name: str, args: Any, layer: str, shape: tuple[int, int, int]
) -> None:
    found, images = network(name, args=args), torch.zeros(2, 3, 32, 64)
    assert found.module.eval()(images).shape == (2, 3, 32, 64)
    assert find_layer(found.module, images, dense=True) == layer
    assert find_groups(found.module, images, dense=True)[-1] == (layer, shape)


def test_networks__take_the_weights_of_an_encoder(tmp_path: Path) -> None:
    """A file of the whole classifier: its head is left out, and a file with a tensor too few is an error."""
    args = {"layers": (1, 1, 1), "channels": (4, 8, 16)}
    state = timm.create_model("cifar_resnet20", num_classes=10, **args).state_dict()
    save_file(state, tmp_path / "encoder.safetensors")
    found = network("lraspp/cifar_resnet20", args=SMALL, weights=str(tmp_path / "encoder.safetensors"))
    assert (found.pretrained, found.new_head) == (True, True)
    own = found.module.encoder.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in own.items())
    save_file(found.module.state_dict(), tmp_path / "whole.safetensors")
    again = network("lraspp/cifar_resnet20", args=SMALL, weights=str(tmp_path / "whole.safetensors"), seed=1)
    assert not again.new_head
    assert all(torch.equal(value, found.module.state_dict()[name]) for name, value in again.module.state_dict().items())
    save_file({name: value for name, value in state.items() if name != "conv1.weight"}, tmp_path / "part.safetensors")
    with pytest.raises(FactorTransferError, match=r"1 missing \(conv1.weight\)"):
        network("lraspp/cifar_resnet20", args=SMALL, weights=str(tmp_path / "part.safetensors"))


def test_networks__for_whole_images_are_refused() -> None:
    with pytest.raises(FactorTransferError, match="height, width"):
        network("cifar_resnet20")


def test_networks__of_the_users_own_may_give_a_smaller_map_among_others() -> None:
    found, images = network(Twice()), torch.zeros(2, 3, 32, 64)
    assert found.output == "out"
    for mode in (True, False):
        torch.testing.assert_close(found.module.train(mode)(images).shape, torch.Size([2, 3, 8, 16]))
    assert find_layer(found.module, images, dense=True) == "encoder"


class Twice(nn.Module):
    """A network of a user's own, whose map is a quarter of the image, beside an auxiliary one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1))
        self.head, self.aux = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 3, 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        feature = self.encoder(images)
        return {"aux": self.aux(feature), "out": self.head(feature)}


# -- a whole run


@pytest.fixture(scope="module")
def settings(blocks: Path) -> dict[str, Any]:
    return {
        "data": str(blocks),
        "task": "segmentation",
        "teacher": "lraspp/cifar_resnet20",
        "teacher_args": {**SMALL, "channels": (8, 8, 16)},
        "student": "lraspp/cifar_resnet20",
        "student_args": SMALL,
        "teacher_epochs": 8,
        "epochs": 1,
        "paraphraser_epochs": 1,
        "views": 1,
        "batch_size": 4,
        "workers": 0,
        "threads": 1,
        "log_with": "none",
        "hflip": 0.0,
    }


@pytest.fixture(scope="module")
def run(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch.setattr)
        run_distillation(Config(**settings, out=str(folder), baseline=True))
    return folder


def test_run__is_measured_and_measured_again(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert [metric["key"] for metric in summary["metrics"]] == ["miou", "pixel_accuracy", "loss"]
    found = evaluate_run(run)
    for role in ("teacher", "baseline", "student"):
        assert found[role]["miou"] == pytest.approx(summary[role]["miou"])
        there = [value for value in found[role]["classes"].values() if value is not None]
        assert found[role]["miou"] == pytest.approx(np.mean(there))
    assert summary["student"]["layer"] == "encoder"


def test_run__has_a_report_with_pictures_and_classes(run: Path) -> None:
    page = write_report(run).read_text()
    assert "no report" not in page
    for word in ("intersection over union", "Dark grey: pixels that count nowhere", "ground", "stone"):
        assert word in page
    found = json.loads((run / "findings.json").read_text())
    assert not found["missing"]
    assert [*found["masks"][0]["pictures"]] == ["image", "mask", "teacher", "baseline", "student"]
    summary = json.loads((run / "summary.json").read_text())
    assert np.mean([value for value in found["overlap"]["student"] if value is not None]) == pytest.approx(
        summary["student"]["miou"]
    )


def test_run__ships_and_predicts(run: Path, answered_here: None, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = export_run(run, Choices(formats=["pt2", "safetensors"], latency=False))
    for row in shipped["formats"]:
        assert row["miou"] == pytest.approx(shipped["reference_miou"], abs=0.1)
    capsys.readouterr()
    where, pictures = run.parent.parent, run / "pictures"
    images = [str(path) for path in sorted(where.glob("blocks*/validation/images/*.png"))]
    code = predict_images(run, images[:2], top=3, threads=1, as_json=True, save_pictures=pictures)
    assert code == 0
    for answer in json.loads(capsys.readouterr().out):
        picture = np.array(Image.open(answer["picture"]))
        assert picture.shape == (16, 24)
        shares = {each["index"]: each["share"] for each in answer["pixels"]}
        assert sum(shares.values()) == pytest.approx(1)
        assert set(np.unique(picture)) == set(shares)


@pytest.mark.slow
def test_run__ships_for_onnxruntime(run: Path, answered_here: None) -> None:
    shipped = export_run(run, Choices(formats=["onnx", "onnx-int8"], latency=False, int8_loss=50.0))
    scores = {row["format"]: row["miou"] for row in shipped["formats"]}
    assert scores["onnx"] == pytest.approx(shipped["reference_miou"], abs=0.1)
    assert "onnx-int8" in scores


def test_doctor__looks_at_masks(settings: dict[str, Any], run: Path) -> None:
    given = {**settings, "teacher_epochs": 0, "teacher_weights": str(run / "teacher.safetensors"), "kd_weight": 1.0}
    found = diagnose(Config(**given))
    assert found.code < 2, found.findings
    (table,) = [rows for title, _, rows in found.tables if title == "training masks"]
    assert [row[0] for row in table] == ["ground", "block", "stone"]
