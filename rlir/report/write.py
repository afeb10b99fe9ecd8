"""Everything a run leaves for people and programs, out of its figures and clips."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlir.evaluation.summary import Scored
from rlir.report.clips import ClipPanel, View, contact_sheet, draw_clip, write_clip_mp4
from rlir.report.document import write_report
from rlir.report.html import write_html
from rlir.report.tables import text_table

CLIPS = 6


def panels(
    base: Scored, post: Scored, real: np.ndarray, read_real: np.ndarray, count: int = CLIPS
) -> list[ClipPanel]:
    """Clips to show: spread over the maps and chosen by their place alone, not by their score.

    real: uint8 [N, L, H, W, 3]; read_real: what the judge reads off it, int64 [N, T, F].
    """
    picked = np.linspace(0, len(base.maps) - 1, min(count, len(base.maps))).astype(int)
    return [
        ClipPanel(
            f"clip {i}, {base.maps[i]}",
            base.space,
            base.commanded[i],
            (
                View("real", real[i], read_real[i]),
                View("base", base.generated[i], base.judge.recovered[i]),
                View("post-trained", post.generated[i], post.judge.recovered[i]),
            ),
        )
        for i in picked.tolist()
    ]


def write_run(out: Path, report: Mapping[str, Any], shown: Sequence[ClipPanel]) -> None:
    """report.html, report.md's table, mp4s of the clips, a contact sheet; report.json last."""
    clips = out / "clips"
    clips.mkdir(exist_ok=True)
    for panel in shown:
        for view in panel.views:
            frames = draw_clip(view.frames, panel.commanded, view.recovered, panel.space)
            name = f"{panel.title.split(',')[0]}-{view.label}".replace(" ", "-")
            write_clip_mp4(clips / f"{name}.mp4", frames)
    contact_sheet(shown[:3], scale=2).save(out / "clips.png")
    write_html(out / "report.html", report, shown)
    (out / "report.txt").write_text(text_table(report) + "\n", encoding="utf-8")
    write_report(out / "report.json", report)
