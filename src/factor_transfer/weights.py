"""Files of weights: data, never code; all of what a network needs, and nothing else.

safetensors, or torch files read with `weights_only=True`. A head of another size is a choice, not a mismatch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from timm.models import clean_state_dict, load_state_dict
from torch import Tensor, nn

from factor_transfer.errors import ModelError, listed, near
from factor_transfer.method import Paraphraser, factor_channels, load_reference_paraphraser


def load_weights(module: nn.Module, path: str | Path, given: str) -> None:
    """Load a safetensors or torch file into `module`, strictly.

    Raises:
        ModelError: the file is missing or unreadable, or does not fit; the message begins with `given` and lists what
            is missing, unexpected and of wrong shape.
    """
    _load_state(module, read_state(path, given), given)


def read_state(path: str | Path, given: str) -> dict[str, Tensor]:
    """The tensors in a file of weights; a `state_dict` inside and `module.` prefixes are seen through.

    A safetensors file is read whole: `load_file` of safetensors 0.8 never gives back all of what it takes.

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
        if Path(path).suffix == ".safetensors":
            state = clean_state_dict(load(Path(path).read_bytes()))
        else:
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


def load_paraphraser(path: str | Path, *, channels: int, k: float, batch_norm: bool = False) -> Paraphraser:
    """A trained paraphraser: `paraphraser.safetensors` of a run, or the authors' published `.pth`.

    Args:
        path: the file.
        channels: channels C of the teacher's map that it must fit.
        k: the paraphrase rate that it must have.
        batch_norm: whether it must have batch norm.

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
        load_weights(paraphraser, path, given)
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
    if paraphraser.batch_norm != batch_norm:
        made, hint = ("with", "give") if paraphraser.batch_norm else ("without", "leave out")
        raise ModelError(given, found=f"made {made} batch norm", hint=f"{hint} --factor-batch-norm")
    return paraphraser


def paraphraser_metadata(paraphraser: Paraphraser) -> dict[str, str]:
    """What `load_paraphraser` reads back: its sizes, for the header of its file."""
    sizes = {name: getattr(paraphraser, name) for name in ("in_channels", "factor_channels", "batch_norm")}
    return {"paraphraser": json.dumps(sizes)}


def load_but_head(module: nn.Module, path: str | Path, given: str) -> bool:
    """Load a file of weights, whose head may be for other classes, or not there (a self-supervised backbone).

    Args:
        module: the network, with a head for the classes that it shall have.
        path: the file.
        given: the setting that named it, for messages.

    Returns:
        True where the file has no head for these classes, so that the network keeps its own.

    Raises:
        ModelError: as `load_weights`.
    """
    state = read_state(path, given)
    own = module.state_dict()
    places = head_places(module)
    head = [name for name in own if name.rpartition(".")[0] in places]
    if not head:  # the network shall have none, whatever the file has
        state = {name: value for name, value in state.items() if name.rpartition(".")[0] not in places}
    bare = hasattr(module, "get_classifier") and not any(name in state for name in head)
    other = bool(head) and (bare or any(state[n].shape[0] != own[n].shape[0] for n in head if n in state))
    if other:
        state |= {name: own[name] for name in head if bare or name in state}
    _load_state(module, state, given)
    return other


def head_places(module: nn.Module) -> list[str]:
    """Names of the last layer: timm's classifier, or where there is none the last linear layer.

    >>> head_places(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    ['2']
    """
    find: Any = getattr(module, "get_classifier", None)
    classifier = find() if find is not None else None
    parts = [(name, part) for name, part in module.named_modules() if name]
    if classifier is None:
        return [name for name, part in parts if isinstance(part, nn.Linear)][-1:]
    return [name for name, part in parts if part is classifier]


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
