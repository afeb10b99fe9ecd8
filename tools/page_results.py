"""Put a run's figures into a page: its table between two markers, its clips and its curves.

python tools/page_results.py runs/demo
python tools/page_results.py runs/doom --page docs/doom.md --name doom --curves
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from rlir.report.document import read_report
from rlir.report.tables import markdown_table

ROOT = Path(__file__).parent.parent
OPEN, CLOSE = "<!-- results -->", "<!-- end of results -->"
KEEP = ("F1 ↑", "reward", "camera", "yaw", "forward", "left", "attack", "PSNR", "Fréchet", "motion")
CURVES = {
    "reward": "reward of the rollouts",
    "eval_judge_f1_macro": "judge F1, small evaluation",
    "eval_psnr": "PSNR, small evaluation, dB",
    "eval_motion": "motion, of real video's",
    "kl": "KL to the base, nats a token",
    "entropy": "entropy, nats a token",
    "grad_norm": "gradient norm",
    "clip_fraction": "clipped tokens",
}


def draw_curves(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Every curve in a panel; a long one faint beneath its moving average."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 4.8), layout="constrained")
    for (name, title), axis in zip(CURVES.items(), axes.flat, strict=True):
        steps, values = np.array(curves[name], dtype=float).T
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        if len(steps) <= 24:
            axis.plot(steps, values, "o-", color="#1f6f8b", markersize=3)
            continue
        reach = len(steps) // 32 + 1
        mean = [values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))]
        axis.plot(steps, values, color="#1f6f8b", alpha=0.25, linewidth=0.8)
        axis.plot(steps, mean, color="#1f6f8b")
    figure.supxlabel("step", fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a post-training run")
    parser.add_argument("--page", type=Path, default=ROOT / "README.md")
    parser.add_argument("--name", default="demo", help="of the pictures in docs/images")
    parser.add_argument("--curves", action="store_true", help="draw NAME-curves.png too")
    arguments = parser.parse_args()
    report = read_report(arguments.run / "report.json")
    rows = markdown_table(report).splitlines()
    kept = rows[:2] + [r for r in rows[2:] if r.startswith(("| **", *(f"| {k}" for k in KEEP)))]
    text = arguments.page.read_text(encoding="utf-8")
    before, _, rest = text.partition(OPEN)
    _, found, after = rest.partition(CLOSE)
    if not found:
        parser.error(f"{arguments.page} must hold the lines {OPEN} and {CLOSE}, found neither")
    table = f"{before}{OPEN}\n" + "\n".join(kept) + f"\n{CLOSE}{after}"
    arguments.page.write_text(table, encoding="utf-8")
    images = ROOT / "docs" / "images"
    images.mkdir(exist_ok=True)
    picture = Image.open(arguments.run / "clips.png").convert("RGB").quantize(128)
    picture.save(images / f"{arguments.name}.png", optimize=True)
    if arguments.curves:
        draw_curves(report["curves"], images / f"{arguments.name}-curves.png")


if __name__ == "__main__":
    main()
