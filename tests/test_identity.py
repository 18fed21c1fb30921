"""What computes something else has another hash, and what computes the same has the same one in another process."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from factor_transfer.method.losses import Reader
from factor_transfer.util import identity
from factor_transfer.util.identity import code_fingerprint

SCALE = 2.0
logger = logging.getLogger(__name__)
environ = os.environ


def helper(x: Any) -> Any:
    return x * SCALE


class Net(nn.Module):
    slope = 0.1

    def __init__(self, act: nn.Module | None = None, **more: Any) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), act or nn.ReLU()
        vars(self).update(more)

    def forward(self, x: Tensor) -> Tensor:
        """Through a function of this module."""
        found: Tensor = self.act(self.conv(helper(x))) * self.slope
        return found


class Root(Reader):
    def __init__(self, power: float) -> None:
        super().__init__("layer", (2, 2))
        self.power = power


class Rarely:
    def __init__(self, p: float, inner: Any = None) -> None:
        self.p, self.inner = p, inner

    def __call__(self, image: Any) -> Any:
        return self.inner(image) if random.random() < self.p else image


def looped(net: Net) -> Net:
    vars(net)["me"] = [net]
    return net


def family(*names: str) -> Net:
    """A parent, whose children are a set that each of them leads back to."""
    parent = Net()
    children = {Rarely(0.1, (name, parent)) for name in names}
    vars(parent)["children"] = children
    return parent


SAME = {
    "network": Net,
    "timm": lambda: timm.create_model("resnet18", num_classes=5),
    "loop": lambda: looped(Net()),
    "transform": lambda: v2.Compose([v2.RandomErasing(0.02), v2.ColorJitter(0.1)]),
    "closure": lambda: functools.partial(lambda power, image: image**power, 2),
    "set": lambda: family("one"),
    "larger set": lambda: family(*"abcdefghijkl"),
    "classes": lambda: Net(kinds={Net, Rarely, Root, nn.ReLU, nn.GELU, 1, "two", frozenset({Net, Root})}),
    "chain": lambda: functools.reduce(lambda inner, _: Rarely(0.1, inner), range(5000), None),
    "weights": lambda: Net().double().train(random.random() < 0.5),
}


@pytest.mark.parametrize("name", SAME)
def test_code_fingerprint__is_the_same_of_the_same(name: str) -> None:
    assert code_fingerprint(SAME[name]()) == code_fingerprint(SAME[name]())


def patched(name: str, value: Any) -> Any:
    """A network under which a global of this module is another one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), name, value)
        return code_fingerprint(Net())


def hooked() -> nn.Module:
    net = Net()
    net.conv.register_forward_hook(lambda _, __, output: output + 1)
    return net


def buffered(value: float) -> nn.Module:
    net = Net()
    net.register_buffer("shift", torch.tensor(value), persistent=False)
    return net


class Other(Net):
    def forward(self, x: Tensor) -> Tensor:
        """As `Net`, but for the helper."""
        found: Tensor = self.act(self.conv(x)) * self.slope
        return found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Net(nn.ReLU()), Net(nn.GELU())),
        (Net(nn.LeakyReLU(0.1)), Net(nn.LeakyReLU(0.2))),
        (Net(power=1), Net(power=2)),
        (Net(act=nn.Identity(), forward=lambda x: x), Net(act=nn.Identity(), forward=lambda x: x + 1)),
        (Net(), Other()),
        (Net(), hooked()),
        (buffered(1), buffered(2)),
        (Root(1.0), Root(0.5)),
        (family("one"), family("other")),
        (family("one", "two"), family("one", "three")),
        (Net(kinds={Net, Root}), Net(kinds={Net, Rarely})),
        (Rarely(0.02), Rarely(0.03)),
        (Rarely(0.02, Rarely(0.5)), Rarely(0.02, Rarely(0.6))),
        (v2.Compose([v2.RandomErasing(0.02)]), v2.Compose([v2.RandomErasing(0.03)])),
        (functools.partial(helper, 1), functools.partial(helper, 2)),
        (timm.create_model("resnet18", act_layer="relu"), timm.create_model("resnet18", act_layer="gelu")),
        (v2.Lambda(lambda x: x), v2.Lambda(lambda x: x + 1)),
    ],
)  # fmt: skip
def test_code_fingerprint__tells_apart_what_computes_otherwise(one: Any, other: Any) -> None:
    assert code_fingerprint(one) != code_fingerprint(other)
    assert code_fingerprint(one, versions=False) != code_fingerprint(other, versions=False)


PAIRS = {  # each on a line of its own, so that nothing but the code tells them apart
    "bytecode": (lambda x: x + 1, lambda x: x - 1),
    "constants": (lambda x: x + 1, lambda x: x + 2),
    "constants of a function within": (lambda x: (y + 1 for y in x), lambda x: (y + 2 for y in x)),
    "names": (lambda x: x.real, lambda x: x.imag),
}


@pytest.mark.parametrize("name", PAIRS)
def test_code_fingerprint__of_what_has_no_source_of_its_own_is_that_of_its_code(name: str) -> None:
    one, other = PAIRS[name]
    assert code_fingerprint(one) != code_fingerprint(other)


def test_code_fingerprint__of_a_function_without_source_is_that_of_its_code() -> None:
    found = []
    for text in ("x + 1", "x - 1", "x + 2"):
        names: dict[str, Any] = {"__name__": "typed_in"}
        exec(f"def f(x): return {text}", names)
        found.append(code_fingerprint(names["f"]))
    assert len(set(found)) == 3


def test_code_fingerprint__follows_functions_and_globals() -> None:
    plain = code_fingerprint(Net())
    assert patched("helper", lambda x: x) != plain
    assert patched("SCALE", 3.0) != plain
    assert patched("SCALE", 2.0) == plain


def logs(x: Any) -> Any:
    logger.warning("%s of %s", x, environ.get("LOCAL_RANK"))
    return x


def test_code_fingerprint__takes_no_notice_of_what_was_logged_and_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = code_fingerprint(logs)
    logs(1)
    logging.getLogger("another one").warning("and more")
    monkeypatch.setenv("LOCAL_RANK", "7")
    assert code_fingerprint(logs) == first
    assert code_fingerprint(logging.getLogger("a")) != code_fingerprint(logging.getLogger("b"))


def test_code_fingerprint__versions_of_libraries_count_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [code_fingerprint(Net(), versions=versions) for versions in (True, False)]
    real = identity._package
    monkeypatch.setattr(identity, "_package", lambda top: "9" if real(top) else None)
    assert code_fingerprint(Net()) != both[0]
    assert code_fingerprint(Net(), versions=False) == both[1]


NET = """
    import torch
    from torch import nn
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.kinds = set("abcdefgh")  # which two processes order alike by a rare chance
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        def forward(self, x):
            return self.body(x)
"""


ELSEWHERE = """
import sys
from factor_transfer.util import identity
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    import nets
    print(identity.code_fingerprint(nets.Net()))
    del sys.modules["nets"], sys.path[0]
"""


def test_code_fingerprint__of_another_process_heeds_code_and_not_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a Python of its own, which has hashes of its own."""
    texts = [NET, NET.replace("return", "# a word\n            return"), NET.replace("(x)", "(x) + 1")]
    folders = [tmp_path / str(place) for place in range(len(texts))]
    for folder, text in zip(folders, texts, strict=True):
        folder.mkdir()
        (folder / "nets.py").write_text(textwrap.dedent(text))
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, folders)], capture_output=True, text=True, check=True
    )
    plain, commented, changed = done.stdout.split()
    monkeypatch.syspath_prepend(str(folders[0]))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    assert code_fingerprint(importlib.import_module("nets").Net()) == plain
    assert commented == plain
    assert changed != plain
