"""The zoo against published sizes, the shared teacher, the authors' numbers, and everything timm asks of a model."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from factor_transfer.method.factor_transfer import Translator, factor_transfer_loss, load_reference_paraphraser
from factor_transfer.networks.layers import find_layer
from factor_transfer.util.errors import ConfigError
from factor_transfer.zoo import CifarResNet
from factor_transfer.zoo.resnet import PadShortcut

SHARED = Path(os.environ.get("FACTOR_TRANSFER_SHARED", "../shared"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="FACTOR_TRANSFER_SHARED names no folder")

# Exact counts for 10 classes. ResNet: table 6 of the paper in millions (0.27, 0.46, 0.66, 0.85, 1.7). WRN: 2.2 M for
# 40-2, 0.7 M for 16-2 (703,284 with 100 classes). VGG-13: 9.4 M (9,462,180 with 100 classes).
PARAMETERS = {
    "cifar_resnet20": 269_722,
    "cifar_resnet32": 464_154,
    "cifar_resnet44": 658_586,
    "cifar_resnet56": 853_018,
    "cifar_resnet110": 1_727_962,
    # Option B adds 16x32 + 32x64 weights and two batch norms: 2,752.
    "cifar_resnet20_b": 272_474,
    "cifar_resnet32_b": 466_906,
    "cifar_resnet44_b": 661_338,
    "cifar_resnet56_b": 855_770,
    "cifar_resnet110_b": 1_730_714,
    "cifar_wrn_16_1": 175_066,
    "cifar_wrn_16_2": 691_674,
    "cifar_wrn_40_1": 563_930,
    "cifar_wrn_40_2": 2_243_546,
    "cifar_wrn_46_4": 10_499_290,
    "cifar_vgg13": 9_416_010,
}

# One small network of each kind: arguments, the layer to tap, and the map's (C, H, W) for 32x32 images.
SMALL: dict[str, tuple[dict[str, Any], str, tuple[int, int, int]]] = {
    "cifar_resnet20": ({"layers": (1, 2, 1), "channels": (4, 8, 15)}, "layer3", (15, 8, 8)),
    "cifar_resnet20_b": ({"layers": (1, 2, 1), "channels": (4, 8, 16)}, "layer3", (16, 8, 8)),
    "cifar_wrn_16_1": ({"depth": 10, "width": 2, "channels": (4, 8, 16)}, "relu", (32, 8, 8)),
    "cifar_vgg13": ({"channels": ((4, 4), (8,), (8,), (16,), (16, 16))}, "layer5", (16, 2, 2)),
}
small = pytest.mark.parametrize("name", SMALL)


def make(name: str, **kwargs: Any) -> nn.Module:
    """The small network of that kind in eval mode, its batch norms away from the identity."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL[name][0], **kwargs})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias, std=0.5)
    return model.eval()


def images(count: int = 2, size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def golden(part: str) -> dict[str, Tensor]:
    tensors = load_file(SHARED / "golden/reference.safetensors")
    return {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}


# -- registry and sizes


def test_registry__names() -> None:
    assert set(timm.list_models("cifar_*")) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_registry__parameters_shapes_and_cfg(name: str) -> None:
    model = timm.create_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]

    with torch.no_grad():
        last = model.forward_features(images(1))
        assert model.forward_head(last).shape == (1, 10)
        assert model.forward_head(last, pre_logits=True).shape == (1, model.head_hidden_size)
    info = model.feature_info[-1]
    assert last.shape == (1, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])

    cfg = model.pretrained_cfg
    assert cfg["architecture"] == name
    assert (cfg["input_size"], cfg["crop_pct"], cfg["num_classes"]) == ((3, 32, 32), 1.0, 10)
    assert cfg["pool_size"] == last.shape[-2:]
    assert (cfg["mean"], cfg["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert timm.data.resolve_data_config({}, model=model)["crop_pct"] == 1.0


@small
@pytest.mark.parametrize("size", [8, 9, 32, 45])
def test_forward__any_size_from_8(name: str, size: int) -> None:
    model, (_, _, (channels, *_)) = make(name), SMALL[name]
    side = -(-size // model.feature_info[-1]["reduction"])
    with torch.no_grad():
        assert model.forward_features(images(size=size)).shape == (2, channels, side, side)
        assert model(images(size=size)).shape == (2, 10)


@small
def test_create_model__arguments(name: str) -> None:
    model = make(name, num_classes=7, in_chans=1, global_pool="catavgmax", drop_rate=0.5)
    assert (model.num_classes, model.in_chans, model.drop_rate) == (7, 1, 0.5)
    assert model.forward_features(images(channels=1)).shape[1:] == SMALL[name][2]
    assert model.head_hidden_size == 2 * model.num_features == model.linear.in_features
    x = images(channels=1)
    assert torch.equal(model(x), model(x))
    model.train()
    last = model.forward_features(x).detach()
    assert (model.forward_head(last, pre_logits=True) == 0).float().mean() > 0.2  # dropout is at work


def test_create_model__bad_arguments() -> None:
    for arguments, text in [
        ({"shortcut": "C"}, "valid: A, B"),
        ({"layers": (1, 1)}, "layers"),
        ({"channels": (16, 8, 4)}, "channels fall from 16 to 8"),
    ]:
        with pytest.raises(ConfigError, match=text):
            CifarResNet(**arguments)
    with pytest.raises(ConfigError, match=r"6n \+ 4"):
        timm.create_model("cifar_wrn_16_1", depth=20)
    with pytest.raises(RuntimeError, match="pretrained"):
        timm.create_model("cifar_resnet20", pretrained=True)


@small
def test_init__he_fan_out(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 20_000):
        wanted = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(wanted, rel=0.03)
    assert all(not conv.bias.any() for conv in model.modules() if isinstance(conv, nn.Conv2d) and conv.bias is not None)


# -- the map that is tapped


@small
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tap__sees_the_last_map_after_its_activation(name: str, checkpointing: bool) -> None:
    model, (_, layer, shape) = make(name), SMALL[name]
    model.set_grad_checkpointing(checkpointing)
    seen: list[Tensor] = []
    model.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(images())
    assert len(seen) == 1
    last = model.forward_features(images())
    assert torch.equal(seen[0], last)
    assert last.shape[1:] == shape
    assert last.min() == 0 < last.max()
    assert torch.equal(model.linear(last.mean((2, 3))), logits)
    assert layer == model.feature_info[-1]["module"] == find_layer(model, images())


@small
def test_forward_intermediates__equals_features(name: str) -> None:
    model = make(name)
    last, maps = model.forward_intermediates(images())
    assert torch.equal(last, model.forward_features(images()))
    assert torch.equal(maps[-1], last)
    assert [tuple(m.shape[1:3]) for m in maps] == [(i["num_chs"], 32 // i["reduction"]) for i in model.feature_info]

    only = model.forward_intermediates(images(), indices=[0, -1], intermediates_only=True)
    assert [torch.equal(a, b) for a, b in zip(only, (maps[0], maps[-1]), strict=True)] == [True, True]
    assert torch.equal(model.forward_intermediates(images(), indices=[0])[0], last)
    early, _ = model.forward_intermediates(images(), indices=[1], stop_early=True)
    assert torch.equal(early, maps[1])
    with pytest.raises(ConfigError, match="NCHW"):
        model.forward_intermediates(images(), output_fmt="NLC")


@small
@pytest.mark.parametrize("feature_cls", ["list", "getter", "hook"])
def test_features_only__gives_every_group(name: str, feature_cls: str) -> None:
    model, backbone = make(name), make(name, features_only=True, feature_cls=feature_cls)  # of one seed
    _, maps = model.forward_intermediates(images())
    found = backbone(images())
    assert [torch.equal(a, b) for a, b in zip(found, maps, strict=True)] == [True] * len(model.feature_info)
    assert backbone.feature_info.channels() == [m.shape[1] for m in maps]
    assert backbone.feature_info.reduction() == [32 // m.shape[2] for m in maps]


@small
def test_prune_intermediate_layers__drops_the_rest(name: str) -> None:
    model = make(name)
    _, maps = model.forward_intermediates(images())
    model.prune_intermediate_layers([1])
    assert torch.equal(model(images()), maps[1])
    assert not hasattr(model, "layer3")
    assert (model.num_features, model.num_classes) == (maps[1].shape[1], 0)


# -- head, groups, checkpointing


@small
def test_reset_classifier__new_head(name: str) -> None:
    model = make(name).double()
    features = model.num_features
    model.reset_classifier(5)
    assert model(images().double()).shape == (2, 5)
    assert model.num_classes == 5
    model.reset_classifier(4, global_pool="catavgmax")
    assert model(images().double()).shape == (2, 4)
    assert model.head_hidden_size == 2 * features
    model.reset_classifier(0)
    assert model(images().double()).shape == (2, 2 * features)
    model.reset_classifier(0, "")
    assert torch.equal(model(images().double()), model.forward_features(images().double()))
    assert model.num_features == features


@small
def test_group_matcher__orders_from_image_to_head(name: str) -> None:
    model = make(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    names = {id(p): key for key, p in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert set(scale) == set(names.values())
    ordered = [scale[key] for key in names.values()]
    assert ordered == sorted(ordered)
    assert {key for key, value in scale.items() if value == 1} == {"linear.weight", "linear.bias"}
    assert ordered[0] == 0.5 ** (len(set(ordered)) - 1)  # each place its own rate, without a gap
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len({coarse[k] for k in names.values() if k.startswith("layer")}) == len(model.feature_info)


@small
def test_grad_checkpointing__same_gradients_less_kept(name: str) -> None:
    def gradients(enable: bool) -> tuple[dict[str, Tensor], int]:
        model, kept = make(name), []
        model.set_grad_checkpointing(enable)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = F.cross_entropy(model(images()), torch.tensor([1, 2]))
        loss.backward()
        return {key: p.grad for key, p in model.named_parameters()}, sum(kept)

    plain, plain_kept = gradients(False)
    recomputed, recomputed_kept = gradients(True)
    assert recomputed_kept < 0.7 * plain_kept
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, msg=key)


# -- option A and memory format


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_pad_shortcut__output_and_gradient_keep_the_layout_of_the_map(layout: torch.memory_format) -> None:
    x = torch.randn(2, 4, 7, 7).to(memory_format=layout).requires_grad_()
    out = PadShortcut(4, 6, 2)(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert out.is_contiguous(memory_format=layout)
    assert gradient.is_contiguous(memory_format=layout)
    expected = torch.zeros_like(x)
    expected[:, :, ::2, ::2] = 2 * x[:, :, ::2, ::2]
    assert gradient.equal(expected)


def test_pad_shortcut__every_second_pixel_between_zeros() -> None:
    x = images(size=5, channels=2)
    out = PadShortcut(2, 5, 2)(x)
    assert out.shape == (2, 5, 3, 3)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3, 4]].any()


@small
def test_channels_last__kept_to_the_last_map(name: str) -> None:
    model = make(name)
    wanted = model.forward_features(images())
    model = model.to(memory_format=torch.channels_last)
    found = model.forward_features(images().to(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# -- weights: the shared teacher and the authors' networks


@needs_shared
def test_shared_teacher__loads_strictly_and_knows_its_images() -> None:
    model = timm.create_model("cifar_resnet56").eval()
    model.load_state_dict(load_file(SHARED / "checkpoints/resnet56-cifar10-jpeg.safetensors"), strict=True)
    pixels, labels = [], []
    with tarfile.open(SHARED / "cifar10-jpeg/validation.tar") as tar:
        members = sorted((m for m in tar if m.name.endswith(".jpg")), key=lambda m: m.name)
        classes = sorted({Path(m.name).parent.name for m in members})
        for member in members[::25]:
            file = tar.extractfile(member)
            assert file is not None
            pixels.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
            labels.append(classes.index(Path(member.name).parent.name))
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    x = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        right = model(x).argmax(1) == torch.tensor(labels)
    assert len(right) == 400
    assert right.float().mean() > 0.87  # 89.96 % on all 10,000; all the zero channels on one side fall short of this


@needs_shared
@pytest.mark.parametrize(("part", "name"), [("student.", "cifar_resnet20_b"), ("teacher.", "cifar_resnet56_b")])
def test_golden__loads_strictly(part: str, name: str) -> None:
    model = timm.create_model(name)
    model.load_state_dict(golden(part), strict=True)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == {
        key: tuple(value.shape) for key, value in golden(part).items()
    }


@needs_shared
def test_golden__student_gives_the_authors_cross_entropy() -> None:
    student = timm.create_model("cifar_resnet20_b").double().train()
    student.load_state_dict(golden("student."))
    step = golden("step_")
    found = F.cross_entropy(student(step["images"].double()), step["labels"])
    torch.testing.assert_close(found.float(), step["losses"][0, 1].float(), rtol=1e-6, atol=0)


@needs_shared
def test_golden__student_feature_is_tapped_where_the_authors_tap_it() -> None:
    paraphraser = load_reference_paraphraser(SHARED / "checkpoints/reference-paraphraser-cifar10.pth").double()
    translator = Translator(64, 32).double()
    translator.load_state_dict(golden("step_translator."))
    student, teacher = (timm.create_model(f"cifar_resnet{depth}_b").double() for depth in (20, 56))
    student.load_state_dict(golden("student."))
    teacher.load_state_dict(golden("teacher."))
    x = golden("step_")["images"].double()
    with torch.no_grad():
        factor = paraphraser.encode(teacher.eval().forward_features(x))
        found = factor_transfer_loss(translator(student.train().forward_features(x)), factor)
    torch.testing.assert_close(found.float(), golden("step_")["losses"][0, 0].float(), rtol=1e-6, atol=0)


def test_wide_resnet__equals_the_papers_functional_form() -> None:
    model = make("cifar_wrn_16_1", depth=16)
    w = model.state_dict()

    def active(x: Tensor, bn: str) -> Tensor:
        stats = [w[f"{bn}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *stats))

    y = F.conv2d(images(), w["conv1.weight"], padding=1)
    for group in (1, 2, 3):
        for block in (f"layer{group}.0", f"layer{group}.1"):
            stride = 2 if block in ("layer2.0", "layer3.0") else 1
            o1 = active(y, f"{block}.bn1")
            o2 = active(F.conv2d(o1, w[f"{block}.conv1.weight"], stride=stride, padding=1), f"{block}.bn2")
            carried = F.conv2d(o1, w[f"{block}.shortcut.weight"], stride=stride) if block.endswith("0") else y
            y = F.conv2d(o2, w[f"{block}.conv2.weight"], padding=1) + carried
    torch.testing.assert_close(model.forward_features(images()), active(y, "bn"))


def test_vgg13__equals_torchvisions_convolutions() -> None:
    torch.manual_seed(0)
    reference = torchvision.models.vgg13_bn().features[:-1].eval()  # without the fifth pooling
    model = timm.create_model("cifar_vgg13").eval()
    body = {key: value for key, value in model.state_dict().items() if not key.startswith("linear")}
    model.load_state_dict(dict(zip(body, reference.state_dict().values(), strict=True)), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images()), reference(images()))


# -- leaving: timm folder and torch.export

LOAD = """
import sys, torch, timm, factor_transfer.zoo
for folder in sys.argv[1:]:
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    torch.save(model(torch.load(folder + "/images.pt")), folder + "/logits.pt")
"""


def test_timm_folder__round_trip_in_a_fresh_process(tmp_path: Path) -> None:
    wanted = {}
    for name in SMALL:
        model = make(name, num_classes=6)
        save_for_hf(model, tmp_path / name, safe_serialization=True)
        torch.save(images(), tmp_path / name / "images.pt")
        wanted[name] = model(images())
    folders = [str(tmp_path / name) for name in SMALL]
    subprocess.run([sys.executable, "-c", LOAD, *folders], check=True, timeout=120)
    for name, logits in wanted.items():
        torch.testing.assert_close(torch.load(tmp_path / name / "logits.pt"), logits, msg=name)
        assert json.loads((tmp_path / name / "config.json").read_text())["architecture"] == name


def test_timm_folder__another_number_of_classes_gets_a_new_head(tmp_path: Path) -> None:
    model = make("cifar_resnet20")
    save_for_hf(model, tmp_path, safe_serialization=True)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
    assert other(images()).shape == (2, 3)
    assert torch.equal(other.forward_features(images()), model.forward_features(images()))


@small
def test_export__round_trip_at_any_batch_size(name: str) -> None:
    model = make(name)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    torch.testing.assert_close(loaded(images(5)), model(images(5)))


def test_create_model__shortcut_overrides_the_names_own() -> None:
    assert "layer2.0.shortcut.0.weight" in timm.create_model("cifar_resnet20", shortcut="B").state_dict()


@small
def test_activations__do_not_overwrite_what_a_hook_on_batch_norm_sees(name: str) -> None:
    model, seen = make(name), []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, args, output: seen.append(output))
    model(images())
    assert all(output.min() < 0 for output in seen)


@small
def test_activations__leave_backward_hooks_on_batch_norm_their_output(name: str) -> None:
    model, seen = make(name).train(), []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    model(images()).sum().backward()
    assert len(seen) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
