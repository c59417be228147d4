"""Networks that the benchmarks differentiate, for batches; most take single samples too."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """(B, 1, 14, 14) -> (B, 10)."""
    convolutions = [nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3, stride=2), nn.Tanh()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(200, 10))


class LastStep(nn.Module):
    """The last output of an LSTM: (B, steps, 8) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 32, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Arm(nn.Module):
    """Position of the tip of an arm with turning joints: angles (..., joints) -> (..., 3)."""

    def __init__(self, joints: int = 7) -> None:
        super().__init__()
        self.axes = [(2, 1)[joint % 2] for joint in range(joints)]  # z, y, z, ...
        skew = torch.zeros(joints, 3, 3)  # the cross product with the axis of each joint
        for joint, axis in enumerate(self.axes):
            skew[joint, (axis + 2) % 3, (axis + 1) % 3] = 1
            skew[joint, (axis + 1) % 3, (axis + 2) % 3] = -1
        self.register_buffer("skew", skew)
        self.register_buffer("square", skew @ skew)
        self.register_buffer("link", 0.1 + 0.3 * torch.rand(joints, 3, 1))
        self.register_buffer("eye", torch.eye(3))

    def forward(self, angles: Tensor) -> Tensor:
        angles = angles[..., None, None]
        turns = self.eye + angles.sin() * self.skew + (1 - angles.cos()) * self.square
        first, *others = turns.unbind(-3)
        pose, tip = first, first @ self.link[0]
        for turn, link in zip(others, self.link[1:]):
            pose = pose @ turn
            tip = tip + pose @ link
        return tip.squeeze(-1)


class Spectral(nn.Module):
    """A convolution by its lowest frequencies: (B, width, points) -> (B, width, points)."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        weight = torch.randn(width, width, modes, dtype=torch.cfloat) / width
        self.weight, self.modes = nn.Parameter(weight), modes
        self.local = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)[..., : self.modes]
        mixed = torch.einsum("bim,iom->bom", spectrum, self.weight)
        return torch.fft.irfft(mixed, n=x.shape[-1]) + self.local(x)


class Fourier(nn.Module):
    """A Fourier operator of two layers: a function on a grid (B, points) -> (B, points)."""

    def __init__(self, width: int = 16, modes: int = 8) -> None:
        super().__init__()
        self.lift, self.project = nn.Conv1d(1, width, 1), nn.Conv1d(width, 1, 1)
        self.first, self.second = Spectral(width, modes), Spectral(width, modes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(self.lift(x.unsqueeze(1))).tanh()
        return self.project(self.second(hidden).tanh()).squeeze(1)


class Sine(torch.autograd.Function):
    """The sine as a custom function that can be differentiated again and again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * Sine.apply(x + math.pi / 2)


class Waves(nn.Module):
    """Five sums of eight waves: (B, 2) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.sums = nn.Linear(2, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.sums(Sine.apply(self.numbers(x)))
