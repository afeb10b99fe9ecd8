"""report.html: one file that needs nothing else, with figures, charts and clips."""

import base64
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlir.checkpoints import write_bytes
from rlir.evaluation.summary import interval_of, value_of
from rlir.evaluation.verdict import WARNING, falls, percent, rises
from rlir.report import tables
from rlir.report.charts import CURVE_LABELS, change_plot, confusion_chart, curve_chart, dot_plot
from rlir.report.clips import ClipPanel, draw_clip, write_clip_mp4
from rlir.report.tables import Row

FPS = 2.0  # slow enough to read the keys

_TILES = (
    Row("judge_f1_macro", "F1, judge"),
    Row("judge_reward", "Reward, judge"),
    Row("judge_camera_l1", "Camera error, judge", 2, "down"),
    Row("reward_reward", "Reward"),
    Row("frechet_judge_idm", "Fréchet, judge", None, "down"),
)
_DOTS = (
    Row("judge_f1_macro", "F1, judge"),
    Row("judge_camera_l1", "Camera error, judge, degrees", 2, "down"),
)
_CHANGES = (
    Row("judge_f1_macro", "F1, judge"),
    Row("judge_reward", "reward, judge"),
    Row("judge_camera_l1", "camera error, judge", 2, "down"),
    Row("reward_f1_macro", "F1, reward model"),
    Row("reward_reward", "reward, reward model"),
    Row("reward_camera_l1", "camera error, reward model", 2, "down"),
    Row("psnr", "PSNR", 2),
    Row("ssim", "SSIM"),
    Row("frechet_judge_idm", "Fréchet distance, judge", None, "down"),
    Row("motion", "motion", 2, "one"),
    Row("brightness", "brightness", 2, "one"),
)


def headline(report: Mapping[str, Any]) -> str:
    """The result in a few words, by the judge."""
    change = report["gain"]["judge_f1_macro"]
    if rises(change):
        return f"Action following up {abs(100 * (change['relative'] or 0)):.1f}%"
    if falls(change):
        return f"Action following down {abs(100 * (change['relative'] or 0)):.1f}%"
    if rises(report["gain"]["reward_reward"]):
        return "The reward rose, action following did not"
    return "No gain in action following shown"


def _facts(report: Mapping[str, Any]) -> str:
    return " · ".join(
        (
            str(report["preset"]),
            str(report["paradigm"]),
            f"seed {report['seed']}",
            f"{report['steps']} steps",
            tables.clips_and_continuations(report["base"]),
            str(report["environment"].get("date", "")),
        )
    )


def _sentence(text: str) -> str:
    """A sentence of the verdict as it stands alone on a page."""
    return text[:1].upper() + text[1:].replace(" -> ", " → ")


def _figure(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _clip(panel: ClipPanel, directory: Path) -> dict[str, Any]:
    views = []
    for view in panel.views:
        drawn = draw_clip(view.frames, panel.commanded, view.recovered, panel.space)
        path = directory / "clip.mp4"
        write_clip_mp4(path, drawn, FPS)
        right, total = panel.followed(view)
        views.append(
            {
                "label": view.label,
                "right": right,
                "total": total,
                "mp4": base64.b64encode(path.read_bytes()).decode(),
                "height": drawn.shape[1],
                "width": drawn.shape[2],
            }
        )
    return {"title": panel.title, "frames": len(panel.commanded) + 1, "views": views}


def _curves(curves: Mapping[str, Any]) -> list[Markup]:
    known = [name for name in CURVE_LABELS if name in curves]
    names = known + sorted(set(curves) - set(known))
    return [chart for name in names if (chart := curve_chart(name, curves[name]))]


def _heat(report: Mapping[str, Any]) -> list[tuple[str, list[Markup]]]:
    """For every action, what the judge takes it for, of base and of post."""
    base, post = (report[name]["judge_idm"].get("confusion", {}) for name in ("base", "post"))
    return [
        (
            task.replace("_", " / "),
            [confusion_chart(base[task], "base"), confusion_chart(post[task], "post-trained")],
        )
        for task in base
    ]


def _seconds(seconds: Mapping[str, float | None]) -> list[tuple[str, bool, float, float]]:
    """Name, whether it is a part of a stage, seconds, share of the longest. The total is last."""
    spent = {name: value for name, value in seconds.items() if value is not None}
    longest = max(spent.values(), default=0.0) or 1.0
    names = sorted(spent, key=lambda name: name == "total")
    return [(n.split(".")[-1], "." in n, spent[n], spent[n] / longest) for n in names]


def _environment(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    out = []
    for name, value in report["environment"].items():
        if isinstance(value, Mapping):
            out += [(str(k), str(v)) for k, v in value.items()]
        elif value is not None:
            out.append((name.replace("_", " "), str(value)))
    if peak := report.get("peak_memory_bytes"):
        out.append(("peak memory", f"{peak / 2**30:.2f} GiB"))
    return out


def _maps(report: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    before, after = report["base"].get("maps") or {}, report["post"].get("maps") or {}
    return [(name, before[name], after[name]) for name in before if name in after]


def render_html(report: Mapping[str, Any], clips: Sequence[ClipPanel] = ()) -> str:
    """The page as text. ``report`` is of `document.build` or `document.read_report`."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"sentence": _sentence, "figure": _figure}
    sweep = report.get("temperature_sweep") or []
    with tempfile.TemporaryDirectory() as directory:
        drawn = [_clip(panel, Path(directory)) for panel in clips]
    return environment.get_template("report.html.j2").render(
        r=report,
        css=Markup((here / "report.css").read_text(encoding="utf-8")),
        js=Markup((here / "report.js").read_text(encoding="utf-8")),
        headline=headline(report),
        facts=_facts(report),
        lead=_sentence(report["verdict"][0].removeprefix(WARNING)),
        warning=WARNING,
        tiles=[row for row in _TILES if row.key in report["gain"]],
        dots=[dot_plot(report, row) for row in _DOTS if row.key in report["gain"]],
        changes=change_plot(report["gain"], _CHANGES, "Change from base to post-trained"),
        clips=drawn,
        fps=FPS,
        curves=_curves(report.get("curves") or {}),
        heat=_heat(report),
        maps=_maps(report),
        sweep_names=list(sweep[0]) if sweep else [],
        environment=_environment(report),
        seconds=_seconds(report["seconds"]),
        sections=tables.sections,
        models=tables.models,
        titles=tables.TITLES,
        tone=tables.tone,
        percent=percent,
        value_of=value_of,
        interval_of=interval_of,
    )


def write_html(path: Path, report: Mapping[str, Any], clips: Sequence[ClipPanel] = ()) -> None:
    """Write report.html."""
    write_bytes(path, render_html(report, clips).encode())
