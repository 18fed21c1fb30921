"""`factor-transfer suggest`: students within limits of size and latency, measured on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from factor_transfer.config import FIELDS, SuggestConfig, plain
from factor_transfer.data.dataset import open_data
from factor_transfer.export.formats import latency_ms
from factor_transfer.networks.load import DEFAULT_SIZE, Network, count_parameters, load_network
from factor_transfer.report.html import repeat_command
from factor_transfer.util.arguments import Size, written
from factor_transfer.util.checks import flag
from factor_transfer.util.console import say, warn
from factor_transfer.util.errors import ConfigError
from factor_transfer.util.machine import keep_memory

TURNS = 3
"""Processes that time a network, one after another."""

Candidate = tuple[str, dict[str, Any]]
"""A timm name, and constructor arguments."""


def _narrow(depth: int, width: int) -> Candidate:
    return "cifar_resnet20", {"layers": (depth,) * 3, "channels": (width, 2 * width, 4 * width)}


def _convnext(width: int, depth: int) -> Candidate:
    dims = (width, 2 * width, 4 * width, 6 * width)
    return "convnext_atto", {"depths": (1, depth, depth, 1), "dims": dims, "patch_size": 1}


FOR_SMALL: tuple[Candidate, ...] = (
    *(_narrow(depth, width) for depth in (1, 2, 3) for width in (4, 8, 12)),
    *((f"cifar_resnet{depth}", {}) for depth in (20, 32, 44)),
    *((f"cifar_wrn_{name}", {}) for name in ("16_1", "16_2", "40_1", "40_2")),
    *(_convnext(width, depth) for width, depth in ((8, 1), (8, 2), (12, 2), (16, 2))),
    ("cifar_vgg13", {}),
)
"""Students for images up to 96 pixels: networks that keep their resolution."""

FOR_LARGE: tuple[Candidate, ...] = tuple(
    (name, {})
    for name in (
        "mobilenetv3_small_050", "mobilenetv3_small_075", "mobilenetv3_small_100", "mobilenetv3_large_100",
        "mobilenetv2_035", "mobilenetv2_050", "mobilenetv2_100", "mobilenetv4_conv_small_050",
        "mobilenetv4_conv_small", "mobilenetv4_conv_medium", "lcnet_035", "lcnet_050", "lcnet_075", "lcnet_100",
        "tinynet_e", "tinynet_d", "tinynet_c", "ghostnet_050", "ghostnet_100", "efficientnet_lite0",
        "efficientnet_b0", "regnetx_002", "regnetx_004", "regnety_002", "regnety_004", "resnet10t", "resnet14t",
        "resnet18", "resnet26", "resnet34", "convnext_atto", "convnext_femto", "mobilevit_xxs", "edgenext_xx_small",
        "vit_tiny_patch16_224",
    )
)  # fmt: skip
"""Students for larger images."""


@dataclass(frozen=True)
class Suggestion:
    """A student that fits, as measured here."""

    name: str
    args: dict[str, Any]
    parameters: int
    size_mb: float
    """Megabytes of its weights in float32."""
    latency_ms: float
    """Median milliseconds of one image, on the CPU, in float32."""
    command: str
    """What distils into it."""


def suggest(config: SuggestConfig) -> tuple[list[Suggestion], Size]:
    """Students within the limits, the largest first, and the size of the images they were measured at.

    Raises:
        ConfigError: there is no limit, or nothing is within the limits.
    """
    limits = {name: getattr(config, name) for name in ("max_latency_ms", "max_params", "max_size_mb")}
    if not any(limit is not None for limit in limits.values()):
        raise ConfigError("suggest", found="no limit", valid=[flag(name) for name in limits])
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = open_data(config, default_size=lambda: DEFAULT_SIZE)
    for note in data.notes:
        say(f"data: {note}")
    for lost in data.lost:
        warn(f"data: {lost.what} ({lost.hint})")
    size, classes = data.frame.size, len(data.classes)
    candidates = FOR_SMALL if data.frame.small else FOR_LARGE
    networks = [load_network(n, role="student", num_classes=classes, img_size=size, args=a) for n, a in candidates]
    say(f"suggest: {len(networks)} networks on this machine, {torch.get_num_threads()} threads, {written(size)} pixels")
    small = [place for place, network in enumerate(networks) if _within(_measures(network), limits)]
    times = _latencies([candidates[place] for place in small], classes, size)  # only of what is small enough
    found = [
        Suggestion(
            candidates[place][0], candidates[place][1], **_measures(networks[place]), latency_ms=milliseconds,
            command=_command(config, candidates[place]),
        )
        for place, milliseconds in zip(small, times, strict=True)
    ]  # fmt: skip
    fitting = [each for each in found if _within({"latency_ms": each.latency_ms}, limits)]
    if not fitting:
        least = min((_measures(network) for network in networks), key=lambda of: of["parameters"])
        nearest = f"{least['parameters']:,} parameters, {least['size_mb']:.3g} MB"
        fastest = f", {min(times):.3g} ms" if times else ""
        raise ConfigError(
            " ".join(f"{flag(name)} {limit:g}" for name, limit in limits.items() if limit is not None),
            found=f"none of {len(networks)} networks within it; the least among them: {nearest}{fastest}",
            hint="raise the limit, or give a smaller --img-size",
        )
    return sorted(fitting, key=lambda each: -each.parameters), size


def _latencies(candidates: Sequence[Candidate], classes: int, size: Size) -> list[float]:
    """Median milliseconds of one image through each, in processes of their own, as in use.

    In one process with all of them, a network would be timed on a heap that the others have fragmented. They take
    turns, so that a disturbance affects all of them.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    measure = partial(_latency, classes=classes, size=size, threads=torch.get_num_threads())
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
        turns = [list(processes.map(measure, candidates)) for _ in range(TURNS)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def _latency(candidate: Candidate, classes: int, size: Size, threads: int) -> float:
    torch.set_num_threads(threads)
    keep_memory()  # else glibc may give freed memory back, by chance, and the latency has page faults in it
    name, args = candidate
    network = load_network(name, role="student", num_classes=classes, img_size=size, args=args)
    return latency_ms([network.module], [size], rounds=10)[0]


def _measures(network: Network) -> dict[str, Any]:
    tensors = network.module.state_dict().values()
    megabytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
    return {"parameters": count_parameters(network.module), "size_mb": megabytes}


def _within(measures: dict[str, Any], limits: dict[str, float | None]) -> bool:
    of = {"parameters": "max_params", "size_mb": "max_size_mb", "latency_ms": "max_latency_ms"}
    return all(value <= (limits[of[name]] or float("inf")) for name, value in measures.items())


def _command(config: SuggestConfig, candidate: Candidate) -> str:
    """The `distill` command for one candidate."""
    name, args = candidate
    shared = {each.name: getattr(config, each.name) for each in fields(SuggestConfig) if each.name in FIELDS}
    baseline = {"baseline": config.label_weight > 0}  # without labels it would learn nothing
    return repeat_command(plain({**shared, "student": name, "student_args": args or None, **baseline}))
