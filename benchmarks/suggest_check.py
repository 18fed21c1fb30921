"""Whether `suggest`'s latencies agree with a separate timing of the same networks, each in a process of its own.

    python benchmarks/suggest_check.py [--data DATA] [--max-params N] [--count N]

The separate timing is torch's own (`torch.utils.benchmark.Timer`), of modules that timm built, once before `suggest`
and once after it: a machine changes its speed within minutes, and so the mean of the two is of the time of `suggest`.
What one says of the other (`drift`) is the least that any comparison can be off by. Raw: results/suggest.json. Exits
with 1 where one is off by more than 20 %. On a machine with other work, `chrt -f 50 python ...` (as root) keeps that
out of all timings.

The separate processes have glibc keep freed memory, as `suggest` does.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from factor_transfer.training.run_folder import environment

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
    print(json.dumps({"ms": 1000 * found.median, "iqr_ms": 1000 * found.iqr, "blocks": len(found.times)}))
"""

app = App()


@app.default
def check(
    *, data: str = "digits", img_size: int = 32, max_params: float = 1e6, threads: int = 1, count: int = 20,
    out: Annotated[Path, Parameter(allow_leading_hyphen=True)] = Path("results/suggest.json"),
) -> None:  # fmt: skip
    """Time what `suggest` proposes independently, before and after."""
    flags = ["--data", data, "--img-size", img_size, "--teacher", "cifar_resnet56", "--max-params", max_params,
             "--threads", threads, "--json"]  # fmt: skip
    command = [sys.executable, "-m", "factor_transfer", "suggest", *map(str, flags)]
    kept = {"MALLOC_TRIM_THRESHOLD_": "200000000", "MALLOC_MMAP_THRESHOLD_": "200000000"}
    found = answer(command)  # says which networks there are to time; its latencies are not compared
    asked = [
        json.dumps([each["name"], each["args"], found["img_size"], threads]) for each in found["suggestions"][:count]
    ]
    before = [answer([sys.executable, "-c", TIMER, one], kept) for one in asked]
    found = answer(command)
    after = [answer([sys.executable, "-c", TIMER, one], kept) for one in asked]
    rows = []
    for each, first, second in zip(found["suggestions"][:count], before, after, strict=True):
        separate = statistics.mean((first["ms"], second["ms"]))
        off, drift = each["latency_ms"] / separate - 1, second["ms"] / first["ms"] - 1
        rows.append({**each, "before": first, "after": second, "separate_ms": separate, "off": off, "drift": drift})
        print(f"{each['name']:24} {each['args']!s:70} {each['latency_ms']:.3f} ms, alone {first['ms']:.3f} and "
              f"{second['ms']:.3f} ms: {off:+.1%} (drift {drift:+.1%})")  # fmt: skip
    offs = [row["off"] for row in rows]
    worst, drift = max(map(abs, offs)), max(abs(row["drift"]) for row in rows)
    print(f"{len(rows)} networks, at most {worst:.1%} off; the separate timings from each other: at most {drift:.1%}")
    result = {"command": shlex.join(["python", *sys.argv]), "suggest": shlex.join(command[1:]), "n": len(rows),
              "worst": worst, "mean": statistics.mean(offs), "sd": statistics.stdev(offs), "worst_drift": drift,
              "real_time_priority": os.sched_getscheduler(0) == os.SCHED_FIFO, "load": os.getloadavg()[0],
              "environment": environment(), "rows": rows}  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(worst > 0.2)


def answer(command: list[str], environ: dict[str, str] | None = None) -> Any:
    """What a command prints, as JSON."""
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environ or {})})
    return json.loads(ran.stdout)


if __name__ == "__main__":
    app()
