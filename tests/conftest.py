"""What tests share: the real material beside the project, a small folder of images, and the command itself.

What takes seconds to import is imported where it is used: the process that hands the tests out needs none of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from processes import Command, Started, leave_out

if TYPE_CHECKING:
    import torch

    from browser import Page

ROOT = Path(__file__).parent.parent


LONGEST = [
    "test_distributed", "test_torchvisions", "test_real", "test_quickstart", "test_compare", "test_shipping",
    "test_distillation", "test_terms", "test_compiled", "test_crash", "test_pairs", "test_docs", "test_kinds",
    "test_cache", "test_content", "test_machines", "test_doctor", "test_data", "test_cuda_fake", "test_kernels",
    "test_cli", "test_recipes", "test_zoo", "test_suggest", "test_orders", "test_suite", "test_resume", "test_train",
    "test_features", "test_layers", "test_identity",
]  # fmt: skip
"""Modules that take long, the longest first: begun last, one would leave all processes but its own without work."""


def pytest_configure(config: pytest.Config) -> None:
    """Prepare a process that runs tests."""
    if config.getoption("numprocesses", None):
        return  # its workers do
    import torch

    import digits  # noqa: F401 (which reads them once)
    from factor_transfer.networks.kernels import guard

    guard()  # tests train without an `Engine`, too
    torch.set_num_threads(1)  # the networks here are so small that a second thread costs more than it gives


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest modules."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str) -> None:
    """End the suite at once where a worker died, of a memory fault for instance."""
    pytest.exit(f"a worker died while running {crashitem}", returncode=1)


@pytest.fixture(scope="session", autouse=True)
def _heeds_interrupts() -> None:
    """What tests start heeds SIGINT, which background jobs of a script, and so their children, ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images and factors of tests are kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real images, trained weights and golden numbers."""
    where = os.environ.get("FACTOR_TRANSFER_SHARED")
    if not where:
        pytest.skip("FACTOR_TRANSFER_SHARED is not set: it names the folder of real images and weights")
    return Path(where)


@pytest.fixture(scope="session")
def cifar10_files(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real JPEG files, 50 of each class of CIFAR-10 to train and 100 to validate."""
    folder = tmp_path_factory.mktemp("cifar10")
    for split, each in (("train", 50), ("validation", 100)):
        with tarfile.open(shared / "cifar10-jpeg" / f"{split}.tar") as tar:
            counts: Counter[str] = Counter()
            members = []
            for member in tar:
                name = Path(member.name).parent.name
                if member.isfile() and counts[name] < each:
                    counts[name] += 1
                    members.append(member)
            tar.extractall(folder / split, members, filter="data")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    """Numbers computed with the authors' own modules."""
    from safetensors.torch import load_file

    return load_file(shared / "golden" / "reference.safetensors")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of real headless Chromium."""
    import browser

    if browser.CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with browser.browser() as opened:
        yield opened


@pytest.fixture(scope="session")
def factor_transfer() -> Command:
    """Run the command in a process of its own: `factor_transfer("distill", "--data", ...)`."""

    def run(*arguments: object, timeout: float = 300, **how: Any) -> subprocess.CompletedProcess[str]:
        return Started(arguments, **how).finished(timeout)

    return run


@pytest.fixture(scope="session")
def python() -> Command:
    """Run a piece of code in a process of its own, in which the package is imported already."""

    def run(code: str, *, cwd: Path | None = None, timeout: float = 300, **environment: str) -> Any:
        return Started([], code=code, cwd=cwd, environment=environment).finished(timeout)

    return run


@pytest.fixture
def unexported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process leave no student.pt2 and no report: see `leave_out`."""
    leave_out(monkeypatch.setattr)


@pytest.fixture
def answered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are proved in this process, by the same code as in a fresh one, which imports for seconds."""
    from factor_transfer.export import runtimes, shipping

    monkeypatch.setattr(shipping, "_fresh", lambda request: runtimes.answer({**request, "without": []}))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 16x16 PNG files in train/ and validation/, in three classes that differ in colour."""
    return make_images(tmp_path / "images")


@pytest.fixture(scope="session")
def image_folder() -> Callable[..., Path]:
    """Makes such folders."""
    return make_images


def make_images(folder: Path, *, classes: int = 3, train: int = 12, validation: int = 6, side: int = 16) -> Path:
    """Write noisy images whose class shows in their colour."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        for place in range(classes):
            where = folder / split / f"class{place}"
            where.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = random.integers(0, 120, (side, side, 3))
                pixels[..., place % 3] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(where / f"{number:03}.png")
    return folder
