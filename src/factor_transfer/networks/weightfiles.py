"""Recognise a file of weights by its content, not by its name, and read the tensors in it.

Weights are data: safetensors, or torch files read with `weights_only=True` on the CPU.
"""

from __future__ import annotations

import argparse
import codecs
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor

from factor_transfer.util.errors import ModelError, first_line, listed, near

VALID = "a safetensors file, or a torch file that holds only tensors"
HEAD = 4096
"""Bytes at the start of a file that are enough to recognise it."""

MOST, DEEPEST = 200_000, 16
"""Limits on the entries of a file and on their nesting: a small hostile file can expand without end."""

AGAIN = "fetch it again, and compare its size with the original's"
UNPACK = "unpack it, and give the file of weights inside"
SAVE = "load it where it was made, and save its weights alone: torch.save(network.state_dict(), FILE)"
SCRIPT = "where you trust it, save its weights alone: torch.save(torch.jit.load(FILE).state_dict(), NEW)"
FOREIGN = "give the weights as a torch or safetensors file, under the names of the network that is built here"
PROGRAM = "an exported program of torch.export (.pt2), no weights alone"
RUN_STUDENT = "give the weights themselves: student.safetensors of the run, or of its export"


class Kind(NamedTuple):
    """What a file is."""

    reader: Literal["safetensors", "torch"] | None
    """What reads it; None: it holds no weights that can be read here."""
    what: str = ""
    hint: str = ""
    """What to do instead."""


SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, such as Keras writes", FOREIGN),
    (0, b"\x93NUMPY", "a numpy array", FOREIGN),
    (0, b"GGUF", "a GGUF file", FOREIGN),
    (4, b"TFL3", "a TFLite model", FOREIGN),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"\x1f\x8b", "a gzip archive", UNPACK),
    (0, b"BZh", "a bzip2 archive", UNPACK),
    (0, b"\xfd7zXZ", "an xz archive", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", UNPACK),
    (0, b"Rar!", "a rar archive", UNPACK),
)
"""(offset, bytes there, what the file is, what to do instead)."""


TIMMS = (
    "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth", "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
)  # fmt: skip
"""Names of the files of weights that timm looks for in a folder, in its order; then it takes any.

A copy of timm's `_PREFERRED_FILES`, which is private: a timm that renames it must not break the import of this package.
A test compares the two.
"""


@dataclass(frozen=True)
class Tensors:
    """The tensors in a file, by full name: keys of dicts and names of tensors, joined by dots."""

    by_name: dict[str, Tensor]
    containers: dict[str, str]
    """The dict that each tensor lies in, by the tensor's name; `` for the file itself."""


def split_key(given: str | Path) -> tuple[Path, str]:
    """(file, key) of `FILE` or `FILE:KEY`; the longest name that exists is the file, so that a colon in it is its own.

    >>> split_key("no/such/file.pth")
    (PosixPath('no/such/file.pth'), '')
    """
    text = str(given)
    whole = Path(text).expanduser()
    if whole.exists():
        return whole, ""
    places = [place for place, char in enumerate(text) if char == ":"]
    for place in reversed(places):
        file = Path(text[:place]).expanduser()
        if file.is_file():
            return file, text[place + 1 :].strip(".")
    return whole, ""


def read_tensors(path: Path, given: str) -> Tensors:
    """All tensors in a file of weights. A safetensors file is read whole: `load_file` never gives back all it takes.

    Raises:
        ModelError: the file is missing, unreadable, or would have to run code to be read.
    """
    kind = identify(path, given)
    if kind.reader is None:
        raise ModelError(given, found=kind.what, valid=VALID, hint=kind.hint)
    try:
        content = load(path.read_bytes()) if kind.reader == "safetensors" else _torch_content(path)
    except pickle.UnpicklingError as error:
        raise _needs_code(path, given, error) from error
    except Exception as error:  # whatever the readers raise on a foreign, damaged or hostile file
        cut = isinstance(error, EOFError) or "unexpected EOF" in str(error) or "failed locating file" in str(error)
        found = "a torch file that was cut short or damaged" if cut else first_line(error)
        raise ModelError(given, found=found, valid=VALID, hint=AGAIN if cut else None) from error
    tensors = Tensors({}, {})
    content = content if isinstance(content, (Tensor, dict, list, tuple)) else {}
    for name, container, tensor in _walk(content, given):
        tensors.by_name[name], tensors.containers[name] = tensor.detach(), container
    if not tensors.by_name:
        raise ModelError(given, found="no tensors in it", valid="tensors by name, at the top or in a dict")
    return tensors


def identify(path: Path, given: str) -> Kind:
    """What a file is, by its first bytes and its size.

    Raises:
        ModelError: there is no such file, or it cannot be opened.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        names = [str(entry) for entry in path.parent.iterdir() if entry.is_file()] if path.parent.is_dir() else []
        close = near(str(path), names)
        raise ModelError(given, found="no such file", valid=close or "a safetensors or torch file, or `pretrained`")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise ModelError(given, found=str(error.strerror or error), valid=VALID) from error
    if not head:
        return Kind(None, "an empty file", AGAIN)
    # safetensors first: the length of its header can look like the first bytes of a pickle.
    found = _safetensors(path, head, size) or _signature(path, head) or _zip(path, head) or _text(head)
    return found or Kind(None, f"no kind of file that is known here; it begins with {head[:8]!r}", AGAIN)


def _signature(path: Path, head: bytes) -> Kind | None:
    """A kind of file that is known by a few bytes."""
    for offset, mark, what, hint in SIGNATURES:
        if head[offset:].startswith(mark):
            return Kind(None, what, hint)
    if head[0] == 0x80 and head[1:2] in {b"\2", b"\3", b"\4", b"\5"}:
        return Kind("torch")  # a pickle, which is torch's older form
    return Kind(None, "an ONNX model", FOREIGN) if _is_onnx(head) or path.suffix.lower() == ".onnx" else None


def _safetensors(path: Path, head: bytes, size: int) -> Kind | None:
    """A safetensors file: the length of its header, and the header, which is JSON."""
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{" or length >= 1 << 32:
        return None
    ends = [0]
    if 8 + length <= size:
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(8 + length)[8:])
            ends += [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return Kind(None, "a safetensors file whose header is damaged", AGAIN)
    whole = 8 + length + max(ends)
    if size < whole:
        return Kind(None, f"a safetensors file that was cut short: {size:,} of {whole:,} bytes", AGAIN)
    return Kind("safetensors")


def _zip(path: Path, head: bytes) -> Kind | None:
    """A torch file, or another of the many kinds of file that are zip archives."""
    if not head.startswith(b"PK\x03\x04"):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return Kind(None, "a torch file (or another zip) that was cut short: its end is missing", AGAIN)
    inside = {*names, *(name.partition("/")[2] for name in names)}
    kinds = (
        ({"models/model.json", "serialized_exported_program.json"} & inside, Kind(None, PROGRAM, RUN_STUDENT)),
        ("constants.pkl" in inside, Kind(None, "a TorchScript archive, which holds code", SCRIPT)),
        ("data.pkl" in inside, Kind("torch")),
        (all(name.endswith(".npy") for name in names), Kind(None, "a numpy archive (.npz)", FOREIGN)),
        ("model.weights.h5" in inside, Kind(None, "a Keras model (.keras)", FOREIGN)),
    )
    other = Kind(None, f"a zip archive of {listed(sorted(names)[:3]) or 'nothing'}", UNPACK)
    return next((kind for told, kind in kinds if told), other)


def _is_onnx(head: bytes) -> bool:
    """A protobuf that begins with a small version and the name of a program."""
    if len(head) < 8 or head[0] != 0x08 or not 1 <= head[1] <= 32 or head[2] != 0x12:
        return False
    name = head[4 : 4 + head[3]]
    return name.isascii() and name.decode().isprintable()


def _text(head: bytes) -> Kind | None:
    """What a text file is; None where it is none."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head).strip()  # its last letter may be cut
    except UnicodeDecodeError:
        return None
    if any(not char.isprintable() and not char.isspace() for char in text):
        return None
    shown = " ".join(text.split())[:80]
    what, hint = f"a text file: {shown}", AGAIN
    if text.startswith("version https://git-lfs"):
        size = re.search(r"^size (\d+)", text, re.MULTILINE)
        of = f" of {int(size[1]):,} bytes" if size else ""
        what, hint = f"a Git LFS pointer, which stands for a file{of}", "git lfs pull, in the folder it came from"
    elif re.match(r"(<!--.*?-->\s*)*<(!doctype html|html|head|body)\b", text, re.IGNORECASE | re.DOTALL):
        title = re.search(r"<title>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        named = f" ({' '.join(title[1].split())[:60]})" if title else ""
        what = f"a web page{named}, saved in the file's place"
        hint = "download the file itself: the page is a login, an error, or the one that shows the file"
    elif text.startswith("<?xml"):
        what = f"an XML answer of a server: {shown}"
    elif '"weight_map"' in text:
        what = "an index of weights that lie in several files"
        hint = "join the parts in Python into one dict of tensors, and save that with safetensors.torch.save_file"
    return Kind(None, what, hint)


def _folder(path: Path) -> Kind:
    """What a folder is that was given in place of a file, and how to name its weights."""
    names = {entry.name for entry in path.iterdir()}
    weights = sorted(name for name in names if name.endswith((".safetensors", ".pth", ".pt", ".bin", ".ckpt")))
    if "data.pkl" in names:
        return Kind(None, "a folder, which is a torch file unpacked", "give the file as it was before it was unpacked")
    if "config.json" in names and weights:
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            config = {}
        if isinstance(config, dict) and "architecture" in config:
            hint = f"name it as the network, without a file of weights: local-dir:{path}"
            return Kind(None, "a folder, of a timm model", hint)
        if isinstance(config, dict) and {"model_type", "architectures"} & config.keys():
            hint = f"give a network of the same names (package.module:callable), and {path / weights[0]}"
            return Kind(None, "a folder, of a transformers model, which timm does not build", hint)
    hint = f"give the file itself, such as {path / weights[0]}" if weights else "give the file itself"
    return Kind(None, "a folder", hint)


def check_config(folder: Path, given: str) -> None:
    """Check that a folder is a timm model: its config.json names an architecture.

    Raises:
        ModelError: it is another one, or none.
    """
    file, valid = folder / "config.json", "a folder with timm's config.json and its weights"
    if not file.is_file():
        found = f"no config.json in {folder}" if folder.is_dir() else f"no folder {folder}"
        raise ModelError(given, found=found, valid=valid)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        kind = identify(file, given)
        raise ModelError(given, found=f"config.json: {kind.what or error}", valid=valid, hint=kind.hint) from error
    if not (isinstance(config, dict) and "architecture" in config):
        kind = _folder(folder)
        raise ModelError(
            given, found=f"{kind.what}: its config.json has no `architecture`", valid=valid, hint=kind.hint
        )


def check_folder(folder: Path, given: str) -> str:
    """Check that timm can read the file of weights that it would pick from a folder.

    Returns:
        A note for the user on which file, or which average of weights, timm picks; empty if there is nothing to say.


    Raises:
        ModelError: it is missing, is no file of weights, or is of another kind than its name says.
    """
    check_config(folder, given)
    there = [folder / name for name in TIMMS if (folder / name).is_file()][:1]
    others = [sorted(folder.glob(f"*{ending}")) for ending in (".safetensors", ".pth", ".pth.tar", ".bin")]
    files = there or next(filter(None, others), [])
    if not files:
        raise ModelError(given, found="no file of weights in it", valid=f"model.safetensors in {folder}")
    kind, file = identify(files[0], given), files[0]
    if kind.reader is None:
        raise ModelError(given, found=f"{file.name}: {kind.what}", valid=VALID, hint=kind.hint)
    if (kind.reader == "safetensors") != (file.suffix == ".safetensors"):
        name = "model.safetensors" if kind.reader == "safetensors" else "pytorch_model.bin"
        raise ModelError(given, found=f"{file.name}: a {kind.reader} file by its content", hint=f"rename it to {name}")
    notes = [f"of the files of weights in its folder timm takes {file.name}"] if len(files) > 1 else []
    keys = {*read_tensors(file, given).containers.values()} if kind.reader == "torch" else set()
    average = next((each for each in ("state_dict_ema", "model_ema") if each in keys), None)
    notes += [f"timm takes the average of its weights, {average} in {file.name}"] if average else []
    return "; ".join(notes)


def _torch_content(path: Path) -> Any:
    # timm's training scripts keep their arguments in the file: a Namespace is plain data.
    with (
        torch.serialization.safe_globals([argparse.Namespace]),
        path.open("rb") as file,
    ):  # an open file: given a name, torch would judge the file by its suffix
        return torch.load(file, map_location="cpu", weights_only=True)


def _needs_code(path: Path, given: str, error: Exception) -> ModelError:
    """The error for a file that would run code: which code, and how to get at its weights."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # torch's older form has no list of them
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
    whole = any(name.startswith("torch.nn.modules.") for name in names)
    what = "a whole network, pickled" if whole else "a file that needs code to be read, and is not (weights_only=True)"
    hint = "where you trust it, load it yourself and save its state_dict with safetensors.torch.save_file"
    code = f": {listed(sorted(names))}" if names else ""
    return ModelError(given, found=what + code, valid=VALID, hint=SAVE if whole else hint)


def _walk(content: Any, given: str) -> Iterator[tuple[str, str, Tensor]]:
    """(full name, name of its dict, tensor) of every tensor in nested dicts and lists."""
    waiting: list[tuple[str, str, Any, int]] = [("", "", content, 0)]
    for _ in range(MOST):
        if not waiting:
            return
        name, container, value, depth = waiting.pop()
        if isinstance(value, Tensor):
            yield name, container, value
        elif depth < DEEPEST:
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            deeper = [(f"{name}.{key}" if name else str(key), name, each, depth + 1) for key, each in pairs
                      if isinstance(each, (Tensor, dict, list, tuple))]  # fmt: skip
            waiting += reversed(deeper)
    raise ModelError(given, found=f"more than {MOST:,} entries", valid=VALID)
