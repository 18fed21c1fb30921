"""What the report shows and no stage has measured: one pass of all networks over the validation images.

Shapes: n validation images, B of them at a time, C channels, K factor channels, H x W the map, N classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from factor_transfer.config import Config
from factor_transfer.data.dataset import Dataset
from factor_transfer.data.splits import Batch
from factor_transfer.data.views import spaced
from factor_transfer.method.factor_transfer import normalize_factor
from factor_transfer.method.losses import drawn_translator, width_of
from factor_transfer.method.slim import AnyParaphraser
from factor_transfer.method.term import align
from factor_transfer.networks.features import Tapped, feature_shape
from factor_transfer.networks.load import Network
from factor_transfer.networks.pair import Modules
from factor_transfer.networks.weights import load_paraphraser, load_weights
from factor_transfer.report.figures import photograph, png, strongest, tiles
from factor_transfer.report.masks import Overlaps
from factor_transfer.tasks.base import Task, task_of
from factor_transfer.training.engine import Engine
from factor_transfer.training.finished import answers, open_images, rebuild
from factor_transfer.training.run_folder import saved_config
from factor_transfer.training.summary import Summary, read_summary
from factor_transfer.util.errors import FactorTransferError
from factor_transfer.util.files import read_json, write_json

VERSION = 3
"""Raise it when findings change; those of another version are made again."""

EXAMPLES, CHANNELS, DISAGREEMENTS = 6, 8, 24
"""Images whose maps are shown, channels of each, and images on which student and teacher differ."""

MOST_DENSE = 16
"""Images at a time where each has a map of logits."""


@dataclass
class Nets:
    """What could be read back of a run, and why the rest could not."""

    networks: dict[str, Network] = field(default_factory=dict)
    answering: list[str] = field(default_factory=list)
    """Those with a trained head; the others give features."""
    tapped: dict[str, Tapped] = field(default_factory=dict)
    size: tuple[int, int] = (1, 1)
    paraphraser: AnyParaphraser | None = None
    translator: nn.Module | None = None
    missing: dict[str, str] = field(default_factory=dict)


def findings(folder: Path, modules: Modules | None = None, engine: Engine | None = None) -> dict[str, Any]:
    """Findings about a finished run: those in its `findings.json`, or made now and kept there.

    What is missing (images that have moved, a translator that early versions did not keep) is named under `missing`.

    Args:
        folder: the run.
        modules: networks that were given as modules, by role.
        engine: where to compute. Default: as the run says.

    Raises:
        RunError: the run is not finished.
    """
    summary, config = read_summary(folder), saved_config(folder)
    path, student = folder / "findings.json", summary.student.fingerprint
    if path.exists():
        kept: dict[str, Any] = read_json(path)
        if kept.get("version") == VERSION and kept.get("student") == student and not kept["missing"]:
            return kept
    made: dict[str, Any] = {"version": VERSION, "student": student}
    nets = _read_back(folder, config, summary, modules or {})
    try:
        images = open_images(config, summary)
    except FactorTransferError as error:
        nets.missing["images"] = str(error)
    else:
        engine = engine or Engine(config.device, config.precision, config.threads)
        task = task_of(config.task)
        made |= _look(
            nets, images, engine, task, min(config.batch_size, MOST_DENSE) if task.dense else config.batch_size
        )
    made["missing"] = nets.missing
    write_json(path, made)
    return made


def _read_back(folder: Path, config: Config, summary: Summary, modules: Modules) -> Nets:
    """All networks of a run that can be had."""
    nets, shapes = Nets(), {}
    for role in summary.networks:
        try:
            network = rebuild(folder, role, modules.get("teacher" if role == "teacher" else "student"))
        except FactorTransferError as error:
            nets.missing[role] = str(error)
            continue
        nets.networks[role] = network
        nets.answering += [role] if answers(config, role, network) else []
        nets.tapped[role] = Tapped(network.module.eval(), summary.networks[role].layer)
        shapes[role] = feature_shape(nets.tapped[role], torch.zeros(2, 3, *network.size))
    if not {"teacher", "student"} <= shapes.keys():
        return nets
    if not config.beta or config.paraphraser == "none":
        return nets
    (channels, *teacher), (own, *student) = shapes["teacher"], shapes["student"]
    nets.size = min(teacher[0], student[0]), min(teacher[1], student[1])
    try:
        file = str(folder / "paraphraser.safetensors")
        nets.paraphraser = load_paraphraser(
            file,
            channels=channels,
            k=config.k,
            batch_norm=config.factor_batch_norm,
            width=width_of(config, channels),
        )
    except FactorTransferError as error:
        nets.missing["paraphraser"] = str(error)
        return nets
    if config.translator == "none":
        nets.translator = nn.Identity()
        return nets
    if not (folder / "translator.safetensors").exists():
        nets.missing["translator"] = "the run was made by a version that did not keep it (no translator.safetensors)"
        return nets
    translator = drawn_translator(config, own, nets.paraphraser.factor_channels)
    try:
        load_weights(translator, folder / "translator.safetensors", str(folder / "translator.safetensors"))
        nets.translator = translator
    except FactorTransferError as error:
        nets.missing["translator"] = str(error)
    return nets


@torch.no_grad()
def _look(nets: Nets, images: Dataset, engine: Engine, task: Task, batch_size: int) -> dict[str, Any]:
    """One pass over the validation images, and a closer look at a few of them."""
    parts: list[nn.Module] = [*nets.tapped.values()]
    parts += [part for part in (nets.paraphraser, nets.translator) if part is not None]
    for part in parts:
        engine.place(part).eval()
    labels = images.validation.labels
    pixels = Overlaps(task, images, nets.answering) if task.dense else None
    given: dict[str, list[Tensor]] = {role: [] for role in nets.answering if pixels is None}
    scores: dict[str, list[Tensor]] = {role: [] for role in nets.answering if images.labelled}
    sums: dict[str, Tensor] = {}
    cosines: list[Tensor] = []
    for chunk in np.array_split(np.arange(len(labels)), -(-len(labels) // batch_size)):
        logits, maps, targets = _forward(nets, images, chunk, engine, task)
        if pixels is not None:
            pixels.add(logits, targets)
        for role, values in given.items():
            values.append(torch.stack([*task.answers(logits[role])]))
        for role, parts_of in scores.items():
            score = task.per_image(logits[role], targets)
            parts_of.extend([] if score is None else [score.double()])
        for name, value in _reconstruction_sums(maps).items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
        cosines += [_cosine(maps)] if "student_factor" in maps else []
    found: dict[str, Any] = {"images": len(labels)}
    if pixels is not None:
        chosen = pixels.chosen()
        found |= pixels.found()
        found["masks"] = pixels.pictures(_forward(nets, images, chosen, engine, task)[0], chosen)
    else:
        found |= _of_answers({role: torch.cat(values, 1).numpy() for role, values in given.items()}, images)
    if images.labelled:
        found["differences"] = _differences({role: torch.cat(each) for role, each in scores.items() if each})
    chosen = _examples(labels) if images.labelled else np.arange(min(EXAMPLES, len(labels)))
    _, maps, _ = _forward(nets, images, chosen, engine, task)
    if sums:
        found["reconstruction"] = {
            "per_channel": _rounded(sums["channel_error"] / sums["channel_size"].clamp_min(1e-12)),
            "per_place": _rounded(sums["place_error"] / sums["place_size"].clamp_min(1e-12)),
        }
    if cosines:
        every = torch.cat(cosines).numpy()
        found["cosine"] = round(float(every.mean()), 4)
        if images.labelled and pixels is None:
            by_class = [every[labels == place] for place in range(len(images.classes))]
            found["similarity"] = [round(float(part.mean()), 4) if len(part) else None for part in by_class]
    found["examples"] = _pictures(maps, chosen, images)
    return found


def _of_answers(joined: Mapping[str, np.ndarray], images: Dataset) -> dict[str, Any]:
    """What the answers of networks tell: how sure each is of an image, and what it names, (2, n)."""
    sure = {role: values[0] for role, values in joined.items()}
    said = {role: values[1].astype(np.int64) for role, values in joined.items()}
    found = _accuracy(said, images.validation.labels, len(images.classes)) if images.labelled else {}
    if {"teacher", "student"} <= said.keys():
        found["disagreements"] = _disagreements(said, sure, images)
    return found


def _forward(
    nets: Nets, images: Dataset, chunk: np.ndarray, engine: Engine, task: Task
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Logits by role, the maps that there are, and targets, for a chunk of validation images; float32, on the CPU."""
    (batch,) = images.validation.batches([chunk], view=None)
    pixels = batch.image.to(engine.device)
    logits: dict[str, Tensor] = {}
    maps: dict[str, Tensor] = {}
    for role, tapped in nets.tapped.items():
        output, feature = tapped(nets.networks[role].norm.to(engine.device)(pixels))
        logits[role] = output.float()
        if role != "baseline":
            maps[role] = align(feature, nets.size).float()
    if nets.paraphraser is not None:
        maps["factor"] = nets.paraphraser.encode(maps["teacher"])
        maps["reconstruction"] = nets.paraphraser.decode(maps["factor"])
    if nets.translator is not None:
        maps["student_factor"] = nets.translator(maps["student"])
    here = [{name: value.cpu() for name, value in part.items()} for part in (logits, maps)]
    return here[0], here[1], task.targets(batch)


def _reconstruction_sums(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums of the error's and of the feature's magnitude, by channel (C,) and by place (H, W)."""
    if "reconstruction" not in maps:
        return {}
    error, size = (maps["reconstruction"] - maps["teacher"]).abs(), maps["teacher"].abs()
    return {
        "channel_error": error.sum((0, 2, 3)),
        "channel_size": size.sum((0, 2, 3)),
        "place_error": error.sum((0, 1)),
        "place_size": size.sum((0, 1)),
    }


def _cosine(maps: Mapping[str, Tensor]) -> Tensor:
    """Of teacher's and student's factor, for each image: (B,)."""
    return (normalize_factor(maps["factor"]) * normalize_factor(maps["student_factor"])).sum(1)


def _accuracy(said: Mapping[str, np.ndarray], labels: np.ndarray, classes: int) -> dict[str, Any]:
    """Right answers by class and role; and on how many images only one of two networks is right."""
    right = {role: answers == labels for role, answers in said.items()}
    only = {
        f"{one} not {other}": int((right[one] & ~right[other]).sum())
        for one in right
        for other in right
        if one != other
    }
    return {
        "count": np.bincount(labels, minlength=classes).tolist(),
        "right": {role: np.bincount(labels[good], minlength=classes).tolist() for role, good in right.items()},
        "only": only,
    }


def _differences(scores: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """The student's headline metric less another network's, with its paired 95 % interval over the images."""
    found = {}
    for other in ("teacher", "baseline"):
        if {"student", other} <= scores.keys():
            differences = scores["student"] - scores[other]
            mean = float(differences.mean())
            half = 1.96 * float(differences.std(correction=0)) / len(differences) ** 0.5
            found[other] = {"mean": mean, "low": mean - half, "high": mean + half}
    return found


def _disagreements(said: Mapping[str, np.ndarray], sure: Mapping[str, np.ndarray], images: Dataset) -> dict[str, Any]:
    """How often teacher and student differ, and the images on which both are surest of it."""
    differ = np.flatnonzero(said["teacher"] != said["student"])
    both = np.minimum(sure["teacher"], sure["student"])[differ]
    chosen = differ[np.argsort(-both, kind="stable")][:DISAGREEMENTS]
    shown = []
    if len(chosen):
        (batch,) = images.validation.batches([chosen], view=None)
        for place, index in enumerate(chosen.tolist()):
            each = {role: [int(said[role][index]), round(float(sure[role][index]), 3)] for role in said}
            picture = photograph(batch.image[place].permute(1, 2, 0).numpy())
            shown.append({"picture": picture, "label": _label(batch, place, images), "index": index, **each})
    return {"count": len(differ), "shown": shown}


def _examples(labels: np.ndarray) -> np.ndarray:
    """The first image of classes that lie evenly among all."""
    classes = np.unique(labels)
    some = classes[spaced(len(classes), EXAMPLES)]
    return np.array([np.flatnonzero(labels == each)[0] for each in some])


def _pictures(maps: Mapping[str, Tensor], chosen: np.ndarray, images: Dataset) -> list[dict[str, Any]]:
    """For each example: the image, and strips of its strongest channels."""
    (batch,) = images.validation.batches([chosen], view=None)
    found = []
    for place, index in enumerate(chosen.tolist()):
        picture = photograph(batch.image[place].permute(1, 2, 0).numpy())
        example: dict[str, Any] = {"label": _label(batch, place, images), "index": index, "picture": picture}
        if "reconstruction" in maps:
            example |= _pair(maps["teacher"][place], maps["reconstruction"][place], "teacher", "reconstruction")
        if "student_factor" in maps:
            ours, theirs = (
                normalize_factor(maps[name][place : place + 1]).view_as(maps[name][place])
                for name in ("student_factor", "factor")
            )
            example |= _pair(theirs, ours, "factor", "student_factor")
            example["cosine"] = round(float((ours * theirs).sum()), 4)
        found.append(example)
    return found


def _label(batch: Batch, place: int, images: Dataset) -> int | None:
    return int(batch.label[place]) if images.labelled and images.pixels is None else None


def _pair(one: Tensor, other: Tensor, *names: str) -> dict[str, str]:
    """Strips of two maps (C, H, W): the first one's strongest channels, in one scale of colours."""
    channels, largest = strongest(one, CHANNELS), float(one.abs().max())
    strips = (png(tiles(maps, channels, largest)) for maps in (one, other))
    return dict(zip(names, strips, strict=True))


def _rounded(values: Tensor) -> Any:
    return np.round(values.double().numpy(), 4).tolist()
