"""Networks by name, strict weights, and files that are data, never code."""

from __future__ import annotations

import argparse
import gc
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from factor_transfer.method.factor_transfer import Paraphraser
from factor_transfer.networks.load import InputNorm, Network, load_network, own_size
from factor_transfer.networks.weightfiles import read_tensors
from factor_transfer.networks.weights import load_paraphraser, paraphraser_metadata
from factor_transfer.util.errors import ModelError
from factor_transfer.util.files import state_fingerprint

SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8)}


def load(name: str | nn.Module = "cifar_resnet20", **more: Any) -> Network:
    settings: dict[str, Any] = {"role": "teacher", "num_classes": 10, "img_size": 16}
    return load_network(name, **{**settings, "args": None if isinstance(name, nn.Module) else SMALL, **more})


@pytest.fixture
def trained() -> nn.Module:
    return timm.create_model("cifar_resnet20", **SMALL)


def test_load_network__weights_belong_to_the_seed() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (state_fingerprint(load(seed=seed).module.state_dict()) for seed in (0, 0, 1))
    assert one == same != other
    assert torch.equal(state, torch.random.get_rng_state()), "nobody else's random numbers are used up"


@pytest.mark.parametrize("form", ["safetensors", "plain", "nested", "prefixed", "timm", "no counters"])
def test_load_network__reads_every_form_of_weights(tmp_path: Path, trained: nn.Module, form: str) -> None:
    state, path = trained.state_dict(), tmp_path / "weights.pth"
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif form == "plain":
        torch.save(state, path)
    elif form == "nested":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif form == "prefixed":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    elif form == "timm":
        torch.save({"state_dict": state, "args": argparse.Namespace(lr=1), "arch": "cifar_resnet20"}, path)
    else:
        torch.save({name: value for name, value in state.items() if "num_batches" not in name}, path)
    network = load(weights=str(path))
    assert network.pretrained
    assert not network.new_head
    assert state_fingerprint(network.module.state_dict()) == state_fingerprint(state)


def test_load_network__reads_a_timm_folder_with_its_weights(tmp_path: Path, trained: nn.Module) -> None:
    timm.models.save_for_hf(trained, tmp_path / "folder", safe_serialization=True)
    network = load(f"local-dir:{tmp_path / 'folder'}", args=None)
    assert network.pretrained
    assert state_fingerprint(network.module.state_dict()) == state_fingerprint(trained.state_dict())
    other = load(f"local-dir:{tmp_path / 'folder'}", args=None, num_classes=7)
    assert other.new_head
    assert "7 classes" in other.notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv1.weight"), r"1 missing \(conv1\.weight\)"),
        (lambda s: s.update({"extra.weight": torch.ones(1)}), r"1 unexpected \(extra\.weight\)"),
        (lambda s: s.update({"conv1.weight": torch.ones(4, 3, 5, 5)}), r"conv1\.weight \(4, 3, 5, 5\) instead of"),
    ],
)
def test_load_network__says_what_does_not_fit(tmp_path: Path, trained: nn.Module, change: Any, message: str) -> None:
    state = dict(trained.state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=f"(?s)--teacher-weights .*{message}"):
        load(weights=str(tmp_path / "w.pth"))


def test_load_network__a_head_of_another_size_is_a_choice(tmp_path: Path, trained: nn.Module) -> None:
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    network = load(weights=str(tmp_path / "w.pth"), num_classes=7)
    assert network.new_head
    assert network.module(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    torch.testing.assert_close(network.module.conv1.weight, trained.conv1.weight)


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["CANARY"],)


def test_load_network__never_runs_what_is_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    torch.save({"state_dict": Canary()}, tmp_path / "hostile.pth")
    with pytest.raises(ModelError, match="(?s)weights_only.*safetensors"):
        load(weights=str(tmp_path / "hostile.pth"))
    assert not (tmp_path / "canary").exists()


def test_load_network__names_what_it_cannot_find(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="(?s)--teacher cifar_resnet21.*cifar_resnet20"):
        load("cifar_resnet21")
    with pytest.raises(ModelError, match="(?s)--teacher-weights .*no such file.*weights.pth"):
        torch.save({}, tmp_path / "weights.pth")
        load(weights=str(tmp_path / "weigths.pth"))
    with pytest.raises(ModelError, match="(?s)unexpected keyword argument.*--teacher-args"):
        load(args={"layerz": 3})
    for content in (b"", b"no weights", b"PK\x03\x04"):
        (tmp_path / "w.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match="--teacher-weights"):
            load(weights=str(tmp_path / "w.safetensors"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="--teacher-weights"):
        load(weights=str(tmp_path / "list.pth"))


def test_load_network__an_output_must_have_a_place_for_every_label() -> None:
    head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    assert load(head, num_classes=5).pretrained
    with pytest.raises(ModelError, match=r"(?s)\(2, 5\).*10 classes"):
        load(head, role="student")
    assert load(head).headless
    assert not load(head).knows_classes
    with pytest.raises(ModelError, match="(?s)fails on images of 16x16.*--img-size"):
        load(nn.Sequential(nn.Flatten(), nn.Linear(12, 10)))
    with pytest.raises(ModelError, match="4 input channels"):
        load(args={**SMALL, "in_chans": 4})


def test_load_network__a_name_stands_for_a_class() -> None:
    """As the message says that refuses a class."""
    network = load("test_resnet", args={"act_layer": "silu"}).module
    assert any(isinstance(each, nn.SiLU) for each in network.modules())


def test_load_network__leaves_a_given_module_as_it_is() -> None:
    given = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    network = load(given)
    with torch.no_grad():
        network.module[0].weight.zero_()  # type: ignore[operator, index, union-attr]
    assert given[0].weight.abs().sum() > 0


def test_load_network__takes_torchvisions_networks(tmp_path: Path) -> None:
    name = "torchvision/shufflenet_v2_x0_5"
    network = load(name, args=None, img_size=32)
    assert network.module(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    save_file(network.module.state_dict(), tmp_path / "w.safetensors")
    other = load(name, args=None, img_size=32, num_classes=4, weights=str(tmp_path / "w.safetensors"))
    assert other.new_head
    assert other.module.fc.out_features == 4  # type: ignore[union-attr]
    torch.testing.assert_close(other.module.conv5[0].weight, network.module.conv5[0].weight)  # type: ignore[index, union-attr]
    assert own_size(name) == 224
    with pytest.raises(ModelError, match="(?s)--teacher torchvision/resnet19.*torchvision/resnet18"):
        load("torchvision/resnet19", args=None)


def test_load_network__torchvisions_own_weights_get_a_new_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights come from a hub out of reach: here they are those of a fresh network, fetched the same way."""
    import torchvision

    fresh = torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: fresh)
    network = load("torchvision/shufflenet_v2_x0_5", args=None, img_size=32, weights="pretrained")
    assert network.pretrained
    assert network.new_head
    assert network.module(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    torch.testing.assert_close(network.module.state_dict()["conv1.0.weight"], fresh["conv1.0.weight"])


def test_load_network__builds_a_transformer_for_the_images_size() -> None:
    network = load("test_vit", args=None, img_size=32)
    assert network.module(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert own_size("test_vit") == 160


def test_input_norm__is_to_tensor_and_normalize() -> None:
    from torchvision.transforms.v2.functional import normalize, to_dtype

    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    wanted = normalize(to_dtype(images, torch.float32, scale=True), list(mean), list(std))
    torch.testing.assert_close(InputNorm(mean, std)(images), wanted)


def test_load_paraphraser__reads_what_was_written_and_what_the_authors_published(tmp_path: Path, shared: Path) -> None:
    paraphraser = Paraphraser(16, 8, batch_norm=True)
    path = tmp_path / "p.safetensors"
    save_file(paraphraser.state_dict(), path, paraphraser_metadata(paraphraser))
    again = load_paraphraser(path, channels=16, k=0.5, batch_norm=True)
    assert state_fingerprint(again.state_dict()) == state_fingerprint(paraphraser.state_dict())
    with pytest.raises(ModelError, match="(?s)--paraphraser .*made with batch norm.*--factor-batch-norm"):
        load_paraphraser(path, channels=16, k=0.5)
    published = shared / "checkpoints" / "reference-paraphraser-cifar10.pth"
    assert load_paraphraser(published, channels=64, k=0.5).factor_channels == 32
    with pytest.raises(ModelError, match="(?s)--paraphraser .*64 teacher channels and 32 factor"):
        load_paraphraser(published, channels=64, k=0.75)
    with pytest.raises(ModelError, match="(?s)--paraphraser .*no paraphraser"):
        save_file(paraphraser.state_dict(), tmp_path / "other.safetensors")
        load_paraphraser(tmp_path / "other.safetensors", channels=16, k=0.5)


def test_read_tensors__leaves_nothing_behind(tmp_path: Path) -> None:
    """A process that reads weights for days does not grow: safetensors' own `load_file` does."""
    file = tmp_path / "weights.safetensors"
    save_file({f"layer{place}.weight": torch.zeros(300 + place) for place in range(100)}, file)
    read_tensors(file, "weights")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            read_tensors(file, "weights")
        gc.collect()
        assert (tracemalloc.get_traced_memory()[0] - before) / (20 * 100) < 5
    finally:
        tracemalloc.stop()
