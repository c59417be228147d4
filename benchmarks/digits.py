"""Draws the picture of the README from the times of ``python -m funcjac``.

``python benchmarks/digits.py FILE`` (needs matplotlib).
"""

import sys

import torch
from matplotlib import pyplot

from funcjac._demo.demonstration import COUNT, OURS, as_time, main


def draw(path: str) -> None:
    """Draw the times of both networks as bars on one logarithmic axis."""
    timings = main()
    figure, axes = pyplot.subplots(1, len(timings), sharey=True, figsize=(10, 3), layout="tight")
    for ax, (title, table) in zip(axes, timings.items()):
        for name, timing in table.items():
            failed = isinstance(timing, str)
            text = timing.split(":")[0] if failed else as_time(timing)
            width, color = 1 if failed else 1e3 * timing, "tab:blue" if name == OURS else "0.75"
            bar = ax.barh(name, width, color=color)
            ax.bar_label(bar, [text], padding=3, fontsize=8, color="tab:red" if failed else "black")
        ax.set(title=title, xscale="log", xlim=(1, 1e4), xlabel="milliseconds")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    title = f"Jacobians of ten logits by 64 pixels for {COUNT} digits"
    figure.suptitle(f"{title} (torch {torch.__version__}, one CPU thread, float32)", fontsize=10)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(sys.argv[1])
