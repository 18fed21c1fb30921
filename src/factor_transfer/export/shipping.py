"""`factor-transfer export`: the student in every format, each proved in a fresh process, with a card and latencies.

EXPORT/student.pt2, student.onnx, student.int8.onnx, student.safetensors, timm/   written only if they agree
       exports.json    what was found: differences, the headline metric, bytes, latency
       README.md       the model card
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts.validators import Number

from factor_transfer.data.dataset import Dataset
from factor_transfer.data.splits import Split
from factor_transfer.data.views import spaced
from factor_transfer.export import runtimes
from factor_transfer.export.formats import (
    TOLERANCE,
    export_int8,
    export_onnx,
    export_pt2,
    export_safetensors,
    export_timm,
    metadata_of,
    plain_copy,
)
from factor_transfer.networks.load import Network
from factor_transfer.networks.pair import Modules
from factor_transfer.networks.segmenter import kind_of
from factor_transfer.report.card import write_card
from factor_transfer.tasks.base import task_of
from factor_transfer.training.finished import answers, open_images, rebuild
from factor_transfer.training.run_folder import cpu_name, saved_config
from factor_transfer.training.summary import read_summary
from factor_transfer.util.arguments import is_callable_name
from factor_transfer.util.checks import check
from factor_transfer.util.console import say, warn
from factor_transfer.util.errors import ConfigError, FactorTransferError, RunError, first_line
from factor_transfer.util.files import read_json, state_fingerprint, write_json

FILES = {
    "pt2": "student.pt2",
    "onnx": "student.onnx",
    "onnx-int8": "student.int8.onnx",
    "safetensors": "student.safetensors",
    "timm": "timm",
}
NEEDS = {
    "pt2": "torch",
    "onnx": "onnxruntime",
    "onnx-int8": "onnxruntime",
    "safetensors": "safetensors",
    "timm": "timm",
}
WITHOUT = {
    "pt2": ["factor_transfer", "timm", "torchvision", "onnxruntime", "accelerate", "safetensors"],
    "onnx": ["factor_transfer", "torch", "timm", "onnx"],
    "timm": ["factor_transfer", "onnxruntime", "accelerate"],
}
"""What the fresh process cannot import."""

AGREEMENT, COSINE = "agreement with the trained student", "cosine with the trained student's features"

MOST_PIXELS = 100_000_000
"""Logits of all images that are compared, at most, where each pixel has its own: they lie in memory several times."""

CALIBRATION = 512
"""Training images that show int8 the ranges of activations."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How to export. The fields are the command's flags."""

    formats: Sequence[str] = tuple(FILES)
    out: Path | None = None
    images: Annotated[int, Number(gte=2)] = 2000
    int8_loss: Annotated[float, Number(gte=0, lte=100)] = 1.0
    latency: bool = True
    license: str | None = None
    data_license: str | None = None
    teacher_license: str | None = None
    intended: str | None = None

    def __post_init__(self) -> None:
        """Check each value by itself."""
        check(self)


def export_run(folder: Path, choices: Choices | None = None, modules: Modules | None = None) -> dict[str, Any]:
    """Export the student of a finished run.

    Args:
        folder: the run.
        choices: formats and checks.
        modules: networks that were given as modules, by role.

    Returns:
        What `exports.json` holds.

    Raises:
        RunError: the run is not finished, or a format failed its check; the others are written all the same.
        ConfigError: an unknown format, or one that needs a package that is not installed.
    """
    choices = choices or Choices()
    _check(choices)
    job = _Export(folder, choices, modules or {})
    out = choices.out or folder / "export"
    out.mkdir(parents=True, exist_ok=True)
    found = _kept(out / "exports.json", job)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as name:
        work = Path(name)
        job.write_pixels(work)
        for form in choices.formats:
            found["formats"] = [row for row in found["formats"] if row["format"] != form]
            _remove(out / FILES[form])
            row = job.attempt(form, work)
            if row is not None:
                (work / FILES[form]).replace(out / FILES[form])
                found["formats"].append(row)
        found["formats"].sort(key=lambda row: list(FILES).index(row["format"]))
        if choices.latency:
            found["latency"], found["machine"] = job.latency(out, work, found["formats"])
    found["failed"] = job.failed
    write_json(out / "exports.json", found)
    write_card(out / "README.md", job.summary, found, job.task, vars(choices))
    if job.failed:
        raise RunError(f"{folder}: {', '.join(job.failed)}", found="; ".join(job.failed.values()),
                       hint=f"the other formats are in {out}")  # fmt: skip
    return found


def _check(choices: Choices) -> None:
    """Formats that exist, with what they need."""
    for form in choices.formats:
        if form not in FILES:
            raise ConfigError(f"--formats {form}", found="no such format", valid=tuple(FILES))
        absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
        if form.startswith("onnx") and absent:
            raise ConfigError(
                f"--formats {form}",
                found=f"{', '.join(absent)} not installed",
                valid="pt2, safetensors and timm without it",
                hint="pip install 'factor-transfer[export]'",
            )


def _kept(path: Path, job: _Export) -> dict[str, Any]:
    """What an earlier export of the same student found; formats that are not made again stay."""
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    if found.get("student") != job.fingerprint:
        for row in found.get("formats", []):
            _remove(path.with_name(row["file"]))
        found = {"formats": [], "latency": []}
    here = [row for row in found["formats"] if path.with_name(row["file"]).exists()]
    return {**found, "formats": here, "version": 1, "student": job.fingerprint, **job.terms}


class _Export:
    """One student, what it answers, and the attempts to write it."""

    def __init__(self, folder: Path, choices: Choices, modules: Modules) -> None:
        self.folder, self.choices, self.modules = folder, choices, modules
        self.config, self.summary = saved_config(folder), read_summary(folder)
        self.task = task_of(self.config.task)
        self.student = rebuild(folder, "student", modules.get("student"))
        self.module = plain_copy(self.student.module)
        self.data: Dataset = open_images(self.config, self.summary)
        self.failed: dict[str, str] = {}
        validation, most = self.data.validation, self.choices.images
        if self.task.dense:
            most = max(2, min(most, MOST_PIXELS // (len(self.data.classes) * math.prod(self.data.frame.size))))
        self.chosen = spaced(len(validation), most)

    @cached_property
    def fingerprint(self) -> str:
        """Of the student's weights."""
        return state_fingerprint(self.module.state_dict())

    @cached_property
    def logits(self) -> torch.Tensor:
        """What the trained student answers: (images, N)."""
        with torch.no_grad():
            return torch.cat([self.module(images) for images, _ in self._shown(self.student, self.data.validation)])

    def example(self, network: Network) -> torch.Tensor:
        """Normalised images to trace a network with, of the size that it sees."""
        images: torch.Tensor
        images, _ = next(self._shown(network, self.data.validation))
        return images

    @cached_property
    def terms(self) -> dict[str, Any]:
        """What the checks were made against."""
        metric = self.task.headline
        return {
            "images": len(self.chosen),
            "metric": asdict(metric),
            f"reference_{metric.key}": self._score(self.logits),
            "measure": self.measure,
            "largest_logit": float(self.logits.abs().max()),
            "tolerance": TOLERANCE,
            "int8_loss": self.choices.int8_loss,
            "resize": self.data.frame.described(),
        }

    @cached_property
    def measure(self) -> str:
        """What int8 is judged by: the headline metric, or how near it is to the student without labels or a head."""
        if not answers(self.config, "student", self.student):
            return COSINE
        return self.task.headline.label if self.data.labelled else AGREEMENT

    def _score(self, outputs: torch.Tensor) -> float | None:
        """The headline metric of outputs (images, N); None where the measure is another one."""
        if self.measure in {AGREEMENT, COSINE}:
            return None
        sums = self.task.sums(outputs, self.targets)
        return round(float(self.task.values(sums, len(outputs))[self.task.headline.key]), 4)

    @cached_property
    def targets(self) -> torch.Tensor:
        """What the images should be answered with."""
        chunks = np.array_split(self.chosen, -(-len(self.chosen) // self.config.batch_size))
        return torch.cat([self.task.targets(batch) for batch in self.data.validation.batches(chunks, view=None)])

    @property
    def custom(self) -> bool:
        """No library can build it: the user's own code."""
        return self.summary.student.is_module or is_callable_name(self.config.student)

    def metadata(self, network: Network | None = None) -> dict[str, Any]:
        """What a file says of itself."""
        return metadata_of(network or self.student, self.data, self.config.task)

    def _shown(self, network: Network, split: Split, chosen: np.ndarray | None = None) -> Iterator[Any]:
        """Normalised images and uint8 pixels (B, H, W, 3), as evaluation shows them."""
        rows = self.chosen if chosen is None else chosen
        chunks = np.array_split(rows, -(-len(rows) // self.config.batch_size))
        for batch in split.batches(chunks, view=None):
            yield network.norm(batch.image).contiguous(), batch.image.permute(0, 2, 3, 1).contiguous().numpy()

    def write_pixels(self, work: Path) -> None:
        """The validation images, for the fresh processes."""
        with (work / "pixels").open("wb") as file:
            for _, pixels in self._shown(self.student, self.data.validation):
                file.write(pixels.tobytes())

    def attempt(self, form: str, work: Path) -> dict[str, Any] | None:
        """Write one format and check it; None where there is none, and why under `failed`."""
        path = work / FILES[form]
        foreign = self.config.student.startswith("torchvision/") or kind_of(self.config.student)
        if form == "timm" and (self.custom or foreign):
            self._decline(form, f"{self.config.student} is no architecture of timm's")
            return None
        say(f"export: {form}")
        try:
            self.write(form, self.student, path, work)
            row = self._compare(form, path, work)
        except FactorTransferError as error:
            self.failed[form] = f"{form}: {' '.join(str(error).split())}"
        except Exception as error:  # exporters raise whatever they meet in foreign code
            reason = first_line(error)
            self.failed[form] = f"{form}: {reason[:300]}"
        else:
            return row
        warn(self.failed[form])
        return None

    def _decline(self, form: str, reason: str) -> None:
        """A format that this student cannot have: a failure only where it was asked for by name."""
        if tuple(self.choices.formats) == tuple(FILES):
            say(f"export: no {form}: {reason}")
        else:
            self.failed[form] = f"{form}: {reason}"

    def write(self, form: str, network: Network, path: Path, work: Path) -> None:
        """Write one format of a network."""
        metadata, module, example = self.metadata(network), network.module, self.example(network)
        if form == "pt2":
            export_pt2(module, example, path, metadata)
        elif form == "onnx":
            export_onnx(module, example, path, metadata)
        elif form == "onnx-int8":
            source = work / "float.onnx"
            export_onnx(module, example, source, metadata)
            shown = self._shown(network, self.data.train, spaced(len(self.data.train), CALIBRATION))
            export_int8(source, (images.numpy() for images, _ in shown), path, metadata)
        elif form == "safetensors":
            export_safetensors(module, path, metadata)
        else:
            export_timm(module, path, metadata)

    def _compare(self, form: str, path: Path, work: Path) -> dict[str, Any]:
        """What the export answers in a fresh process, against the trained student.

        Raises:
            RunError: it does not agree.
        """
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
        metric = self.task.headline
        row: dict[str, Any] = {"format": form, "file": path.name, "needs": NEEDS[form], "bytes": size, metric.key: None,
               "max_difference": None, "mean_difference": None}  # fmt: skip
        architecture = self.metadata()["architecture"]
        own = "factor_transfer.zoo" if architecture.startswith("cifar_") else None
        own = "factor_transfer" if kind_of(architecture) else own
        if form in {"safetensors", "timm"} and own:
            row["needs"] += f", {own}"
        if form == "safetensors" and self.custom:
            there = _fresh({"task": "tensors", "path": str(path), "without": ["factor_transfer"]})["digest"]
            if there != self.fingerprint:
                raise RunError("other tensors than the trained student's", found=there, valid=self.fingerprint)
            return row
        without = [*WITHOUT[{"onnx-int8": "onnx", "safetensors": "timm"}.get(form, form)]]
        if own and form in {"safetensors", "timm"}:  # what the package imports is needed with it
            without = [] if kind_of(architecture) else [name for name in without if name != "factor_transfer"]
        request = {"task": "logits", "path": str(path), "pixels": str(work / "pixels"), "batch": self.config.batch_size,
                   "logits": str(work / "logits"), "threads": torch.get_num_threads(), "without": without}  # fmt: skip
        _fresh(request)
        got = torch.from_numpy(np.fromfile(work / "logits", np.float32)).view(self.logits.shape)
        difference = (got - self.logits).abs()
        row["max_difference"], row["mean_difference"] = float(difference.max()), float(difference.mean())
        if self.measure == COSINE:  # the largest of its features is no answer
            row["agreement"] = round(100 * float(torch.cosine_similarity(got, self.logits).mean()), 4)
            row["other_answers"] = 0
        else:
            same = self.task.answers(got)[1] == self.task.answers(self.logits)[1]
            row["agreement"], row["other_answers"] = round(100 * float(same.float().mean()), 4), int((~same).sum())
        row[metric.key] = self._score(got)
        self._judge(form, row)
        return row

    def _judge(self, form: str, row: Mapping[str, Any]) -> None:
        if form == "onnx-int8":
            metric = self.task.headline
            kept, reference = row[metric.key], self.terms[f"reference_{metric.key}"]
            lost = 100 - row["agreement"] if kept is None else metric.gain(reference, kept)
            allowed = self.choices.int8_loss
            if not lost <= allowed:
                found = f"it loses {lost:.2f} {metric.points} of {self.measure}"
                hint = "allow more with --int8-loss, or ship the float32 file"
                raise RunError("int8", found=found, valid=f"at most {allowed:g}", hint=hint)
            return
        relative = row["max_difference"] / max(self.terms["largest_logit"], 1e-12)
        allowed = self.task.other_answers * self.logits[:, 0].numel()
        if not relative <= TOLERANCE or row["other_answers"] > allowed:
            found = f"logits off by {relative:.2g} of the largest, {row['other_answers']} other answers"
            raise RunError("it does not agree with the trained student", found=found, valid=f"at most {TOLERANCE:g}")

    def latency(
        self, out: Path, work: Path, formats: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Teacher and student in every runtime: batch 1 and 32, one thread and all."""
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1),
                   "torch": torch.__version__}  # fmt: skip
        machine["onnxruntime"] = version("onnxruntime") if find_spec("onnxruntime") else None
        paths = {("student", row["format"]): out / row["file"] for row in formats}
        try:
            teacher = rebuild(self.folder, "teacher", self.modules.get("teacher"))
            for form in ("pt2", "onnx"):
                if ("student", form) in paths:
                    paths["teacher", form] = work / f"teacher-{FILES[form]}"
                    self.write(form, teacher, paths["teacher", form], work)
        except Exception as error:  # as in `attempt`
            warn(f"the teacher's latency is not measured: {first_line(error)}")
            paths = {key: path for key, path in paths.items() if path.exists()}
        rows = []
        for forms in (("pt2",), ("onnx", "onnx-int8")):
            group = {f"{who} {form}": str(path) for (who, form), path in sorted(paths.items()) if form in forms}
            for threads in (1, None) if group else ():
                say(f"latency: {', '.join(group)}; {threads or 'all'} thread{'' if threads == 1 else 's'}")
                arguments = {"paths": group, "threads": threads, "batches": [1, 32], "turns": 60, "seconds": 20}
                found = _fresh({"task": "latency", "arguments": arguments, "without": ["factor_transfer"]})["latency"]
                for row in found:
                    who, form = row.pop("name").split()
                    size = Path(group[f"{who} {form}"]).stat().st_size
                    row |= {"network": who, "format": form, "threads": threads or os.cpu_count(), "bytes": size}
                    rows.append(row)
        return rows, machine


def _fresh(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of `runtimes` in a process of its own, isolated from the user's environment and working folder."""
    command = [sys.executable, "-I", runtimes.__file__, json.dumps(request)]
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=kept)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RunError("a fresh process could not run it", found=last)
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
