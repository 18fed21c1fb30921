"""Which convolutions, batch norms and pools corrupt memory, or are wrong, on which instruction set of this CPU.

    python benchmarks/kernels.py    # leaves results/kernels.json; an hour of two cores

Forward and backward of every case run under an allocator (`fence.c`, built with gcc) whose blocks end at a page that
cannot be touched, and are compared with float64, computed contiguous and without oneDNN. A process that dies is
replaced, and the case that it died of is noted. What failed is tried once more, each in a process of its own, under
glibc's checks alone (MALLOC_CHECK_=3 MALLOC_PERTURB_=7, with libc_malloc_debug.so.0, which they need since glibc 2.34).
Without gcc these checks are all there is, and every case has a process of its own.

The instruction set is chosen as a user would: ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY. All that fails here must be
among what `factor_transfer.networks.kernels` computes in another way: what fails besides is listed under `unguarded`.
Where nothing fails any more, with a newer torch, the guard can go.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from factor_transfer.networks.kernels import broken

RESULT = Path(__file__).parent.parent / "results" / "kernels.json"
ISA = {
    "own": {},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "AVX": {"ONEDNN_MAX_CPU_ISA": "AVX", "ATEN_CPU_CAPABILITY": "default"},
    "SSE41": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest error of one value, in units of the root mean square of all that it is one of."""

STEPS = 3
CHUNK = 50
"""Cases that a fenced process runs one after the other."""


@dataclass(frozen=True)
class Case:
    """One shape, of a square (or line, or cube) of `side`."""

    op: str
    kernel: int
    stride: int
    padding: int
    groups: int
    channels: int
    out: int
    side: int
    batch: int
    dtype: str = "float32"
    channels_last: bool = True
    dims: int = 2

    def guarded(self) -> bool:
        """Whether a run computes it in another way."""
        weight = torch.empty(self.out, self.channels // self.groups, *[self.kernel] * self.dims, device="meta")
        return self.op == "conv" and broken(weight, [self.stride] * self.dims, transposed=False)


def fits(case: Case) -> bool:
    """Whether there is such a convolution."""
    divides = case.channels % case.groups == 0 and case.out % case.groups == 0
    return divides and case.side + 2 * case.padding >= case.kernel


def core() -> Iterator[Case]:
    """Always tried: plain convolutions of few pixels, and what stands beside them in networks."""
    sizes = [(8, 4), (9, 3)]
    for kernel, stride, channels, (side, batch) in itertools.product((1, 3), (1, 2, 3), range(1, 41), sizes):
        for out, padding in itertools.product((4, 8, 17), {0, kernel // 2}):
            yield Case("conv", kernel, stride, padding, 1, channels, out, side, batch)
    for op, channels, (side, batch) in itertools.product(PLAIN, range(1, 41), sizes):
        yield Case(op, 3, 2, 1, 1, channels, channels, side, batch)


def small() -> Iterator[Case]:
    """Always tried: maps of few places, which padding makes larger."""
    for op, kernel, stride, channels, (side, batch) in itertools.product(
        ("conv", "transposed"), (1, 3, 5, 7), (1, 2), (1, 2, 4, 8, 13, 16, 32), [(1, 2), (2, 3), (3, 2)]
    ):
        for padding in {0, kernel // 2}:
            case = Case(op, kernel, stride, padding, 1, channels, 8, side, batch)
            if fits(case):
                yield case


def wide(count: int) -> list[Case]:
    """Drawn from a grid of about a million and a half: always the same ones, and of fewer the first."""
    some, found = random.Random(0), dict[Case, None]()
    while len(found) < count:
        channels, kernel = some.randint(1, 40), some.choice((1, 3, 5, 7))
        groups, out = some.choice([(1, 1), (1, 6), (1, 16), (1, 27), (2, 2), (2, 12), (channels, channels),
                                   (channels, 2 * channels)])  # fmt: skip
        side, batch = some.choice([(8, 4), (7, 3), (12, 1), (16, 16), (33, 2), (56, 2)])
        op, stride, padding = (
            some.choice(("conv", "transposed")),
            some.choice((1, 2, 3)),
            some.choice((0, 1, kernel // 2)),
        )
        dtype, last, dims = some.choice(tuple(TOLERANCE)), some.random() < 0.67, some.choice((1, 2, 2, 2, 3))
        case = Case(op, kernel, stride, padding, groups, channels, out, side, batch, dtype, last, dims)
        # In three dimensions, and of many channels, float64 takes too long.
        if fits(case) and batch * (side * kernel) ** case.dims * channels * out / groups < 1e7:
            found[case] = None
    return list(found)


def batch_norm(case: Case, x: Tensor, _: list[Tensor]) -> Tensor:
    """With statistics of the batch."""
    return F.batch_norm(x, None, None, training=True)


def max_pool(case: Case, x: Tensor, _: list[Tensor]) -> Tensor:
    """Over windows that overlap."""
    return F.max_pool2d(x, case.kernel, case.stride, case.padding)


def avg_pool(case: Case, x: Tensor, _: list[Tensor]) -> Tensor:
    """Over windows that overlap."""
    return F.avg_pool2d(x, case.kernel, case.stride, case.padding)


def adaptive_pool(case: Case, x: Tensor, _: list[Tensor]) -> Tensor:
    """To a map that does not divide the other."""
    return F.adaptive_avg_pool2d(x, 3)


def global_pool(case: Case, x: Tensor, _: list[Tensor]) -> Tensor:
    """To one place."""
    return F.adaptive_avg_pool2d(x, 1)


def resize(case: Case, x: Tensor, _: list[Tensor]) -> Tensor:
    """To a larger map."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear")


PLAIN = {each.__name__: each for each in (batch_norm, max_pool, avg_pool, adaptive_pool, global_pool, resize)}


def convolve(case: Case, x: Tensor, weights: list[Tensor]) -> Tensor:
    """Both kinds."""
    if case.op in PLAIN:
        return PLAIN[case.op](case, x, weights)
    names = {"conv": ("conv1d", "conv2d", "conv3d"), "transposed": ("conv_transpose1d", "conv_transpose2d",
             "conv_transpose3d")}[case.op]  # fmt: skip
    function = getattr(F, names[case.dims - 1])
    found: Tensor = function(x, *weights, stride=case.stride, padding=case.padding, groups=case.groups)
    return found


def drawn(case: Case, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Input, and weight and bias where there are any."""
    some = torch.Generator().manual_seed(seed)
    x = torch.randn(case.batch, case.channels, *[case.side] * case.dims, generator=some)
    if case.op in PLAIN:
        return x, []
    shape = [case.out, case.channels // case.groups]
    if case.op == "transposed":
        shape = [case.channels, case.out // case.groups]
    weight = torch.randn(*shape, *[case.kernel] * case.dims, generator=some)
    return x, [weight, torch.randn(case.out, generator=some)]


def computed(case: Case, tensors: list[Tensor], shown: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Output and gradients, and the gradient of the output that was given."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = convolve(case, leaves[0], leaves[1:])
    if shown is None:
        shown = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(getattr(torch, case.dtype))
    given = shown.to(out.dtype)
    if case.channels_last and case.dims == 2:
        given = given.contiguous(memory_format=torch.channels_last)
    return [out.detach(), *torch.autograd.grad(out, leaves, given)], shown


def tried(case: Case, seed: int) -> dict[str, float]:
    """Errors of output and gradients."""
    dtype = getattr(torch, case.dtype)
    x, weights = drawn(case, seed)
    plain = [tensor.to(dtype) for tensor in (x, *weights)]
    laid = plain
    if case.channels_last and case.dims > 1:
        layout = torch.channels_last if case.dims == 2 else torch.channels_last_3d
        laid = [tensor.contiguous(memory_format=layout) if tensor.ndim > 2 else tensor for tensor in plain]
    found, shown = computed(case, laid, None)
    with torch.backends.mkldnn.flags(enabled=False):
        wanted, _ = computed(case, [tensor.double() for tensor in plain], shown)
    errors = {}
    for name, ours, theirs in zip(("output", "input", "weight", "bias"), found, wanted, strict=False):
        size = float(theirs.square().mean().sqrt()) or 1.0
        errors[name] = float((ours.double() - theirs).abs().max()) / size
    return errors


def worker() -> None:
    """Run the cases on standard input in processes forked from this one; a line of JSON for each on standard output."""
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    cases = [Case(**each) for each in asked["cases"]]
    place, end = 0, time.monotonic() + 60 * asked["minutes"]
    while place < len(cases) and time.monotonic() < end:
        until = min(place + (CHUNK if asked["fenced"] else 1), len(cases))
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            forked(cases, place, until, writer, fenced=asked["fenced"])
        os.close(writer)
        with os.fdopen(reader) as lines:
            done = [json.loads(line) for line in lines]
        _, status = os.waitpid(child, 0)
        for errors in done:
            print(json.dumps({"place": place, "errors": errors}), flush=True)
            place += 1
        if status:
            code = os.waitstatus_to_exitcode(status)
            ended = signal.Signals(-code).name if code < 0 else {97: "written past a block"}.get(code, f"exit {code}")
            print(json.dumps({"place": place, "died": ended}), flush=True)
            place += 1


def forked(cases: list[Case], place: int, until: int, writer: int, *, fenced: bool) -> None:
    """In a process of their own; it does not return."""
    if fenced:
        ctypes.CDLL(None).fence(1)
    for each in range(place, until):
        for seed in range(1 if fenced else STEPS):
            errors = tried(cases[each], seed)
        os.write(writer, (json.dumps(errors) + "\n").encode())
    os._exit(0)


def run(
    cases: list[Case], environment: dict[str, str], threads: int, fence: Path | None, processes: int, minutes: float
) -> list[dict[str, Any]]:
    """What became of every case."""
    found: list[dict[str, Any]] = [{} for _ in cases]
    with ThreadPoolExecutor(processes) as pool:
        parts = [cases[start::processes] for start in range(processes)]
        for start, part in enumerate(
            pool.map(lambda part: run_part(part, environment, threads, fence, minutes), parts)
        ):
            found[start::processes] = part
    return found


def run_part(
    cases: list[Case], environment: dict[str, str], threads: int, fence: Path | None, minutes: float
) -> list[dict[str, Any]]:
    """What became of these cases, in one worker."""
    checks = {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "7", "LD_PRELOAD": "libc_malloc_debug.so.0"}
    setting = {"LD_PRELOAD": str(fence)} if fence else checks
    asked = {"cases": [asdict(case) for case in cases], "threads": threads, "fenced": fence is not None,
             "minutes": minutes}  # fmt: skip
    with subprocess.Popen(
        [sys.executable, __file__, "--worker"], env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment,
        **setting}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asked))
        process.stdin.close()
        found, told = [], time.monotonic()
        for line in process.stdout:
            found.append(json.loads(line))
            if time.monotonic() - told > 20:
                told = time.monotonic()
                print(f"  {len(found)} of {len(cases)}", flush=True)
    assert process.returncode == 0
    return found + [{}] * (len(cases) - len(found))


def seen_isa(environment: dict[str, str]) -> list[str]:
    """What oneDNN says of itself, and the kernels it takes for the shape that is known to be broken."""
    code = (
        "import torch; torch.set_num_threads(1); "
        "print('capability', torch.backends.cpu.get_cpu_capability(), flush=True);"
        "x = torch.randn(4, 4, 8, 8).contiguous(memory_format=torch.channels_last);"
        "torch.nn.Conv2d(4, 8, 1, 2)(x).sum().backward()"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment, "ONEDNN_VERBOSE": "1"}, text=True,
        capture_output=True, check=False,
    ).stdout.splitlines()  # fmt: skip
    lines = [line for line in said if "cpu,isa" in line or "capability" in line or "info,oneDNN" in line]
    return lines + [",".join(line.split(",")[4:8]) for line in said if "exec,cpu,convolution" in line]


def summarised(cases: list[Case], found: list[dict[str, Any]], alone: dict[int, str]) -> dict[str, Any]:
    """Counts, and every case that failed."""
    failed, largest = [], dict.fromkeys(TOLERANCE, 0.0)
    for place, (case, each) in enumerate(zip(cases, found, strict=True)):
        worst = max(each.get("errors", {}).values(), default=0.0)
        wrong = {name: round(value, 5) for name, value in each.get("errors", {}).items()
                 if not value < TOLERANCE[case.dtype]}  # fmt: skip
        if "died" in each or wrong:
            how = {"died": each["died"]} if "died" in each else {"wrong": wrong}
            failed.append({**asdict(case), **how, "alone_under_glibc_checks": alone.get(place, "survived"),
                           "guarded": case.guarded()})  # fmt: skip
        else:
            largest[case.dtype] = max(largest[case.dtype], worst)
    guarded = sum(case.guarded() for case, each in zip(cases, found, strict=True) if each)
    kinds = Counter(
        f"{each['op']} {each['kernel']} stride {each['stride']} groups {each['groups']} {each['dtype']} "
        f"{'channels-last' if each['channels_last'] else 'contiguous'} {each['dims']}d: "
        + str(each.get("died") or "wrong " + " ".join(each["wrong"]))
        for each in failed
    )
    return {
        "tried": sum(map(bool, found)), "of_guarded_shapes": guarded, "failed": len(failed),
        "kinds": dict(kinds.most_common()),
        "channels_of_failed": dict(sorted(Counter(each["channels"] for each in failed).items())),
        "unguarded": [each for each in failed if not each["guarded"]], "largest_error_of_the_rest": largest,
        "cases": failed,
    }  # fmt: skip


def built(folder: str) -> Path | None:
    """The allocator; None without gcc."""
    library = Path(folder) / "fence.so"
    source = Path(__file__).with_name("fence.c")
    try:
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    except FileNotFoundError:
        return None
    return library


def main() -> None:
    """Try all, and write down what failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", type=int, default=6000, help="drawn from the wide grid, beside the core")
    parser.add_argument("--share", type=float, default=0.375, help="of these, for sets other than its own")
    parser.add_argument(
        "--isa", nargs="+", default=["own", "AVX", "SSE41"], choices=list(ISA), help="other results are kept"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e4, help="for each instruction set; cases are shuffled")
    parser.add_argument("--processes", type=int, default=2, help="at once")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker()
        return
    record: dict[str, Any] = {
        "command": "python benchmarks/kernels.py", "torch": torch.__version__, "threads": asked.threads,
        "processor": processor(), "libc": " ".join(platform.libc_ver()),
        "not_tried": "instruction sets that this CPU lacks: see `flags`", "runs": {},
    }  # fmt: skip
    if asked.out.exists():
        before = json.loads(asked.out.read_text())
        if all(before[name] == record[name] for name in ("torch", "threads", "processor")):
            record["runs"] = before["runs"]
    with tempfile.TemporaryDirectory() as folder:
        fence = built(folder)
        record["detector"] = "fence.c" if fence else "glibc's checks"
        for isa in asked.isa:
            count = asked.cases if isa == "own" else round(asked.share * asked.cases)
            cases = [*core(), *small(), *wide(count)]
            random.Random(1).shuffle(cases)
            print(f"{isa}: {len(cases)} cases", flush=True)
            found = run(cases, ISA[isa], asked.threads, fence, asked.processes, asked.minutes)
            places = [place for place, each in enumerate(found) if "died" in each]
            again = run([cases[place] for place in places], ISA[isa], asked.threads, None, asked.processes, 1e4)
            alone = {place: each["died"] for place, each in zip(places, again, strict=True) if "died" in each}
            record["runs"][isa] = {"environment": ISA[isa], "onednn": seen_isa(ISA[isa]),
                                   **summarised(cases, found, alone)}  # fmt: skip
            summary = {name: value for name, value in record["runs"][isa].items() if name not in ("cases", "unguarded")}
            print(json.dumps(summary, indent=1), flush=True)
            asked.out.write_text(json.dumps(record, indent=1) + "\n")


def processor() -> dict[str, Any]:
    """Its name, and which of the instruction sets that matter here it has."""
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    flags = set(fields.get("flags", "").split())
    known = ("sse4_1", "avx", "avx2", "avx_vnni", "avx512f", "avx512_bf16", "amx_bf16")
    return {"name": fields.get("model name", ""), "flags": {flag: flag in flags for flag in known}}


if __name__ == "__main__":
    main()
