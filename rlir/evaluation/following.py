"""Action following: how well the actions read off a video agree with those it was given.

MineWorld's protocol (arXiv 2504.08388): every camera axis and every key group is a task; the
labels of a task are pooled over all clips and frames; a task has macro and micro precision,
recall and F1 with zero_division = 0 (scikit-learn's); the figures are unweighted means over the
tasks. MineWorld scores key tasks and the camera apart; here the camera axes are tasks as well,
and the camera error is given besides.

All figures are functions of confusion counts. They are kept a clip, so that a bootstrap over
clips is a matrix product.

Legend: N clips, T actions a clip, F factors (camera axes, then key groups), C classes of a
factor, D draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlir.actions.space import ActionSpace
from rlir.errors import InputError


def _check(commanded: np.ndarray, recovered: np.ndarray, space: ActionSpace) -> None:
    if commanded.ndim != 3 or commanded.shape[2] != len(space.factors):
        raise InputError(
            f"following: commanded must be [clips, actions, {len(space.factors)}] for "
            f"{space.name}, got shape {commanded.shape}"
        )
    if recovered.shape != commanded.shape:
        raise InputError(
            f"following: recovered must have shape {commanded.shape}, got {recovered.shape}"
        )
    if commanded.size == 0:
        raise InputError(f"following: there must be an action, got shape {commanded.shape}")
    sizes = np.array(space.factor_sizes)
    for name, classes in (("commanded", commanded), ("recovered", recovered)):
        if (classes < 0).any() or (classes >= sizes).any():
            raise InputError(
                f"following: {name} must be classes below {space.factor_sizes}, got "
                f"{classes.min()} to {classes.max()}"
            )


def confusion_counts(
    commanded: np.ndarray, recovered: np.ndarray, space: ActionSpace
) -> tuple[np.ndarray, ...]:
    """How often class i was commanded and class j recovered, of each clip.

    commanded, recovered: int64 [N, T, F]. Returns one int64 [N, C, C] a factor, commanded in
    rows.
    """
    commanded, recovered = np.asarray(commanded), np.asarray(recovered)
    _check(commanded, recovered, space)
    n = len(commanded)
    clip = np.arange(n)[:, None]
    counts = []
    for f, c in enumerate(space.factor_sizes):
        cell = (clip * c + commanded[..., f]) * c + recovered[..., f]
        counts.append(np.bincount(cell.ravel(), minlength=n * c * c).reshape(n, c, c))
    return tuple(counts)


@dataclass(frozen=True)
class Tally:
    """What a set of clips scored, a clip: enough for every figure and for its bootstrap."""

    space: ActionSpace
    counts: tuple[np.ndarray, ...]
    """Confusion counts of each factor, int64 [N, C, C], commanded in rows."""
    joint: np.ndarray
    """Actions of which every factor was recovered, int64 [N]."""

    @property
    def clips(self) -> int:
        return len(self.joint)

    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every figure with clip n counted ``weights[d, n]`` times; float64 [D] each.

        A task's figures are ``f1/NAME``, ``precision/NAME``, ``recall/NAME``.
        """
        weights = np.asarray(weights, np.float64)
        pooled = [
            (weights @ count.reshape(self.clips, -1)).reshape(-1, *count.shape[1:])
            for count in self.counts
        ]
        actions = pooled[0].sum((1, 2))
        names = self.space.factor_names
        tasks = dict(zip(names, map(_precision_recall_f1, pooled), strict=True))
        match = [np.einsum("dcc->d", cell) / actions for cell in pooled]
        out = {}
        for i, kind in enumerate(("precision", "recall", "f1")):
            out[f"{kind}_macro"] = np.mean([tasks[name][i] for name in names], 0)
            # Over all classes of a task every false positive is a false negative of another
            # class: pooled precision, recall and F1 are all the share of matches.
            out[f"{kind}_micro"] = np.mean(match, 0)
        out["reward"] = np.mean(match, 0)
        out["reward_joint"] = weights @ self.joint / actions
        if axes := self.space.axes:
            degrees, bins = [], []
            for axis, cell in zip(axes, pooled, strict=False):  # the axes stand first
                centres, index = axis.centres(), np.arange(axis.size)
                degrees.append(np.einsum("dij,ij->d", cell, _distance(centres)) / actions)
                bins.append(np.einsum("dij,ij->d", cell, _distance(index)) / actions)
            out["camera_l1"], out["camera_l1_bins"] = np.mean(degrees, 0), np.mean(bins, 0)
        for i, kind in enumerate(("precision", "recall", "f1")):
            out |= {f"{kind}/{name}": tasks[name][i] for name in names}
        return out


def _distance(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(x[:, None] - x[None, :]))


def _precision_recall_f1(cell: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Macro precision, recall, F1 [D] of counts [D, C, C], zero_division = 0.

    A class that was neither commanded nor recovered has no part in the mean, as in
    scikit-learn; one that was either but never both scores 0.
    """
    hits = np.einsum("dcc->dc", cell)
    true, found = cell.sum(2), cell.sum(1)
    present = true + found > 0
    classes = present.sum(1)

    def mean(over: np.ndarray, under: np.ndarray) -> np.ndarray:
        ratio = np.divide(over, under, out=np.zeros_like(over), where=under > 0)
        return np.asarray(ratio.sum(1) / classes)

    return mean(hits, found), mean(hits, true), mean(2 * hits, true + found)


def tally(commanded: np.ndarray, recovered: np.ndarray, space: ActionSpace) -> Tally:
    """Count int64 [N, T, F] commanded against recovered classes, a clip."""
    counts = confusion_counts(commanded, recovered, space)
    joint = (np.asarray(commanded) == np.asarray(recovered)).all(2).sum(1)
    return Tally(space, counts, joint)


def join(tallies: Sequence[Tally]) -> Tally:
    """The clips of several runs, one after another."""
    counts = tuple(np.concatenate(c) for c in zip(*(t.counts for t in tallies), strict=True))
    return Tally(tallies[0].space, counts, np.concatenate([t.joint for t in tallies]))


def following(counted: Tally) -> dict[str, Any]:
    """All figures of action following, as plain numbers.

    ``precision_macro``, ``recall_macro``, ``f1_macro``: mean over tasks of the mean over classes.
    ``precision_micro``, ``recall_micro``, ``f1_micro``: mean over tasks of the figure pooled over
    all classes of the task, none and rest included, as MineWorld does. Pooled over all classes
    the three are the same number, the share of matches: use the macro figures.
    ``precision_per_task``, ``recall_per_task``, ``f1_per_task``: macro figures by task.
    ``camera_l1``: mean difference between bin centres in degrees, over axes, frames and clips;
    ``camera_l1_bins``: the same in bins of the action space (MineWorld counts in VPT's bins).
    ``reward``: share of factors that match (RLIR's reward with a match per factor);
    ``reward_joint``: share of actions all of whose factors match.
    ``confusion``: labels and counts of each task, commanded in rows.
    """
    scores = {k: float(v[0]) for k, v in counted.scores(np.ones((1, counted.clips))).items()}
    out: dict[str, Any] = {k: v for k, v in scores.items() if "/" not in k}
    factors = counted.space.factors
    for kind in ("precision", "recall", "f1"):
        out[f"{kind}_per_task"] = {f.name: scores[f"{kind}/{f.name}"] for f in factors}
    out["confusion"] = {
        factor.name: {"labels": list(factor.labels), "counts": counts.sum(0).tolist()}
        for factor, counts in zip(factors, counted.counts, strict=True)
    }
    return out
