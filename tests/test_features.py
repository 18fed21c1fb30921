"""Taps: the right layer of any network is found, named, and read without leaving a trace."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.models.resnet import ResNet
from torch import Tensor, distributed, nn

import factor_transfer.zoo  # noqa: F401
from factor_transfer.method.losses import align
from factor_transfer.networks.features import FrozenTeacher, Tapped, feature_shape
from factor_transfer.networks.layers import find_layer, follower
from factor_transfer.networks.load import load_network
from factor_transfer.util.errors import ModelError


@pytest.fixture
def network() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=5).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "size", "layer", "shape"),
    [
        ("cifar_resnet20", 32, "layer3", (64, 8, 8)),  # the last of three groups, after its final ReLU
        ("cifar_resnet20_b", 8, "layer3", (64, 2, 2)),
        ("cifar_wrn_16_2", 32, "relu", (128, 8, 8)),  # pre-activation: the last ReLU stands behind the groups
        ("cifar_vgg13", 32, "layer5", (512, 2, 2)),
        ("resnet18", 64, "layer4", (512, 2, 2)),
        ("resnet18", 8, "layer4", (512, 1, 1)),  # one place is all that is left
        ("resnetv2_18", 64, "norm", (512, 2, 2)),
        ("efficientnet_b0", 64, "bn2", (1280, 2, 2)),  # timm's BatchNormAct: norm and activation in one
        ("convnext_atto", 64, "stages", (320, 2, 2)),
        ("torchvision/shufflenet_v2_x0_5", 64, "conv5", (1024, 2, 2)),  # no timm network: the last map that flows
        ("torchvision/resnet18", 64, "layer4", (512, 2, 2)),
        ("test_vit", 160, "norm", (64, 10, 10)),  # tokens of a square image, without the class token
        ("swin_tiny_patch4_window7_224", 224, "norm", (768, 7, 7)),  # channels last
    ],
)
def test_find_layer__finds_the_last_map(name: str, size: int, layer: str, shape: tuple[int, int, int]) -> None:
    module = load_network(name, role="teacher", num_classes=10, img_size=size).module
    images = torch.zeros(2, 3, size, size)
    assert find_layer(module, images) == layer
    assert feature_shape(Tapped(module, layer), images) == shape


class Plain(nn.Module):
    """A user's network, of which timm knows nothing; its pooling and head are modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)
        self.unused = nn.Conv2d(8, 8, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.body(images)).flatten(1))  # type: ignore[no-any-return]


def test_find_layer__needs_no_timm_network() -> None:
    module = Plain().train()
    assert find_layer(module, torch.zeros(2, 3, 8, 8)) == "body"
    assert module.training, "the mode it was in"
    assert not any(part._forward_hooks for part in module.modules()), "no hook is left behind"


def test_find_layer__does_not_touch_batch_norm_statistics() -> None:
    module = Plain()
    before = copy.deepcopy(module.state_dict())
    find_layer(module, torch.randn(4, 3, 8, 8))
    feature_shape(Tapped(module, "body"), torch.randn(4, 3, 8, 8))
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_tapped__gives_the_layers_output_with_its_gradient_and_leaves_no_hook() -> None:
    module = Plain().eval()
    images = torch.randn(2, 3, 8, 8)
    output, feature = Tapped(module, "body")(images)
    torch.testing.assert_close(feature, module.body(images))
    torch.testing.assert_close(output, module(images))
    feature.sum().backward()
    assert module.body[0].weight.grad is not None
    assert not any(part._forward_hooks for part in module.modules())


def test_tapped__the_gradient_of_a_channels_last_map_is_channels_last_too() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    output, feature = Tapped(net.to(memory_format=torch.channels_last), "1")(images)
    (gradient,) = torch.autograd.grad(output.square().sum(), feature)
    expected = (2 * output / 16).detach()[:, :, None, None].expand(2, 8, 4, 4)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert gradient.allclose(expected)


def test_tapped__survives_deepcopy() -> None:
    """An average of weights is a deep copy: it must read its own features."""
    tapped = Tapped(Plain().eval(), "body")
    twin = copy.deepcopy(tapped)
    with torch.no_grad():
        twin.module.body[0].weight.zero_()  # type: ignore[union-attr, operator, index]
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(twin(images)[1], twin.module.body(images))  # type: ignore[operator]
    torch.testing.assert_close(tapped(images)[1], tapped.module.body(images))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("bodi", r"--student-layer bodi\n.*no submodule of that name\n.*body"),
        ("nonsense.at.all", "valid: .*body, pool, head, unused"),
        ("unused", "not used when the network runs"),
        ("head", "shape \\(2, 5\\), which is no feature map"),
    ],
)
def test_tapped__names_a_layer_that_cannot_be_read(layer: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Tapped(Plain(), layer, flag="--student-layer")(torch.zeros(2, 3, 8, 8))


def test_find_layer__says_that_there_is_no_map() -> None:
    with pytest.raises(ModelError, match="no submodule gives a feature map"):
        find_layer(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.zeros(2, 3, 2, 2))


class Branches(nn.Module):
    """Two branches that no module joins, behind a trunk: as an inception block without a class of its own."""

    def __init__(self, joined: str) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.one, self.other = nn.Conv2d(8, 8, 1), nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.head = nn.Linear(16 if joined == "cat" else 8, 5)
        self.joined = joined

    def forward(self, images: Tensor) -> Tensor:
        found = self.trunk(images)
        one, other = self.one(found), self.other(found)
        joined = torch.cat([one, other], 1) if self.joined == "cat" else one + other
        return self.head(joined.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("joined", ["cat", "sum"])
def test_find_layer__takes_no_branch_for_the_last_map(joined: str) -> None:
    module = Branches(joined)
    nn.init.zeros_(module.head.weight)  # whose zeros hide the branches from whoever compares outputs
    assert find_layer(module, torch.zeros(2, 3, 8, 8)) == "trunk"
    assert follower(module, "other", torch.zeros(2, 3, 8, 8)) in {"cat", "add"}, "who names a branch is told"


def test_find_layer__takes_no_head_of_convolutions_for_the_last_map() -> None:
    """As SqueezeNet's: a map of each class, which is pooled."""
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    head = nn.Sequential(nn.Dropout(), nn.Conv2d(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert find_layer(nn.Sequential(body, head), torch.zeros(2, 3, 80, 80)) == "0"


def test_find_layer__a_map_of_one_place_that_is_not_pooled_is_the_last() -> None:
    """As Inception's at 96 pixels: the place that is left is not where a branch before it had several."""
    body = [
        nn.Sequential(nn.Conv2d(width, 8, 3, stride, padding=1), nn.ReLU())
        for width, stride in ((3, 4), (8, 4), (8, 4), (8, 2))
    ]
    module = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(8, 5))
    assert find_layer(module, torch.zeros(2, 3, 96, 96)) == "3"


def test_find_layer__does_not_take_an_attention_matrix_for_a_map() -> None:
    """CrossViT ends in two maps of tokens, 20x20 and 14x14; the last one is taken."""
    module = timm.create_model("crossvit_tiny_240")
    images = torch.zeros(1, 3, 240, 240)
    assert find_layer(module, images) == "norm.1"
    assert feature_shape(Tapped(module, "norm.1"), images) == (192, 14, 14)


def test_align__averages_places() -> None:
    feature = torch.arange(16.0).view(1, 1, 4, 4)
    assert align(feature, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert align(feature, (4, 4)) is feature


def test_tapped__reads_what_is_compiled_and_has_run(network: nn.Module) -> None:
    """A compiled graph knows nothing of hooks that come after it."""
    images = torch.randn(2, 3, 32, 32)
    output, feature = Tapped(network, "layer4")(images)
    for compiled in (torch.compile(network, backend="eager"), copy.deepcopy(network)):
        if isinstance(compiled, ResNet):
            compiled.compile(backend="eager")  # in place: the names stay
        compiled(images)
        layer = find_layer(compiled, images)
        assert layer.removeprefix("_orig_mod.") == "layer4"
        again, found = Tapped(compiled, layer)(images)
        torch.testing.assert_close((again, found), (output, feature))
        found.sum().backward()
        assert compiled.get_submodule(layer)[-1].conv1.weight.grad is not None


def test_tapped__reads_what_is_behind_distributed_data_parallel(network: nn.Module, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    wanted = Tapped(network, "layer4")(images)[1]
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network)
        assert find_layer(wrapped, images) == "module.layer4"
        found = Tapped(wrapped, "module.layer4")(images)[1]
        torch.testing.assert_close(found, wanted)
        found.sum().backward()
        assert network.layer4[-1].conv1.weight.grad is not None
    finally:
        distributed.destroy_process_group()


class Hostile(nn.Module):
    """What `torch.fx` cannot trace: it branches on values, and loops over a list that it makes as it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.parts = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        found = self.stem(images)
        for part in self.parts if float(found.detach().sum()) != 0 else ():
            found = part(found)
        return self.head(found.mean((2, 3)))  # type: ignore[no-any-return]


def test_tapped__reads_inside_a_sequential_of_a_network_that_fx_cannot_trace() -> None:
    module, images = Hostile(), torch.randn(2, 3, 8, 8)
    with pytest.raises(TypeError, match="Proxy"):
        torch.fx.symbolic_trace(module)
    assert find_layer(module, images) == "parts.3"
    torch.testing.assert_close(Tapped(module, "parts.1")(images)[1], module.parts[:2](module.stem(images)))


class Counts(nn.Module):
    """Writes to a buffer in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x


def test_frozen_teacher__knows_whether_it_changed() -> None:
    still = FrozenTeacher(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    still.train()
    still(torch.randn(2, 3, 8, 8))
    assert still.unchanged()
    moving = FrozenTeacher(Counts())
    moving(torch.randn(2, 3, 8, 8))
    assert not moving.unchanged()
