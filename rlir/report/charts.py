"""Charts of a report as inline SVG: crisp, small, and coloured by the page's own variables.

Colours are CSS classes (``c-base``, ``c-post``, ...), so that one drawing fits light and dark.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from rlir.evaluation.summary import interval_of, value_of
from rlir.evaluation.verdict import percent
from rlir.report.tables import TITLES, Row, models, tone

Curve = Sequence[Sequence[float]]

CURVE_LABELS = {
    "eval_judge_f1_macro": "Test clips: F1, judge",
    "eval_judge_reward": "Test clips: reward, judge",
    "eval_reward_reward": "Test clips: reward",
    "eval_motion": "Test clips: motion, of real video's",
    "eval_brightness": "Test clips: brightness",
    "eval_psnr": "Test clips: PSNR, dB",
    "reward": "Reward in training",
    "judge_reward": "Reward by the judge",
    "judge_f1_macro": "F1 by the judge",
    "reward_group_std": "Reward spread in a group",
    "kl": "KL to the base",
    "entropy": "Entropy a token, nats",
    "grad_norm": "Gradient norm",
    "clip_fraction": "Clip fraction",
    "ratio": "Importance ratio",
}


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that span [low, high], about ``count`` of them."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # too little for floats to count in steps
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick_text(tick: float, step: float) -> str:
    """As many digits as tell neighbours apart."""
    if abs(tick) < step / 2:
        return "0"
    decimals = math.ceil(-math.log10(step) - 1e-9) + (f"{step:.1e}"[:3] == "2.5")
    return f"{tick:.{max(decimals, 0)}f}" if -2 < decimals < 6 else f"{tick:.4g}"


def _svg(
    width: float, height: float, parts: Sequence[str], label: str, *, fixed: bool = False
) -> Markup:
    """Fills its container, or keeps its size in pixels (``fixed``)."""
    body = "".join(parts)
    style = f' style="width:{width:g}px"' if fixed else ""
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}"{style} role="img" aria-label="{escape(label)}">'
        f"{body}</svg>"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", cls: str = "t") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{cls}">{escape(text)}</text>'
    )


def _line(x0: float, y0: float, x1: float, y1: float, cls: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{cls}"/>'


def _dot(x: float, y: float, radius: float, cls: str, title: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{cls}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _path(points: Sequence[tuple[float, float]], cls: str) -> str:
    at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{at}" class="{cls}"/>'


def _smooth(values: Sequence[float], reach: int) -> list[float]:
    """Mean over ``reach`` neighbours to both sides, fewer at the ends."""
    out = []
    for i in range(len(values)):
        window = values[max(0, i - reach) : i + reach + 1]
        out.append(sum(window) / len(window))
    return out


def curve_chart(name: str, curve: Curve) -> Markup:
    """One curve over steps. A long one is drawn faint beneath its moving average."""
    points = [(p[0], p[1]) for p in curve if p[1] is not None]
    if not points:
        return Markup("")
    width, height, left, right, top, bottom = 330, 178, 44, 12, 28, 22
    low, high = min(v for _, v in points), max(v for _, v in points)
    if high - low < 1e-3 * abs(high):  # not to magnify rounding errors
        low, high = low - 0.01 * abs(low), high + 0.01 * abs(high)
    ticks = _ticks(low, high, 3)
    steps = [s for s, _ in points]
    span = (max(steps) - min(steps)) or 1

    def x(step: float) -> float:
        return left + (width - left - right) * (step - min(steps)) / span

    def y(value: float) -> float:
        return (
            height - bottom - (height - top - bottom) * (value - ticks[0]) / (ticks[-1] - ticks[0])
        )

    parts = [_text(0, 12, CURVE_LABELS.get(name, name.replace("_", " ")), cls="t title")]
    parts.append(_text(width - right, 12, f"{points[-1][1]:.4g}", anchor="end", cls="t value"))
    for tick in ticks:
        parts.append(_line(left, y(tick), width - right, y(tick), "grid"))
        label = _tick_text(tick, ticks[1] - ticks[0])
        parts.append(_text(left - 6, y(tick) + 3.5, label, anchor="end", cls="t small"))
    for step in sorted({steps[0], steps[-1]}):
        anchor = "end" if step == steps[-1] and len(steps) > 1 else "start"
        parts.append(_text(x(step), height - 6, f"step {step:g}", anchor=anchor, cls="t small"))
    drawn = [(x(s), y(v)) for s, v in points]
    if len(points) > 24:
        smooth = _smooth([v for _, v in points], max(1, len(points) // 16))
        parts.append(_path(drawn, "curve faint"))
        parts.append(_path([(x(s), y(v)) for s, v in zip(steps, smooth, strict=True)], "curve"))
    else:
        parts.append(_path(drawn, "curve"))
        for (s, v), (px, py) in zip(points, drawn, strict=True):
            parts.append(_dot(px, py, 2.6, "c-post", f"step {s:g}: {v:.4g}"))
    return _svg(width, height, parts, name)


def dot_plot(report: Mapping[str, Any], row: Row) -> Markup:
    """One figure of every model, with its 95% interval where it has one."""
    order = ("floor", "base", "control", "post", "tokenised", "ceiling")
    names = [name for name in order if name in models(report)]
    found = [(name, value_of(report[name], row.key)) for name in names]
    values = [(name, value) for name, value in found if value is not None]
    intervals = {name: interval_of(report[name], row.key) for name, _ in values}
    ends = [v for _, v in values] + [v for i in intervals.values() if i for v in i]
    ticks = _ticks(min(ends), max(ends))
    width, left, right, top, step = 520, 104, 52, 30, 24
    height = top + step * len(values) + 22

    def x(value: float) -> float:
        return left + (width - left - right) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    title = f"{row.label} {row.arrow}"
    parts = [_text(0, 14, title, cls="t title")]
    for tick in ticks:
        parts.append(_line(x(tick), top, x(tick), height - 20, "grid"))
        parts.append(_text(x(tick), height - 6, f"{tick:.4g}", anchor="middle", cls="t small"))
    for i, (name, value) in enumerate(values):
        y = top + step * (i + 0.5)
        strong = " strong" if name in ("base", "post") else ""
        parts.append(_text(0, y + 4, TITLES[name], cls="t" + strong))
        if interval := intervals[name]:
            parts.append(_line(x(interval[0]), y, x(interval[1]), y, f"whisker s-{name}"))
        parts.append(_dot(x(value), y, 5.5, f"c-{name}", f"{TITLES[name]}: {row.format(value)}"))
        parts.append(_text(width, y + 4, row.format(value), anchor="end", cls="t value" + strong))
    return _svg(width, height, parts, title)


def change_plot(gain: Mapping[str, Any], rows: Sequence[Row], title: str) -> Markup:
    """Relative changes with their 95% intervals, green or red where they exclude 0."""
    shown = [r for r in rows if r.key in gain and gain[r.key]["relative"] is not None]
    if not shown:
        return Markup("")
    ends = [0.0]
    for row in shown:
        change = gain[row.key]
        ends += [change["relative"], *(change["ci95"] or ())]
    ticks = _ticks(100 * min(ends), 100 * max(ends))
    width, left, right, top, step = 520, 196, 58, 34, 25
    height = top + step * len(shown) + 22

    def x(value: float) -> float:
        return left + (width - left - right) * (100 * value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [_text(0, 14, title, cls="t title")]
    for tick in ticks:
        cls = "zero" if abs(tick) < 1e-9 else "grid"
        parts.append(_line(x(tick / 100), top, x(tick / 100), height - 20, cls))
        label = f"{tick:+.4g}%" if cls == "grid" else "0"
        parts.append(_text(x(tick / 100), height - 6, label, anchor="middle", cls="t small"))
    for i, row in enumerate(shown):
        y, change = top + step * (i + 0.5), gain[row.key]
        verdict = tone(row, change)
        parts.append(_text(0, y + 4, f"{row.label} {row.arrow}"))
        if change["ci95"]:
            low, high = change["ci95"]
            parts.append(_line(x(low), y, x(high), y, f"whisker s-{verdict}"))
        text = percent(change["relative"])
        parts.append(_dot(x(change["relative"]), y, 5, f"c-{verdict}", f"{row.label}: {text}"))
        parts.append(_text(width, y + 4, text, anchor="end", cls=f"t value f-{verdict}"))
    return _svg(width, height, parts, title)


def _class_name(label: str, classes: int) -> str:
    """A class for people: ``none``, a key, degrees; of a single mouse button ``held``."""
    if label == "-":
        return "none"
    if classes == 2 and label.isdigit():
        return "held"
    return "0" if label == "+0" else label.upper()


def confusion_chart(table: Mapping[str, Any], title: str) -> Markup:
    """Shares of what was recovered for each commanded class; commanded in rows. Fixed size."""
    labels, counts = table["labels"], table["counts"]
    n = len(labels)
    labels = [_class_name(label, n) for label in labels]
    cell, top = (33.0 if n > 5 else 34.0), 44.0
    left = 12 + 7.2 * max(map(len, labels))
    width, height = left + n * cell + 2, top + n * cell + 2
    parts = [_text(0, 12, title, cls="t title")]
    for i, row in enumerate(counts):
        total = sum(row)
        parts.append(_text(left - 6, top + (i + 0.5) * cell + 3.5, labels[i], anchor="end"))
        parts.append(_text(left + (i + 0.5) * cell, top - 6, labels[i], anchor="middle"))
        for j, count in enumerate(row):
            share = count / total if total else 0.0
            x, y = left + j * cell, top + i * cell
            note = escape(f"asked {labels[i]}, seen {labels[j]}: {count} of {total}")
            cls = "hit" if i == j else "miss"
            parts.append(
                f'<rect x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{cell - 1:.1f}" '
                f'height="{cell - 1:.1f}" rx="2" class="{cls}" fill-opacity="{share:.2f}">'
                f"<title>{note}</title></rect>"
            )
            if share >= 0.1:
                parts.append(
                    _text(
                        x + cell / 2,
                        y + cell / 2 + 3.2,
                        f"{100 * share:.0f}",
                        anchor="middle",
                        cls="t cell over" if share > 0.55 else "t cell",
                    )
                )
    return _svg(width, height, parts, title, fixed=True)
