"""Whether `suggest`'s latencies agree with a separate timing of the same networks, each in a process of its own.

    python benchmarks/suggest_check.py [--data DATA] [--max-params N] [--count N]

Raw: results/suggest.json. Exits with 1 where one is off by more than 20 %.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from factor_transfer.runs import environment

TIMER = """
import json, sys, timm, torch
from torch.utils.benchmark import Timer
import factor_transfer.zoo
name, args, size, threads = json.loads(sys.argv[1])
args = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
module = timm.create_model(name, num_classes=10, **args).eval()
with torch.no_grad():
    timer = Timer("module(image)", globals={"module": module, "image": torch.zeros(1, 3, size, size)},
                  num_threads=threads)
    timer.timeit(20)
    print(1000 * timer.blocked_autorange(min_run_time=2).median)
"""

app = App()


@app.default
def check(
    *, data: str = "digits", img_size: int = 32, max_params: float = 1e6, threads: int = 1, count: int = 20,
    out: Annotated[Path, Parameter(allow_leading_hyphen=True)] = Path("results/suggest.json"),
) -> None:  # fmt: skip
    """Time what `suggest` proposes once more, independently."""
    flags = ["--data", data, "--img-size", img_size, "--teacher", "cifar_resnet56", "--max-params", max_params,
             "--threads", threads, "--json"]  # fmt: skip
    command = [sys.executable, "-m", "factor_transfer", "suggest", *map(str, flags)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    rows = []
    for each in found["suggestions"][:count]:
        asked = json.dumps([each["name"], each["args"], found["img_size"], threads])
        alone = subprocess.run([sys.executable, "-c", TIMER, asked], check=True, stdout=subprocess.PIPE, text=True)
        separate = float(alone.stdout)
        off = each["latency_ms"] / separate - 1
        rows.append({**each, "separate_ms": separate, "off": off})
        print(f"{each['name']:24} {each['args']!s:70} {each['latency_ms']:.3f} ms, alone {separate:.3f} ms: {off:+.1%}")
    worst = max(abs(row["off"]) for row in rows)
    print(f"{len(rows)} networks, at most {worst:.1%} off")
    result = {"command": " ".join(command[1:]), "worst": worst, "environment": environment(), "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(worst > 0.2)


if __name__ == "__main__":
    app()
