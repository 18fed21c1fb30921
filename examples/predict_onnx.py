"""Name what is on images with an exported student: needs onnxruntime, numpy and Pillow, and nothing else.

python examples/predict_onnx.py runs/photos/export/student.onnx cat.jpg dog.jpg

The file says of itself how its images are prepared; `prepared` does it, pixel for pixel as in training.
"""

import json
import math
import sys
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def main(student: str, names: list[str]) -> None:
    """Print the likeliest class of each image."""
    import onnxruntime

    session = onnxruntime.InferenceSession(student)
    about = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    for name in names:
        pixels = prepared(upright_rgb(Image.open(name), about.get("bit_depth")), about)
        mean, std = (np.array(about[key], np.float32) for key in ("mean", "std"))
        images = ((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1)[None]  # (1, 3, H, W)
        (logits,) = session.run(None, {"images": images})[0]
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        print(name, about["classes"][shares.argmax()], f"{100 * shares.max():.1f} %")


def upright_rgb(image: Image.Image, bits: int | None) -> Image.Image:
    """Turned as its EXIF orientation says, in RGB; `bits` are in use in grey images of more than 8, if it was said."""
    declared = getattr(image, "tag_v2", {}).get(258, (0,))[0]  # TIFF's BitsPerSample
    tiles = getattr(image, "tile", None) or [("",)]
    scaled = image.format == "PPM" and tiles[0][0].startswith("ppm")  # Pillow has scaled these to 16 bits
    layout, tiff = str(tiles[0][-1]), image.format == "TIFF"
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        said = 16 if scaled else declared if 8 < declared < 16 else bits
        bits = said or 16
        if said is None and image.mode == "I" and (tiff or "S" in layout):
            raise SystemExit("signed or 32-bit integer pixels, of which none is known to be white")
        if values.min() < 0 or values.max() >= 1 << bits:
            raise SystemExit(f"values from {values.min()} to {values.max()}, where {bits} bits are in use")
        image = Image.fromarray((values >> bits - 8).astype(np.uint8))
    elif bits not in {None, 16} and not 8 < declared < 16 and (";16" in layout or "65535" in layout):
        raise SystemExit(f"16-bit colour, where {bits} bits are in use in grey images")
    if image.mode == "F":
        raise SystemExit("floating-point pixels, of which none is known to be white")
    if "transparency" in image.info or image.mode == "RGBa":
        image = image.convert("RGBA")
    return image.convert("RGB")


def prepared(image: Image.Image, about: dict[str, Any]) -> np.ndarray:
    """An RGB image at the student's size, uint8 (H, W, 3): squashed, with borders, or its centre, as `about` says."""
    size, resize = about["img_size"], about["resize"]
    height, width = (size, size) if isinstance(size, int) else size
    mode, how = resize["crop_mode"], Image.Resampling[resize["interpolation"].upper()]
    tall, wide = (math.floor(side / resize["crop_pct"]) for side in (height, width))
    if mode == "squash":
        image = image.resize((wide, tall), how)
    elif mode == "center" and tall == wide:
        shorter, longer = sorted(image.size)
        sides = (tall, int(tall * longer / shorter))
        image = image.resize(sides if image.width <= image.height else sides[::-1], how)
    else:
        ratio = (max if mode == "border" else min)(image.height / tall, image.width / wide)
        image = image.resize((round(image.width / ratio), round(image.height / ratio)), how)
    if mode == "border":
        left, top = (max(want - have, 0) // 2 for want, have in zip((width, height), image.size, strict=True))
        canvas = Image.new("RGB", (max(width, image.width), max(height, image.height)), tuple(resize["fill"]))
        canvas.paste(image, (left, top))
        image = canvas
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
