"""How images become pixels of the networks' size: timm's own evaluation, in every crop mode, and the example's."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from factor_transfer.data.frames import Frame
from factor_transfer.data.images import decoded
from factor_transfer.data.views import random_resized_crop

ROOT = Path(__file__).parent.parent


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("predict_onnx", ROOT / "examples" / "predict_onnx.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLE = example()


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def saved(image: Image.Image, form: str = "PNG", **how: Any) -> Callable[[], Image.Image]:
    """Opens the image as from a file, each time anew."""
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return lambda: Image.open(io.BytesIO(buffer.getvalue()))


def array(shown: torch.Tensor) -> np.ndarray:
    return shown.permute(1, 2, 0).numpy()


sides = st.integers(8, 40) | st.integers(97, 130)
frames = st.builds(
    Frame.of,
    st.tuples(sides, sides),
    st.sampled_from(["squash", "border", "center", None]),
    st.sampled_from([None, 0.8]),
)


@settings(max_examples=60, deadline=None)
@given(frame=frames, width=st.integers(4, 200), height=st.integers(4, 200))
def test_frame__shows_what_timm_and_the_example_show(frame: Frame, width: int, height: int) -> None:
    image = noise(width, height)
    theirs = create_transform(
        frame.size if frame.size[0] != frame.size[1] else frame.size[0],
        is_training=False,
        interpolation=frame.interpolation,
        crop_pct=frame.pct,
        crop_mode=frame.mode,
        normalize=False,
    )
    try:
        wanted = theirs(image)
    except ValueError:  # nothing would be left of one side
        with pytest.raises(ValueError, match="nothing would be left"):
            frame.show(image)
        assume(False)
    got = frame.show(image)
    assert got.shape == (3, *frame.size)
    assert torch.equal(got, wanted)
    about = {"img_size": list(frame.size), "resize": frame.described()}
    assert np.array_equal(EXAMPLE.prepared(image, about), array(got))
    assert Frame.read(about) == frame


def test_frame__obeys_what_an_export_says_of_resizing() -> None:
    """Whatever a later version has for its defaults, a student sees what it was trained on."""
    image = noise(150, 60)
    for resize in (
        {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bicubic", "fill": [1, 2, 3]},
        {"crop_mode": "border", "crop_pct": 0.8, "interpolation": "nearest", "fill": [255, 0, 7]},
    ):
        about = {"img_size": [32, 48], "resize": resize}
        frame = Frame.read(about)
        assert np.array_equal(array(frame.show(image)), EXAMPLE.prepared(image, about))
        assert frame.described() == resize
    without = {"img_size": 128, "resize": {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "border"}}
    assert Frame.read(without) == Frame.of(128, "border"), "timm folders name no colour"


def test_frame__keeps_the_bits_of_earlier_versions_for_squares() -> None:
    """Up to 96 pixels PIL's bilinear resize, above it timm's centre: recorded before there were crop modes."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    image = noise(150, 120)
    small = np.array(image.resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(array(Frame.of(32).show(image)), small)
    large = F.center_crop(F.resize(image, [128], interpolation=InterpolationMode.BICUBIC), [112, 112])
    assert np.array_equal(array(Frame.of(112).show(image)), np.array(large))
    assert np.array_equal(array(Frame.of(16).show(noise(16, 16))), np.array(noise(16, 16)))


def test_random_resized_crop__keeps_its_bits_for_squares() -> None:
    """Sums of views that were made before there were crop modes."""
    view = random_resized_crop(noise(150, 120), Frame.of(112), (0.35, 1.0), 0.5, 0.4, seed=3, index=5, view=2)
    assert (int(view.long().sum()), int((view.long() * torch.arange(112)).sum())) == (4_263_259, 236_766_120)


@pytest.mark.parametrize(("mode", "aspect"), [("center", 4.0), ("squash", 2.0), ("border", 4.0)])
def test_random_resized_crop__crops_the_aspect_that_is_shown_undistorted(mode: Any, aspect: float) -> None:
    """Crops of a ramp: its slopes along rows and columns tell the aspect of each crop."""
    columns, rows = np.meshgrid(np.arange(400.0), np.arange(200.0))
    ramp = Image.fromarray(np.stack([columns * 0.5, rows * 0.5, 0 * rows], -1).astype(np.uint8))
    frame, found = Frame.of((32, 128), mode), []
    for view in range(40):
        shown = random_resized_crop(ramp, frame, (0.2, 0.4), 0.0, 0.0, seed=0, index=0, view=view).float()
        wide, high = shown[0, 16, 80] - shown[0, 16, 48], shown[1, 24, 64] - shown[1, 8, 64]
        places = shown[2, [16, 16, 24, 8], [80, 48, 64, 64]]
        if places.max() == 0:  # none of the border
            found.append(float((wide / 32 * 128) / (high / 16 * 32)))
    assert 0.8 * aspect < np.median(found) < 1.25 * aspect
    assert len(found) > 5
    assert min(found) > 0.7 * aspect
    assert max(found) < 1.45 * aspect


def modes() -> dict[str, Callable[[], Image.Image]]:
    deep = Image.fromarray(np.random.default_rng(1).integers(0, 1 << 16, (9, 7)).astype(np.uint16))
    twelve = Image.fromarray(np.random.default_rng(1).integers(0, 1 << 12, (9, 7)).astype(np.uint16))
    palette, turned = noise(7, 9).quantize(8), Image.Exif()
    turned[0x112] = 6
    declared = b"P5 7 9 4095\n" + np.asarray(twelve).astype(">u2").tobytes()
    return {
        "rgb": saved(noise(7, 9)),
        "grey": saved(noise(7, 9, "L"), "JPEG"),
        "bits": saved(noise(7, 9).convert("1")),
        "palette": saved(palette),
        "palette with transparency": saved(palette, transparency=bytes([0, 9, 0, 0])),
        "rgba": saved(noise(7, 9, "RGBA")),
        "grey with alpha": saved(noise(7, 9, "LA")),
        "cmyk": saved(noise(7, 9, "CMYK"), "JPEG"),
        "gif": saved(noise(7, 9), "GIF", save_all=True, append_images=[noise(7, 9, seed=2)]),
        "webp": saved(noise(7, 9), "WEBP", lossless=True),
        "16 bits": saved(deep),
        "16 bits, tiff": saved(deep, "TIFF"),
        "16 bits, pgm of 12": lambda: Image.open(io.BytesIO(declared)),
        "turned": saved(noise(7, 9), "JPEG", exif=turned),
        "turned, tiff": saved(noise(7, 9), "TIFF", exif=turned),
    }


@pytest.mark.parametrize("kind", modes())
def test_example__reads_every_mode_as_the_package_does(kind: str) -> None:
    opened = modes()[kind]
    wanted = np.array(decoded(opened()).image)
    assert np.array_equal(np.array(EXAMPLE.upright_rgb(opened(), 16)), wanted)
    assert np.array_equal(np.array(EXAMPLE.upright_rgb(opened(), None)), wanted)
    assert len(np.unique(wanted)) > 1, "all of one colour"


def refused() -> dict[str, tuple[Callable[[], Image.Image], int | None]]:
    colour = b"P6 7 9 65535\n" + np.random.default_rng(1).integers(0, 1 << 16, (9, 7, 3)).astype(">u2").tobytes()
    return {
        "32 bits, tiff": (saved(Image.fromarray(np.full((9, 7), 900, np.int32)), "TIFF"), None),
        "32 bits, below 0": (saved(Image.fromarray(np.full((9, 7), -900, np.int32)), "TIFF"), 20),
        "above the bits": (saved(Image.fromarray(np.full((9, 7), 9000, np.uint16))), 12),
        "floats": (saved(Image.fromarray(np.full((9, 7), 0.5, np.float32)), "TIFF"), None),
        "colour of 16 bits": (lambda: Image.open(io.BytesIO(colour)), 12),
    }


@pytest.mark.parametrize("kind", refused())
def test_example__refuses_what_the_package_refuses(kind: str) -> None:
    opened, bits = refused()[kind]
    with pytest.raises(ValueError, match="bit"):
        decoded(opened(), bits)
    with pytest.raises(SystemExit):
        EXAMPLE.upright_rgb(opened(), bits)


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(9, 16), seed=st.integers(0, 99), form=st.sampled_from(["PNG", "TIFF", "PPM"]))
def test_example__scales_deep_grey_as_the_package_does(bits: int, seed: int, form: str) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (9, 7)).astype(np.uint16)
    opened = saved(Image.fromarray(values), form)
    wanted = np.array(decoded(opened(), bits).image)
    assert np.array_equal(wanted[..., 0], values >> (bits - 8))
    assert np.array_equal(np.array(EXAMPLE.upright_rgb(opened(), bits)), wanted)
