"""Name what is on images with an exported student: needs onnxruntime, numpy and Pillow, and nothing else.

python examples/predict_onnx.py runs/photos/export/student.onnx cat.jpg dog.jpg
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
about = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
size, mean, std = about["img_size"], *(np.array(about[name], np.float32) for name in ("mean", "std"))
for name in sys.argv[2:]:
    image = Image.open(name).convert("RGB")
    if size > 96:  # large images: the shorter side is resized, and the centre cut out
        scale = int(size / about["resize"]["crop_pct"]) / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    pixels = (np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), np.float32) / 255 - mean) / std
    (logits,) = session.run(None, {"images": pixels.transpose(2, 0, 1)[None]})[0]
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    print(name, about["classes"][shares.argmax()], f"{100 * shares.max():.1f} %")
