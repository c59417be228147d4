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
        for name, (seconds, remark) in table.items():
            text = remark.split(":")[0]
            if seconds is not None:
                text = as_time(seconds) + (" (slow fallback)" if remark else "")
            bar = ax.barh(
                name, 1e3 * (seconds or 1e-3), color="tab:blue" if name == OURS else "0.75"
            )
            ax.bar_label(bar, [text], padding=3, fontsize=8, color="tab:red" if remark else "black")
        ax.set(title=title, xscale="log", xlim=(1, 1e4), xlabel="milliseconds")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    title = f"Jacobians of ten logits by 64 pixels for {COUNT} digits"
    figure.suptitle(f"{title} (torch {torch.__version__}, one CPU thread, float32)", fontsize=10)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(sys.argv[1])
