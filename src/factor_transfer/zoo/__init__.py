"""The paper's CIFAR networks in timm's registry: ResNet, Wide ResNet and VGG. Importing this package registers them.

>>> import timm
>>> timm.create_model("cifar_resnet20", layers=(1, 1, 1), channels=(4, 8, 16)).num_features
16
"""

from factor_transfer.zoo.resnet import CifarResNet
from factor_transfer.zoo.vgg import CifarVgg
from factor_transfer.zoo.wide_resnet import CifarWideResNet

__all__ = ["CifarResNet", "CifarVgg", "CifarWideResNet"]
