"""The model card: `README.md` in Hugging Face's form, beside the exports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from factor_transfer.data.frames import Frame
from factor_transfer.report.html import rendered, repeat_command, scored
from factor_transfer.tasks.base import Task
from factor_transfer.training.summary import Summary
from factor_transfer.util.files import write_atomic

USE = """import numpy as np, onnxruntime

session = onnxruntime.InferenceSession("student.onnx")
outputs = session.run(None, {"images": images})[0]  # images: float32 (B, 3, H, W), as above"""

TORCH_USE = """import torch

student = torch.export.load("student.pt2").module()
outputs = student(images)  # images: float32 (B, 3, H, W), as above"""

TIMM_USE = """import timm
%s
student = timm.create_model("local-dir:timm", pretrained=True).eval()"""

ZOO = "import factor_transfer.zoo  # the architecture is this package's: pip install factor-transfer"

METHOD = """Factor Transfer (Kim, Park, Kwak: *Paraphrasing Complex Network: Network Compression via Factor Transfer*, \
NeurIPS 2018, arXiv 1802.04977)"""


def write_card(path: Path, summary: Summary, exports: Mapping[str, Any], task: Task, said: Mapping[str, Any]) -> None:
    """Write the card of a run's student.

    Args:
        path: where.
        summary: of the run.
        exports: what `exports.json` holds.
        task: what the student is for.
        said: what the user states: `license`, `data_license`, `teacher_license`, `intended`.
    """
    forms = {row["format"] for row in exports["formats"]}
    student, classes, settings = summary.student, summary.data.classes, summary.settings
    zoo = student.model_args.get("architecture", "").startswith("cifar_")
    frame = Frame.read({"img_size": summary.data.img_size, "resize": exports.get("resize", {})})
    head = bool(settings.get("label_weight", 1.0) or settings.get("kd_weight"))
    kind = task.hub if head else "image-feature-extraction"
    networks = [
        {
            "label": summary.label(role),
            "metrics": [metric.number(network.measured.get(metric.key)) for metric in summary.metrics],
            "parameters": network.parameters,
        }
        for role, network in summary.networks.items()
        if summary.value(role) is not None
    ]
    values = {
        "summary": summary,
        "size": frame.size,
        "resized": frame.in_words(),
        "networks": networks,
        "head": head,
        "gives": task.gives,
        "dense": task.dense,
        "exports": scored(exports),
        "by": METHOD if summary.method == "Factor Transfer" else summary.method,
        "classes": ", ".join(f"{place} {name}" for place, name in enumerate(classes)),
        "use": USE if "onnx" in forms else TORCH_USE,
        "timm_use": TIMM_USE % (ZOO if zoo else "") if "timm" in forms else None,
        "command": repeat_command(settings),
        "front": yaml.safe_dump(_front(summary, kind, said), sort_keys=False, allow_unicode=True),
        **{name: said.get(name) for name in ("license", "data_license", "teacher_license", "intended")},
    }
    text = rendered("card.md.jinja", values)
    write_atomic(path, text)
    if "timm" in forms:
        write_atomic(path.parent / "timm" / "README.md", text.replace('"local-dir:timm"', '"local-dir:FOLDER"'))


def _front(summary: Summary, kind: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub reads."""
    front: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": kind,
        "tags": [kind, "knowledge-distillation", "factor-transfer"],
    }
    metric, value = summary.metric, summary.value("student")
    if value is not None:
        name = Path(summary.data.name).name
        measured = {"type": metric.hub or metric.key, "name": metric.heading, "value": round(value, 4)}
        found = {
            "task": {"type": kind},
            "dataset": {"name": name, "type": name, "split": "validation"},
            "metrics": [measured],
        }
        front["model-index"] = [{"name": summary.student.name, "results": [found]}]
    return front | ({"license": said["license"]} if said.get("license") else {})
