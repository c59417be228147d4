"""256 handwritten digits (see data/README.md), and two small networks that read them."""

from importlib.resources import files

import torch
from torch import Tensor, nn


def digits() -> tuple[Tensor, Tensor]:
    """Images ``(256, 1, 8, 8)`` with values from 0 to 1, and their labels ``(256,)``."""
    text = (files("funcjac._demo") / "data" / "digits.txt").read_text("ascii").split()
    # A character is a pixel: how many of the 16 points of its cell are ink, in base 17.
    pixels = [[int(character, 17) for character in image] for image in text[1::2]]
    return torch.tensor(pixels).view(-1, 1, 8, 8) / 16, torch.tensor(list(map(int, text[::2])))


class RowReader(nn.Module):
    """An LSTM that reads an image from top to bottom, eight pixels at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.lstm(images.squeeze(1))  # (B, 1, 8, 8) -> (B, 8, 32)
        return self.head(states[:, -1])


def make_networks() -> dict[str, nn.Module]:
    """One that vmap can take, and one that it cannot; each maps ``(B, 1, 8, 8)`` to ``(B, 10)``."""
    features = nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 16, 3, 2, 1), nn.Tanh()
    convolutional = nn.Sequential(*features, nn.Flatten(), nn.Linear(256, 10))
    return {"A convolutional network": convolutional, "An LSTM": RowReader()}
