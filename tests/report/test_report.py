"""Reports are complete, self-contained, and show what they were given."""

import base64
import io
import itertools
import json
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlir.actions.space import DOOM, ActionSpace, CameraAxis, KeyGroup
from rlir.errors import InputError
from rlir.evaluation.verdict import WARNING
from rlir.report.charts import _tick_text, _ticks, curve_chart
from rlir.report.clips import contact_sheet, draw_clip, write_clip_mp4
from rlir.report.document import MODELS, build, curves, read_report, section, write_report
from rlir.report.html import headline, render_html, write_html
from rlir.report.hud import AGREES, COMMANDED, DIFFERS, _layout, draw_hud, hud_height
from rlir.report.tables import Row, change_text, markdown_table, text_table, tone

KEYS = {
    "preset", "paradigm", "seed", "steps", "command", *MODELS, "gain", "verdict", "unseen_maps",
    "curves", "temperature_sweep", "seconds", "frames_per_second", "environment",
}  # fmt: skip

MINECRAFT = ActionSpace(
    "minecraft",
    (CameraAxis("pitch", "dy", 90.0, 11.4887, 21), CameraAxis("yaw", "dx", 90.0, 11.4887, 21)),
    (
        KeyGroup("forward_back", ("key.keyboard.w", "key.keyboard.s")),
        KeyGroup("left_right", ("key.keyboard.a", "key.keyboard.d")),
        KeyGroup("sprint_sneak", ("key.keyboard.left.control", "key.keyboard.left.shift")),
        KeyGroup("use_attack", ("mouse.1", "mouse.0")),
        KeyGroup("jump", ("key.keyboard.space",)),
    ),
)


class Loads(HTMLParser):
    """What a page would load, and what elements it has."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = {"src", "href", "poster", "srcset", "data", "action"}
        self.sources += [value for name, value in attrs if name in names]


def colour(hex_digits):
    return np.array([int(hex_digits[i : i + 2], 16) for i in (1, 3, 5)])


def has(image, hex_digits):
    return bool((np.abs(image.astype(int) - colour(hex_digits)).max(-1) < 8).any())


# -- report.json -----------------------------------------------------------------------------


def test_every_key_is_always_there(minimal, full):
    assert set(minimal) == set(full) == KEYS
    assert all(full[name] is not None for name in KEYS)
    assert minimal["ceiling"] is None
    assert set(full["unseen_maps"]) == {*MODELS, "gain", "verdict"}


def test_report_is_read_back(tmp_path, full):
    write_report(tmp_path / "report.json", full)
    assert read_report(tmp_path / "report.json") == json.loads(json.dumps(full))


def test_what_is_not_finite_becomes_null(minimal):
    numbers = {"nan": float("nan"), "inf": np.float32("inf"), "one": np.int64(1)}
    keep = ("preset", "paradigm", "seed", "steps", "base", "post", "gain", "verdict")
    report = build(**{name: minimal[name] for name in keep}, seconds=numbers)
    assert report["seconds"] == {"nan": None, "inf": None, "one": 1}
    assert "seconds" in render_html(report)


def test_environment_says_what_a_run_depends_on_and_no_more(minimal):
    environment = minimal["environment"]
    assert environment["packages"]["torch"]
    assert environment["cores"] >= 1
    assert environment["cpu"]
    assert not re.search(r"(?<![\w.])/\w+/", json.dumps(environment))  # no path of a machine


@pytest.mark.parametrize("text", ["[]", "{}", '{"preset": "doom"}', "not json"])
def test_what_is_no_report_is_named(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"report\.json"):
        read_report(path)


def test_unknown_model_is_named(minimal):
    with pytest.raises(InputError, match="got 'other'"):
        section(
            base=minimal["base"],
            post=minimal["post"],
            gain=minimal["gain"],
            verdict=[],
            other=minimal["base"],
        )


def test_curves_are_a_metric_each():
    rows = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.6, "judge_reward": 0.4}]
    assert curves(rows) == {"reward": [[1, 0.5], [2, 0.6]], "judge_reward": [[2, 0.4]]}


# -- report.html -----------------------------------------------------------------------------


def test_page_loads_nothing(tmp_path, full, panels):
    write_html(tmp_path / "report.html", full, panels)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Loads(text)
    assert len(page.sources) == 6
    assert all(source.startswith("data:video/mp4;base64,") for source in page.sources)
    assert "link" not in page.tags
    outside = text.replace("http-equiv", "")
    assert "http" not in outside
    assert "@import" not in text
    assert "url(" not in text


def test_page_plays_every_clip(full, panels):
    for source in Loads(render_html(full, panels)).sources:
        data = base64.b64decode(source.split(",", 1)[1])
        with av.open(io.BytesIO(data)) as container:
            frames = list(container.decode(video=0))
        assert len(frames) == 4
        assert frames[0].format.name == "yuv420p"


def test_page_shows_what_it_was_given(full, panels):
    text = render_html(full, panels)
    assert headline(full) in text
    for title in ("Results", "Clips", "Training", "What is mistaken for what", "By map"):
        assert f"<h2>{title}</h2>" in text
    for title in ("On maps that no training saw", "Sampling temperature", "How to reproduce"):
        assert f"<h2>{title}</h2>" in text
    assert "rlir post-train --preset doom &lt;seed&gt;" in text
    assert "MAP00 &lt;b&gt;" in text  # text is text, whatever it holds
    assert text.count("<video ") == 6
    for what in ("the base", "the post", "the ceiling"):
        assert f": {what}." in text


def test_page_of_the_least_report(minimal):
    text = render_html(minimal)
    assert "<video" not in text
    assert "<h2>Training</h2>" not in text
    assert "<h2>Results</h2>" in text


def test_page_of_a_report_that_was_read_back(tmp_path, full):
    write_report(tmp_path / "report.json", full)
    assert "<h2>Training</h2>" in render_html(read_report(tmp_path / "report.json"))


def test_warnings_stand_out(full):
    said = [full["verdict"][0], f"{WARNING}the reward rose and the judge did not."]
    text = render_html({**full, "verdict": said})
    assert '<li class="warning"><b>Warning</b> The reward rose and the judge did not.' in text


def change(interval, before=0.5, after=0.6):
    relative = (after - before) / before
    return {
        "before": before,
        "after": after,
        "absolute": after - before,
        "relative": relative,
        "ci95": interval,
        "ci95_absolute": interval,
    }


@pytest.mark.parametrize(
    ("judge", "reward", "wanted"),
    [
        ([0.1, 0.3], [0.1, 0.3], "Action following up 20.0%"),
        ([-0.3, -0.1], [0.1, 0.3], "Action following down 20.0%"),
        ([-0.1, 0.3], [0.1, 0.3], "The reward rose, action following did not"),
        ([-0.1, 0.3], [-0.1, 0.3], "No gain in action following shown"),
    ],
)
def test_headline(judge, reward, wanted):
    gain = {"judge_f1_macro": change(judge), "reward_reward": change(reward)}
    assert headline({"gain": gain}) == wanted


# -- tables ----------------------------------------------------------------------------------


def test_tone_knows_which_way_is_better():
    up, down, unclear = [0.1, 0.3], [-0.3, -0.1], [-0.1, 0.1]
    assert tone(Row("x", "x"), change(up)) == "good"
    assert tone(Row("x", "x"), change(down)) == "bad"
    assert tone(Row("x", "x"), change(unclear)) == "even"
    assert tone(Row("x", "x", better="down"), change(down)) == "good"
    ratio = Row("x", "x", better="one")
    assert tone(ratio, change(up, 0.8, 0.98)) == "good"
    assert tone(ratio, change(down, 1.3, 1.1)) == "good"
    assert tone(ratio, change(down, 0.98, 0.8)) == "bad"
    assert tone(ratio, change(up, 0.999, 1.001)) == "even"


def test_change_text():
    assert change_text(change([0.1, 0.3])) == "+20.0% (+10.0 to +30.0)"
    assert change_text(change(None)) == "+20.0%"
    assert change_text(None) == change_text({"relative": None}) == "-"


def test_text_table_is_aligned_and_complete(full):
    lines = text_table(full).splitlines()
    header = lines[0]
    for name in ("base", "post-trained", "change", "control", "floor", "tokenised", "ceiling"):
        assert name in header
    row = next(line for line in lines if line.strip().startswith("PSNR"))
    assert row.index(f"{full['base']['quality']['psnr']:.2f}") == header.index("base")
    assert any(line.strip().startswith("forward / back") for line in lines)
    assert lines[-1].startswith("24 held-out clips; in brackets")


def test_markdown_table_has_a_cell_a_column(minimal):
    lines = markdown_table(minimal).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert any(f"{minimal['post']['judge_idm']['f1_macro']:.3f}" in line for line in lines)


# -- clips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 15), (64, 96)])
def test_clip_is_browser_video(tmp_path, size):
    frames = np.random.default_rng(0).integers(0, 256, (5, *size, 3), np.uint8)
    path = tmp_path / "clip.mp4"
    write_clip_mp4(path, frames, fps=2.0)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays before it is whole
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == 2
        shown = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
    assert [f.shape for f in shown] == [(size[0] + size[0] % 2, size[1] + size[1] % 2, 3)] * 5
    again = tmp_path / "again.mp4"
    write_clip_mp4(again, frames, fps=2.0)
    assert again.read_bytes() == data


def test_drawn_clip_holds_the_frames_as_they_are():
    frames = np.random.default_rng(1).integers(0, 256, (3, 16, 24, 3), np.uint8)
    actions = np.zeros((2, 4), int)
    drawn = draw_clip(frames, actions, None, DOOM, scale=4)
    assert drawn.shape == (3, 64 + hud_height(DOOM, 96), 96, 3)
    assert (drawn[:, :64][:, ::4, ::4] == frames).all()
    with pytest.raises(InputError, match=r"recovered must be \[2, 4\]"):
        draw_clip(frames, actions, actions[:1], DOOM)


def test_strip_colours_tell_right_from_wrong():
    asked = np.array([5, 1, 0, 0])  # forward, no turn
    assert has(draw_hud(DOOM, 384, asked, None), COMMANDED)
    right = draw_hud(DOOM, 384, asked, asked)
    assert has(right, AGREES)
    assert not has(right, DIFFERS)
    assert has(draw_hud(DOOM, 384, asked, np.array([5, 0, 0, 0])), DIFFERS)  # missed
    assert has(draw_hud(DOOM, 384, asked, np.array([5, 1, 0, 1])), DIFFERS)  # invented
    assert has(draw_hud(DOOM, 384, asked, np.array([9, 1, 0, 0])), DIFFERS)  # turned
    assert not has(draw_hud(DOOM, 384, None, None), COMMANDED)


@pytest.mark.parametrize("space", [DOOM, MINECRAFT], ids=lambda s: s.name)
@pytest.mark.parametrize("width", [192, 384])
def test_strip_has_room_for_every_factor(space, width):
    widgets, _ = _layout(space)
    keys = sum(group.size - 1 for group in space.groups)
    assert len(widgets) == keys + len(space.axes)
    for pair in {w.pair for w in widgets}:
        row = [w for w in widgets if w.pair == pair]
        assert row[-1].x + row[-1].width <= 384
        assert all(a.x + a.width <= b.x for a, b in itertools.pairwise(row))
    rest = np.array([axis.size // 2 for axis in space.axes] + [0] * len(space.groups))
    assert draw_hud(space, width, rest, rest).shape == (hud_height(space, width), width, 3)
    assert hud_height(space, width) % 2 == 0


def test_keys_stand_as_on_a_keyboard():
    assert [w.text for w in _layout(DOOM)[0]] == ["W", "A", "S", "D", "FIRE", ""]
    assert {"W", "USE", "ATTACK", "SHIFT", "SPACE"} <= {w.text for w in _layout(MINECRAFT)[0]}


def test_contact_sheet_shows_every_frame(panels):
    sheet = contact_sheet(panels, scale=2)
    height = 32 + hud_height(DOOM, 48)
    assert sheet.width > 4 * 48
    assert sheet.height > 6 * height
    pixels = np.asarray(sheet)
    for panel in panels:
        for view in panel.views:
            large = draw_clip(view.frames, panel.commanded, view.recovered, DOOM, 2)[-1][:32]
            rows = np.lib.stride_tricks.sliding_window_view(pixels[:, :, 0], (1, 48))[:, :, 0]
            assert (rows == large[5, :, 0]).all(-1).any()
    with pytest.raises(InputError, match="there must be a clip"):
        contact_sheet([])


# -- charts ----------------------------------------------------------------------------------


@example(-3.948267169050918e-292, 5.653250551606245e-308)
@example(1.0, 2.0**-52)
@given(st.floats(-1e6, 1e6, allow_subnormal=False), st.floats(0, 1e6, allow_subnormal=False))
def test_ticks_span_the_values(low, extent):
    high = low + extent
    ticks = _ticks(low, high)
    pad = 1e-6 * max(abs(low), abs(high), 1.0)
    assert ticks[0] <= low + pad
    assert ticks[-1] >= high - pad
    assert 2 <= len(ticks) <= 9


@pytest.mark.parametrize(
    "curve", [[[1, 0.5]], [[1, 0.0], [2, 0.0]], [[1, None], [2, 1e-7]], [[s, s] for s in range(99)]]
)
def test_any_curve_is_drawn(curve):
    assert curve_chart("kl", curve).startswith("<svg")
    assert "nan" not in curve_chart("kl", curve)


def test_no_curve_without_values():
    assert curve_chart("kl", []) == curve_chart("kl", [[1, None]]) == ""


@given(st.floats(-1e3, 1e3), st.floats(1e-4, 1e3))
def test_tick_texts_differ(low, extent):
    ticks = _ticks(low, low + max(extent, 0.01 * abs(low)))  # a chart pads what is narrower
    texts = [_tick_text(tick, ticks[1] - ticks[0]) for tick in ticks]
    assert len(set(texts)) == len(texts)
    for tick, text in zip(ticks, texts, strict=True):
        assert float(text) == pytest.approx(tick, abs=1e-6 * max(1.0, abs(tick)))
