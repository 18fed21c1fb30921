"""Load a network from its name (or take a module), with its weights and its input normalisation.

Names are timm's (its registry, `local-dir:FOLDER`, `hf-hub:NAME`; the paper's CIFAR families are in `zoo`), or
`torchvision/NAME`, or `lraspp/NAME` and `deeplab/NAME` (a head for segmentation on a timm encoder, see `segmenter.py`),
or `package.module:callable` for a network of the user's own.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
import torchvision.models
import torchvision.models.segmentation
from accelerate.utils import extract_model_from_parallel
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import parse_model_name, resolve_model_input_args
from torch import Tensor, nn

import factor_transfer.zoo  # noqa: F401 (registers the paper's families with timm)
from factor_transfer.config import Rgb
from factor_transfer.networks.outputs import choose, given_by, tensors, unwrap
from factor_transfer.networks.segmenter import Segmenter, build_sized, kind_of, load_segmenter
from factor_transfer.networks.weightfiles import check_config, check_folder, identify
from factor_transfer.networks.weights import check_finite, head_places, load_all, load_but_head
from factor_transfer.util.arguments import AnySize, Size, as_size, brief, imported, is_callable_name, written
from factor_transfer.util.errors import FactorTransferError, ModelError, listed, near
from factor_transfer.util.seeds import part_seed, seeded

Role = Literal["teacher", "student"]

LOCAL = "local-dir:"
"""How names of timm's folders begin."""

TORCHVISION, TORCHVISION_CLASSES = "torchvision/", 1000
"""How names of torchvision's begin, and the classes of its weights."""

SEGMENTERS = tuple(torchvision.models.list_models(torchvision.models.segmentation))
"""Those of torchvision's that give a map of logits."""

DEFAULT_SIZE = 224
"""Side of the images of a network that does not say, in pixels."""


class InputNorm(nn.Module):
    """uint8 pixels (B, 3, H, W) -> floats normalised by a network's own channel means and deviations (for 0..1).

    Images of another size than `size` are resized to it (bilinear, with antialiasing).

    >>> InputNorm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten().tolist()
    [-1.0, -1.0, -1.0]
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Rgb, std: Rgb, size: AnySize | None = None) -> None:
        super().__init__()
        self.size = None if size is None else as_size(size)
        mean_, std_ = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
        self.register_buffer("scale", 1 / (255 * std_), persistent=False)
        self.register_buffer("shift", -mean_ / std_, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, *size)."""
        if self.size is not None and self.size != tuple(images.shape[-2:]):
            images = F.interpolate(images.float(), self.size, mode="bilinear", antialias=True)
        return torch.addcmul(self.shift, images.to(self.scale.dtype), self.scale)


@dataclass(frozen=True)
class Network:
    """A network and what is known of it."""

    module: nn.Module
    name: str
    size: Size
    """Height and width of its images, in pixels."""
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
    headless: bool = False
    """It has no head for the data's classes, like a self-supervised backbone. Only a teacher may have none."""
    output: str | None = None
    """Which of its own outputs the logits are; None where it gives one tensor."""
    origin: str = ""
    """Which tensors of its file of weights were taken, where the file holds more than the weights alone."""

    @property
    def norm(self) -> InputNorm:
        """From uint8 pixels to its input."""
        return InputNorm(self.mean, self.std, self.size)

    @property
    def knows_classes(self) -> bool:
        """Its trained head tells the data's classes apart."""
        return self.pretrained and not self.new_head and not self.headless

    @property
    def classifier(self) -> nn.Module:
        """From uint8 pixels to its logits (B, N)."""
        return nn.Sequential(self.norm, self.module)


def load_network(
    given: str | nn.Module,
    *,
    role: Role,
    num_classes: int,
    img_size: AnySize,
    args: Mapping[str, Any] | None = None,
    weights: str | None = None,
    output: str | None = None,
    seed: int = 0,
    mean: Rgb | None = None,
    std: Rgb | None = None,
    dense: bool = False,
) -> Network:
    """A network that takes (B, 3, *img_size) and gives logits (B, num_classes), or a teacher of features.

    The module gives one tensor, whatever its own output is: see `outputs`.

    Args:
        given: a timm name, or a module (copied, without torch.compile and parallel wrappers; the one given stays as
            it is).
        role: whose flags the messages name.
        num_classes: classes of the data; a head of another size is replaced, and `new_head` says so. 0: no head.
        img_size: height and width of its input, in pixels; or one number for a square.
        args: constructor arguments.
        weights: a safetensors or torch file, or `pretrained` for timm's own.
        output: which of its outputs the logits are, by name; default: the one that can only be them.
        seed: of the weights that are initialised here.
        mean: channel means of its input; default: the model's own.
        std: channel deviations likewise.
        dense: its logits are a map (B, num_classes, h, w).

    Raises:
        ModelError: no such network, arguments or weights that do not fit it, or an output that is not logits, or that
            could be so in several places.
    """
    notes: list[str] = []
    if isinstance(given, nn.Module):
        built = _Built(deepcopy(extract_model_from_parallel(given, keep_torch_compile=False)), pretrained=True)
    else:
        with seeded(part_seed(seed, role)):
            built = _built(given, role, num_classes, img_size, dict(args or {}), weights, notes)
    pretrained, new_head, origin = _filled(built, f"--{role} {name_of(given)}", role, num_classes, weights, notes)
    module = built.module
    own = getattr(module, "pretrained_cfg", None) or {}
    if getattr(module, "in_chans", 3) != 3:
        raise ModelError(f"--{role} {given}", found=f"{module.in_chans} input channels", valid="3: images are RGB")
    network = Network(
        module,
        name_of(given),
        as_size(img_size),
        mean or tuple(own.get("mean", IMAGENET_DEFAULT_MEAN)),
        std or tuple(own.get("std", IMAGENET_DEFAULT_STD)),
        pretrained,
        new_head,
        built.model_args,
        tuple(notes),
        origin=origin,
    )
    foreign = isinstance(given, nn.Module) or built.source in {"torchvision", "callable"}
    return _unwrapped(network, role, num_classes, output, foreign=foreign, dense=dense)


@dataclass(frozen=True)
class _Built:
    """A network before weights from a file are loaded."""

    module: nn.Module
    pretrained: bool
    """Its weights are trained ones."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    """See `parse_name`."""
    from_name: bool = False


def _built(
    name: str,
    role: Role,
    num_classes: int,
    img_size: AnySize,
    args: dict[str, Any],
    weights: str | None,
    notes: list[str],
) -> _Built:
    """The network of a name, with timm's or torchvision's weights if they are asked for, else with fresh ones."""
    if "img_size" in args:
        raise ModelError(
            f"--{role}-args img_size",
            found="set by the data",
            hint="leave it out there; --img-size sets both networks' images",
        )
    source, plain = parse_name(name, role)
    pretrained = weights == "pretrained" or (weights is None and source in {"local-dir", "hf-hub"})
    if pretrained and source == "local-dir":
        notes += filter(None, [check_folder(Path(plain), f"--{role} {name}")])
    module, model_args = _create(name, role, num_classes, img_size, args, pretrained)
    return _Built(module, pretrained, model_args, source, from_name=True)


def _filled(
    built: _Built, given: str, role: Role, num_classes: int, weights: str | None, notes: list[str]
) -> tuple[bool, bool, str]:
    """Whether it has trained weights, whether its head is new, and where its weights come from; a file's are loaded."""
    new_head, origin, pretrained = False, "", built.pretrained
    if pretrained and built.from_name:
        classes = {"num_classes": TORCHVISION_CLASSES} if built.source == "torchvision" else {}
        own_classes = (getattr(built.module, "pretrained_cfg", None) or classes).get("num_classes")
        new_head = own_classes not in {None, num_classes} and num_classes > 0
    if isinstance(built.module, Segmenter) and pretrained and built.from_name:
        new_head = True  # timm's weights are the encoder's
    if weights is not None and weights != "pretrained":
        load = load_segmenter if isinstance(built.module, Segmenter) else load_but_head
        (new_head, origin), pretrained = load(built.module, weights, f"--{role}-weights {weights}"), True
        notes += [origin] if origin else []
    elif pretrained:
        check_finite(built.module, given)
    if new_head:
        notes.append(f"its weights have no head for {num_classes} classes, so that it has a new one")
    return pretrained, new_head, origin


def parse_name(name: str, role: Role) -> tuple[str | None, str]:
    """(source, name): `callable`; `torchvision` and `segmenter` and a name of theirs; `local-dir`, `hf-hub` or None.

    Raises:
        ModelError: there is no such network; the message has near names.
    """
    if name.startswith(TORCHVISION):
        plain = name.removeprefix(TORCHVISION)
        known = [*torchvision.models.list_models(torchvision.models), *SEGMENTERS]
        if plain not in known:
            valid = f"a name such as {listed([TORCHVISION + other for other in near(plain, known) or known])}"
            raise ModelError(f"--{role} {name}", found="torchvision has no such network", valid=valid)
        return "torchvision", plain
    if is_callable_name(name):
        return "callable", name
    if kind_of(name) is not None:
        return "segmenter", parse_name(name.partition("/")[2], role)[1]
    path, known_to_timm = Path(name), timm.is_model(name)
    if (path.is_dir() and not known_to_timm) or (path.is_file() and not (known_to_timm and not path.suffix)):
        hint = f"name the network, and give the file as --{role}-weights"
        hint = identify(path, "").hint if path.is_dir() else hint
        raise ModelError(f"--{role} {name}", found="a path, which names no network", hint=hint)
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
            valid=f"a name of timm's, such as {listed(near(tag, known) or timm.list_models('cifar_*'))}",
            hint="list them with: python -c \"import timm, factor_transfer.zoo; print(timm.list_models('*net*'))\"",
        )
    return source, plain


def name_of(given: str | nn.Module) -> str:
    """What a network is called: its name, or the class of a module."""
    return given if isinstance(given, str) else type(given).__name__


def own_size(given: str | nn.Module, role: Role = "student") -> int | Size:
    """Size of the images that a network was designed for, in pixels: one number for a square, else height and width."""
    if isinstance(given, nn.Module):
        own = getattr(given, "pretrained_cfg", None) or {}
    elif parse_name(given, role)[0] in {"torchvision", "callable"}:
        own = {}
    else:
        name = given.partition("/")[2] if kind_of(given) else given
        own = _resolved(name, role, {})["pretrained_cfg"]
    return brief(tuple(map(int, (own.get("input_size") or (3, DEFAULT_SIZE, DEFAULT_SIZE))[-2:])))


def count_parameters(module: nn.Module) -> int:
    """Number of trainable and frozen weights; buffers do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def _resolved(name: str, role: Role, args: dict[str, Any]) -> dict[str, Any]:
    """timm's arguments for `create_model`, with the image size where an architecture is built for one."""
    img_size = args.pop("img_size", None)
    if name.startswith(LOCAL):
        check_config(Path(name.removeprefix(LOCAL)), f"--{role} {name}")
    try:
        return resolve_model_input_args(name, {"img_size": img_size}, **args)  # type: ignore[no-any-return]
    except FactorTransferError:
        raise
    except Exception as error:  # a hub out of reach, a folder without config.json, an unknown tag
        raise ModelError(f"--{role} {name}", found=_first_line(error)) from error


def _create(
    name: str, role: Role, num_classes: int, img_size: AnySize, args: dict[str, Any], pretrained: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and the arguments that rebuild it with `timm.create_model` (or torchvision's `get_model`)."""
    made = {"model_name": name, **args}
    if not (name.startswith(TORCHVISION) or is_callable_name(name) or kind_of(name)):
        made = _resolved(name, role, {"num_classes": num_classes, "img_size": img_size, **args})
    try:
        if name.startswith(TORCHVISION):
            module, more = _torchvision(name, num_classes, args, pretrained=pretrained)
            made |= more
        elif kind_of(name):
            module, more = build_sized(name, num_classes, img_size, args, pretrained=pretrained)
            made |= more
        else:
            create: Callable[..., nn.Module] = _call if is_callable_name(name) else timm.create_model
            module = create(**made, pretrained=pretrained)
            own_classes = (made.get("pretrained_cfg") or {}).get("num_classes")
            if pretrained and own_classes not in {None, num_classes}:
                # With another head timm loads weights non-strictly. A build with their own head checks them.
                create(**{**made, "num_classes": own_classes}, pretrained=True)
    except TypeError as error:
        raise ModelError(
            f"--{role} {name} with {args}",
            found=_first_line(error),
            valid="constructor arguments of that network",
            hint=f"see --{role}-args",
        ) from error
    except Exception as error:  # weights that cannot be fetched or do not fit, sizes that contradict each other
        source = f"--{role}-weights pretrained" if pretrained else f"--{role} {name} with {args}"
        source = f"--{role} {name}" if pretrained and ":" in name else source  # a folder's, or a hub's
        raise ModelError(source, found=_first_line(error), hint=f"give a file with --{role}-weights") from error
    kept = {key: value for key, value in made.items() if key not in {"pretrained_cfg", "model_name"}}
    return module, {"architecture": made["model_name"], **kept}


def _torchvision(
    name: str, num_classes: int, args: Mapping[str, Any], *, pretrained: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """A torchvision network, and the arguments that build it again without its weights.

    With torchvision's weights it has the same structure as without them. Its head is new where the number of classes
    differs, and so are auxiliary heads that were asked for.

    Args:
        name: torchvision/NAME.
        num_classes: N of its head.
        args: further arguments of its constructor.
        pretrained: load torchvision's weights.
    """
    plain, more = name.removeprefix(TORCHVISION), dict(args)
    if plain in SEGMENTERS:
        if pretrained:
            raise ValueError("weights of torchvision's networks for segmentation are not fetched")
        more = {"weights_backbone": None, **more}
    if not pretrained:
        return _bare(plain, num_classes, more), {"num_classes": num_classes, **more}
    # With weights, torchvision adds auxiliary heads even if none were asked for.
    whole = torchvision.models.get_model(
        plain, weights="DEFAULT", **{k: v for k, v in more.items() if k != "aux_logits"}
    )
    more = _set_by_weights(whole, plain, more) | more
    module = _bare(plain, num_classes, more)
    own, there = module.state_dict(), whole.state_dict()
    head = head_places(module) if num_classes != TORCHVISION_CLASSES else []
    fits = {key: value for key, value in there.items() if key in own and value.shape == own[key].shape}
    aux = [key for key in own if key.startswith(("aux", "Aux")) and key not in fits]
    drawn = {key: own[key] for key in own if key.rpartition(".")[0] in head or key in aux}
    load_all(module, fits | drawn)
    return module, {"num_classes": num_classes, **more}


def _bare(plain: str, num_classes: int, args: Mapping[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of first weights that another version will draw
        return torchvision.models.get_model(plain, weights=None, num_classes=num_classes, **args)  # type: ignore[no-any-return]


def _set_by_weights(whole: nn.Module, plain: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that torchvision changes when it loads weights, such as GoogLeNet's `transform_input`."""
    with torch.random.fork_rng(devices=[]):  # on the CPU: RegNet computes its sizes with tensors
        bare = _bare(plain, TORCHVISION_CLASSES, args)
    names = set(inspect.signature(type(whole).__init__).parameters) & vars(whole).keys() & vars(bare).keys()
    return {name: vars(whole)[name] for name in sorted(names) if vars(whole)[name] != vars(bare)[name]}


def _unwrapped(
    network: Network, role: Role, num_classes: int, wanted: str | None, *, foreign: bool, dense: bool
) -> Network:
    """The network, with a hook that makes one tensor of its outputs where they are several or another kind."""
    given, count = f"--{role}-output", 3 if num_classes == 2 else 2  # a matrix between images is no logits
    try:
        output, training = given_by(network.module, network.size, count, foreign=foreign)
    except Exception as error:  # whatever a foreign network raises on a size that it cannot take
        raise ModelError(
            f"--{role} {network.name}",
            found=f"it fails on images of {written(network.size)} pixels: {_first_line(error)}",
            hint="give a size that it can take with --img-size" + (" or --teacher-size" if role == "teacher" else ""),
        ) from error
    plain = all(each is None or isinstance(each, Tensor) for each in (output, training))
    if plain and wanted is not None:
        raise ModelError(f"{given} {wanted}", found="a network that gives one tensor", hint=f"leave {given} out")
    asked = num_classes or wanted is not None
    chosen = choose(output, num_classes, wanted, given, dense=dense) if asked else None
    first = chosen.output if chosen else next((each for _, each in tensors(output)), None)
    if not plain and first is not None:
        hook, name, note = unwrap(output, training, chosen, num_classes, wanted, given, dense=dense)
        network.module.register_forward_hook(hook)
        network = replace(network, output=name, notes=(*network.notes, note))
    shape = tuple(first.shape) if first is not None else type(output).__name__
    fits = shape[:2] == (count, num_classes) and len(shape) == (4 if dense else 2)
    if fits or num_classes == 0:
        return replace(network, headless=num_classes == 0)
    if role == "teacher" and network.pretrained and not dense:
        note = f"it gives {shape} for {count} images, no logits for {num_classes} classes"
        return replace(network, headless=True, notes=(*network.notes, note))
    raise ModelError(
        f"--{role} {network.name}",
        found=f"an output of {shape} for {count} images",
        valid=f"logits ({count}, {num_classes}{', height, width' if dense else ''}): the data has {num_classes} "
        "classes, and every label needs its place",
        hint=f"give a network with {num_classes} outputs, or data with the network's classes",
    )


def _call(model_name: str, pretrained: bool, **args: Any) -> nn.Module:
    """The user's own network, from `package.module:callable`."""
    if pretrained:
        raise ValueError("`pretrained` is a word for timm's and torchvision's weights")
    module = imported(model_name)(**args)
    if not isinstance(module, nn.Module):
        raise ValueError(f"it gave a {type(module).__name__}, not a torch.nn.Module")
    return module


def _first_line(error: Exception) -> str:
    """The first line of an error's message; and the second, where the first ends in a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    shown = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return shown or type(error).__name__
