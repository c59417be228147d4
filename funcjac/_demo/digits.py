"""256 handwritten digits (see data/README.md), and two small networks that read them."""

from importlib.resources import files

import torch
from torch import Tensor, nn


def digits() -> tuple[Tensor, Tensor]:
    """Images ``(256, 1, 8, 8)`` with values from 0 to 1, and their labels ``(256,)``."""
    lines = (files("funcjac._demo") / "data" / "digits.txt").read_text("ascii").splitlines()
    pairs = [line.split() for line in lines]
    # A character is a pixel: how many of the 16 points of its cell are ink, in base 17.
    pixels = [[int(character, 17) for character in image] for _, image in pairs]
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return images, torch.tensor([int(label) for label, _ in pairs])


class RowReader(nn.Module):
    """An LSTM that reads an image from top to bottom, eight pixels at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.lstm(images.squeeze(1))  # (B, 1, 8, 8) -> (B, 8, 32)
        return self.head(states[:, -1])


def make_networks() -> dict[str, nn.Module]:
    """One that vmap can take, and one that it cannot; each maps ``(B, 1, 8, 8)`` to ``(B, 10)``."""
    convolutional = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    return {"A convolutional network": convolutional, "An LSTM": RowReader()}
