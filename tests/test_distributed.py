"""Several processes compute what one does, end together, and continue as any other number of them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bits import bits
from factor_transfer.data.views import permutation
from factor_transfer.networks.load import load_network
from factor_transfer.training.engine import Engine
from factor_transfer.training.run_folder import Run
from factor_transfer.training.trainer import training_chunks
from factor_transfer.util.errors import ConfigError
from factor_transfer.util.files import read_json
from processes import TORCHRUN, Started

HERE = Path(__file__).parent
SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8)}
TWO = ["--standalone", "--nproc-per-node", "2"]
spec = importlib.util.spec_from_file_location("part_batches", HERE / "part_batches.py")
assert spec is not None
assert spec.loader is not None
part_batches = importlib.util.module_from_spec(spec)
spec.loader.exec_module(part_batches)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("two")
    done = Started([*TWO, HERE / "part_batches.py", folder], code=TORCHRUN, forks=True).finished()
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("cpu", "fp32")


def both(name: str, two: Path, tmp_path: Path, engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
    one = part_batches.observed(part_batches.trainer(name, tmp_path / name, engine))
    return one, torch.load(two / f"{name}.pt", weights_only=True)


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max((float((one[name] - two[name]).abs().max()) for name in one), default=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["student", "compiled", "cached", "paraphraser", "no_labels", "mixed", "mixed_cached"])
def test_two_processes__give_the_loss_and_gradients_of_one(
    name: str, two: Path, tmp_path: Path, engine: Engine
) -> None:
    """In float64, without batch norm: every step of both passes, with parts of 50 and 49 images."""
    one, other = both(name, two, tmp_path, engine)
    assert one["losses"].shape == (10,)
    assert float((one["losses"] - other["losses"]).abs().max()) < 1e-10
    assert float((one["gradients"] - other["gradients"]).abs().max()) < 1e-10
    assert distance(one["weights"], other["weights"]) < 1e-10
    assert one["compiled"] + other["compiled"] == 3 * [name == "compiled"]
    assert bool(one["average"]) is (name not in {"paraphraser", "no_labels"})
    assert distance(one["average"], other["average"]) < 1e-10
    assert float(one["gradients"].abs().max()) > 1e-3, "there is something to compare"


@pytest.mark.slow
def test_two_processes__show_each_image_once_a_pass(two: Path, engine: Engine) -> None:
    for name in ("mixed", "mixed_cached"):
        first, second = torch.load(two / f"{name}.pt", weights_only=True)["shown"]
        assert not set(first) & set(second)
        labelled, bare = part_batches.LABELLED, part_batches.BARE
        assert sorted(index for epoch, index in first + second) == sorted([*range(labelled), *range(labelled + bare)])
    for name in ("student", "paraphraser", "cached"):
        shown = torch.load(two / f"{name}.pt", weights_only=True)["shown"]
        assert len(shown) == 2
        assert not set(shown[0]) & set(shown[1])
        assert sorted(shown[0] + shown[1]) == [
            (epoch, index) for epoch in range(2) for index in range(part_batches.IMAGES)
        ]


@pytest.mark.slow
def test_two_processes__are_one_in_float32_to_a_tolerance(two: Path, tmp_path: Path, engine: Engine) -> None:
    """After 50 steps the weights agree to 1e-4, where the largest is about 1."""
    one, other = both("float32", two, tmp_path, engine)
    assert one["losses"].shape == (50,)
    assert one["gradients"].dtype == torch.float32
    assert distance(one["weights"], other["weights"]) < 1e-4


@pytest.mark.slow
def test_two_processes__with_batch_norm_equal_the_part_batches_as_separate_forwards(
    two: Path, tmp_path: Path, engine: Engine
) -> None:
    """In one process: each part by itself, weighted by its share; the statistics are the mean of the parts'."""
    made = part_batches.trainer("batch_norm", tmp_path / "one", engine)
    task, module = made.objective.train(), made.module
    losses = []
    for epoch in range(2):
        order = permutation(0, epoch, len(made.train))
        for number, chunk in enumerate(training_chunks(order, 99)):
            made.optimizer.zero_grad()
            before = [buffer.clone() for buffer in module.buffers()]
            after, loss = [], 0.0
            for batch in made.train.batches(np.array_split(chunk, 2), view=epoch):
                for buffer, value in zip(module.buffers(), before, strict=True):
                    buffer.copy_(value)
                part = task(batch.image, batch.label, batch.index, epoch)["loss"] * len(batch.label) / len(chunk)
                part.backward()
                loss += float(part.detach())
                after.append([buffer.clone() for buffer in module.buffers()])
            made.optimizer.step()
            made.scheduler.step_update(epoch * made.steps + number + 1)
            for buffer, *values in zip(module.buffers(), *after, strict=True):
                buffer.copy_((values[0] + values[1]) / 2)
            losses.append(loss)
        made.scheduler.step(epoch + 1)
    other = torch.load(two / "batch_norm.pt", weights_only=True)
    assert float((torch.tensor(losses, dtype=torch.float64) - other["losses"]).abs().max()) < 1e-10
    assert distance(dict(module.state_dict()), other["weights"]) < 1e-10


@pytest.mark.slow
def test_two_processes__decide_alike_on_what_one_of_them_met(two: Path) -> None:
    skips, stops = (torch.load(two / f"{name}.pt", weights_only=True) for name in ("skips", "stops"))
    assert skips["skipped"] == [1, 1]
    assert skips["errors"] == ["", ""]
    assert stops["skipped"] == [10, 10]
    for error in stops["errors"]:
        # The fifth forward is that of step 4: one before training finds the weights that no gradient reaches.
        assert "pass 3, step 4, the last of 11 in a row: the faulty, first in terms.faulty" in error
    for found in (skips, stops):
        assert len(set(found["fingerprints"])) == 1


def test_sync_bn__is_refused_on_the_cpu_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="(?s)--sync-bn.*on GPUs only.*its own part"):
        Engine("cpu", sync_bn=True)


ALONE = """
import sys, time
from pathlib import Path
import timm, torch
import factor_transfer.zoo
from factor_transfer import distillation
from factor_transfer.distillation import distill

small, limit = {"layers": (1, 1, 1), "channels": (4, 4, 8)}, 0.2
real = distillation.write_report

def slow(*arguments):
    time.sleep(1.4 * 60 * limit)
    return real(*arguments)

distillation.write_report = slow
torch.manual_seed(0)
teacher = timm.create_model("cifar_resnet20", **small, num_classes=0)
found = distill(teacher, "cifar_resnet20", sys.argv[1], student_args=small, label_weight=0.0, epochs=2, device="cpu",
                paraphraser_epochs=1, batch_size=12, lr=0.05, weight_decay=0.1, out="run", timeout_minutes=limit,
                workers=0, class_map="classes.txt", precision="fp32")
Path(f"returned-{sys.argv[2]}-" + __import__("os").environ.get("RANK", "0")).touch()
"""
"""Two passes without labels, and a report that takes longer than a process waits for another."""


@pytest.mark.slow
def test_torchrun__without_labels_and_with_a_report_longer_than_the_timeout(images: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(ALONE)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    flat = tmp_path / "flat"
    flat.mkdir()
    for place, path in enumerate(sorted((images / "train").rglob("*.png"))):
        shutil.copy(path, flat / f"{place}.png")
    done = Started([*TWO, "alone.py", flat, "two"], code=TORCHRUN, cwd=tmp_path, forks=True).finished(BOUND)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("returned-*")} == {"returned-two-0", "returned-two-1"}
    assert (tmp_path / "run" / "report.html").exists()
    state = load_file(tmp_path / "run" / "student.safetensors")
    first = load_network("cifar_resnet20", role="student", num_classes=2, img_size=16, args=SMALL)
    for name in ("linear.weight", "linear.bias"):  # decayed by nothing, since no gradient came
        assert torch.equal(state[name], first.module.state_dict()[name])


@pytest.mark.parametrize(
    ("ends", "said"), [("raise ValueError", "process 1 failed"), ("os._exit(3)", "no sign of life")]
)
def test_unhurried__a_process_that_fails_or_dies_is_told_of(tmp_path: Path, ends: str, said: str) -> None:
    code = (
        "import os, sys\nfrom datetime import timedelta\nimport torch.distributed as dist\n"
        "from factor_transfer.training.processes import unhurried\n"
        "rank = int(sys.argv[1])\n"
        "store = dist.TCPStore('localhost', int(sys.argv[2]), 2, rank == 0, timedelta(seconds=60))\n"
        "dist.init_process_group('gloo', store=store, rank=rank, world_size=2)\n"
        f"with unhurried(rank, 2, 3.0):\n    if rank == 1:\n        {ends}\n"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [Started([rank, port], code=code, cwd=tmp_path) for rank in range(2)]
    told = [process.finished(BOUND) for process in processes]
    assert all(done.returncode for done in told)
    assert "process 0 of 2 has lost another one" in told[0].stderr
    assert said in told[0].stderr


# -- the whole job under torchrun

JOB = [
    "distill", "--data", "digits", "--teacher", "cifar_resnet20", "--student", "cifar_resnet20_b",
    "--teacher-args", "layers=(1,1,1)", "channels=(8,16,32)", "--student-args", "layers=(1,1,1)", "channels=(4,8,16)",
    "--teacher-epochs", "4", "--factor-form", "slim", "--factor-width", "8", "--epochs", "3", "--batch-size", "64",
    "--lr", "0.05",
    "--threads", "1", "--device", "cpu", "--precision", "fp32", "--out", "run",
]  # fmt: skip
OFTEN = ["--checkpoint-minutes", "0.0001"]
BOUND = 150
"""Seconds; on a machine with other work to do the processes start slowly. What is tested ends by itself, or never."""


def launch(folder: Path, *more: str, code: str = TORCHRUN, how: Sequence[str] = TWO, **environ: str) -> Started:
    """The job on two processes."""
    arguments = [*how, "-m", "factor_transfer", *JOB, *more]
    return Started(arguments, code=code, cwd=folder, environment=environ, forks=True, exports=False)


def process_of_rank(folder: Path, rank: int) -> int:
    """The process id of a rank of the run whose working folder this is."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            named = (entry / "comm").read_text().strip() == f"rank {rank}"
            if named and (entry / "cwd").resolve() == folder.resolve():
                return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


def wait_for(folder: Path, pattern: str, *processes: Started) -> None:
    deadline = time.monotonic() + BOUND
    while not list((folder / "run").glob(pattern)):
        for process in processes:
            assert process.running(), process.finished().stderr
        assert time.monotonic() < deadline, pattern
        time.sleep(0.02)


def left(process: Started, code: int | None = None) -> str:
    """What a launcher said, which ends within bounds; with an error, unless `code` is 0."""
    done = process.finished(BOUND)
    assert done.returncode == code or (code is None and done.returncode), done.stderr
    return done.stderr


PASSES = [("teacher", epoch) for epoch in range(1, 5)] + [("student", epoch) for epoch in range(1, 4)]


def passes(folder: Path) -> list[tuple[str, int]]:
    """Of all stages but the paraphraser's, which ends when its error falls no more."""
    found = [(row["stage"], row["epoch"]) for row in Run(folder / "run").metrics()]
    paraphraser = [epoch for stage, epoch in found if stage == "paraphraser"]
    assert paraphraser == list(range(1, len(paraphraser) + 1))
    return [each for each in found if each[0] != "paraphraser"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs, on two processes."""
    folder = tmp_path_factory.mktemp("straight")
    left(launch(folder), code=0)
    assert passes(folder) == PASSES
    return folder


@pytest.mark.slow
def test_torchrun__a_signal_to_any_process_saves_and_one_process_continues(straight: Path, tmp_path: Path) -> None:
    run = launch(tmp_path)
    wait_for(tmp_path, "checkpoints/student-000001-*.pt", run)
    os.kill(process_of_rank(tmp_path, 1), signal.SIGTERM)
    said = left(run)
    assert said.count("stopped by SIGTERM; the same command continues") == 2
    saved = sorted((tmp_path / "run/checkpoints").glob("*.pt"))[-1].name
    assert saved > "student-000001-00000000.pt", "the step under way was saved, not only the pass before it"
    again = Started(JOB, cwd=tmp_path, exports=False).finished(BOUND)
    assert again.returncode == 0, again.stderr
    assert "student: continued after 1 passes" in again.stderr
    assert "processes 2 -> 1" in again.stderr
    assert passes(tmp_path) == PASSES
    one, two = bits(tmp_path / "run"), bits(straight / "run")
    assert one["paraphraser.safetensors"] == two["paraphraser.safetensors"], "up to the signal both were the same"
    assert one["student.safetensors"] != two["student.safetensors"], "batch norm saw other parts"
    rows = [json.loads((folder / "run/summary.json").read_text())["student"] for folder in (tmp_path, straight)]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=0.3)
    spent = [json.loads((folder / "run/summary.json").read_text())["compute"] for folder in (tmp_path, straight)]
    assert spent[0]["student"] == spent[1]["student"] > spent[0]["baseline"], "images of all processes, each once"
    trained = {stage: each["images"]["trained"] for stage, each in spent[1]["stages"].items()}
    assert trained["student"] == 3 * trained["teacher"] / 4
    maps = spent[1]["stages"]["paraphraser"]["images"]
    assert maps["teacher"] == 2 * 1024, "each process makes all maps"
    assert maps["trained"] % 1024 == 0


@pytest.mark.slow
def test_torchrun__a_process_that_dies_ends_the_run_and_the_same_command_continues(
    straight: Path, tmp_path: Path
) -> None:
    run = launch(tmp_path, *OFTEN)
    wait_for(tmp_path, "checkpoints/student-000001-*5.pt", run)
    os.kill(process_of_rank(tmp_path, 1), signal.SIGKILL)
    said = left(run)
    assert "process 0 of 2 has lost another one" in said
    assert "the same command continues" in said
    left(launch(tmp_path), code=0)
    assert passes(tmp_path) == PASSES
    assert bits(tmp_path / "run") == bits(straight / "run")


ACCELERATE = "from accelerate.commands.launch import main; main()"


@pytest.mark.slow
def test_accelerate_launch__gives_the_bits_of_torchrun(straight: Path, tmp_path: Path) -> None:
    """Started as a user starts it: launcher and processes import all that they need."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, "-m", "factor_transfer", *JOB],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=BOUND, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "run/environment.json")["processes"] == 2
    assert passes(tmp_path) == PASSES
    assert bits(tmp_path / "run") == bits(straight / "run")


@pytest.mark.slow
def test_accelerate_launch__that_starts_one_process_for_two_is_refused(tmp_path: Path) -> None:
    said = left(launch(tmp_path, code=ACCELERATE, how=["--num_processes", "2", "--cpu"], HF_HOME=str(tmp_path)))
    assert "found: one process" in said
    assert "accelerate launch --multi_gpu --num_processes N" in said
    assert not (tmp_path / "run/config.json").exists()


IN_HOST = f"""
import ctypes, os, sys
host, os.environ["GLOO_SOCKET_IFNAME"] = sys.argv.pop(1), sys.argv.pop(1)
assert not ctypes.CDLL(None).setns(os.open(f"/var/run/netns/{{host}}", os.O_RDONLY), 0x40000000), "as `ip netns exec`"
{TORCHRUN}
"""


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """Two network namespaces, joined by a veth pair: what `IN_HOST` is told in each, in order of rank."""
    ip, name = shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin"), f"ft{os.getpid() % 100000}"
    if ip is None:
        pytest.skip("no `ip` (iproute2) on this machine")

    def do(*words: str) -> None:
        subprocess.run([str(ip), *words], check=True, capture_output=True, text=True)

    ends = [(f"{name}h{place}", f"v{name}{place}", f"10.77.0.{place + 1}") for place in range(2)]
    try:
        try:
            for host, _, _ in ends:
                do("netns", "add", host)
            do("link", "add", ends[0][1], "netns", ends[0][0], "type", "veth", "peer", "name", ends[1][1], "netns",
               ends[1][0])  # fmt: skip
            for host, link, address in ends:
                do("-n", host, "address", "add", f"{address}/24", "dev", link)
                do("-n", host, "link", "set", link, "up")
                do("-n", host, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield [
            [host, link, "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(place), "--master-addr",
             ends[0][2], "--master-port", "29511"]
            for place, (host, link, _) in enumerate(ends)
        ]  # fmt: skip
    finally:
        for host, _, _ in ends:
            with contextlib.suppress(subprocess.CalledProcessError):
                do("netns", "delete", host)


@pytest.mark.slow
def test_two_hosts__compute_the_same_and_one_that_vanishes_ends_the_other(
    hosts: list[list[str]], straight: Path, tmp_path: Path
) -> None:
    """A host that loses its power says no goodbye: its cable is cut before its processes are killed."""
    ip = shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin")
    runs = [launch(tmp_path, *OFTEN, "--timeout-minutes", "0.4", code=IN_HOST, how=how) for how in hosts]
    wait_for(tmp_path, "checkpoints/student-000001-*5.pt", *runs)
    host, link = hosts[1][:2]
    subprocess.run([str(ip), "-n", host, "link", "set", link, "down"], check=True)
    os.kill(process_of_rank(tmp_path, 1), signal.SIGKILL)
    runs[1].send_signal(signal.SIGKILL)
    said = left(runs[0])
    assert "process 0 of 2 has lost another one" in said
    runs[1].finished()
    subprocess.run([str(ip), "-n", host, "link", "set", link, "up"], check=True)
    for run in [launch(tmp_path, code=IN_HOST, how=how) for how in hosts]:
        left(run, code=0)
    assert passes(tmp_path) == PASSES
    assert bits(tmp_path / "run") == bits(straight / "run")
