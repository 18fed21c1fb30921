"""`factor-transfer predict`: what an exported student sees on images, through the runtime that its user has."""

from __future__ import annotations

import io
import json
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any

from cyclopts.validators import Number
from PIL import Image

from factor_transfer.data.content import Content
from factor_transfer.data.frames import Frame
from factor_transfer.data.images import decoded, image_formats, natural
from factor_transfer.data.trees import counted, folder_tree
from factor_transfer.export.runtimes import Runtime, kind_of, load
from factor_transfer.tasks.base import Task, task_of
from factor_transfer.util.arguments import Size, check_trust
from factor_transfer.util.checks import check_arguments
from factor_transfer.util.console import say, warn
from factor_transfer.util.errors import DataError, RunError, first_line
from factor_transfer.util.limits import MOST_THREADS

BATCH, DENSE_BATCH = 32, 4
"""Images at a time; fewer where each pixel has an answer."""

ORDER = ("student.onnx", "student.pt2", "student.int8.onnx")
"""Which export of a folder is used: the first that is there and can be run."""


def predict_images(
    student: Path,
    images: Sequence[str],
    *,
    top: Annotated[int, Number(gte=1)],
    threads: Annotated[int | None, Number(gte=1, lte=MOST_THREADS)],
    as_json: bool,
    trust_config: bool = False,
    save_pictures: Path | None = None,
) -> int:
    """Print the answer for each image: its likeliest classes, or what another task shows.

    Args:
        student: a run folder, a folder of exports, or one exported file.
        images: files, folders, or `-`.
        top: classes for each image.
        threads: CPU threads.
        as_json: print one JSON list.
        trust_config: run the code of a task that the file names by package.module:callable.
        save_pictures: a folder for the class of every pixel of each image: see `_Pictures`.

    Returns:
        0; 2 where an image could not be read: the others are answered all the same.

    Raises:
        ConfigError: a number out of range, or a task whose code is not trusted.
        RunError: no export that can be run here, or answers that are no pictures.
        DataError: no images.
    """
    check_arguments(predict_images, top=top, threads=threads)
    runtime = open_student(student, threads)
    task = _task(student, runtime.metadata, trusted=trust_config)
    classes, frame, bits = runtime.metadata["classes"], Frame.read(runtime.metadata), runtime.metadata.get("bit_depth")
    answers, unread, content = [], 0, Content()
    pictures = None if save_pictures is None else _Pictures(save_pictures, task, classes, frame)
    batch: list[tuple[str, bytes, Size]] = []

    def answer() -> None:
        logits = array("f", runtime.logits(b"".join(pixels for _, pixels, _ in batch), len(batch)))
        length = len(logits) // len(batch)  # of one image
        for place, (name, _, size) in enumerate(batch):
            outputs = logits[place * length : (place + 1) * length]
            found = task.answer(outputs, classes, top)
            saved = {} if pictures is None else {"picture": pictures.save(name, outputs, size)}
            answers.append({"image": name, **found, **saved})
            if not as_json:
                print(f"{name}: {task.in_words(found)}")  # noqa: T201 (the command's output)
        batch.clear()

    for name, source in find_images(images):
        try:
            with Image.open(source, formats=image_formats()) as opened:
                found = decoded(opened, bits)
            pixels = frame.show(found.image).permute(1, 2, 0).numpy().tobytes()
        except Exception as error:  # decoders raise anything
            unread += 1
            warn(f"{name} is no image that PIL can decode ({error})")
            continue
        content.add(name, found)
        batch.append((name, pixels, (found.image.height, found.image.width)))
        if len(batch) == (DENSE_BATCH if task.dense else BATCH):
            answer()
    if batch:
        answer()
    _tell(content, bits)
    if as_json:
        print(json.dumps(answers, ensure_ascii=False, indent=1))  # noqa: T201
    return 2 if unread else 0


class _Pictures:
    """Writes the answers of dense tasks: a PNG with a palette for each image, whose values are class indices.

    Where the student sees whole images, resized (squash), a picture has the size of its image; else that which the
    student sees.

    Args:
        folder: made where it is not there.
        task: what the student is for.
        classes: their names.
        frame: how the student sees images.

    Raises:
        RunError: the task's answers are no pictures.
    """

    def __init__(self, folder: Path, task: Task, classes: Sequence[str], frame: Frame) -> None:
        if not task.dense:
            found, valid = "a student whose answers are no pictures", "a student for segmentation"
            raise RunError(f"--save-pictures {folder}", found=found, valid=valid, hint="leave it out")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.task, self.classes, self.frame = folder, task, classes, frame
        self.names = set[str]()

    def save(self, name: str, outputs: Sequence[float], size: Size) -> str:
        """The file that is written for an image of this name, and height and width."""
        from factor_transfer.report.masks import colours

        said = self.task.picture(outputs, self.classes, self.frame.size)
        assert said is not None
        whole = self.frame.mode == "squash" and self.frame.pct == 1
        height, width = size if whole else self.frame.size
        picture = Image.fromarray(said).resize((width, height), Image.Resampling.NEAREST)
        picture.putpalette(colours(len(self.classes)).tobytes())
        stem = "stdin" if name == "-" else Path(name).stem
        alike = (f"{stem}-{at}" for at in count(1))
        free = next(each for each in chain([stem], alike) if each not in self.names)
        self.names.add(free)
        path = self.folder / f"{free}.png"
        picture.save(path)
        return str(path)


def _tell(content: Content, bits: int | None) -> None:
    """Say what of the images is not shown to the student."""
    for _, what in content.told():
        warn(what)
    dark = content.dark(bits)
    if dark is not None:
        warn(dark.what)


def _task(student: Path, metadata: Mapping[str, Any], *, trusted: bool) -> Task:
    """What the student is for."""
    name = metadata.get("task", "classification")
    check_trust(str(student), {"task": name}, trusted=trusted, valid="a student for classification, or --trust-config")
    return task_of(name)


def open_student(given: Path, threads: int | None = None) -> Runtime:
    """The export that `given` names, or the first of a folder's that this machine can run.

    Raises:
        RunError: there is none, or it does not say how its images are prepared.
    """
    path = _export_in(given)
    try:
        runtime = load(path, threads)
    except ImportError as error:
        raise RunError(str(path), found=str(error), hint="pip install 'factor-transfer[export]'") from error
    except Exception as error:  # whatever a library raises on a foreign or damaged file
        reason = first_line(error)
        raise RunError(str(path), found=f"no exported student: {reason}", hint="export the run again") from error
    if runtime.metadata.get("classes") == []:
        raise RunError(
            str(path),
            found="a student without a head: it gives features and names no classes",
            valid="a student that was trained with labels, or with --kd-weight and --class-map",
            hint="read its features through onnxruntime or torch, as the README.md beside it shows",
        )
    if not runtime.metadata.keys() >= {"img_size", "mean", "std"} or not runtime.metadata.get("classes"):
        raise RunError(
            str(path),
            found="an export of another program, or of an early version: it does not say how images are prepared",
            hint="make it again with: factor-transfer export RUN",
        )
    return runtime


def _export_in(given: Path) -> Path:
    if not given.exists():
        raise RunError(str(given), found="nothing there", valid="a run folder, a folder of exports, or a file of them")
    if given.is_file():
        try:
            kind_of(given)
        except ValueError as error:
            raise RunError(str(given), found=str(error), valid="a .pt2, .onnx or .safetensors file") from error
        return given
    if (given / "model.safetensors").exists():
        return given
    for folder in (given / "export", given):
        for name in ORDER:
            if (folder / name).exists() and (name.endswith(".pt2") or find_spec("onnxruntime")):
                return folder / name
    unfinished = (given / "config.json").exists() and not (given / "summary.json").exists()
    raise RunError(
        str(given),
        found="a run that is not finished" if unfinished else "no exported student",
        valid=f"a folder with {', '.join(ORDER)}, or a timm folder",
        hint="give the command that began it again" if unfinished else "make one with: factor-transfer export RUN",
    )


def find_images(given: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(name, file or stream) of every image: files as given, folders through and through, `-` from standard input.

    Raises:
        DataError: a file that is not there, or a folder without images.
    """
    if not given:
        raise DataError("no images", valid="files, folders, or - for standard input")
    missing = [name for name in given if name != "-" and not Path(name).exists()]
    if missing:
        hint = "`factor-transfer predict --help` has the flags" if missing[0].startswith("-") else None
        valid = "files, folders, or - for standard input"
        raise DataError(missing[0], found="no such file or folder", valid=valid, hint=hint)
    for name in given:
        path = Path(name)
        if name == "-":
            yield "-", io.BytesIO(sys.stdin.buffer.read())
        elif path.is_dir():
            yield from ((str(file), file) for file in _images_in(path, name))
        else:
            yield name, path


def _images_in(folder: Path, given: str) -> list[Path]:
    try:
        tree = folder_tree(folder)
    except OSError as error:
        raise DataError(given, found=str(error), valid="a folder that can be read") from error
    left_out = counted(tree.left_out)
    if not tree.files:
        found = "no images in it" + (f", but {left_out}" if left_out else "")
        raise DataError(given, found=found, valid=".jpg, .png, .webp and what else PIL reads")
    if left_out:
        say(f"in {given}, not read: {left_out}")
    return [folder / name for name in sorted(tree.files, key=natural)]
