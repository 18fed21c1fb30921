"""What lies in a file reaches the networks, or is counted and named: in training, in the store, in predict."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch import nn

from factor_transfer import distill
from factor_transfer.config import Config, DataConfig
from factor_transfer.data.content import DECODED, Content, aspects, fitting, look
from factor_transfer.data.dataset import Dataset, open_data
from factor_transfer.data.frames import Frame
from factor_transfer.data.images import decoded, needs_decoding, upright_size
from factor_transfer.data.sources import open_source
from factor_transfer.doctor import diagnose
from factor_transfer.export.predict import open_student, predict_images
from factor_transfer.export.runtimes import sides
from factor_transfer.export.shipping import Choices, export_run
from factor_transfer.util.errors import DataError, FactorTransferError, TrainingError
from factor_transfer.util.files import read_json, write_json

SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 8, 8)}
JOB: dict[str, Any] = {"paraphraser_epochs": 1, "batch_size": 16, "device": "cpu", "threads": 1, "lr": 0.05,
                       "hflip": 0.0, "log_with": "none"}  # fmt: skip

ADAM = {"opt": "adam", "lr": 0.02, "teacher_lr": 0.02}

Draw = Callable[[int, int], Image.Image]
"""The image of a class and a number."""


def folder(root: Path, draw: Draw, *, train: int = 6, validation: int = 4, form: str = "png", **how: Any) -> Path:
    """train/ and validation/ with two classes."""
    for split, count in (("train", train), ("validation", validation)):
        for label in range(2):
            where = root / split / f"class{label}"
            where.mkdir(parents=True)
            for number in range(count):
                draw(label, number + 100 * (split == "validation")).save(where / f"{number}.{form}", **how)
    return root


def opened(root: Path, **more: Any) -> Dataset:
    return open_data(DataConfig(data=str(root), **{"workers": 0, **more}), default_size=lambda: 112)


def shown(split: Any, view: int | None = None) -> torch.Tensor:
    (batch,) = split.batches([np.arange(len(split))], view)
    return batch.image


def noise(seed: int, width: int = 12, height: int = 12, mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


# -- orientation

TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How an upright picture is stored under each orientation."""


def stored(upright: Image.Image, orientation: int, form: str = "PNG") -> Image.Image:
    turn, exif, buffer = TURNS[orientation], Image.Exif(), io.BytesIO()
    exif[0x112] = orientation
    (upright if turn is None else upright.transpose(turn)).save(buffer, form, exif=exif)
    return Image.open(buffer)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_orientation__pictures_are_turned_upright(orientation: int, form: str) -> None:
    upright = noise(0, 9, 5, "L").convert("RGB")  # grey: WebP loses none of it
    image = stored(upright, orientation, form)
    assert upright_size(image) == (5, 9)
    found = decoded(image)
    assert found.image.size == (9, 5)
    if form != "WEBP":
        assert np.array_equal(np.array(found.image), np.array(upright))
    assert found.kinds == (("turned",) if orientation > 1 else ())


def test_orientation__damaged_metadata_says_nothing() -> None:
    buffer = io.BytesIO()
    noise(0).save(buffer, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(np.array(decoded(Image.open(buffer)).image), np.array(noise(0)))


@pytest.mark.parametrize(("side", "size"), [(12, None), (130, 112)], ids=["store", "workers"])
def test_orientation__is_heeded_in_training_and_evaluation(tmp_path: Path, side: int, size: int | None) -> None:
    def saved(root: Path, turn: int) -> Path:
        for split in ("train", "validation"):
            for label in range(2):
                where = root / split / f"class{label}"
                where.mkdir(parents=True)
                for number in range(3):
                    exif = Image.Exif()
                    exif[0x112] = turn
                    upright = noise(9 * number + label, side, side)
                    (upright if turn == 1 else upright.transpose(TURNS[turn])).save(where / f"{number}.png", exif=exif)
        return root

    plain, turned = (opened(saved(tmp_path / str(turn), turn), img_size=size) for turn in (1, 6))
    for view in (None, 0):
        assert torch.equal(shown(turned.train, view), shown(plain.train, view))
    assert any(" images are turned as" in note for note in turned.notes)
    assert not any("EXIF" in note for note in plain.notes)
    assert not turned.lost


# -- more than 8 bits


def deep(label: int, number: int, bits: int = 12, side: int = 12) -> Image.Image:
    values = np.random.default_rng(number).integers(0, 1 << bits, (side, side)).astype(np.uint16)
    return Image.fromarray((values // 2 + label * (1 << bits - 1)).astype(np.uint16))


@pytest.mark.parametrize("side", [12, 130])
def test_depth__twelve_bits_are_never_black_unsaid(tmp_path: Path, side: int) -> None:
    root = folder(tmp_path / "x", lambda label, number: deep(label, number, 12, side))
    with pytest.raises(DataError, match=r"without a value above 4,\d+.*12 bits.*nearly black\n.*\n.*--bit-depth 12"):
        opened(root)
    given = shown(opened(root, bit_depth=12).train)
    assert int(given.max()) >= 250
    if side == 12:
        with Image.open(root / "train" / "class0" / "0.png") as image:
            assert np.array_equal(given[0, 0].numpy(), np.array(image) >> 4)
    assert int(shown(opened(root, bit_depth=16).train).max()) <= 16  # as its user says
    with pytest.raises(DataError, match="above the 10 bits"):
        shown(opened(root, bit_depth=10).train)


def test_depth__sixteen_bits_need_no_word(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", lambda label, number: deep(label, number, 16))
    with Image.open(root / "train" / "class0" / "0.png") as image:
        wanted = np.array(image) >> 8
    assert np.array_equal(shown(opened(root).train)[0, 0].numpy(), wanted)


def test_depth__what_a_file_declares_is_used() -> None:
    values = np.array([[0, 100, 4095]], np.uint16)
    declared = b"P5 3 1 4095\n" + values.astype(">u2").tobytes()
    found = decoded(Image.open(io.BytesIO(declared)))
    assert np.array(found.image)[0, :, 0].tolist() == [0, 6, 255]
    assert found.largest is None, "nothing is left to doubt"
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF")
    image = Image.open(buffer)
    image.tag_v2[258] = (12,)  # type: ignore[attr-defined] # as a file of packed 12-bit samples says
    assert np.array(decoded(image).image)[0, :, 0].tolist() == [0, 6, 255]


def test_depth__dark_16_bit_colour_is_found_too() -> None:
    """Of 16-bit colour PIL keeps the upper 8 bits."""
    ppm = b"P6 2 2 65535\n" + np.full((2, 2, 3), 900, ">u2").tobytes()
    for name, body in (("a.ppm", ppm), ("a.png", deep_png(900))):
        content = Content()
        content.add(name, decoded(Image.open(io.BytesIO(body))))
        dark = content.dark(None)
        assert dark is not None
        assert "nearly black" in dark.what


def deep_png(value: int) -> bytes:
    """A PNG of 2x2 pixels with three samples of 16 bits, which PIL does not write."""
    rows = b"".join(b"\0" + np.full((2, 3), value, ">u2").tobytes() for _ in range(2))
    parts = ((b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
              for kind, data in parts)  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_look__decodes_no_png_to_know_its_size() -> None:
    image = Image.open(io.BytesIO(deep_png(900)))
    assert upright_size(image) == (2, 2)
    assert needs_decoding(image), "its layout is still known"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((2, 2), -5, np.int16), "signed integer pixels"),
        (np.full((2, 2), 70_000, np.int32), "signed integer pixels"),
        (np.full((2, 2), 0.5, np.float32), "floating-point pixels, of which none is known to be white"),
    ],
)
def test_depth__kinds_without_a_white_are_refused_by_name(values: np.ndarray, message: str) -> None:
    buffer = io.BytesIO()
    if values.dtype == np.int16:  # PIL writes none
        width, data = 2, values.tobytes()
        tags = [(256, 3, width), (257, 3, 2), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
                (278, 3, 2), (279, 4, len(data)), (339, 3, 2)]  # fmt: skip
        entries = b"".join(np.array([tag, kind], "<u2").tobytes() + np.array([1, value], "<u4").tobytes()
                           for tag, kind, value in tags)  # fmt: skip
        buffer.write(b"II*\0" + np.array([8 + len(data)], "<u4").tobytes() + data)
        buffer.write(np.array([len(tags)], "<u2").tobytes() + entries + bytes(4))
    else:
        Image.fromarray(values).save(buffer, "TIFF")
    with pytest.raises(ValueError, match=message):
        decoded(Image.open(buffer))


# -- further bands and frames


def test_content__opaque_alpha_changes_nothing_and_transparent_is_named(tmp_path: Path) -> None:
    def opaque(label: int, number: int) -> Image.Image:
        image = noise(number + label)
        image.putalpha(255)
        return image

    def part(label: int, number: int) -> Image.Image:
        image = opaque(label, number)
        if number == 2:
            image.putpixel((0, 0), (1, 2, 3, 0))
        return image

    plain = opened(folder(tmp_path / "plain", lambda label, number: noise(number + label)))
    whole = opened(folder(tmp_path / "opaque", opaque))
    assert torch.equal(shown(whole.train), shown(plain.train))
    assert not whole.lost
    assert not plain.lost
    some = folder(tmp_path / "some", part)
    for turn in range(2):  # decoded, then from the store
        (lost,) = opened(some, cache_dir=str(tmp_path / "cache")).lost
        assert "2 of 20 images are partly transparent" in lost.what, turn
        assert "class0/2.png, class1/2.png" in lost.what
        assert "background" in lost.hint


@pytest.mark.parametrize("side", [12, 130])
@pytest.mark.parametrize(
    ("mode", "form", "what"),
    [("RGBX", "tif", "more than three colour bands"), ("CMYK", "jpg", "in CMYK"), ("RGB", "gif", "several frames")],
)
def test_content__what_is_not_shown_is_counted(tmp_path: Path, mode: str, form: str, what: str, side: int) -> None:
    def draw(label: int, number: int) -> Image.Image:
        return noise(number + label, side, side, mode)

    more = {"save_all": True, "append_images": [noise(7, side, side)]} if form == "gif" else {}
    data = opened(folder(tmp_path / "x", draw, train=2, validation=2, form=form, **more))
    (lost,) = data.lost
    assert what in lost.what
    assert lost.what.startswith("8 of 8" if side == 12 else "4 of 4"), "all, or a sample of the training images"


def test_doctor__warns_of_what_is_lost(tmp_path: Path) -> None:
    def draw(label: int, number: int) -> Image.Image:
        return noise(number + label, 64, 16, "RGBA")

    settings = {"teacher": "cifar_resnet20", "teacher_args": SMALL, "student": "cifar_resnet20", "student_args": SMALL}
    found = diagnose(Config(data=str(folder(tmp_path / "x", draw)), teacher_epochs=1, **settings, **JOB))
    said = {finding.what: finding.hint for finding in found.findings if finding.level == "warning"}
    (transparent,) = [what for what in said if "partly transparent" in what]
    assert "20 of 20" in transparent
    (aspect,) = [what for what in said if "another aspect" in what]
    assert "100% of the images have another aspect (16x64) than the 64x64" in aspect
    assert "--crop-mode squash squashes them by 4.0" in aspect
    assert said[aspect].startswith("--img-size 32 128")


def test_aspects__say_what_each_mode_does() -> None:
    wide = [(32, 128)] * 3 + [(100, 100)] * 7
    for mode, what in (("center", "cuts 75% of them off"), ("squash", "by 4.0"), ("border", "75% of what is seen")):
        (lost,) = aspects(wide, Frame.of(128, mode))  # type: ignore[arg-type]
        assert what in lost.what
        assert "30% of the images" in lost.what
    assert not aspects(wide[2:] + [(100, 100)] * 9, Frame.of(128))
    assert not aspects([(200, 300)] * 9, Frame.of(128)), "photographs are usually cropped"
    assert not aspects(wide[:3], Frame.of(fitting((128, 128), (32, 128))))


def test_look__reads_headers_of_large_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "x", lambda label, number: noise(number, 130, 120))
    images: Any = opened(root).train
    monkeypatch.setattr("factor_transfer.data.images.decoded", lambda *_: 1 / 0)
    sizes, content = look(images._images, None)
    assert set(sizes) == {(120, 130)}
    assert content.looked == 12


def test_look__decodes_a_few_where_the_header_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL decodes a PNG to look for EXIF behind its pixels, if asked; it is not, but for a few."""
    root = folder(tmp_path / "x", lambda label, number: noise(number, 12, 12, "RGBA"), train=DECODED)
    loaded: list[Any] = []
    real = PngImagePlugin.PngImageFile.load_prepare
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", lambda self: (loaded.append(self), real(self))[1])
    _, content = look(open_source(DataConfig(data=str(root))).train, None)
    assert content.looked == 2 * DECODED
    assert len({id(image) for image in loaded}) == DECODED


# -- runs of earlier versions


def test_run__begun_by_an_earlier_version_says_why_it_cannot_go_on(image_folder: Any, tmp_path: Path) -> None:
    settings = {**JOB, "teacher_args": SMALL, "student_args": SMALL, "teacher_epochs": 1, "epochs": 1}
    data, out = str(image_folder(tmp_path / "data", classes=2, train=6)), tmp_path / "run"
    with pytest.raises(FactorTransferError):  # a teacher that knows nothing: begun, and not finished
        distill("cifar_resnet20", "cifar_resnet20", data, out=out, **{**settings, "teacher_lr": 1e-9})
    pins = read_json(out / "fingerprints.json")
    assert pins["pixels"] != "1"
    write_json(out / "fingerprints.json", {**pins, "pixels": "1", "data": "other"})
    with pytest.raises(FactorTransferError, match="images are decoded otherwise than by the version that began"):
        distill("cifar_resnet20", "cifar_resnet20", data, out=out, **{**settings, "teacher_lr": 1e-9})


# -- content at the ends of wide images


def ends(label: int, number: int) -> Image.Image:
    """128x32 noise whose ends alone tell the class."""
    pixels = np.random.default_rng(2 * number + label).integers(100, 156, (32, 128, 3))
    pixels[:, :20] = pixels[:, -20:] = [(220, 40, 40), (40, 220, 40)][label]
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("ends") / "data", ends, train=16, validation=10)


def network(seed: int) -> nn.Module:
    """Two strided convolutions: wide images in a millisecond."""
    torch.manual_seed(seed)
    body = nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 4, 4), nn.ReLU()
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def learned(wide: Path, out: Path, **how: Any) -> dict[str, Any]:
    settings = {**JOB, **ADAM, "teacher_epochs": 10, "epochs": 10, "beta": 0.1, "scale": (1.0, 1.0), "workers": 0}
    return distill(network(0), network(1), str(wide), out=out, **{**settings, **how}).summary


@pytest.mark.usefixtures("unexported")
@pytest.mark.parametrize(
    "how",
    [{"img_size": 128, "crop_mode": "border"}, {"img_size": (32, 128), "crop_pct": 1.0}],
    ids=["border", "rectangular"],
)
def test_ends__are_learned_where_they_are_seen(wide: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    summary = learned(wide, tmp_path / "run", **how)
    assert summary["student"]["top1"] == 100
    assert summary["data"]["img_size"] == ([32, 128] if how["img_size"] != 128 else 128)


def test_ends__cannot_be_learned_from_the_centre(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingError, match="chance is 50"):
        learned(wide, tmp_path / "run", img_size=128)
    said = " ".join(capsys.readouterr().err.split())
    assert "--crop-mode center cuts 75% of them off" in said
    assert "--img-size 64 256 (height, width), or --crop-mode squash or border" in said


# -- rectangles from end to end


@pytest.mark.slow
@pytest.mark.usefixtures("answered_here")
@pytest.mark.parametrize(
    ("student", "formats"),
    [("test_vit", ["pt2", "onnx", "onnx-int8", "safetensors", "timm"]), ("cifar_resnet20", ["pt2", "onnx", "timm"])],
)
def test_rectangle__goes_from_training_to_prediction(
    tmp_path: Path, student: str, formats: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """32x16 images, upright and tall, through a ViT and a CNN; every export answers as the student does."""
    data = folder(tmp_path / "data", lambda label, number: ends(label, number).rotate(90, expand=True).resize((16, 32)))
    args = {"patch_size": 8} if student == "test_vit" else SMALL
    settings = {**JOB, **ADAM, "student_args": args, "teacher_args": SMALL, "teacher_epochs": 6, "epochs": 3}
    out = tmp_path / "run"
    found = distill("cifar_resnet20", student, str(data), img_size=(32, 16), out=out, **settings)
    assert found.summary["data"]["img_size"] == found.summary["student"]["img_size"] == [32, 16]
    assert "32x16 pixels" in (out / "report.html").read_text()
    exported = export_run(out, Choices(formats=formats, images=8, latency=False, int8_loss=100))
    assert [row["format"] for row in exported["formats"]] == formats
    assert "images of 32x16 pixels" in (out / "export" / "README.md").read_text()
    assert sides(open_student(out / "export" / "timm").metadata) == (32, 16)
    capsys.readouterr()
    answers = []
    for form in ("student.pt2", "timm"):
        predict_images(out / "export" / form, [str(data / "validation")], top=1, threads=1, as_json=False)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    right = sum(line.split("/")[-2] == line.split(": ")[1].split()[0] for line in answers[0].splitlines())
    assert 100 * right / 8 == found.summary["student"]["top1"]


def test_predict__prepares_images_as_the_run_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A crop mode, a bit depth and an orientation go with the export; what it does not see is said."""
    data = folder(tmp_path / "data", deep)
    out, how = tmp_path / "run", {"img_size": (14, 10), "crop_mode": "border", "crop_pct": 0.8, "bit_depth": 12}
    settings = {**JOB, **ADAM, "teacher_args": SMALL, "student_args": SMALL, "teacher_epochs": 6, "epochs": 3, **how}
    top1 = distill("cifar_resnet20", "cifar_resnet20", str(data), out=out, **settings).summary["student"]["top1"]
    metadata = open_student(out).metadata
    assert metadata["bit_depth"] == 12
    assert Frame.read(metadata) == Frame.of((14, 10), "border", 0.8)
    capsys.readouterr()
    assert predict_images(out, [str(data / "validation")], top=1, threads=1, as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 100 * sum(line.split("/")[-2] == line.split(": ")[1].split()[0] for line in lines) / 8 == top1
    clear = noise(1, 12, 12, "RGBA")
    clear.save(tmp_path / "clear.png")
    assert predict_images(out, [str(tmp_path / "clear.png")], top=1, threads=1, as_json=False) == 0
    assert "1 of 1 images are partly transparent" in " ".join(capsys.readouterr().err.split())


def said(out: Path, name: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    code = predict_images(out, [name], top=1, threads=1, as_json=False)
    return code, " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("answered_here")
def test_predict__knows_whether_a_bit_depth_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where none was, as in training, integers of unknown white are refused and doubtful ones are named."""
    settings = {**JOB, **ADAM, "teacher_args": SMALL, "student_args": SMALL, "teacher_epochs": 6, "epochs": 1}
    data = str(folder(tmp_path / "data", lambda label, number: deep(label, number, 16)))
    Image.fromarray(np.full((12, 12), 900, np.int32)).save(tmp_path / "signed.tif")
    dark, pair = tmp_path / "dark", tmp_path / "pair"
    for where in (dark, pair):
        where.mkdir()
        deep(0, 1).save(where / "dark.png")
    deep(1, 0, 16).save(pair / "other.png")
    for depth in (None, 16):
        out = tmp_path / f"run{depth}"
        distill("cifar_resnet20", "cifar_resnet20", data, out=out, bit_depth=depth, **settings)
        export_run(out, Choices(formats=["timm"], images=8, latency=False))
        for export in (out / "student.pt2", out / "export" / "timm"):
            assert open_student(export).metadata["bit_depth"] == depth
            code, err = said(export, str(tmp_path / "signed.tif"), capsys)
            assert code == (2 if depth is None else 0)
            assert ("none is known to be white" in err) == (depth is None)
            assert ("nearly black" in said(export, str(dark), capsys)[1]) == (depth is None)
            assert "nearly black" not in said(export, str(pair), capsys)[1], "no image is judged by itself"
