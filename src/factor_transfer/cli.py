"""The command line: parse, call, print. Heavy libraries are imported by the commands, so `--help` answers at once."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, cast

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter
from cyclopts.config import Dict

from factor_transfer import __version__
from factor_transfer.compare.plan import CompareConfig
from factor_transfer.config import FIELDS, Config, SuggestConfig
from factor_transfer.settings import COMMON, RECIPE, read_settings, recipes
from factor_transfer.util.arguments import check_trust
from factor_transfer.util.checks import flag
from factor_transfer.util.errors import ConfigError, FactorTransferError, Interrupted
from factor_transfer.util.help import WHOLE, Help
from factor_transfer.util.machine import check_supported, keep_memory

Flattened = Parameter(name="*")
SettingsFile = Annotated[str | None, Parameter(
    group="Run",
    help="YAML file of settings, named as the flags, or recipe:NAME (see `factor-transfer recipes`). "
         "Flags win over it.",
)]  # fmt: skip
TrustFile = Annotated[bool, Parameter(
    group="Run", negative="",
    help="Let that file name data, a network, transform, term or task by package.module:callable, whose code is then "
         "run.",
)]  # fmt: skip
TrustRun = Annotated[bool, Parameter(
    negative="", help="Run the code of data, a network or a task that a run names by package.module:callable."
)]  # fmt: skip
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]


def settings_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in from the file behind --config what no flag has set."""
    for argument in arguments:
        if "--config" in argument.names and argument.tokens:
            path = argument.tokens[0].value
            values = read_settings(path)
            trusted = any("--trust-config" in each.names and each.tokens for each in arguments)
            check_trust(f"--config {path}", {name: values.get(name, "") for name in CODE}, trusted=trusted)
            # Mappings (constructor arguments) go as one JSON text: cyclopts would make strings of their values.
            flat = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in values.items()}
            Dict(flat, source=path, use_commands_as_keys=False)(app, commands, arguments)


CODE = ("data", "teacher", "student", "transform", "term", "task")
"""Settings that can name code of the user's."""


def _trusted(run: Path, *, trust_config: bool, data: bool = True) -> Config:
    """The settings of a run that is measured again, with its own `data`. (Its transform is not run again.)"""
    from factor_transfer.training.run_folder import saved_config

    saved = saved_config(run)
    again = ("teacher", "student", "task", *(["data"] if data else []))
    check_trust(str(run / "config.json"), {name: getattr(saved, name) for name in again}, trusted=trust_config)
    return saved


app = App(
    name="factor-transfer",
    help="Compress a trained vision network into a smaller one by Factor Transfer (Kim, Park, Kwak, NeurIPS 2018).",
    version=__version__,
    config=settings_file,
    help_flags=["--help", "-h", WHOLE],
)
short = Help(FIELDS, COMMON)
app.register_install_completion_command(help="Complete commands and flags with the tab key, in bash, zsh and fish.")


@app.command(help_formatter=short)
def distill(
    settings: Annotated[Config, Flattened],
    *,
    config: SettingsFile = None,
    trust_config: TrustFile = False,
) -> None:
    """Train a student by Factor Transfer from a teacher. The same command again continues an interrupted run."""
    from factor_transfer.distillation import run_distillation
    from factor_transfer.report.terminal import show

    result = run_distillation(settings)
    show(result.folder)


@app.command(help_formatter=short)
def compare(
    settings: Annotated[CompareConfig, Flattened],
    *,
    config: SettingsFile = None,
    trust_config: TrustFile = False,
) -> None:
    """Run methods under one protocol, several seeds each, and say what is shown. The same command continues."""
    from factor_transfer.compare.run import compare as run_all
    from factor_transfer.compare.words import show_outcome

    show_outcome(*run_all(settings))


@app.command(help_formatter=short)
def doctor(
    settings: Annotated[Config, Flattened],
    *,
    config: SettingsFile = None,
    trust_config: TrustFile = False,
) -> None:
    """Look before the hours are spent: flags of `distill`, one batch, nothing written. Exit 0 fit, 1 warned, 2 not."""
    from factor_transfer.doctor import diagnose
    from factor_transfer.report.terminal import show_diagnosis

    found = diagnose(settings)
    show_diagnosis(found.tables, found.findings)
    sys.exit(found.code)


@app.command(help_formatter=short)
def suggest(
    settings: Annotated[SuggestConfig, Flattened],
    *,
    as_json: AsJson = False,
) -> None:
    """Measure timm's networks on this machine, at the size of the images, and print those that fit, with commands."""
    from dataclasses import asdict

    from factor_transfer.report.terminal import show_suggestions
    from factor_transfer.suggest import suggest as measure
    from factor_transfer.util.arguments import brief

    found, size = measure(settings)
    if as_json:
        print(json.dumps({"img_size": brief(size), "suggestions": [asdict(each) for each in found]}))  # noqa: T201
    else:
        show_suggestions(found, size)


@app.command
def evaluate(
    run: Path,
    *,
    data: str | None = None,
    data_dir: str | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    device: str = "auto",
    as_json: AsJson = False,
    trust_config: TrustRun = False,
) -> None:
    """Measure the networks of a finished run again, on its validation images and in float32.

    Parameters
    ----------
    run
        The run folder.
    data
        Other images, of some or all of the run's classes: class folders (all are measured), or a folder with train/ and
        validation/. Default: the run's own.
    data_dir
        Where a timm dataset lies.
    label_column
        Column of an hfds/ dataset that holds the classes.
    image_column
        Column of an hfds/ dataset that holds the images.
    device
        auto, cpu, cuda or mps.
    """
    from dataclasses import replace

    from factor_transfer.distillation import evaluate_run
    from factor_transfer.report.terminal import show_evaluation

    saved = _trusted(run, trust_config=trust_config, data=not data)
    where = {"data_dir": data_dir, "label_column": label_column, "image_column": image_column}
    given = [f"{flag(name)} {value}" for name, value in where.items() if value is not None]
    if given and not data:
        raise ConfigError(given[0], found="no --data, which it would belong to", hint="give --data, or leave it out")
    images = replace(saved, data=data, **cast(dict[str, Any], where)) if data else None
    found = evaluate_run(run, images, device)
    if as_json:
        print(json.dumps(found))  # noqa: T201 (the command's output)
    else:
        show_evaluation(run, found)


@app.command
def report(
    runs: Annotated[list[Path], Parameter(negative="")],
    *,
    out: Path | None = None,
    trust_config: TrustRun = False,
) -> None:
    """Make report.html of a finished run again; of several runs, or a folder of runs, a page that compares them.

    Parameters
    ----------
    runs
        Run folders, or one folder of run folders.
    out
        The comparison's file. Default: comparison.html in the working folder.
    """
    from factor_transfer.compare.words import tabulated
    from factor_transfer.report.html import write_report
    from factor_transfer.report.several import runs_in, write_comparison

    folders = runs_in(runs)
    for folder in folders:
        _trusted(folder, trust_config=trust_config)
    if len(folders) == 1:
        print(write_report(folders[0]))  # noqa: T201 (the command's output)
    else:
        compared = tabulated(runs[0]) if len(runs) == 1 else None
        print(write_comparison(folders, out or Path("comparison.html"), compared))  # noqa: T201


@app.command
def export(
    run: Path,
    *,
    formats: str = "pt2,onnx,onnx-int8,safetensors,timm",
    out: Path | None = None,
    images: int = 2000,
    int8_loss: float = 1.0,
    latency: bool = True,
    license: str | None = None,
    data_license: str | None = None,
    teacher_license: str | None = None,
    intended: str | None = None,
    trust_config: TrustRun = False,
) -> None:
    """Write a finished run's student in every format, check each in a fresh process, and measure its latency.

    Parameters
    ----------
    run
        The run folder.
    formats
        pt2, onnx, onnx-int8, safetensors, timm; with commas between.
    out
        Where to. Default: export/ in the run folder.
    images
        Validation images on which each is compared with the trained student, at most.
    int8_loss
        Points of top-1 (or of the task's own metric) that int8 may lose; with more it is not written.
    latency
        Measure p50 and p95 of teacher and student: batch 1 and 32, one thread and all.
    license
        The student's licence, for the model card.
    data_license
        Licence of the training images, for the model card.
    teacher_license
        Licence of the teacher's weights, for the model card.
    intended
        What the student is meant for, for the model card.
    """
    from factor_transfer.export.shipping import Choices, export_run
    from factor_transfer.report.html import scored, write_report
    from factor_transfer.report.terminal import show_exports

    _trusted(run, trust_config=trust_config)
    said = {"license": license, "data_license": data_license, "teacher_license": teacher_license, "intended": intended}
    wanted = [name.strip() for name in formats.split(",") if name.strip()]
    choices = Choices(formats=wanted, out=out, images=images, int8_loss=int8_loss, latency=latency, **said)
    show_exports(out or run / "export", scored(export_run(run, choices)))
    if out is None:
        write_report(run)  # with what has been measured


@app.command
def predict(
    student: Path,
    images: Annotated[list[str], Parameter(negative="", allow_leading_hyphen=True)],
    *,
    top: int = 5,
    threads: int | None = None,
    as_json: AsJson = False,
    save_pictures: Path | None = None,
    trust_config: TrustRun = False,
) -> None:
    """Name what is on images, with an exported student, through onnxruntime or torch.

    Parameters
    ----------
    student
        A run folder, a folder of exports, or one exported file.
    images
        Files, folders, or - for one image on standard input.
    top
        Classes to print for each image.
    threads
        CPU threads. Default: the runtime's choice.
    save_pictures
        Folder for a picture of each image, of a student for segmentation: a PNG whose values are class indices.
    """
    from factor_transfer.export.predict import predict_images

    how = {"top": top, "threads": threads, "as_json": as_json, "save_pictures": save_pictures}
    sys.exit(predict_images(student, images, trust_config=trust_config, **cast(dict[str, Any], how)))


@app.command
def demo(*, out: str = "runs/demo", seed: int = 0, overwrite: bool = False) -> None:
    """Few images and a good teacher: one student without it, by kd, by Factor Transfer and by both, in three minutes.

    The images (Fashion-MNIST) and the teacher come with the package.

    Parameters
    ----------
    out
        Folder of the runs.
    seed
        Owns the students' initial weights.
    overwrite
        Delete the runs that are there and start anew.
    """
    from factor_transfer.demo import demo as run_demo

    run_demo(out, seed, overwrite=overwrite)


@app.command(name="recipes")
def list_recipes() -> None:
    """List the shipped recipes: settings of published runs, and of common jobs, for `--config recipe:NAME`."""
    for name, what in recipes().items():
        print(f"{RECIPE}{name}\n    {what}")  # noqa: T201 (the command's output)


def main() -> None:
    """Run the command line; exit code 2 for a mistake in what was given, 130 or 143 for an interruption."""
    try:
        check_supported()
        keep_memory()
        short.whole = WHOLE in sys.argv
        app(exit_on_error=False)
    except CycloptsError:
        sys.exit(2)  # cyclopts has printed it
    except FactorTransferError as error:
        sys.exit(_told(f"error: {error}", 2))
    except Interrupted as stopped:
        sys.exit(_told(str(stopped), stopped.code))
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}:
            raise
        where = f" ({error.filename})" if error.filename else ""
        hint = "make room or mend the permissions; the same command continues"
        sys.exit(_told(f"error: {error.strerror}{where}\n  next:  {hint}", 2))
    except KeyboardInterrupt:
        sys.exit(_told("stopped; the same command continues", 130))


def _told(text: str, code: int) -> int:
    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    print(text if rank is None else f"[process {rank}] {text}", file=sys.stderr)  # noqa: T201 (the last word)
    return code
