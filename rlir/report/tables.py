"""The table of a report: rows of figures, columns of models. For terminals and for a README."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlir.evaluation.summary import interval_of, value_of
from rlir.evaluation.verdict import falls, figure, percent, rises

Tone = Literal["good", "bad", "even"]

_NEAR = 0.03  # ratios to real video that differ by less look the same

TITLES = {
    "base": "base",
    "post": "post-trained",
    "control": "control",
    "floor": "floor",
    "tokenised": "tokenised",
    "ceiling": "ceiling",
}


@dataclass(frozen=True)
class Row:
    """A figure: its name in the gains, and how people read it."""

    key: str
    label: str
    digits: int | None = 3
    """Decimals; three significant digits if None."""
    better: Literal["up", "down", "one"] = "up"

    @property
    def arrow(self) -> str:
        return {"up": "↑", "down": "↓", "one": "→1"}[self.better]

    def format(self, value: float | None) -> str:
        return "-" if value is None else figure(value, self.digits)


def _following(idm: str) -> tuple[Row, ...]:
    return (
        Row(f"{idm}_f1_macro", "F1"),
        Row(f"{idm}_precision_macro", "precision"),
        Row(f"{idm}_recall_macro", "recall"),
        Row(f"{idm}_reward", "reward, share of factors"),
        Row(f"{idm}_reward_joint", "share of whole actions"),
        Row(f"{idm}_camera_l1", "camera error, degrees", 2, "down"),
    )


_PICTURE = (
    Row("psnr", "PSNR, dB", 2),
    Row("ssim", "SSIM"),
    Row("frechet_judge_idm", "Fréchet distance, judge", None, "down"),
    Row("frechet_reward_idm", "Fréchet distance, reward model", None, "down"),
    Row("motion", "motion, of real video's", 2, "one"),
    Row("brightness", "brightness, of real video's", 2, "one"),
)


def sections(report: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """Titled groups of the rows that this report has figures for."""
    tasks = report["base"]["judge_idm"]["f1_per_task"]
    groups: list[tuple[str, Sequence[Row]]] = [
        ("Read by the judge", _following("judge")),
        ("F1 by action, judge", [Row(f"judge_f1/{name}", _words(name)) for name in tasks]),
        ("Read by the reward model", _following("reward")),
        ("Picture", _PICTURE),
    ]
    return [
        (title, [row for row in rows if value_of(report["base"], row.key) is not None])
        for title, rows in groups
    ]


def _words(name: str) -> str:
    return name.replace("_", " / ") if name in ("forward_back", "left_right") else name


def models(report: Mapping[str, Any]) -> list[str]:
    """The columns: the models that this report has."""
    return [name for name in TITLES if report.get(name) is not None]


def tone(row: Row, change: Mapping[str, Any]) -> Tone:
    """Whether a change is for the better, as far as its interval can tell."""
    up, down = rises(change), falls(change)
    nearer = abs(change["before"] - 1) - abs(change["after"] - 1)
    if not (up or down) or (row.better == "one" and abs(nearer) < _NEAR):
        return "even"
    if row.better == "one":
        up = nearer > 0
    return "good" if up == (row.better != "down") else "bad"


def change_text(change: Mapping[str, Any] | None) -> str:
    """``+7.5% (+3.1 to +11.9)``."""
    if change is None or change["relative"] is None:
        return "-"
    text = percent(change["relative"])
    if change["ci95"] is not None:
        low, high = (percent(x).removesuffix("%") for x in change["ci95"])
        text += f" ({low} to {high})"
    return text


def _cell(row: Row, summary: Mapping[str, Any], interval: bool) -> str:
    text = row.format(value_of(summary, row.key))
    ci95 = interval_of(summary, row.key) if interval else None
    return text if ci95 is None else f"{text} ({row.format(ci95[0])} to {row.format(ci95[1])})"


def _lines(report: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Titled groups of lines: label, a cell a model, the change after post-trained."""
    out = []
    for title, rows in sections(report):
        lines = []
        for row in rows:
            line = [f"{row.label} {row.arrow}"]
            for name in models(report):
                line.append(_cell(row, report[name], name in ("base", "post")))
                if name == "post":
                    line.append(change_text(report["gain"].get(row.key)))
            lines.append(line)
        out.append((title, lines))
    return out


def _header(report: Mapping[str, Any]) -> list[str]:
    out = [""]
    for name in models(report):
        out.append(TITLES[name])
        if name == "post":
            out.append("change")
    return out


def clips_and_continuations(summary: Mapping[str, Any]) -> str:
    """What was scored, in a few words."""
    clips, total = summary["clips"], summary["continuations"]
    return f"{clips} held-out clips" + (f", each {total // clips} times" if total > clips else "")


def text_table(report: Mapping[str, Any]) -> str:
    """The table for a terminal, with 95% intervals over clips in brackets."""
    groups = _lines(report)
    header = _header(report)
    every = [header, *(line for _, lines in groups for line in lines)]
    widths = [max(len(line[i]) + 2 * (i == 0) for line in every) for i in range(len(header))]

    def render(line: list[str], indent: str = "") -> str:
        first = (indent + line[0]).ljust(widths[0])
        rest = (cell.ljust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        return "  ".join([first, *rest]).rstrip()

    out = [render(header)]
    for title, lines in groups:
        out += ["", title, *(render(line, "  ") for line in lines)]
    counts = clips_and_continuations(report["base"])
    out += ["", f"{counts}; in brackets: 95% intervals over clips"]
    return "\n".join(out)


def markdown_table(report: Mapping[str, Any]) -> str:
    """The table for a README."""
    header = _header(report)
    out = [_markdown(header), _markdown(["---"] + ["---:"] * (len(header) - 1))]
    for title, lines in _lines(report):
        out.append(_markdown([f"**{title}**"] + [""] * (len(header) - 1)))
        out += [_markdown(line) for line in lines]
    return "\n".join(out)


def _markdown(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
