"""An exported student as its user runs it: each kind of file needs one library, and none needs this package.

As a script (`python runtimes.py REQUEST`, a JSON object) this file is the fresh process in which an export is checked
and timed. It imports nothing of the package, and only the library that the kind needs; pixels go in, and logits come
out, as bytes, so that not even numpy is asked for where torch is enough.

Shapes: B images of H x W pixels, N classes.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

KINDS = {"pt2": "torch", "onnx": "onnxruntime", "onnx-int8": "onnxruntime", "safetensors": "timm", "timm": "timm"}
"""The library that runs each kind."""


class Runtime(Protocol):
    """A loaded student. `metadata` has `img_size`, `resize`, `mean`, `std` and `classes`.

    Of segmentation the logits are a map, (B, N, h, w).
    """

    metadata: dict[str, Any]

    def prepare(self, pixels: bytes, count: int) -> Any:
        """uint8 pixels (B, H, W, 3) -> normalised float32 (B, 3, H, W), as the library has them."""

    def forward(self, images: Any) -> Any:
        """-> logits (B, N), as the library has them."""

    def logits(self, pixels: bytes, count: int) -> bytes:
        """uint8 pixels (B, H, W, 3) -> float32 logits (B, N), row by row."""


class TorchRuntime:
    """A module of torch's: a `torch.export` program, or a network that timm or torchvision built."""

    def __init__(self, module: Any, metadata: dict[str, Any], threads: int | None) -> None:
        import torch

        self.metadata, self.module = metadata, module
        if threads is not None:
            torch.set_num_threads(threads)

    def prepare(self, pixels: bytes, count: int) -> Any:
        """See `Runtime`."""
        import torch

        shape = (count, *sides(self.metadata), 3)
        images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(self.metadata[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        return ((images.float() / 255 - mean) / std).contiguous()

    def forward(self, images: Any) -> Any:
        """See `Runtime`."""
        import torch

        with torch.no_grad():
            found = self.module(images)
        return found["out"] if isinstance(found, dict) else found  # torchvision's networks for segmentation

    def logits(self, pixels: bytes, count: int) -> bytes:
        """See `Runtime`."""
        found = self.forward(self.prepare(pixels, count)).float().contiguous()
        return ctypes.string_at(found.data_ptr(), found.nbytes)


class OnnxRuntime:
    """An ONNX file, on the CPU."""

    def __init__(self, path: Path, threads: int | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.metadata = read_properties(self.session.get_modelmeta().custom_metadata_map)

    def prepare(self, pixels: bytes, count: int) -> Any:
        """See `Runtime`."""
        import numpy as np

        images = np.frombuffer(pixels, np.uint8).reshape(count, *sides(self.metadata), 3).transpose(0, 3, 1, 2)
        mean, std = (np.array(self.metadata[name], np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
        return np.ascontiguousarray((images / np.float32(255) - mean) / std)

    def forward(self, images: Any) -> Any:
        """See `Runtime`."""
        return self.session.run(None, {"images": images})[0]

    def logits(self, pixels: bytes, count: int) -> bytes:
        """See `Runtime`."""
        output: bytes = self.forward(self.prepare(pixels, count)).tobytes()
        return output


def properties(metadata: dict[str, Any]) -> dict[str, str]:
    """Metadata as a file's plain strings hold it.

    >>> read_properties(properties({"img_size": 32, "classes": ["cat"]}))
    {'img_size': 32, 'classes': ['cat']}
    """
    return {name: json.dumps(value, ensure_ascii=False) for name, value in metadata.items()}


def read_properties(found: dict[str, str]) -> dict[str, Any]:
    """What `properties` wrote; {} where another program wrote the file."""
    try:
        return {name: json.loads(value) for name, value in found.items() if name != "format"}
    except ValueError:
        return {}


def sides(metadata: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the images, in pixels: a file holds one number for a square.

    >>> sides({"img_size": 32}), sides({"img_size": [256, 128]})
    ((32, 32), (256, 128))
    """
    size = metadata["img_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _bytes(metadata: dict[str, Any]) -> int:
    """Of the pixels of an image."""
    height, width = sides(metadata)
    return 3 * height * width


def kind_of(path: Path) -> str:
    """The kind of an exported file or folder, by its name.

    Raises:
        ValueError: it is none.
    """
    if path.is_dir():
        return "timm"
    if path.suffix in {".pt2", ".onnx", ".safetensors"}:
        return path.suffix[1:]
    raise ValueError(f"{path.name} is no .pt2, .onnx or .safetensors file")


def load(path: Path, threads: int | None = None) -> Runtime:
    """Open an export.

    Args:
        path: a `.pt2`, `.onnx` or `.safetensors` file, or a timm folder.
        threads: CPU threads; None leaves the library's choice, which is all of them.
    """
    kind = kind_of(path)
    if kind == "onnx":
        return OnnxRuntime(path, threads)
    if kind == "pt2":
        import torch

        extra = {"metadata.json": ""}
        module = torch.export.load(path, extra_files=extra).module()
        return TorchRuntime(module, json.loads(extra["metadata.json"] or "{}"), threads)
    return _rebuilt(path, threads)


def _rebuilt(path: Path, threads: int | None) -> Runtime:
    """From weights, by the library that has the architecture."""
    from safetensors import safe_open

    file = path / "model.safetensors" if path.is_dir() else path
    with safe_open(file, "pt") as opened:
        metadata = read_properties(opened.metadata() or {})
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
    if path.is_dir():
        metadata = _folder_metadata(path)
    architecture, arguments = metadata["architecture"], metadata.get("model_args", {})
    if architecture.startswith("torchvision/"):
        import torchvision.models.segmentation  # which registers its names as well

        module = torchvision.models.get_model(architecture.partition("/")[2], weights=None, **arguments)
        _load(module, state)
    elif architecture.startswith(("lraspp/", "deeplab/")):
        from factor_transfer.networks.segmenter import build_segmenter

        module = build_segmenter(architecture, **arguments)
        _load(module, state)
    else:
        import timm

        if architecture.startswith("cifar_"):
            import factor_transfer.zoo  # noqa: F401 (registers them; nothing else of the package is needed)
        if path.is_dir():
            module = timm.create_model(f"local-dir:{path}", pretrained=True)
        else:
            module = timm.create_model(architecture, **arguments)
            _load(module, state)
    return TorchRuntime(module.eval(), metadata, threads)


def _load(module: Any, state: dict[str, Any]) -> None:
    """All tensors, under the versions that the module's own state names (MNASNet asks for one)."""
    own = module.state_dict()
    if own.keys() != state.keys():
        raise ValueError(f"weights that do not fit: {sorted(own.keys() ^ state.keys())[:3]}")
    own.update(state)
    module.load_state_dict(own)


def _folder_metadata(path: Path) -> dict[str, Any]:
    """What a timm folder says of its network's input."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    own = config["pretrained_cfg"]
    return {
        "architecture": config["architecture"],
        "img_size": own["input_size"][-2:],
        "mean": own["mean"],
        "std": own["std"],
        "classes": config.get("label_names") or own.get("label_names"),
        "bit_depth": config.get("bit_depth"),
        "resize": {name: own[name] for name in ("interpolation", "crop_pct", "crop_mode") if name in own},
    }


# -- the fresh process


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Write logits (`task: logits`) or measure (`task: latency`); libraries in `without` cannot be imported."""
    for name in request["without"]:
        sys.modules[name] = None  # type: ignore[assignment] # an import of it raises ImportError
    if request["task"] == "latency":
        return {"latency": _latency(**request["arguments"])}
    if request["task"] == "tensors":
        return {"digest": _digest(Path(request["path"]))}
    runtime = load(Path(request["path"]), threads=request["threads"])
    size, batch = _bytes(runtime.metadata), request["batch"]
    with open(request["pixels"], "rb") as pixels, open(request["logits"], "wb") as logits:  # noqa: PTH123
        while block := pixels.read(batch * size):
            logits.write(runtime.logits(block, len(block) // size))
    return {"metadata": runtime.metadata, "modules": sorted({name.partition(".")[0] for name in sys.modules})}


def _digest(path: Path) -> str:
    """SHA-256 over names, types, shapes and values of a file's tensors: the package's `state_fingerprint`."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(path, "pt") as opened:
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _latency(
    paths: dict[str, str], threads: int | None, batches: list[int], turns: int, seconds: float
) -> list[dict[str, Any]]:
    """Milliseconds of a forward pass of each network, for each batch size; networks take turns.

    Measuring one batch size ends after `turns` turns, or after `seconds` with at least five.
    """
    loaded = {name: load(Path(path), threads) for name, path in paths.items()}
    found = []
    for batch in batches:
        inputs = {
            name: runtime.prepare(os.urandom(_bytes(runtime.metadata)) * batch, batch)
            for name, runtime in loaded.items()
        }
        taken: dict[str, list[float]] = {name: [] for name in loaded}
        started = time.perf_counter()
        for turn in range(turns + 3):  # the first three warm up
            for name, runtime in loaded.items():
                start = time.perf_counter()
                runtime.forward(inputs[name])
                if turn >= 3:
                    taken[name].append(1000 * (time.perf_counter() - start))
            if turn >= 7 and time.perf_counter() - started > seconds:
                break
        for name, times in taken.items():
            times.sort()
            p50, p95 = (times[min(int(share * len(times)), len(times) - 1)] for share in (0.5, 0.95))
            found.append({"name": name, "batch": batch, "p50_ms": p50, "p95_ms": p95, "n": len(times)})
    return found


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))  # noqa: T201 (the answer)
