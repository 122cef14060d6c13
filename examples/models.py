"""The networks of the examples: ResNet-18 for small and large images, a small residual network, a multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, Fig. 5 left)."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """x [N, channels_in, H, W] → [N, channels, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + shortcut)


class ResNet18(nn.Module):
    """ResNet-18.

    Args:
        classes: outputs of the classifier.
        stem: ``"imagenet"`` (7x7 convolution of stride 2 and max-pooling) or ``"cifar"`` (3x3 convolution).
        widths: channels of the four stages.
    """

    def __init__(
        self, classes: int = 1000, stem: str = "imagenet", widths: Sequence[int] = (64, 128, 256, 512)
    ) -> None:
        super().__init__()
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem must be 'imagenet' or 'cifar', not {stem!r}")
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(3, widths[0], 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self.layer1 = self._stage(widths[0], widths[0], 1)
        self.layer2 = self._stage(widths[0], widths[1], 2)
        self.layer3 = self._stage(widths[1], widths[2], 2)
        self.layer4 = self._stage(widths[2], widths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], classes)
        initialise(self)

    @staticmethod
    def _stage(channels_in: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(channels_in, channels, stride), BasicBlock(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3, H, W] → logits [N, classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class SmallCNN(nn.Module):
    """A stem, residual blocks at two resolutions and a classifier, for 8x8 digits or 28x28 images of clothing.

    Args:
        classes: outputs of the classifier.
        channels_in: channels of the images.
        widths: channels of the two stages.
    """

    def __init__(self, classes: int = 10, channels_in: int = 1, widths: Sequence[int] = (32, 64)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.block1 = BasicBlock(widths[0], widths[0])
        self.block2 = BasicBlock(widths[0], widths[1], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[1], classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, channels_in, H, W] → logits [N, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.block2(self.block1(x))
        return self.fc(self.avgpool(x).flatten(1))


def initialise(model: nn.Module) -> None:
    """Kaiming normal, fan-out, for convolutions; zero for the last norm of every residual block."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)


def resnet18(classes: int = 1000) -> ResNet18:
    """ResNet-18 for ImageNet: x [N, 3, 224, 224]; 11,689,512 parameters with 1000 classes."""
    return ResNet18(classes, "imagenet")


def resnet18_cifar(classes: int = 100) -> ResNet18:
    """ResNet-18 for CIFAR: x [N, 3, 32, 32]; 11,220,132 parameters with 100 classes."""
    return ResNet18(classes, "cifar")


def small_cnn(classes: int = 10, channels_in: int = 1, widths: Sequence[int] = (32, 64)) -> SmallCNN:
    """A residual network of some 80 thousand parameters: x [N, channels_in, H, W], H and W at least 8."""
    return SmallCNN(classes, channels_in, widths)


def mlp(features: int = 64, hidden: Sequence[int] = (256, 256), classes: int = 10) -> nn.Sequential:
    """Linear layers with ReLU between them: x [N, ...] with ``features`` numbers per example."""
    sizes = [features, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for size_in, size_out in zip(sizes, hidden, strict=False):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))
