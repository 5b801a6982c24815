"""The networks: a few kinds each, small enough for many seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from dldr_ext.demo.model import build as demo_network

from .data import TEXTS, Problem


def build(name: str, problem: Problem, seed: int) -> nn.Module:
    """A network for the problem's inputs; the same seed gives the same weights.

    Raises
    ------
    ValueError
        The name is unknown, or the network is not for this kind of data.
    """
    if name not in NAMES:
        raise ValueError(f"network: expected one of {', '.join(NAMES)}, got {name!r}")
    kind = "text" if problem.name in TEXTS else "images"
    if (name in ("chars", "gpt")) != (kind == "text"):
        raise ValueError(f"network: expected one for {kind}, as in {problem.name}, got {name!r}")
    if name == "cnn":
        if problem.train.inputs.shape[1] != 1:
            raise ValueError(f"network: expected one for colour images, got {name!r}")
        return demo_network(problem.train.inputs.shape[-1], seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _BUILDERS[name](problem)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _mlp(problem: Problem) -> nn.Module:
    inputs = problem.train.inputs[0].numel()
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, 100),
        nn.ReLU(),
        nn.Linear(100, 100),
        nn.ReLU(),
        nn.Linear(100, problem.classes),
    )


def _lenet(problem: Problem) -> nn.Module:
    """LeNet-5 with ReLU and max pooling."""
    channels, size = problem.train.inputs.shape[1:3]
    side = (size // 2 - 4) // 2 if size >= 28 else size // 4
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5, padding=0 if size >= 28 else 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * side**2, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, problem.classes),
    )


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(inner)) + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Every second pixel where the image shrinks, zeros for new channels."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.more:
            x = functional.pad(x, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return x


def _resnet(blocks: int) -> Callable[[Problem], nn.Module]:
    """CIFAR-style residual network: three stages of 16, 32 and 64 channels, 6 blocks + 2 layers."""

    def make(problem: Problem) -> nn.Module:
        layers: list[nn.Module] = [
            nn.Conv2d(problem.train.inputs.shape[1], 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        ]
        width = 16
        for stage in range(3):
            for block in range(blocks):
                layers.append(ResidualBlock(width, 16 << stage, 2 if stage and not block else 1))
                width = 16 << stage
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, problem.classes)]
        network = nn.Sequential(*layers)
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
        return network

    return make


class _Attention(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        qkv = self.qkv(self.first_norm(x)).view(count, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(count, length, width))
        return x + self.inner(self.second_norm(x))


class _ViT(nn.Module):
    """A small vision transformer: 16 to 49 patches, two blocks, mean over the patches."""

    def __init__(self, problem: Problem, width: int = 48) -> None:
        super().__init__()
        channels, size = problem.train.inputs.shape[1:3]
        patch = 2 if size <= 8 else 4
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.places = nn.Parameter(0.1 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(_Attention(width, 4, causal=False) for _ in range(2)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, problem.classes))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.blocks(tokens).mean(1))


class _Chars(nn.Module):
    """A character transformer: causal blocks."""

    def __init__(self, problem: Problem, width: int, blocks: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(problem.classes, width)
        self.places = nn.Parameter(0.1 * torch.randn(problem.train.inputs.shape[1], width))
        self.blocks = nn.Sequential(*(_Attention(width, 4, causal=True) for _ in range(blocks)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, problem.classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.letters(x) + self.places))


_BUILDERS: dict[str, Callable[[Problem], nn.Module]] = {
    "mlp": _mlp,
    "lenet": _lenet,
    "resnet8": _resnet(1),
    "resnet20": _resnet(3),
    "resnet32": _resnet(5),
    "vit": _ViT,
    "chars": partial(_Chars, width=48, blocks=2),
    "gpt": partial(_Chars, width=128, blocks=3),
}
NAMES = ("cnn", *_BUILDERS)  # the first is the demo's network
