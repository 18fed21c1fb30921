"""A network from a name and its weights: strict, and never a line of code out of a weight file.

Names are timm's (its registry, `local-dir:FOLDER`, `hf-hub:NAME`; the paper's CIFAR families are in `zoo`).
Weights are safetensors, or torch files read with `weights_only=True`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_state_dict, parse_model_name, resolve_model_input_args
from torch import Tensor, nn

import factor_transfer.zoo  # noqa: F401 (registers the paper's families with timm)
from factor_transfer.config import Rgb
from factor_transfer.errors import FactorTransferError, ModelError, listed, near
from factor_transfer.files import state_fingerprint
from factor_transfer.method import Paraphraser, factor_channels, load_reference_paraphraser
from factor_transfer.seeds import part_seed, seeded

Role = Literal["teacher", "student"]

DEFAULT_SIZE = 224
"""Side of the images of a network that does not say, in pixels."""


class InputNorm(nn.Module):
    """uint8 pixels (B, 3, H, W) -> floats normalised by a network's own channel means and deviations (for 0..1).

    >>> InputNorm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten().tolist()
    [-1.0, -1.0, -1.0]
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Rgb, std: Rgb) -> None:
        super().__init__()
        mean_, std_ = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
        self.register_buffer("scale", 1 / (255 * std_), persistent=False)
        self.register_buffer("shift", -mean_ / std_, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H, W)."""
        return torch.addcmul(self.shift, images.to(self.scale.dtype), self.scale)


@dataclass(frozen=True)
class Network:
    """A network and what is known of it."""

    module: nn.Module
    name: str
    mean: Rgb
    std: Rgb
    pretrained: bool
    """It came with trained weights (its head may be new all the same)."""
    new_head: bool = False
    """Its last layer is untrained, because the weights were for other classes."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments; with `architecture` they rebuild it."""
    notes: tuple[str, ...] = ()
    """What its user should know."""

    @property
    def norm(self) -> InputNorm:
        """From uint8 pixels to its input."""
        return InputNorm(self.mean, self.std)


class FrozenTeacher(nn.Module):
    """A module that is in eval mode and without gradient, whatever mode the modules around it are put in.

    `no_grad`, not inference mode: losses save the teacher's outputs for their backward pass.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in eval mode: in train mode its batch-norm statistics would drift."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """As the module's own."""
        return self.module(*inputs)

    def fingerprint(self) -> str:
        """SHA-256 of its weights and buffers."""
        return state_fingerprint(self.module.state_dict())


def load_network(
    given: str | nn.Module,
    *,
    role: Role,
    num_classes: int,
    img_size: int,
    args: Mapping[str, Any] | None = None,
    weights: str | None = None,
    seed: int = 0,
    mean: Rgb | None = None,
    std: Rgb | None = None,
) -> Network:
    """A network that takes (B, 3, img_size, img_size) and gives logits (B, num_classes).

    Args:
        given: a timm name, or a module (copied; the one given stays as it is).
        role: whose flags the messages name.
        num_classes: classes of the data; a head of another size is replaced, and `new_head` says so.
        img_size: height and width of its input, in pixels.
        args: constructor arguments.
        weights: a safetensors or torch file, or `pretrained` for timm's own.
        seed: owns the weights that are drawn here.
        mean: channel means of its input; default: the model's own.
        std: channel deviations likewise.

    Raises:
        ModelError: no such network, arguments or weights that do not fit it, or an output that is not logits.
    """
    notes: list[str] = []
    model_args: dict[str, Any] = {}
    if isinstance(given, nn.Module):
        module, pretrained = deepcopy(given), True
    else:
        if "img_size" in (args or {}):
            raise ModelError(f"--{role}-args img_size", found="set by the data", hint="give --img-size")
        pretrained = weights == "pretrained" or (weights is None and parse_name(given, role)[0] is not None)
        with seeded(part_seed(seed, role)):
            module, model_args = _create(given, role, num_classes, img_size, dict(args or {}), pretrained)
    new_head = False
    if pretrained and not isinstance(given, nn.Module):
        own_classes = (getattr(module, "pretrained_cfg", None) or {}).get("num_classes")
        new_head = own_classes not in {None, num_classes}
    if weights not in {None, "pretrained"}:
        assert weights is not None
        new_head, pretrained = _load_file(module, weights, role), True
    if new_head:
        notes.append(f"its weights are for other classes, so its head is a new one, for {num_classes} classes")
    own = getattr(module, "pretrained_cfg", None) or {}
    if getattr(module, "in_chans", 3) != 3:
        raise ModelError(f"--{role} {given}", found=f"{module.in_chans} input channels", valid="3: images are RGB")
    name = given if isinstance(given, str) else type(given).__name__
    network = Network(
        module,
        name,
        mean or tuple(own.get("mean", IMAGENET_DEFAULT_MEAN)),
        std or tuple(own.get("std", IMAGENET_DEFAULT_STD)),
        pretrained,
        new_head,
        model_args,
        tuple(notes),
    )
    _check_output(network, role, num_classes, img_size)
    return network


def parse_name(name: str, role: Role) -> tuple[str | None, str]:
    """timm's (source, name), where a source is `local-dir` or `hf-hub`.

    Raises:
        ModelError: timm has no such network; the message has near names.
    """
    try:
        source, plain = parse_model_name(name)
    except ValueError as error:
        raise ModelError(f"--{role} {name}", found=str(error)) from error
    if source is None and not timm.is_model(plain):
        known = timm.list_models()
        tag = plain.partition(".")[0]
        raise ModelError(
            f"--{role} {name}",
            found="no such network",
            valid=near(tag, known) or f"a name of timm's, such as {listed(timm.list_models('cifar_*'))}",
            hint="list them with: python -c \"import timm, factor_transfer.zoo; print(timm.list_models('*net*'))\"",
        )
    return source, plain


def own_size(given: str | nn.Module, role: Role = "student") -> int:
    """Side of the square images that a network was made for, in pixels."""
    if isinstance(given, nn.Module):
        own = getattr(given, "pretrained_cfg", None) or {}
    else:
        parse_name(given, role)
        own = _resolved(given, role, {})["pretrained_cfg"]
    return int((own.get("input_size") or (3, DEFAULT_SIZE, DEFAULT_SIZE))[-1])


def count_parameters(module: nn.Module) -> int:
    """Number of trainable and frozen weights; buffers do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def load_weights(module: nn.Module, path: str | Path, given: str) -> None:
    """Load a safetensors or torch file into `module`, strictly.

    Raises:
        ModelError: the file is missing or unreadable, or does not fit; the message begins with `given` and lists what
            is missing, unexpected and of wrong shape.
    """
    _load_state(module, read_state(path, given), given)


def read_state(path: str | Path, given: str) -> dict[str, Tensor]:
    """The tensors in a file of weights; a `state_dict` inside and `module.` prefixes are seen through.

    Raises:
        ModelError: the file is missing, unreadable, or would have to run code to be read.
    """
    if not Path(path).is_file():
        folder = Path(path).parent
        names = [str(entry) for entry in folder.iterdir() if entry.is_file()] if folder.is_dir() else []
        raise ModelError(
            given,
            found="a folder" if Path(path).is_dir() else "no such file",
            valid=near(str(path), names) or "a safetensors or torch file, or `pretrained`",
        )
    try:
        state = load_state_dict(str(path))  # timm's: weights_only=True, on the CPU
    except Exception as error:  # whatever the readers raise on a foreign or hostile file
        lines = str(error).splitlines()
        unsafe = "weights_only" in str(error)
        raise ModelError(
            given,
            found=lines[0] if lines else type(error).__name__,
            valid="a safetensors file, or a torch file that holds only tensors",
            hint="where you trust it, load it yourself and save its state_dict with safetensors.torch.save_file"
            if unsafe
            else None,
        ) from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(given, found="no state dict", valid="tensors by name, at the top or behind `state_dict`")
    return state


def load_paraphraser(path: str | Path, *, channels: int, k: float) -> Paraphraser:
    """A trained paraphraser: `paraphraser.safetensors` of a run, or the authors' published `.pth`.

    Args:
        path: the file.
        channels: channels C of the teacher's map that it must fit.
        k: the paraphrase rate that it must have.

    Raises:
        ModelError: it is missing, unreadable, or made for another size.
    """
    given = f"--paraphraser {path}"
    if Path(path).suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                sizes = json.loads((file.metadata() or {})["paraphraser"])
            paraphraser = Paraphraser(**sizes)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ModelError(
                given, found=f"no paraphraser ({error})", valid="paraphraser.safetensors of a run"
            ) from error
        _load_state(paraphraser, load_file(path), given)
    else:
        try:
            paraphraser = load_reference_paraphraser(path)
        except ModelError as error:
            raise ModelError(given, found=error.found, valid=error.valid) from error
    wanted = channels, factor_channels(channels, k)
    found = paraphraser.in_channels, paraphraser.factor_channels
    if found != wanted:
        raise ModelError(
            given,
            found=f"made for {found[0]} teacher channels and {found[1]} factor channels",
            valid=f"one for {wanted[0]} teacher channels and {wanted[1]} factor channels (--k {k:g})",
            hint="leave --paraphraser out to train one here, or give the --k and --teacher-layer it was made with",
        )
    return paraphraser


def paraphraser_metadata(paraphraser: Paraphraser) -> dict[str, str]:
    """What `load_paraphraser` reads back: its sizes, for the header of its file."""
    sizes = {name: getattr(paraphraser, name) for name in ("in_channels", "factor_channels", "batch_norm")}
    return {"paraphraser": json.dumps(sizes)}


def _resolved(name: str, role: Role, args: dict[str, Any]) -> dict[str, Any]:
    """timm's arguments for `create_model`, with the image size where an architecture is built for one."""
    img_size = args.pop("img_size", None)
    try:
        return resolve_model_input_args(name, {"img_size": img_size}, **args)  # type: ignore[no-any-return]
    except FactorTransferError:
        raise
    except Exception as error:  # a hub out of reach, a folder without config.json, an unknown tag
        raise ModelError(f"--{role} {name}", found=_first_line(error)) from error


def _create(
    name: str, role: Role, num_classes: int, img_size: int, args: dict[str, Any], pretrained: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and the arguments that rebuild it with `timm.create_model`."""
    made = _resolved(name, role, {"num_classes": num_classes, "img_size": img_size, **args})
    try:
        module = timm.create_model(**made, pretrained=pretrained)
    except TypeError as error:
        raise ModelError(
            f"--{role} {name} with {args}",
            found=_first_line(error),
            valid="constructor arguments of that network",
            hint=f"see --{role}-args",
        ) from error
    except Exception as error:  # weights that cannot be fetched or do not fit, sizes that contradict each other
        source = f"--{role}-weights pretrained" if pretrained else f"--{role} {name} with {args}"
        raise ModelError(source, found=_first_line(error), hint=f"give a file with --{role}-weights") from error
    kept = {key: value for key, value in made.items() if key not in {"pretrained_cfg", "model_name"}}
    return module, {"architecture": made["model_name"], **kept}


def _load_file(module: nn.Module, weights: str, role: Role) -> bool:
    """Load a file of weights; True where its head is for other classes, and the new one was kept."""
    given = f"--{role}-weights {weights}"
    state = read_state(weights, given)
    own = module.state_dict()
    head = [name for name in _head_names(module) if name in state and name in own]
    other = any(state[name].shape[0] != own[name].shape[0] for name in head)
    if other:
        state |= {name: own[name] for name in head}
    _load_state(module, state, given)
    return other


def _head_names(module: nn.Module) -> list[str]:
    """Tensors of the last layer."""
    find: Any = getattr(module, "get_classifier", lambda: None)
    classifier = find()
    places = [name for name, part in module.named_modules() if part is classifier and name]
    return [f"{place}.{kind}" for place in places for kind in ("weight", "bias")]


def _load_state(module: nn.Module, state: Mapping[str, Tensor], given: str) -> None:
    own = module.state_dict()
    # Files of before torch 0.4.1 lack batch norm's counter, which counts and is not computed with.
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    state = counters | dict(state)
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of wrong shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own.keys() & state.keys()
            if own[name].shape != state[name].shape
        ],
    }
    wrong = [f"{len(names)} {problem} ({listed(names)})" for problem, names in problems.items() if names]
    if wrong:
        raise ModelError(
            given,
            found=f"tensors that do not fit {type(module).__name__}: " + "; ".join(wrong),
            valid=f"all {len(own)} tensors of the network, and no other",
            hint="check that the weights are of this very network and of these constructor arguments",
        )
    module.load_state_dict(state)


@torch.no_grad()
def _check_output(network: Network, role: Role, num_classes: int, img_size: int) -> None:
    given = f"--{role} {network.name}"
    module = deepcopy(network.module).cpu().float().eval()
    try:
        output = module(torch.zeros(2, 3, img_size, img_size))
    except Exception as error:  # whatever a foreign network raises on a size that it cannot take
        raise ModelError(
            given,
            found=f"it fails on images of {img_size}x{img_size} pixels: {_first_line(error)}",
            hint="give a size that it can take with --img-size",
        ) from error
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if shape != (2, num_classes):
        raise ModelError(
            given,
            found=f"an output of {shape} for 2 images",
            valid=f"logits (2, {num_classes}): the data has {num_classes} classes, and every label needs its place",
            hint=f"give a network with {num_classes} outputs, or data with the network's classes",
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
