"""95% intervals by resampling clips: of a figure, and of its change from one model to another.

A clip is the unit, because the frames of a clip are not independent. A draw picks as many clips
as there are, with replacement: a row of a multinomial weights matrix [draws, clips]. Figures are
functions of weighted sums of per-clip statistics, so all draws cost one matrix product, and two
models that were given the same clips share their draws (paired).

The intervals hold for other clips of the same kind, not for other training seeds: pool several
seeds and look at their spread for that.
"""

import math
from typing import Protocol, TypedDict

import numpy as np

from rlir.errors import InputError

# Delete-a-group jackknife: twenty groups, and Student's 97.5% quantile with nineteen degrees.
GROUPS = 20
_STUDENT = 2.0930


class Sample(Protocol):
    """Per-clip statistics that know their figures under any weighting of the clips."""

    @property
    def clips(self) -> int: ...

    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Figures [draws] of weights float64 [draws, clips]."""
        ...


class Interval(TypedDict):
    """A figure and its 95% interval."""

    value: float
    ci95: list[float] | None


class Change(TypedDict):
    """A figure before and after. Signs are those of the figure, whichever way is better.

    ``relative`` = (after - before) / |before|, null where before is 0; ``ci95`` is its interval.
    """

    before: float
    after: float
    absolute: float
    relative: float | None
    ci95: list[float] | None
    ci95_absolute: list[float] | None


def clip_weights(
    clips: int, draws: int = 2000, seed: int = 0, ids: np.ndarray | None = None
) -> np.ndarray:
    """How often each clip is in each draw, float64 [draws, clips].

    ids: int [clips]. Clips of the same id (one clip, given to the models of several seeds) are
    drawn together, since they are not independent.
    """
    if clips < 1 or draws < 1:
        raise InputError(f"bootstrap: clips and draws must be >= 1, got {clips} and {draws}")
    inverse = np.arange(clips) if ids is None else np.unique(ids, return_inverse=True)[1]
    if len(inverse) != clips:
        raise InputError(f"bootstrap: ids must be [{clips}], got [{len(inverse)}]")
    distinct = int(inverse.max()) + 1
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(distinct, np.full(distinct, 1 / distinct), size=draws)
    return np.asarray(weights[:, inverse], np.float64)


def _interval(draws: np.ndarray) -> list[float] | None:
    """2.5% and 97.5% percentiles; draws that are not finite (0 / 0) are left out."""
    finite = draws[np.isfinite(draws)]
    if len(finite) == 0:
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return [float(low), float(high)]


def _relative(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    nothing = np.full_like(before, np.nan)
    return np.asarray(np.divide(after - before, np.abs(before), out=nothing, where=before != 0))


def _number(x: np.ndarray | float) -> float | None:
    return float(x) if np.isfinite(x) else None


def bootstrap(
    sample: Sample, draws: int = 2000, seed: int = 0, ids: np.ndarray | None = None
) -> dict[str, Interval]:
    """Every figure of a sample with its 95% percentile interval over clips."""
    drawn = sample.scores(clip_weights(sample.clips, draws, seed, ids))
    exact = sample.scores(np.ones((1, sample.clips)))
    return {
        name: {"value": float(exact[name][0]), "ci95": _interval(values)}
        for name, values in drawn.items()
    }


def bootstrap_change(
    before: Sample,
    after: Sample,
    draws: int = 2000,
    seed: int = 0,
    ids: np.ndarray | None = None,
) -> dict[str, Change]:
    """Every figure's change, clip n of ``before`` paired with clip n of ``after``.

    To pool seeds, concatenate the clips of their runs on both sides and pass ``ids``.
    """
    if before.clips != after.clips:
        raise InputError(
            f"bootstrap: before and after must have the same clips, got {before.clips} and "
            f"{after.clips}"
        )
    weights = clip_weights(before.clips, draws, seed, ids)
    ones = np.ones((1, before.clips))
    drawn = before.scores(weights), after.scores(weights)
    exact = before.scores(ones), after.scores(ones)
    out: dict[str, Change] = {}
    for name in drawn[0]:
        a, b = exact[0][name], exact[1][name]
        out[name] = {
            "before": float(a[0]),
            "after": float(b[0]),
            "absolute": float(b[0] - a[0]),
            "relative": _number(_relative(a, b)[0]),
            "ci95": _interval(_relative(drawn[0][name], drawn[1][name])),
            "ci95_absolute": _interval(drawn[1][name] - drawn[0][name]),
        }
    return out


def groups(clips: int, ids: np.ndarray | None = None) -> np.ndarray | None:
    """A group below GROUPS for every clip, same id same group; None for fewer clips."""
    inverse = np.arange(clips) if ids is None else np.unique(ids, return_inverse=True)[1]
    return np.asarray(inverse % GROUPS) if int(inverse.max()) + 1 >= GROUPS else None


def _student(value: float, left_out: np.ndarray | None) -> list[float] | None:
    if left_out is None or not np.isfinite(left_out).all():
        return None
    g = len(left_out)
    spread = (g - 1) / g * np.square(left_out - left_out.mean()).sum()
    half = float(_STUDENT * np.sqrt(spread))
    return [value - half, value + half]


def jackknife(value: float, left_out: np.ndarray | None) -> Interval:
    """A figure with the interval that the same figure without each group [GROUPS] gives.

    For figures that resampling biases: a Fréchet distance grows when clips are repeated.
    """
    return {"value": value, "ci95": _student(value, left_out)}


def jackknife_change(
    before: float,
    after: float,
    left_out: tuple[np.ndarray, np.ndarray] | None,
) -> Change:
    """The change of such a figure >= 0; ``left_out`` are both sides without each group [GROUPS].

    The interval of the relative change is taken on the logarithm of the ratio.
    """
    relative = _number(_relative(np.array(before), np.array(after)))
    difference = ci95 = None
    if left_out is not None:
        difference = left_out[1] - left_out[0]
        if min(before, after, *left_out[0], *left_out[1]) > 0:
            log = _student(math.log(after / before), np.log(left_out[1] / left_out[0]))
            ci95 = None if log is None else [math.expm1(x) for x in log]
    return {
        "before": before,
        "after": after,
        "absolute": after - before,
        "relative": relative,
        "ci95": ci95,
        "ci95_absolute": _student(after - before, difference),
    }
