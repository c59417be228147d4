"""``python -m funcjac``: the question the library answers, live.

First on the smallest network that shows it, then on handwritten digits, where the answers that
people write by hand differ in time, in memory, and in whether they work at all.
"""

import statistics
import textwrap
import warnings
from collections.abc import Callable
from importlib.resources import files
from timeit import repeat, timeit

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import jacfwd, jacrev

from funcjac import __version__, batch_jacobian, explain
from funcjac._diagnostics.meter import Meter

# Digits whose Jacobians are computed: the full Jacobian costs the square of that.
WIDTH, COUNT = 100, 128
REFERENCE, OURS = "loop over rows", "funcjac.batch_jacobian"
Timing = float | str  # seconds of a usual run, or what it raises


def main() -> dict[str, dict[str, Timing]]:
    """Ask the question, then answer it for two networks; returns the times."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # times of one thread vary least
    print(f"funcjac {__version__}, torch {torch.__version__}, one CPU thread, float32")
    show_question()
    (images, labels), timings = digits(), {}
    for number, (title, net) in enumerate(make_networks().items(), 2):
        heading(f"{number}. {title}: ten logits by 64 pixels, for each of {COUNT} digits")
        train(net, images, labels)
        timings[title] = compare(make_ways(net, images[:COUNT]))
        for line in str(explain(batch_jacobian(net), images[:COUNT])).splitlines():
            print(textwrap.fill(line, WIDTH, subsequent_indent=" " * 7))
    return timings


def show_question() -> None:
    """A network 5 -> 2 -> 10 and three rows: what comes out, and what was wanted."""
    heading("1. A network with 5 inputs and 10 outputs, 3 rows: the Jacobian of each row")
    net, x = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 10)), torch.randn(3, 5)
    full, of_row = jacobian(net, x), lambda row: jacobian(net, row, create_graph=True)
    between = torch.stack([full[i, :, j] for i in range(3) for j in range(3) if i != j])
    zeros = f"{between.numel()} entries between rows, the largest {between.abs().max():.1g}"
    print(f"{'autograd.functional.jacobian(net, x)':<40}{tuple(full.shape)!s:<15}{zeros}")
    func, call = net, "net"
    for derivative_of_row in (of_row, lambda row: jacobian(of_row, row)):
        func, call = batch_jacobian(func), f"batch_jacobian({call})"
        jac, reference = func(x), torch.stack([derivative_of_row(row) for row in x])
        remark = f"{(jac - reference).abs().max():.1e} from the loop over rows"
        print(f"{call + '(x)':<40}{tuple(jac.shape)!s:<15}{remark}")


def digits() -> tuple[Tensor, Tensor]:
    """Images ``(256, 1, 8, 8)`` with values from 0 to 1, and labels; see data/README.md."""
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


def train(net: nn.Module, images: Tensor, labels: Tensor, steps: int = 150) -> None:
    """Fit the digits, then freeze: Jacobians are looked at here, not trained through."""
    optimizer, loss = torch.optim.Adam(net.parameters(), lr=0.03), torch.zeros(())
    for _ in range(steps):
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval().requires_grad_(False)
    right = (net(images).argmax(1) == labels).float().mean().item()
    print(f"training, step {steps} of {steps}: loss {loss.item():.3f}, {right:.0%} right\n")


def make_ways(net: nn.Module, images: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Five ways as people write them, and funcjac; each returns ``(B, 10, 1, 8, 8)``."""
    ours, rows = batch_jacobian(net), torch.arange(len(images))

    def row(image: Tensor) -> Tensor:
        return net(image.unsqueeze(0)).squeeze(0)

    def sum_trick() -> Tensor:
        x = images.clone().requires_grad_()
        total = net(x).sum(0)
        grads = [torch.autograd.grad(logit, x, retain_graph=True)[0] for logit in total]
        return torch.stack(grads, 1)

    return {
        "full Jacobian, then its diagonal": lambda: jacobian(net, images)[rows, :, rows],
        REFERENCE: lambda: torch.stack([jacobian(row, image) for image in images]),
        "sum trick, output by output": sum_trick,
        "vmap(jacrev)": lambda: torch.vmap(jacrev(row))(images),
        "vmap(jacfwd)": lambda: torch.vmap(jacfwd(row))(images),
        OURS: lambda: ours(images),
    }


def compare(ways: dict[str, Callable[[], Tensor]]) -> dict[str, Timing]:
    """Print what every way gives and costs."""
    reference, timings, first = ways[REFERENCE](), {}, 0.0
    print(f"{tuple(reference.shape)}, entries up to {reference.abs().max():.3g}\n")
    print(f"{'':<34}{'time':>10}{'peak memory':>14}{'difference from the loop':>27}")
    for name, way in ways.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                first = timeit(way, number=1)
                rounds = min(max(int(1 / first), 1), 7)  # of a second in all, if it is not slower
                seconds = statistics.median(repeat(way, number=1, repeat=rounds))
                with Meter() as meter:
                    jac = way()
            except Exception as error:  # whatever a way raises is its row in the table
                sentence = str(error).strip().partition("\n")[0].split(". ")[0]
                timings[name] = text = f"{type(error).__name__}: {sentence.rstrip('.')}"
                print(f"{name:<36}{textwrap.shorten(text, WIDTH - 36, placeholder='...')}")
                continue
        timings[name] = seconds
        difference = "reference" if name == REFERENCE else f"{(jac - reference).abs().max():.1e}"
        print(f"{name:<34}{as_time(seconds):>10}{meter.peak / 2**20:>10.1f} MiB{difference:>27}")
    print(f"\nThe first call of funcjac, verified, took {as_time(first)}.\n")
    return timings


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def as_time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
