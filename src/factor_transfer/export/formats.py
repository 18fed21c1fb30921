"""The student leaves alone: writers of each kind of file, and nothing about runs.

`student.pt2` needs only torch, ONNX only onnxruntime, a timm folder only timm, safetensors only a reader of tensors.
"""

from __future__ import annotations

import io
import json
import logging
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from factor_transfer.config import plain
from factor_transfer.data.dataset import Dataset
from factor_transfer.export.runtimes import properties
from factor_transfer.networks.load import Network
from factor_transfer.util.arguments import AnySize, as_size, brief
from factor_transfer.util.errors import RunError
from factor_transfer.util.files import write_atomic

TOLERANCE = 1e-4
"""Largest difference of a logit between the trained student and its export, relative to the largest logit."""

EXPORT_IMAGES = 64
"""Validation images on which the export at a run's end is compared with the trained student."""

UNMEASURED = 3
"""Forward passes that warm a network up before each of its turns at being timed."""

READABLE = 0o644
"""safetensors makes files that only their owner can read; these are made to leave."""

Metadata = Mapping[str, Any]
"""What a file says of itself: architecture, model_args, img_size, mean, std, classes, task, resize."""


def metadata_of(network: Network, data: Dataset, task: str) -> dict[str, Any]:
    """What an export of a network that was trained on `data` says of itself: no other file is needed to use it.

    `img_size` is one number for a square, else height and width. `bit_depth` is of grey images of more than 8 bits,
    as it was given: None where nothing was.
    """
    arguments = {**network.model_args}
    return {
        "architecture": arguments.pop("architecture", network.name),
        "model_args": plain(arguments),
        "img_size": brief(network.size),
        "mean": list(network.mean),
        "std": list(network.std),
        "classes": list(data.classes),
        "task": task,
        "resize": data.frame.described(),
        "bit_depth": data.bit_depth,
    }


def export_pt2(module: nn.Module, images: Tensor, path: Path, metadata: Metadata | None = None) -> float:
    """Write `module` as a `torch.export` program with a dynamic batch; read it back and compare.

    Args:
        module: normalised float images (B, 3, H, W) -> logits (B, N), or a map of them.
        images: normalised images to compare on, at least two.
        path: the `.pt2` file; written only if the comparison passes.
        metadata: kept in the file as `metadata.json`.

    Returns:
        The largest difference of a logit, relative to the largest logit.

    Raises:
        RunError: what was read back does not agree.
    """
    whole = plain_copy(module)
    images = images.cpu().float().contiguous()
    batch = torch.export.Dim("batch", min=1)
    # The program keeps its example: a copy of two images, where a view would drag all of them along.
    program = torch.export.export(whole, (images[:2].clone(),), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(dict(metadata or {}))})
    buffer.seek(0)
    with torch.no_grad():
        wanted, got = whole(images), torch.export.load(buffer).module()(images)
    difference = float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not difference <= TOLERANCE:
        raise RunError(str(path), found=f"logits off by {difference:.2g} after export", valid=f"at most {TOLERANCE:g}")
    write_atomic(path, buffer.getvalue())
    return difference


def export_onnx(module: nn.Module, images: Tensor, path: Path, metadata: Metadata) -> None:
    """Write `module` as ONNX: `images` (B, 3, H, W), normalised -> `logits` (B, N, ...); metadata as properties."""
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        torch.onnx.export(
            plain_copy(module),
            (images[:2].cpu().float().contiguous().clone(),),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    _set_properties(onnx.load(path), path, metadata)


def export_int8(source: Path, images: Iterable[np.ndarray], path: Path, metadata: Metadata) -> None:
    """Quantise an ONNX file to 8 bits: weights by channel, activations in ranges that `images` show.

    Args:
        source: the float32 ONNX file.
        images: batches of normalised training images, float32 (B, 3, H, W).
        path: the int8 ONNX file (QDQ: int8 weights, uint8 activations).
        metadata: as for `export_onnx`.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc] # no types
        """The training images, once."""

        def __init__(self) -> None:
            self.batches = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    prepared = path.with_name(f"{path.name}.prepared")
    quiet = logging.getLogger()
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        # Unsigned activations: with VNNI twice as fast as float32 where signed ones are slower than it.
        unsigned = quantization.QuantType.QUInt8
        quantization.quantize_static(prepared, path, Calibration(), per_channel=True, activation_type=unsigned)
    finally:
        quiet.setLevel(level)
        prepared.unlink(missing_ok=True)
    _set_properties(onnx.load(path), path, metadata)


def export_safetensors(module: nn.Module, path: Path, metadata: Metadata) -> None:
    """Write the weights as a plain state dict, with metadata in the header."""
    save_file(_state(module), path, {"format": "pt"} | properties(dict(metadata)))
    path.chmod(READABLE)


def export_timm(module: nn.Module, folder: Path, metadata: Metadata) -> None:
    """Write the folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads."""
    import timm

    shown = {
        "input_size": (3, *as_size(metadata["img_size"])),
        "mean": tuple(metadata["mean"]),
        "std": tuple(metadata["std"]),
        "interpolation": metadata["resize"]["interpolation"],
        "crop_pct": metadata["resize"]["crop_pct"],
        "crop_mode": metadata["resize"]["crop_mode"],
    }
    arguments = {name: value for name, value in metadata["model_args"].items() if name not in {"num_classes"}}
    timm.models.save_for_hf(
        plain_copy(module),
        folder,
        model_config={"label_names": list(metadata["classes"]), "bit_depth": metadata["bit_depth"]},
        model_args=arguments or None,
        safe_serialization=True,
        data_config=shown,
    )
    (folder / "model.safetensors").chmod(READABLE)


def latency_ms(
    modules: Sequence[nn.Module], sizes: Sequence[AnySize], rounds: int = 7, repeats: int = 5
) -> list[float]:
    """Median milliseconds of one image, of its size, through each module, on the CPU, in float32.

    The modules take turns, so that a disturbance of the machine meets all of them. In each of its turns a module first
    runs unmeasured: others have emptied the processor's caches, and in use no other network runs between two images.
    """
    images = [torch.zeros(1, 3, *as_size(size)) for size in sizes]
    copies = [plain_copy(module) for module in modules]
    times: list[list[float]] = [[] for _ in copies]
    with torch.no_grad():
        for _ in range(rounds):
            for module, image, taken in zip(copies, images, times, strict=True):
                for turn in range(UNMEASURED + repeats):
                    start = time.perf_counter()
                    module(image)
                    if turn >= UNMEASURED:
                        taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy for inference: on the CPU, float32, contiguous, in eval mode."""
    return deepcopy(module).cpu().float().to(memory_format=torch.contiguous_format).eval()


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone().contiguous() for name, value in plain_copy(module).state_dict().items()}


def _set_properties(model: Any, path: Path, metadata: Metadata) -> None:
    import onnx

    onnx.helper.set_model_props(model, properties(dict(metadata)))
    onnx.save(model, path)
