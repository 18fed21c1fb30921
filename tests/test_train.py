"""The one loop: the authors' learning rates, images counted once, and a stop that loses nothing."""

from __future__ import annotations

import copy
import ctypes
import math
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

from factor_transfer.config import Config, DataConfig
from factor_transfer.data.dataset import Dataset, open_data
from factor_transfer.method.factor_transfer import Translator
from factor_transfer.method.losses import FactorTransfer, Labels, Term
from factor_transfer.networks.features import Tapped
from factor_transfer.networks.load import load_network
from factor_transfer.tasks.classification import Classification
from factor_transfer.training.engine import Engine, stop_signals
from factor_transfer.training.evaluation import evaluate
from factor_transfer.training.run_folder import Run
from factor_transfer.training.schedule import Plan, optimizer_and_schedule
from factor_transfer.training.step import DistillationTask
from factor_transfer.training.trainer import Trainer, training_chunks
from factor_transfer.util.errors import ConfigError, Interrupted, RunError, TrainingError
from factor_transfer.util.seeds import part_seed, seeded
from processes import Command


def config(**changed: Any) -> Config:
    return Config(**{"teacher": "t", "student": "s", "data": "digits", "device": "cpu", **changed})


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("cpu", "fp32")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_data(DataConfig(data="digits"), default_size=lambda: 8)


def rates(epochs: int, steps: int, **changed: Any) -> list[float]:
    """The learning rate of each pass's first step, as the trainer drives the schedule."""
    plan = Plan(stage="student", epochs=epochs, lr=0.1, seed=0)
    optimizer, scheduler = optimizer_and_schedule(nn.Linear(2, 2), plan, config(epochs=epochs, **changed), steps)
    found = []
    for epoch in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        for step in range(steps):
            scheduler.step_update(epoch * steps + step + 1)
        scheduler.step(epoch + 1)
    return found


@pytest.mark.parametrize("on_updates", [False, True])
def test_schedule__drops_after_82_and_123_passes_as_the_authors(on_updates: bool) -> None:
    found = rates(164, 3, sched="multistep", decay_milestones=(83, 124), sched_on_updates=on_updates)
    wanted = [0.1] * 82 + [0.01] * 41 + [0.001] * 41
    assert found == pytest.approx(wanted)


def test_schedule__cosine_falls_to_its_floor_and_warm_up_rises() -> None:
    found = rates(10, 5, sched="cosine", warmup_epochs=2, warmup_lr=0.001, min_lr=0.01)
    assert found[0] == pytest.approx(0.001)
    assert found[2] == pytest.approx(max(found), rel=0.1)
    assert found[2:] == sorted(found[2:], reverse=True)
    assert found[-1] < 0.02


def test_optimizer__is_the_authors_plain_momentum_with_decay_on_everything() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    plan = Plan(stage="student", epochs=1, lr=0.1, seed=0)
    optimizer, _ = optimizer_and_schedule(module, plan, config(), 1)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 4
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 5e-4)


def test_optimizer__names_what_timm_does_not_know() -> None:
    plan = Plan(stage="student", epochs=1, lr=0.1, seed=0)
    with pytest.raises(ConfigError, match="(?s)--opt momentun.*momentum"):
        optimizer_and_schedule(nn.Linear(2, 2), plan, config(opt="momentun"), 1)
    with pytest.raises(ConfigError, match="(?s)--sched cosin.*cosine"):
        optimizer_and_schedule(nn.Linear(2, 2), plan, config(sched="cosin"), 1)


@pytest.mark.parametrize("batch_size", [1000, 128, 7])
def test_evaluate__counts_each_image_once(digits: Dataset, engine: Engine, batch_size: int) -> None:
    weight = torch.randn(10, 192, generator=torch.Generator().manual_seed(0)) / 100

    class Linear(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().flatten(1) @ weight.T

    found = evaluate(Linear(), digits.validation, engine, Classification(), batch_size=batch_size)
    (batch,) = digits.validation.batches([np.arange(len(digits.validation))], view=None)
    logits = Linear()(batch.image)
    assert found["top1"] == pytest.approx(100 * (logits.argmax(1) == batch.label).float().mean().item(), abs=1e-4)
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(logits, batch.label).item(), rel=1e-5)


def trainer(
    data: Dataset, engine: Engine, folder: Path, epochs: int = 2, terms: Sequence[Term] = (Labels(),), **changed: Any
) -> Trainer:
    settings = config(batch_size=100, **changed)
    network = load_network(
        "cifar_resnet20",
        role="student",
        num_classes=10,
        img_size=8,
        args={"layers": (1, 1, 1), "channels": (4, 4, 8), "drop_rate": 0.2},
    )
    task = DistillationTask(Tapped(network.module, "layer3"), network.norm, terms)
    plan = Plan(stage="student", epochs=epochs, lr=settings.lr, seed=0, average=settings.model_ema)
    folder.mkdir(exist_ok=True)
    return Trainer(task, plan, data.train, engine, settings, Run(folder), data.validation)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.objective.trained().state_dict().items()}


def test_trainer__measures_every_few_passes_and_after_the_last_one(
    digits: Dataset, engine: Engine, tmp_path: Path
) -> None:
    often = trainer(digits, engine, tmp_path / "often", epochs=3)
    seldom = trainer(digits, engine, tmp_path / "seldom", epochs=3, val_interval=2)
    often.fit()
    seldom.fit()
    measured = [row["epoch"] for row in seldom.run.metrics("student") if "validation_top1" in row]
    assert measured == [2, 3]
    assert often.run.metrics("student")[1].keys() == seldom.run.metrics("student")[1].keys()
    assert all(torch.equal(value, weights(often)[name]) for name, value in weights(seldom).items())


@pytest.mark.parametrize("changed", [{}, {"model_ema": True}, {"opt": "adamw", "lr": 0.01}, {"clip_grad": 0.1}])
def test_trainer__resumes_to_the_same_bits_wherever_it_is_stopped(
    digits: Dataset, engine: Engine, tmp_path: Path, changed: dict[str, Any]
) -> None:
    """With dropout: the noise inside layers is addressed by step, too."""
    straight = trainer(digits, engine, tmp_path / "a", **changed)
    straight.fit()
    stops = [3, 13, 14]  # steps counted over both passes of 13

    class StopError(Exception):
        pass

    for stop in stops:
        cut = trainer(digits, engine, tmp_path / "b", checkpoint_minutes=1e-9, **changed)
        step = cut.step

        def until(batch: Any, size: int, view: int, step: Any = step, cut: Trainer = cut, stop: int = stop) -> Any:
            if cut.progress.epoch * 13 + cut.progress.step == stop:
                raise StopError
            return step(batch, size, view)

        cut.step = until  # type: ignore[method-assign]
        torch.manual_seed(stop)  # whatever others drew in between
        with pytest.raises(StopError):
            cut.fit()
    last = trainer(digits, engine, tmp_path / "b", **changed)
    assert (last.progress.epoch, last.progress.step) == (1, 1)
    last.fit()
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(last)[name]), name
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in Run(tmp_path / n).metrics()] for n in "ab"]
    assert rows[0] == rows[1]
    assert [row["epoch"] for row in rows[0]] == [1, 2]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as at a terminal: a shell's background job, such as a test run may be, starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_trainer__a_signal_ends_the_step_saves_and_leaves(
    digits: Dataset, engine: Engine, tmp_path: Path, signum: signal.Signals
) -> None:
    cut = trainer(digits, engine, tmp_path)
    step = cut.step

    def interrupted(batch: Any, size: int, view: int) -> Any:
        if cut.progress.step == 4:
            os.kill(os.getpid(), signum)
        return step(batch, size, view)

    cut.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(Interrupted) as stopped:
        cut.fit()
    assert stopped.value.code == 128 + signum
    assert trainer(digits, engine, tmp_path).progress.step == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_stop_signals__what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.signum
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_stop_signals__a_second_one_acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factor_transfer.training.engine.SAME_SIGNAL_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt), stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_trainer__a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    digits: Dataset, engine: Engine, tmp_path: Path
) -> None:
    good = trainer(digits, engine, tmp_path, epochs=1)
    good.fit()
    bad = trainer(digits, engine, tmp_path, epochs=3)
    with torch.no_grad():
        next(bad.module.parameters()).fill_(float("nan"))
    wanted = (
        "(?s)pass 2, step 11, the last of 11 in a row: the cross_entropy, first in student.module.conv1;.*--lr.*fp32"
    )
    with pytest.raises(TrainingError, match=wanted):
        bad.fit()
    again = trainer(digits, engine, tmp_path, epochs=3)
    assert again.progress.epoch == 1
    for name, value in weights(good).items():
        assert torch.equal(value, weights(again)[name]), name


class Faulty(Term):
    """Adds nothing to the loss, but in some steps something that is not finite to it or to its gradient."""

    name = "faulty"

    def __init__(self, loss: set[int], gradient: set[int]) -> None:
        super().__init__()
        self.loss, self.gradient, self.calls = loss, gradient, 0

    def forward(self, student: Any, teacher: Any, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        none = 0 * student.logits.sum()
        return none.sqrt() if self.calls in self.gradient else none * (math.nan if self.calls in self.loss else 1)


def state(trainer: Trainer) -> list[Any]:
    average = trainer.objective.get_trainable_module(ema=True)
    found = [trainer.module.state_dict(), average.state_dict(), trainer.optimizer.state_dict()["state"]]
    return tree_leaves(copy.deepcopy(found))


def test_trainer__a_step_that_is_not_finite_leaves_no_trace_and_is_counted(
    digits: Dataset, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(digits, engine, tmp_path, epochs=1, model_ema=True, terms=[Labels(), Faulty({4, 5}, {8})])
    step, skipped = made.step, []

    def watched(batch: Any, size: int, view: int) -> Any:
        before = state(made)
        values = step(batch, size, view)
        after = state(made)
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        assert same is (values is None)
        if values is None:
            skipped.append(made.progress.step + 1)
        return values

    made.step = watched  # type: ignore[method-assign]
    made.fit()
    assert skipped == [4, 5, 8]
    (row,) = Run(tmp_path).metrics()
    assert row["skipped_steps"] == 3
    assert math.isfinite(row["loss"])
    assert made.progress.record()["skipped_steps"] == 3
    said = capsys.readouterr().err
    assert "faulty not finite in pass 1, step 4; the step is skipped" in said
    assert "gradient not finite in pass 1, step 8; the step is skipped" in said


def test_trainer__a_gradient_that_stays_not_finite_stops_with_its_layer(
    digits: Dataset, engine: Engine, tmp_path: Path
) -> None:
    terms = [Labels(), Faulty(set(), set(range(3, 99)))]
    made = trainer(digits, engine, tmp_path, terms=terms, max_skipped=4, checkpoint_minutes=1e-9)
    with pytest.raises(TrainingError, match="step 7, the last of 5 in a row: the gradient, first in student.module"):
        made.fit()
    kept = trainer(digits, engine, tmp_path)  # a checkpoint of before the trouble, and none of within it
    assert (kept.progress.step, kept.progress.in_a_row) == (2, 0)


def test_trainer__says_that_a_translator_is_dead(
    digits: Dataset, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Follow(FactorTransfer):
        def __init__(self, translator: Translator, beta: float) -> None:
            super().__init__(translator, beta)
            self.needs = frozenset()

        def forward(self, student: Any, teacher: Any, labels: torch.Tensor) -> torch.Tensor:
            return super().forward(student, {"factor": student.feature.detach()}, labels)

    for dead in (True, False):
        translator = Translator(8, 8)
        if dead:
            translator.conv2.weight.data.zero_()
        made = trainer(digits, engine, tmp_path / str(dead), epochs=1, lr=1e-9, terms=[Follow(translator, 10.0)])
        made.fit()
        assert ("the translator is dead: its output is nearly the same" in capsys.readouterr().err) is dead
        assert (Run(tmp_path / str(dead)).metrics()[0]["factor_variety"] < 1e-6) is dead


def test_trainer__a_checkpoint_of_something_else_is_named(digits: Dataset, engine: Engine, tmp_path: Path) -> None:
    whole = {"progress": {"epoch": 1}, "module": {}, "ema": None, "optimizer": {}}
    for changed in ({}, {"progress": {"epoc": 1}}, {"module": {"a": torch.zeros(1)}}, {"optimizer": 3}):
        Run(tmp_path).save_checkpoint("student", 1, 0, whole | changed)
        with pytest.raises(RunError, match="(?s)checkpoints.*something else.*student-"):
            trainer(digits, engine, tmp_path)


def test_trainer__weights_that_are_not_finite_are_never_saved(digits: Dataset, engine: Engine, tmp_path: Path) -> None:
    """A last step can ruin them although every loss and gradient was finite."""
    bad = trainer(digits, engine, tmp_path, epochs=1)
    step = bad.optimizer.step

    def ruin(*arguments: Any) -> Any:
        step(*arguments)
        if bad.progress.step == bad.steps - 1:
            next(bad.module.parameters()).data[0] = float("inf")

    bad.optimizer.step = ruin  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="not finite in pass 1"):
        bad.fit()
    assert Run(tmp_path).load_checkpoint("student") is None


@pytest.mark.parametrize(
    ("images", "size", "last"),
    [(1258, 100, [100, 58]), (1258, 64, [64, 42]), (2515, 1257, [1257, 629, 629]), (10, 128, [10]), (5, 2, [2, 3])],
)
def test_training_chunks__a_small_rest_shares_with_the_batch_before(images: int, size: int, last: list[int]) -> None:
    """Batch norm cannot train on one image, and every process needs two."""
    parts = training_chunks(np.arange(images), size)
    assert [len(part) for part in parts][-len(last) :] == last
    assert np.array_equal(np.concatenate(parts), np.arange(images))


def test_optimizer__of_second_order_is_refused() -> None:
    plan = Plan(stage="student", epochs=1, lr=0.1, seed=0)
    with pytest.raises(ConfigError, match="--opt adahessian"):
        optimizer_and_schedule(nn.Linear(2, 2), plan, config(opt="adahessian"), 1)


def test_engine__precision_is_ours_whatever_accelerates_environment_says(python: Command) -> None:
    script = "from factor_transfer.training.engine import Engine; print(Engine('cpu').accelerator.mixed_precision)"
    done = python(script, ACCELERATE_MIXED_PRECISION="bf16")
    assert done.stdout.split() == ["no"]


def test_keep_memory__keeps_freed_memory_for_the_next_step(python: Command) -> None:
    program = """
import resource, torch
from factor_transfer.util.machine import keep_memory
keep_memory()
faults = []
for turn in range(20):
    torch.ones(2**24)  # 64 MB, freed at once
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[9])
"""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this C library is not glibc")
    assert int(python(program).stdout) < 5 * 16_384  # ten times as many pages were handed out


def test_seeds__are_addressed_and_give_the_state_back() -> None:
    assert part_seed(0, "a", 1) != part_seed(0, "a1") != part_seed(0, "a", "1")
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1):
        torch.rand(100)
    assert torch.equal(torch.rand(3), wanted)


@given(st.integers(2, 4), st.integers(1, 3), st.integers(8, 300), st.integers(0, 99))
def test_shard__by_host_gives_each_sample_to_one_process_and_keeps_it_at_home(
    hosts: int, each: int, size: int, seed: int
) -> None:
    chunk = np.random.default_rng(seed).permutation(1000)[:size]
    engine = Engine("cpu")
    engine.hosts, engine.processes = hosts, hosts * each
    parts = []
    for rank in range(engine.processes):
        engine.rank = rank
        parts.append(engine.shard(chunk, by_host=True))
    assert sorted(np.concatenate(parts).tolist()) == sorted(chunk.tolist())
    counts = np.bincount(chunk % hosts, minlength=hosts)
    if counts.min() >= 2 * each:
        assert all(sample % hosts == rank // each for rank, part in enumerate(parts) for sample in part)
