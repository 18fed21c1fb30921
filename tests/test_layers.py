"""The last feature map of many families, found by what flows, against the layer that a person would name and why."""

from __future__ import annotations

import pytest
import torch

import factor_transfer.zoo  # noqa: F401
from factor_transfer.networks.features import Tapped, feature_shape
from factor_transfer.networks.layers import find_layer
from factor_transfer.networks.load import load_network

PERSON: dict[str, tuple[int, str, tuple[int, int, int], str]] = {
    # name: (side of the images, layer, its shape there, why a person names it)
    # groups that end in their activation or residual sum, right before the pooling
    "regnetx_002": (64, "s4", (368, 2, 2), "the last of four stages, after its ReLU"),
    "res2next50": (64, "layer4", (2048, 2, 2), "a ResNet's last group"),
    "resnest14d": (64, "layer4", (2048, 2, 2), "a ResNet's last group"),
    "legacy_seresnet18": (64, "layer4", (512, 2, 2), "a ResNet's last group"),
    "skresnet18": (64, "layer4", (512, 2, 2), "a ResNet's last group"),
    "dla46x_c": (64, "level5", (256, 2, 2), "the last level of the aggregation"),
    "ese_vovnet19b_slim_dw": (64, "stages", (512, 2, 2), "all stages; the head pools"),
    "mobileone_s1": (64, "stages", (1280, 2, 2), "all stages; its final convolution is none"),
    "cs3darknet_focus_s": (64, "stages", (512, 2, 2), "all stages; the head pools"),
    "hgnetv2_b0": (64, "stages", (1024, 2, 2), "all stages; its last convolution comes after the pooling"),
    "fasternet_t0": (64, "stages", (320, 2, 2), "all stages; the head pools first"),
    "repvit_m1": (64, "stages", (384, 2, 2), "all stages; the head pools"),
    "tresnet_m": (64, "body", (2048, 2, 2), "the body before the head"),
    "mobilenetv3_small_050": (64, "blocks", (288, 2, 2), "its head convolution comes after the pooling"),
    "ghostnet_050": (64, "blocks", (480, 2, 2), "its head convolution comes after the pooling"),
    "repghostnet_050": (64, "blocks", (480, 2, 2), "its head convolution comes after the pooling"),
    # a last convolution, norm or activation behind the groups
    "mobilenetv2_035": (64, "bn2", (1280, 2, 2), "the head convolution's norm and activation in one"),
    "densenet121": (64, "features", (1024, 2, 2), "its last norm carries the activation"),
    "dpn48b": (64, "features", (832, 2, 2), "its last norm carries the activation"),
    "rexnet_100": (64, "features", (1280, 2, 2), "the last of its features is the head convolution"),
    "nf_regnet_b0": (64, "final_act", (960, 2, 2), "norm-free: the last activation stands alone"),
    "xception41p": (64, "act", (2048, 2, 2), "pre-activation: the last activation stands alone"),
    "inception_v3": (128, "Mixed_7c", (2048, 2, 2), "the last mixed block"),
    "hrnet_w18_small": (64, "final_layer", (2048, 2, 2), "the branches are merged there"),
    "selecsls42": (128, "head", (1280, 2, 2), "its `head` is convolutions; the pooling follows"),
    "mobilevit_xxs": (64, "final_conv", (320, 2, 2), "the last convolution with its activation"),
    "fastvit_t8": (64, "final_conv", (768, 2, 2), "the last convolution with its activation"),
    "starnet_s050": (64, "norm", (128, 2, 2), "the last norm, before the pooling"),
    "swiftformer_xs": (64, "norm", (220, 2, 2), "the last norm, before the pooling"),
    # convolutions and attention whose last norm is a part of the head, behind the pooling
    "convnext_atto": (64, "stages", (320, 2, 2), "the norm comes after the pooling"),
    "edgenext_xx_small": (64, "stages", (168, 2, 2), "the norm comes after the pooling"),
    "inception_next_atto": (64, "stages", (320, 2, 2), "the norm comes after the pooling"),
    "mambaout_femto": (64, "stages", (288, 2, 2), "the norm comes after the pooling"),
    "pvt_v2_b0": (64, "stages", (256, 2, 2), "each stage ends in its norm"),
    "tiny_vit_5m_224": (64, "stages", (320, 2, 2), "the norm comes after the pooling"),
    "efficientvit_b0": (64, "stages", (128, 2, 2), "its head convolutions belong to the head"),
    "nest_tiny": (64, "norm", (384, 4, 4), "the last norm, before the pooling"),
    # channels last
    "swinv2_cr_tiny_224": (64, "stages", (768, 2, 2), "stages give channels first again"),
    "focalnet_tiny_srf": (64, "norm", (768, 2, 2), "the last norm"),
    # tokens
    "vit_tiny_patch16_224": (64, "norm", (192, 4, 4), "the last norm over a class token and a square"),
    "deit_tiny_distilled_patch16_224": (64, "norm", (192, 4, 4), "two tokens stand before the square"),
    "vit_tiny_patch16_dinov3_qkvb": (64, "norm", (192, 4, 4), "a class token and four registers before the square"),
    "gmlp_ti16_224": (64, "norm", (128, 4, 4), "tokens without a class token"),
    "cait_xxs24_224": (64, "norm", (192, 4, 4), "the class token joins late, before the last norm"),
    "xcit_nano_12_p16_224": (64, "norm", (128, 4, 4), "the last norm"),
    "levit_128s": (128, "stages", (384, 2, 2), "tokens without a class token; the head has its own norm"),
    "mvitv2_tiny": (64, "norm", (768, 2, 2), "the last norm"),
    "volo_d1_224": (64, "norm", (384, 4, 4), "a class token, of which it does not tell"),
    "twins_svt_small": (64, "norm", (512, 2, 2), "the last norm"),
    # outputs that are lists, tuples or of another kind
    "coat_tiny": (64, "norm4", (152, 2, 2), "three last maps; the coarsest is the deepest"),
    "pit_ti_224": (64, "transformers", (256, 2, 2), "gives (map, class token); only the token is normed"),
    "efficientvim_m1": (128, "norm.3", (320, 2, 2), "the norm of the last map; flattened later"),
    # torchvision's, of which timm knows nothing
    "torchvision/resnet18": (32, "layer4", (512, 1, 1), "the last group, though one place is left of small images"),
    "torchvision/vgg11": (64, "features", (512, 2, 2), "its pooling enlarges small maps again"),
    "torchvision/mobilenet_v3_small": (64, "features", (576, 2, 2), "all features; the pooling follows"),
    "torchvision/swin_t": (64, "permute", (768, 2, 2), "the last norm, channels first again"),
    "torchvision/inception_v3": (96, "Mixed_7c", (2048, 1, 1), "the last mixed block, though one place is left"),
    "torchvision/squeezenet1_1": (64, "features", (512, 3, 3), "its head convolves before it pools"),
    "torchvision/googlenet": (64, "inception5b", (1024, 2, 2), "the last inception block"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PERSON)
def test_find_layer__names_what_a_person_would(name: str) -> None:
    size, layer, shape, _ = PERSON[name]
    module = load_network(name, role="student", num_classes=10, img_size=size).module
    images = torch.zeros(1, 3, size, size)
    assert find_layer(module, images) == layer
    assert feature_shape(Tapped(module, layer), images) == shape


def test_the_list__is_long_and_gives_reasons() -> None:
    assert len(PERSON) >= 40
    assert all(reason for *_, reason in PERSON.values())
