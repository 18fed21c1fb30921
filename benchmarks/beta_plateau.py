"""Whether `--beta auto` lands where a sweep finds the best beta: four pairs of networks, two input sizes.

    python benchmarks/beta_plateau.py    # half an hour of two cores; results/beta-plateau.json

Each pair is a `factor-transfer compare` on the built-in digits that sweeps beta, scored on a share of the training
images. The plateau is every beta that is not shown to be worse than the best one: the 95 % interval of its paired
difference, over seeds, reaches 0. `auto` is on it when its own result is not shown to be worse, nor its beta outside of
the betas that are not. Runs are kept in runs/beta-plateau, and the same command continues.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from factor_transfer.files import write_json
from factor_transfer.method import portable_beta
from factor_transfer.runs import environment
from factor_transfer.statistics import paired

WORK = Path("runs/beta-plateau")
RESULT = Path(__file__).parent.parent / "results" / "beta-plateau.json"
BETAS = (1, 10, 30, 100, 300, 1000, 10_000)
SEEDS = 6
COMMON = ["--data", "digits", "--hflip", "0", "--teacher-epochs", "20", "--paraphraser-epochs", "30", "--epochs", "16",
          "--batch-size", "64", "--methods", "alone,ft", "--validation-share", "0.25", "--seeds", str(SEEDS),
          "--jobs", "2", "--threads", "1", "--log-with", "none"]  # fmt: skip
PAIRS: dict[str, tuple[int, list[str]]] = {
    "ResNet -> narrow ResNet": (16, ["--teacher", "cifar_resnet20", "--student", "cifar_resnet20",
                                     "--student-args", '{"layers": [1, 1, 1], "channels": [4, 8, 16]}']),
    "WideResNet -> ResNet": (16, ["--teacher", "cifar_wrn_16_2", "--student", "cifar_resnet20_b",
                                  "--student-args", '{"layers": [1, 1, 1], "channels": [8, 8, 16]}']),
    "ResNet -> narrow WideResNet": (32, ["--teacher", "cifar_resnet20", "--student", "cifar_wrn_16_1",
                                         "--student-args", '{"depth": 10, "channels": [4, 8, 16]}']),
    "ResNet -> ConvNeXt": (32, ["--teacher", "cifar_resnet20", "--student", "convnext_atto", "--opt", "adamw",
                                "--lr", "0.002", "--teacher-lr", "0.002", "--paraphraser-lr", "0.002", "--student-args",
                                '{"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "patch_size": 1}']),
}  # fmt: skip
"""Side of the images, and the networks."""


def swept(name: str) -> dict[str, Any]:
    """Run one pair's sweep, and compare every beta with the best."""
    size, networks = PAIRS[name]
    folder = WORK / name.replace(" -> ", "-to-").replace(" ", "-").lower()
    betas = ",".join(map(str, ("auto", *BETAS)))
    command = ["compare", *networks, *COMMON, "--img-size", str(size), "--sweep", f"beta={betas}", "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "factor_transfer", *command], check=True)
    found = json.loads((folder / "compare.json").read_text())
    top1 = {str(each["swept"].get("beta", each["name"])): scores(each) for each in found["methods"]}
    chosen = [student_of(path) for path in sorted(folder.glob("ft-beta=auto-s*/summary.json"))]
    grid = {beta: top1[beta] for beta in map(str, BETAS)}
    best = max(grid, key=lambda beta: np.mean(list(grid[beta].values())))
    plateau = [beta for beta in grid if beta == best or not worse(grid[beta], grid[best])]
    autos = [student["beta"] for student in chosen]
    inside = min(map(float, plateau)) <= min(autos) and max(autos) <= max(map(float, plateau))
    lost = paired(top1["auto"], grid[best])
    return {
        "img_size": size,
        "command": found["command"],
        "scored_on": found["scored_on"],
        "elements": chosen[0]["elements"],
        "beta_of_the_same_bound": portable_beta(chosen[0]["elements"]),
        "auto": autos,
        "means": {name: float(np.mean(list(values.values()))) for name, values in top1.items()},
        "best": best,
        "plateau": plateau,
        "auto_less_best": lost.to_dict() if lost else None,
        "on_the_plateau": inside and not worse(top1["auto"], grid[best]),
        "top1": top1,
    }


def scores(method: dict[str, Any]) -> dict[int, float]:
    """Top-1 by seed."""
    return {int(seed): value for seed, value in method["top1"].items()}


def student_of(path: Path) -> dict[str, Any]:
    """What a run's summary says of its student."""
    return dict(json.loads(path.read_text())["student"])


def worse(ones: dict[int, float], others: dict[int, float]) -> bool:
    """Whether they are shown to be."""
    found = paired(ones, others)
    return found is not None and found.mean < 0 and (found.high is None or found.high < 0)


def main() -> None:
    """Run, print, and keep."""
    pairs = {}
    for name in PAIRS:
        pairs[name] = swept(name)
        print(name, {key: value for key, value in pairs[name].items() if key not in {"top1", "command"}}, flush=True)
        write_json(
            RESULT, {"command": "python benchmarks/beta_plateau.py", "pairs": pairs, "environment": environment()}
        )


if __name__ == "__main__":
    main()
