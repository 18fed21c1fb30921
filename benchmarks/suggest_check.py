"""Whether `suggest`'s latencies agree with a separate timing of the same networks, each in a process of its own.

    python benchmarks/suggest_check.py [--data DATA] [--max-params N] [--count N]

The separate timing is torch's own (`torch.utils.benchmark.Timer`), of modules that timm built. Raw:
results/suggest.json. Exits with 1 where one is off by more than 20 %. On a machine with other work,
`chrt -f 50 python ...` (as root) keeps that out of both timings.

With `--no-keep-memory` the separate processes run with glibc as it is. Where nothing chances to lie behind them, it
gives a network's maps back to the system after every pass and faults them in again in the next: half as long again.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
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
    found = timer.blocked_autorange(min_run_time=1)
    print(json.dumps([1000 * found.median, 1000 * found.iqr, len(found.times)]))
"""

app = App()


@app.default
def check(
    *, data: str = "digits", img_size: int = 32, max_params: float = 1e6, threads: int = 1, count: int = 20,
    keep_memory: bool = True, out: Annotated[Path, Parameter(allow_leading_hyphen=True)] = Path("results/suggest.json"),
) -> None:  # fmt: skip
    """Time what `suggest` proposes once more, independently."""
    flags = ["--data", data, "--img-size", img_size, "--teacher", "cifar_resnet56", "--max-params", max_params,
             "--threads", threads, "--json"]  # fmt: skip
    command = [sys.executable, "-m", "factor_transfer", "suggest", *map(str, flags)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    kept = {"MALLOC_TRIM_THRESHOLD_": "200000000", "MALLOC_MMAP_THRESHOLD_": "200000000"} if keep_memory else {}
    rows = []
    for each in found["suggestions"][:count]:
        asked = json.dumps([each["name"], each["args"], found["img_size"], threads])
        timer = [sys.executable, "-c", TIMER, asked]
        alone = subprocess.run(timer, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **kept})
        separate, spread, blocks = json.loads(alone.stdout)
        off = each["latency_ms"] / separate - 1
        rows.append({**each, "separate_ms": separate, "separate_iqr_ms": spread, "blocks": blocks, "off": off})
        print(f"{each['name']:24} {each['args']!s:70} {each['latency_ms']:.3f} ms, alone {separate:.3f} ms: {off:+.1%}")
    offs = [row["off"] for row in rows]
    worst = max(map(abs, offs))
    print(f"{len(rows)} networks, at most {worst:.1%} off")
    result = {"command": shlex.join(["python", *sys.argv]), "suggest": shlex.join(command[1:]), "n": len(rows),
              "worst": worst, "mean": statistics.mean(offs), "sd": statistics.stdev(offs),
              "real_time_priority": os.sched_getscheduler(0) == os.SCHED_FIFO, "load": os.getloadavg()[0],
              "keep_memory": keep_memory,
              "environment": environment(), "rows": rows}  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(worst > 0.2)


if __name__ == "__main__":
    app()
