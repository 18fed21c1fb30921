"""Whether `--beta auto` lands on the plateau of a sweep: six pairs of networks, two input sizes, real images.

    python benchmarks/beta_plateau.py ../shared    # two or three hours of two cores; results/beta-plateau.json

The teacher is the ResNet-56 of ../shared, the training images a fixed share of 10,000, and what is scored are 5,000
training images that were held out. For each pair a sweep over beta finds the best one (two seeds). The best of several
owes a part of its lead to chance, so it meets `auto` and the student alone on four further seeds. `auto` is on the
plateau when it is not shown to be worse there (the 95 % interval of the paired difference reaches 0) and keeps at least
`KEPT` of the best beta's lead over the student alone. Runs are kept in runs/beta-plateau, and the same command
continues.

The rule that `auto` follows was chosen when five of the pairs had been run with an earlier one (at commit 4192077:
results/beta-plateau-gradients.json); the ResNet-8 came after it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from factor_transfer.compare.statistics import Difference, Scores, paired
from factor_transfer.method.factor_transfer import portable_beta
from factor_transfer.training.run_folder import environment
from factor_transfer.util.files import write_json

WORK = Path("runs/beta-plateau")
RESULT = Path(__file__).parent.parent / "results" / "beta-plateau.json"
BETAS = (30, 125, 500, 2000)
CHOOSING, FURTHER = 2, 4
"""Seeds that choose the best beta, and those that it then meets `auto` on."""
KEPT = 0.8
COMMON = ["--train-images", "10000", "--teacher", "cifar_resnet56", "--epochs", "8", "--views", "4", "--jobs", "2",
          "--threads", "1", "--log-with", "none"]  # fmt: skip
TUNED = ["--img-size", "16", "--teacher-epochs", "10"]
"""The teacher learned from larger images, so it is fine-tuned on smaller ones."""
PAIRS: dict[str, list[str]] = {
    "ResNet-56 to ResNet-20 of half its width, 16 px": [
        "--student", "cifar_resnet20", "--student-args", '{"channels": [8, 16, 32]}', *TUNED],
    "ResNet-56 to a small ConvNeXt, 16 px": [
        "--student", "convnext_atto",
        "--student-args", '{"depths": [1, 1, 1, 1], "dims": [16, 32, 48, 64], "patch_size": 1}',
        "--opt", "adamw", "--lr", "0.002", "--teacher-lr", "0.0005", "--paraphraser-lr", "0.002", *TUNED],
    "ResNet-56 to WRN-16-1, 16 px": ["--student", "cifar_wrn_16_1", *TUNED],
    "ResNet-56 to ResNet-8, k 2, 32 px": [
        "--student", "cifar_resnet20", "--student-args", '{"layers": [1, 1, 1]}', "--k", "2"],
    "ResNet-56 to ResNet-20, 32 px": ["--student", "cifar_resnet20"],
    "ResNet-56 to WRN-16-1, 32 px": ["--student", "cifar_wrn_16_1"],
}  # fmt: skip

Top1 = dict[str, dict[int, float]]
"""By beta, or `baseline`, and seed."""


def judged(shared: Path, name: str) -> dict[str, Any]:
    """Sweep one pair, and let its best beta meet `auto`."""
    sweep = compared(shared, name, ["--methods", "ft"], 0, CHOOSING, BETAS)
    grid = top1(sweep)
    best = max(grid, key=lambda beta: np.mean(list(grid[beta].values())))
    (elements,) = {
        json.loads(path.read_text())["student"]["elements"] for path in folder(name).glob("ft-*/summary.json")
    }
    auto = portable_beta(elements)
    betas = (best,) if float(best) == auto else ("auto", best)  # the best may be the very beta that `auto` sets
    final = compared(shared, name, ["--methods", "baseline,ft"], CHOOSING, FURTHER, betas)
    scores = {"auto": top1(final)[best]} | top1(final)
    means = {each: float(np.mean(list(values.values()))) for each, values in scores.items()}
    gained, lost = difference(scores[best], scores["baseline"]), difference(scores["auto"], scores[best])
    return {
        "commands": [sweep["command"], final["command"]],
        "scored_on": final["scored_on"],
        "teacher": final["teacher"],
        "elements": elements,
        "auto": auto,
        "sweep": {beta: float(np.mean(list(values.values()))) for beta, values in grid.items()},
        "best": best,
        "means": means,
        "best_less_alone": gained.to_dict(),
        "auto_less_best": lost.to_dict(),
        "auto_less_alone": difference(scores["auto"], scores["baseline"]).to_dict(),
        "on_the_plateau": on_the_plateau(lost, gained),
        "top1": {"sweep": grid, "further": scores},
    }


def on_the_plateau(lost: Difference, gained: Difference) -> bool:
    """Of what loses this to the best beta, which gains that over the student alone."""
    return (lost.high is None or lost.high >= 0) and gained.mean + lost.mean >= KEPT * gained.mean


def difference(ones: Scores, others: Scores) -> Difference:
    """Over the seeds that all have."""
    found = paired(ones, others)
    assert found is not None
    return found


def compared(
    shared: Path, name: str, methods: list[str], seed: int, seeds: int, betas: tuple[Any, ...]
) -> dict[str, Any]:
    """A comparison's own result; what is finished is not run again."""
    images, weights = shared / "cifar10-jpeg", shared / "checkpoints" / "resnet56-cifar10-jpeg.safetensors"
    command = ["compare", "--data", str(images), "--teacher-weights", str(weights), *COMMON, *PAIRS[name], *methods,
               "--seed", str(seed), "--seeds", str(seeds), "--sweep", f"beta={','.join(map(str, betas))}",
               "--out", str(folder(name))]  # fmt: skip
    subprocess.run([sys.executable, "-m", "factor_transfer", *command], check=True)
    return dict(json.loads((folder(name) / "compare.json").read_text()))


def folder(name: str) -> Path:
    """Of a pair's runs."""
    return WORK / name.replace(",", "").replace(" ", "-").lower()


def top1(found: dict[str, Any]) -> Top1:
    """Of a comparison."""
    return {
        str(each["swept"].get("beta", each["name"])): {int(seed): value for seed, value in each["top1"].items()}
        for each in found["methods"]
    }


def main(shared: Path) -> None:
    """Run, print, and keep, after every pair."""
    pairs = {}
    for name in PAIRS:
        pairs[name] = judged(shared, name)
        print(name, {key: value for key, value in pairs[name].items() if key not in {"top1", "commands"}}, flush=True)
        command = "python benchmarks/beta_plateau.py ../shared"
        write_json(RESULT, {"command": command, "pairs": pairs, "environment": environment()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
