"""Draw the masks of the attention ops: docs/images/mask-*.png.

    python tools/draw_masks.py

Rows are queries, columns are keys, in stream order. Needs matplotlib.
"""

import math
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from rlir.ops import Mask, causal, diagonal, frame_causal, visible

mpl.use("Agg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).parents[1] / "docs" / "images"
ROWS, COLUMNS, AHEAD, ACTION = 3, 6, 2, 2
IMAGE, FRAMES = ROWS * COLUMNS, 3
COLOURS = ("#ffffff", "#9ecae1", "#fdae6b", "#3182bd")
WORDS = ("not seen", "an image's token", "an action's token", "a token of the query's own image")


def draw_mask(axes: Axes, mask: Mask, frames: bool = True, image: int = IMAGE) -> None:
    block = image + ACTION
    total = image + (FRAMES - 1) * block
    positions = torch.arange(total)
    seen = visible(mask, positions, total)
    frame, slot = (positions + ACTION) // block, (positions + ACTION) % block - ACTION
    kind = torch.where(slot < 0, 2, 1).expand(total, total)
    own = (frame[:, None] == frame) & (slot[:, None] >= 0) & (slot >= 0)
    kind = torch.where(own, 3, kind) if frames else torch.ones_like(kind)
    axes.imshow(kind * seen, cmap=ListedColormap(COLOURS), vmin=0, vmax=3)
    starts = [image + f * block for f in range(FRAMES - 1)] if frames else []
    for start in starts:
        for line in (axes.axhline, axes.axvline):
            line(start - 0.5, color="black", linewidth=0.8)
    axes.set_xticks(torch.arange(total) - 0.5, minor=True)
    axes.set_yticks(torch.arange(total) - 0.5, minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.3)
    axes.tick_params(which="both", length=0, labelsize=8)
    middles = [(image - 1) / 2, *(s + (block - 1) / 2 for s in starts)] if frames else []
    axes.set_xticks(middles, [f"frame {i}" for i in range(len(middles))])
    axes.set_yticks(middles, [f"frame {i}" for i in range(len(middles))], rotation=90, va="center")
    axes.set_xlabel("key", fontsize=9)
    axes.set_ylabel("query", fontsize=9)


def draw_steps(axes: Axes, refresh: bool = False) -> None:
    """When the slots of an image are fed, and until when stand-ins are seen."""
    rows, columns = 4, 6
    across = columns + refresh
    steps = [[r * AHEAD + min(c + 1, columns) for c in range(across)] for r in range(rows)]
    for r in range(rows - 1):
        steps[r][columns - 1] = (r + 1) * AHEAD
    steps[-1][columns:] = [math.nan] * refresh
    axes.imshow(steps, cmap="Blues", vmin=-4, vmax=18)
    for r, row in enumerate(steps):
        for c, step in enumerate(row):
            stand_in = c == columns - 1 and r < rows - 1
            style = "italic" if stand_in else "normal"
            colour = "#a63603" if stand_in else "black"
            words = "" if math.isnan(step) else str(step)
            if stand_in and refresh:
                words += f"-{r * AHEAD + columns - 1}"
            axes.text(c, r, words, ha="center", va="center", style=style, color=colour)
    names = [*range(columns - 1), f"{columns - 1}'", columns - 1] if refresh else range(columns)
    axes.set_xticks(range(across), names, fontsize=8)
    axes.set_yticks(range(rows), range(rows), fontsize=8)
    axes.tick_params(length=0)
    axes.set_xlabel("column", fontsize=9)
    axes.set_ylabel("row", fontsize=9)
    axes.set_title("step of each slot, w = 2\n(red: fed with a stand-in)", fontsize=9)


def save(name: str, figure: plt.Figure, colours: tuple[int, ...]) -> None:
    patches = [Patch(facecolor=COLOURS[i], edgecolor="#bbbbbb", label=WORDS[i]) for i in colours]
    figure.legend(
        handles=patches, loc="lower center", ncols=len(patches), fontsize=8, frameon=False
    )
    figure.savefig(IMAGES / f"mask-{name}.png", dpi=90, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8, 4.3))
    for ax, window, title in zip(axes, (None, 10), ("causal()", "causal(10)"), strict=True):
        draw_mask(ax, causal(window), frames=False)
        ax.set_title(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    save("causal", figure, ())

    figure, axes = plt.subplots(1, 2, figsize=(8, 4.6))
    for ax, window in zip(axes, (None, 2), strict=True):
        draw_mask(ax, frame_causal(IMAGE, ACTION, window))
        words = f"frame_causal({IMAGE}, {ACTION}{'' if window is None else f', {window}'})"
        ax.set_title(words, fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    save("frame-causal", figure, (0, 1, 2, 3))

    figure, axes = plt.subplots(1, 2, figsize=(8, 4.6), width_ratios=(1, 1.4))
    draw_steps(axes[0])
    draw_mask(axes[1], diagonal(ROWS, COLUMNS, AHEAD, ACTION))
    axes[1].set_title(f"diagonal({ROWS}, {COLUMNS}, {AHEAD}, {ACTION})", fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    save("diagonal", figure, (0, 1, 2, 3))

    figure, axes = plt.subplots(1, 2, figsize=(8, 4.6), width_ratios=(1, 1.4))
    draw_steps(axes[0], refresh=True)
    axes[0].set_title("steps, w = 2 (red: from when to when\na stand-in is seen)", fontsize=9)
    mask = diagonal(ROWS, COLUMNS, AHEAD, ACTION, refresh=True)
    draw_mask(axes[1], mask, image=IMAGE + ROWS - 1)
    axes[1].set_title(f"diagonal({ROWS}, {COLUMNS}, {AHEAD}, {ACTION}, refresh=True)", fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    save("refresh", figure, (0, 1, 2, 3))


if __name__ == "__main__":
    main()
