"""Image classifiers in plain torch for export, their images, and what onnxruntime computes from them.

ResNet, MobileNetV3, ConvNeXt and ViT are narrow and shallow; their layers are torchvision's.
"""

import functools
from collections.abc import Callable
from typing import Any

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, SIZE = 5, 32


def unit(
    inputs: int, outputs: int, kernel: int, activation: nn.Module, *, eps: float = 1e-5, **options: Any
) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs, eps), activation)


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class Residual(nn.Module):
    """A block of ResNet. Its shortcut is the input, or a strided 1x1 convolution of it where the shape changes."""

    def __init__(self, body: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = body
        changed = stride != 1 or inputs != outputs
        self.shortcut = unit(inputs, outputs, 1, nn.Identity(), stride=stride) if changed else nn.Identity()

    def forward(self, x: Any) -> Any:
        return F.relu(self.body(x) + self.shortcut(x))


def basic(inputs: int, outputs: int, stride: int = 1) -> Residual:
    body = nn.Sequential(
        unit(inputs, outputs, 3, nn.ReLU(), stride=stride),
        unit(outputs, outputs, 3, nn.Identity()),
    )
    return Residual(body, inputs, outputs, stride)


def bottleneck(inputs: int, width: int, stride: int = 1) -> Residual:
    body = nn.Sequential(
        unit(inputs, width, 1, nn.ReLU()),
        unit(width, width, 3, nn.ReLU(), stride=stride),
        unit(width, 4 * width, 1, nn.Identity()),
    )
    return Residual(body, inputs, 4 * width, stride)


def resnet() -> nn.Sequential:
    """The blocks of ResNet-18 and those of ResNet-50, behind one stem."""
    stem = unit(3, 8, 7, nn.ReLU(), stride=2)
    blocks = [basic(8, 8), basic(8, 12, stride=2), bottleneck(12, 4, stride=2), bottleneck(16, 4)]
    return nn.Sequential(stem, nn.MaxPool2d(3, stride=2, padding=1), *blocks, head(16))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, 4, 1),
            nn.ReLU(),
            nn.Conv2d(4, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Any) -> Any:
        return self.gate(x) * x


class InvertedResidual(nn.Module):
    """A block of MobileNetV3: widened, filtered per channel, gated or not, narrowed."""

    def __init__(
        self, inputs: int, wide: int, outputs: int, kernel: int, activation: nn.Module, *, gate: bool, stride: int = 1
    ) -> None:
        super().__init__()
        widen = [unit(inputs, wide, 1, activation, eps=1e-3)] if wide != inputs else []
        depthwise = unit(wide, wide, kernel, activation, stride=stride, groups=wide, eps=1e-3)
        gates = [SqueezeExcite(wide)] if gate else []
        self.body = nn.Sequential(*widen, depthwise, *gates, unit(wide, outputs, 1, nn.Identity(), eps=1e-3))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Any) -> Any:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet() -> nn.Sequential:
    """MobileNetV3."""
    relu, hardswish = nn.ReLU(), nn.Hardswish()
    return nn.Sequential(
        unit(3, 8, 3, hardswish, stride=2, eps=1e-3),
        InvertedResidual(8, 8, 8, 3, relu, gate=True, stride=2),
        InvertedResidual(8, 16, 8, 3, relu, gate=False),
        InvertedResidual(8, 16, 12, 5, hardswish, gate=True, stride=2),
        InvertedResidual(12, 24, 12, 5, hardswish, gate=True),
        unit(12, 24, 1, hardswish, eps=1e-3),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(24, 16), hardswish, nn.Dropout(0.2), nn.Linear(16, CLASSES)),
    )


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of [batch, channel, height, width], with the channels moved last as torchvision does."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelsFirstNorm(nn.Module):
    """The same in arithmetic of its own, as ConvNeXt's authors do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Any) -> Any:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Any) -> Any:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
        return x + self.scale * y


def convnext() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 4, stride=4), LayerNorm2d(8, eps=1e-6), ConvNeXtBlock(8)),
        *(LayerNorm2d(8, eps=1e-6), nn.Conv2d(8, 12, 2, stride=2), ConvNeXtBlock(12)),
        *(ChannelsFirstNorm(12), nn.Conv2d(12, 16, 2, stride=2), ConvNeXtBlock(16)),
        *(nn.AdaptiveAvgPool2d(1), LayerNorm2d(16, eps=1e-6), nn.Flatten(), nn.Linear(16, CLASSES)),
    )


class MultiheadAttention(nn.Module):
    """Self-attention by torch's module, as torchvision writes it. Asked for its weights, torch does not fuse it."""

    def __init__(self, channels: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.fused, self.attention = fused, nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, x: Any) -> Any:
        return self.attention(x, x, x, need_weights=not self.fused)[0]


class ScaledDotProduct(nn.Module):
    """Self-attention by torch's function, as timm writes it, with the same alternative."""

    def __init__(self, channels: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.fused, self.heads = fused, heads
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Any) -> Any:
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [batch, head, token, channel]
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, tokens, channels))


class EncoderBlock(nn.Module):
    def __init__(self, channels: int, attention: nn.Module) -> None:
        super().__init__()
        self.before_attention, self.attention = nn.LayerNorm(channels, eps=1e-6), attention
        self.before_mlp, self.mlp = nn.LayerNorm(channels, eps=1e-6), self._mlp(channels)

    @staticmethod
    def _mlp(channels: int) -> nn.Sequential:
        wide, narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        return nn.Sequential(wide, nn.GELU(), nn.Dropout(0.1), narrow, nn.Dropout(0.1))

    def forward(self, x: Any) -> Any:
        x = x + self.attention(self.before_attention(x))
        return x + self.mlp(self.before_mlp(x))


class ViT(nn.Module):
    def __init__(self, *, fused: bool = True) -> None:
        super().__init__()
        channels, patch = 8, 8
        self.patches = nn.Conv2d(3, channels, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, channels))
        self.position = nn.Parameter(torch.zeros(1, (SIZE // patch) ** 2 + 1, channels))
        self.encoder = nn.Sequential(
            nn.Dropout(0.1),
            EncoderBlock(channels, MultiheadAttention(channels, 2, fused=fused)),
            EncoderBlock(channels, ScaledDotProduct(channels, 2, fused=fused)),
            nn.LayerNorm(channels, eps=1e-6),
        )
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)  # [batch, patch, channel]
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.encoder(x)[:, 0])


class Normalising(nn.Module):
    """Pixels in 0..1 are standardised inside the graph."""

    mean: Tensor
    sd: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.register_buffer("sd", torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1))
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Upsample(scale_factor=2), head(4))

    def forward(self, x: Any) -> Any:
        return self.body((x - self.mean) / self.sd)


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": resnet,
    "mobilenet": mobilenet,
    "convnext": convnext,
    "vit": ViT,
    "unfused vit": functools.partial(ViT, fused=False),
    "normalising": Normalising,
}


@functools.cache
def network(net: str) -> nn.Module:
    """Random everywhere: an exporter merges parameters that are equal, such as two biases of zeros.

    The scales keep the images apart up to the output, and let gradients reach the stem.
    """
    random = torch.Generator().manual_seed(3)
    model = NETS[net]().eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim > 1 and name.endswith("weight"):
            tensor.data.normal_(0, (3 / tensor[0].numel()) ** 0.5, generator=random)
        elif name.endswith(("weight", "running_var", "scale")):
            tensor.data.uniform_(0.5, 1.5, generator=random)
        elif tensor.is_floating_point() and name not in {"mean", "sd"}:
            tensor.data.normal_(0, 0.3, generator=random)
    return model


def images(batch: int) -> Tensor:
    """Squares of random colours."""
    random = torch.Generator().manual_seed(batch)
    return F.interpolate(torch.rand(batch, 3, SIZE // 8, SIZE // 8, generator=random), scale_factor=8)


def served(model: onnx.ModelProto, x: Tensor) -> Tensor:
    """The first output as onnxruntime computes it."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
