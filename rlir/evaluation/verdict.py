"""What the gains mean, in plain sentences. A sentence that warns begins with ``Warning:``.

The warnings are about how rewards are known to go wrong: the reward IDM is fooled and the judge is
not; the video grows static (EVA, arXiv 2603.17808, on inverse rewards) or dark (arXiv 2509.23958,
on pixel rewards), or leaves the distribution of real video.
"""

from collections.abc import Mapping
from typing import Any

from rlir.evaluation.summary import value_of

WARNING = "Warning: "

# A change is warned of when it is beyond these and its interval excludes 0: about where an eye
# begins to notice it in a clip beside the base's.
MOTION_FELL = 0.10
DARKER = 0.05
FRECHET_ROSE = 0.05
PSNR_FELL = 0.2  # dB
STATIC = 0.6  # motion below this share of the real clip's is nearly a still picture

Gain = Mapping[str, Any]


def rises(change: Gain) -> bool:
    """Whether the 95% intervals of the change are above 0."""
    low = [interval[0] for interval in _intervals(change)]
    return bool(low) and min(low) > 0


def falls(change: Gain) -> bool:
    """Whether the 95% intervals of the change are below 0."""
    high = [interval[1] for interval in _intervals(change)]
    return bool(high) and max(high) < 0


def _intervals(change: Gain) -> list[list[float]]:
    """Of the absolute and the relative change; a jackknife's need not agree about 0."""
    return [change[name] for name in ("ci95_absolute", "ci95") if change[name] is not None]


def percent(x: float | None) -> str:
    """``+7.5%``; what rounds to nothing has no sign."""
    if x is None:
        return "n/a"
    text = f"{100 * x:+.1f}%"
    return "0.0%" if text in ("+0.0%", "-0.0%") else text


def figure(x: float, digits: int | None = 3) -> str:
    """A figure to that many decimals, or (None) to three significant digits."""
    if digits is not None:
        return f"{x:.{digits}f}"
    if abs(x) < 5e-5:
        return "0"
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:#.3g}"


def describe(change: Gain, digits: int | None = 3) -> str:
    """``0.482 -> 0.518, +7.5% (95% interval +3.1% to +11.9%)``."""
    text = f"{figure(change['before'], digits)} -> {figure(change['after'], digits)}"
    if change["relative"] is not None:
        text += f", {percent(change['relative'])}"
    if change["ci95"] is not None:
        low, high = change["ci95"]
        text += f" (95% interval {percent(low)} to {percent(high)})"
    return text


def verdict(gain: Mapping[str, Gain], ceiling: Mapping[str, Any] | None = None) -> list[str]:
    """Sentences on whether post-training worked, most important first.

    gain: of `summary.gains`. ceiling: the summary of real video, for the share of the way to it.
    """
    out = [_following(gain)]
    if rises(gain["reward_reward"]) and not rises(gain["judge_f1_macro"]):
        out.append(_hacked(gain))
    elif not rises(gain["reward_reward"]):
        out.append(
            f"The reward itself did not rise: {describe(gain['reward_reward'])}. Train for more "
            "steps or with a higher learning rate."
        )
    if "judge_camera_l1" in gain:
        out.append(
            "Camera error as the judge reads it, degrees a step: "
            f"{describe(gain['judge_camera_l1'], 2)}."
        )
    if (sentence := _share_of_ceiling(gain["judge_f1_macro"], ceiling)) is not None:
        out.append(sentence)
    if (sentence := _over_control(gain["judge_f1_macro"])) is not None:
        out.append(sentence)
    warnings = _quality_warnings(gain)
    return out + (warnings or [_quality_held(gain)])


def _following(gain: Mapping[str, Gain]) -> str:
    change = gain["judge_f1_macro"]
    figures = (
        "The judge, an inverse dynamics model that took no part in training, reads them off its "
        f"video with F1 {describe(change)}."
    )
    if rises(change):
        return f"The post-trained model follows its actions better. {figures}"
    if falls(change):
        return f"{WARNING}the post-trained model follows its actions worse. {figures}"
    return f"That the post-trained model follows its actions better is not shown. {figures}"


def _hacked(gain: Mapping[str, Gain]) -> str:
    judge = gain["judge_f1_macro"]
    more = (
        " The judge's interval includes a gain, so more clips may tell."
        if judge["absolute"] > 0
        else ""
    )
    return (
        f"{WARNING}the reward rose and the judge did not. Reward: "
        f"{describe(gain['reward_reward'])}; judge's F1: {describe(judge)}. This is what reward "
        "hacking looks like: the video learned to please the reward model instead of to obey. "
        f"Raise the KL weight or stop earlier.{more}"
    )


def _share_of_ceiling(change: Gain, ceiling: Mapping[str, Any] | None) -> str | None:
    top = value_of(ceiling, "judge_f1_macro")
    if top is None or not rises(change) or top <= change["before"]:
        return None
    share = change["absolute"] / (top - change["before"])
    return (
        f"The gain is {100 * share:.0f}% of the way from the base to the ceiling, the judge's F1 "
        f"of {top:.3f} on real video."
    )


def _over_control(change: Gain) -> str | None:
    over = change["over_control"]
    if over is None:
        return None
    if over > 0:
        return (
            "Against the control, continued pretraining, the judge's F1 is "
            f"{100 * over:.1f}% higher."
        )
    return (
        f"{WARNING}the control, continued pretraining, does as well or better: "
        f"the judge's F1 is {-100 * over:.1f}% lower than with it. The base had not converged, or "
        "post-training was too short."
    )


def _quality_warnings(gain: Mapping[str, Gain]) -> list[str]:
    out = []
    motion, brightness = gain["motion"], gain["brightness"]
    fell = _below(motion, -MOTION_FELL) and motion["after"] < 1 - MOTION_FELL
    if motion["after"] < STATIC and falls(motion):
        out.append(
            f"{WARNING}the video is collapsing into stills: it moves {motion['after']:.2f} times "
            f"as much as real video, the base {motion['before']:.2f}."
        )
    elif fell:
        out.append(
            f"{WARNING}motion shrank: {describe(motion, 2)}, of real video's. Little motion is "
            "easy to read; watch for collapse into stills."
        )
    if _below(brightness, -DARKER) and brightness["after"] < 1 - DARKER:
        out.append(f"{WARNING}the frames darkened: {describe(brightness, 2)}, of real video's.")
    drifted = []
    for idm, name in (("judge", "the judge's"), ("reward", "the reward model's")):
        change = gain[f"frechet_{idm}_idm"]
        if rises(change) and (change["relative"] or 0) > FRECHET_ROSE:
            drifted.append(f"in {name} features {describe(change, None)}")
    if drifted:
        out.append(
            f"{WARNING}the video drifts away from real video. Fréchet distance "
            f"{', '.join(drifted)}."
        )
    psnr = gain["psnr"]
    if falls(psnr) and psnr["absolute"] < -PSNR_FELL:
        out.append(
            f"{WARNING}PSNR fell by {-psnr['absolute']:.2f} dB: {psnr['before']:.2f} -> "
            f"{psnr['after']:.2f}."
        )
    return out


def _below(change: Gain, limit: float) -> bool:
    return falls(change) and change["relative"] is not None and change["relative"] < limit


def _quality_held(gain: Mapping[str, Gain]) -> str:
    psnr, frechet, motion = gain["psnr"], gain["frechet_judge_idm"], gain["motion"]
    return (
        f"Picture quality held: PSNR {psnr['before']:.2f} -> {psnr['after']:.2f} dB, Fréchet "
        f"distance in the judge's features {figure(frechet['before'], None)} -> "
        f"{figure(frechet['after'], None)}, "
        f"motion {motion['before']:.2f} -> {motion['after']:.2f} of real video's."
    )
