"""torchvision's families: each loads with its weights, is tapped, trains, is rebuilt from what is recorded, and ships.

Its weights come from a hub out of reach: here they are those of a fresh network, fetched the same way.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from factor_transfer.export.formats import export_pt2
from factor_transfer.networks.features import Tapped
from factor_transfer.networks.layers import find_layer
from factor_transfer.networks.load import Network, load_network
from factor_transfer.networks.weights import load_weights

FAMILIES: dict[str, tuple[int, str]] = {
    # name: (side of the images, layer)
    "squeezenet1_1": (64, "features"),
    "googlenet": (64, "inception5b"),
    "alexnet": (64, "features"),
    "convnext_tiny": (64, "features"),
    "densenet121": (64, "features"),
    "efficientnet_b0": (64, "features"),
    "efficientnet_v2_s": (64, "features"),
    "inception_v3": (96, "Mixed_7c"),
    "maxvit_t": (224, "blocks.3"),
    "mnasnet0_5": (64, "layers"),
    "mobilenet_v2": (64, "features"),
    "mobilenet_v3_small": (64, "features"),
    "regnet_y_400mf": (64, "trunk_output"),
    "resnet18": (64, "layer4"),
    "resnext50_32x4d": (64, "layer4"),  # its class is ResNet, as that of Wide ResNets
    "shufflenet_v2_x0_5": (64, "conv5"),
    "swin_t": (64, "permute"),
    "swin_v2_t": (64, "permute"),
    "vgg11": (64, "features"),
    "vit_b_32": (224, "encoder"),
}
FAST = {"squeezenet1_1"}
DEEP = {
    "convnext_tiny", "efficientnet_v2_s", "maxvit_t", "regnet_y_400mf", "resnext50_32x4d", "swin_t", "swin_v2_t",
    "vit_b_32",
}  # fmt: skip
"""Of many blocks alike, of which a few are exported."""


def load(name: str, size: int, **more: Any) -> Network:
    return load_network(f"torchvision/{name}", role="student", num_classes=5, img_size=size, **more)


def thinned(module: nn.Module) -> nn.Module:
    """Without the third and later of blocks alike in a row: to trace them takes long and shows no more."""
    for each in [each for each in module.modules() if isinstance(each, (nn.Sequential, nn.ModuleList))]:
        kept: dict[str, nn.Module] = {}
        looks: list[str] = []
        for name, child in each.named_children():
            look = re.sub(r"StochasticDepth\(.*?\)", "", repr(child))
            if looks[-2:] != [look, look]:
                kept[str(len(kept)) if isinstance(each, nn.ModuleList) else name] = child
                looks.append(look)
        each._modules = dict(kept)
    return module


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_torchvision__every_family_trains_is_rebuilt_and_ships(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, layer = FAMILIES[name]
    more = {"aux_logits": True} if name == "googlenet" else {}
    torch.manual_seed(0)
    whole = torchvision.models.get_model(name, weights=None, **more).state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: copy.copy(whole))
    # Its auxiliary head, which it trains with unless told otherwise, needs maps of 17 places a side.
    asked = {"aux_logits": False} if name == "inception_v3" else None
    network = load(name, size, weights="pretrained", args=asked)
    assert network.new_head
    module, images = network.module, network.norm(torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8))
    own = {key: value for key, value in module.state_dict().items() if value.shape == whole[key].shape}
    assert len(own) >= len(module.state_dict()) - 4, "all but heads"
    assert all(torch.equal(value, whole[key]) for key, value in own.items() if not key.startswith("aux"))
    assert find_layer(module, images[:2]) == layer

    logits, feature = Tapped(module.train(), layer)(images)
    (logits.square().mean() + feature.square().mean()).backward()
    with torch.no_grad():
        for weight in module.parameters():
            if weight.grad is not None:
                weight.sub_(1e-3 * weight.grad)

    with torch.no_grad():
        wanted = module.eval()(images)
    arguments = {key: value for key, value in network.model_args.items() if key not in {"architecture", "num_classes"}}
    monkeypatch.undo()
    again = load(name, size, args=arguments, seed=1).module.eval()
    save_file({key: value.clone() for key, value in module.state_dict().items()}, tmp_path / "w.safetensors")
    load_weights(again, tmp_path / "w.safetensors", "w")
    with torch.no_grad():
        torch.testing.assert_close(again(images), wanted, rtol=0, atol=0)
    shipped = thinned(module) if name in DEEP else module
    assert export_pt2(shipped, images, tmp_path / "student.pt2") <= 1e-4


def test_torchvision__auxiliary_heads_train_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=True).state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: dict(whole))
    for asked in (True, False):
        network = load("googlenet", 64, weights="pretrained", args={"aux_logits": asked, "init_weights": False})
        assert isinstance(network.module.aux1, nn.Module) == asked
        assert network.module.transform_input, "as its weights want it"
        assert network.model_args["transform_input"] is True
        logits = network.module.train()(torch.zeros(2, 3, 64, 64))
        assert logits.shape == (2, 5)
