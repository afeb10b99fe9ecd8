"""What an evaluation says: figures of one model, gains from one to another.

Two inverse dynamics models (IDMs) read every generated clip: the one that gave the reward and the
judge, which took no part in training and shares no part of its architecture. The reward IDM's
figures say whether the optimisation worked, the judge's whether the video obeys.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rlir.actions.space import ActionSpace
from rlir.errors import InputError
from rlir.evaluation import following, quality
from rlir.evaluation.bootstrap import (
    Change,
    bootstrap,
    bootstrap_change,
    groups,
    jackknife,
    jackknife_change,
)
from rlir.evaluation.following import Tally, tally
from rlir.evaluation.quality import Quality, frechet_distance, frechet_without_groups

IDMS = ("reward", "judge")


@dataclass(frozen=True, eq=False)
class Reading:
    """What one inverse dynamics model made of a set of clips."""

    recovered: np.ndarray
    """Most likely classes off the generated frames, int64 [N, T, F]."""
    features: np.ndarray
    """Its features of the generated frames, float [N, T, D]."""
    real_features: np.ndarray
    """Its features of the real frames, float [N, T, D]."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A model's continuations of N clips, and what both inverse dynamics models made of them.

    Frames have L = T + 1 rows a clip: the prompt, then one a commanded action.
    """

    space: ActionSpace
    commanded: np.ndarray
    """int64 [N, T, F]."""
    reward: Reading
    judge: Reading
    generated: np.ndarray
    """uint8 [N, L, H, W, 3]."""
    real: np.ndarray
    """uint8 [N, L, H, W, 3]."""
    maps: Sequence[str]
    """Map of each clip."""

    def __post_init__(self) -> None:
        n, t = self.commanded.shape[:2]
        for name, rows in (
            ("reward features", self.reward.features[:, :t]),
            ("judge features", self.judge.features[:, :t]),
            ("generated frames", self.generated[:, 1:]),
            ("real frames", self.real[:, 1:]),
        ):
            if rows.shape[:2] != (n, t):
                raise InputError(
                    f"evaluation: {name} must be of {n} clips of {t} actions, got {rows.shape[:2]}"
                )
        if len(self.maps) != n:
            raise InputError(f"evaluation: maps must name {n} clips, got {len(self.maps)}")

    @cached_property
    def tallies(self) -> dict[str, Tally]:
        return {
            idm: tally(self.commanded, getattr(self, idm).recovered, self.space) for idm in IDMS
        }

    @cached_property
    def quality(self) -> Quality:
        return quality.quality(self.generated, self.real)

    @cached_property
    def ids(self) -> np.ndarray:
        """A digest of each clip's real frames and commands: what a clip is, in any run."""

        def digest(actions: np.ndarray, frames: np.ndarray) -> str:
            return hashlib.sha256(actions.tobytes() + frames.tobytes()).hexdigest()[:16]

        return np.array([digest(a, f) for a, f in zip(self.commanded, self.real, strict=True)])

    def select(self, keep: np.ndarray) -> "Scored":
        """The clips at ``keep`` (bool [N] or indices)."""
        reward, judge = (
            Reading(r.recovered[keep], r.features[keep], r.real_features[keep])
            for r in (self.reward, self.judge)
        )
        return Scored(
            self.space,
            self.commanded[keep],
            reward,
            judge,
            self.generated[keep],
            self.real[keep],
            tuple(np.asarray(self.maps)[keep]),
        )


@dataclass(frozen=True, eq=False)
class _Pool:
    """Per-clip statistics of one or several runs."""

    tallies: dict[str, Tally]
    quality: Quality
    features: dict[str, tuple[np.ndarray, np.ndarray]]  # generated, real
    ids: np.ndarray

    def frechet(self, idm: str) -> tuple[float, np.ndarray | None]:
        """The distance, and the distances without each group of clips."""
        generated, real = self.features[idm]
        group = groups(len(self.ids), self.ids)
        value = frechet_distance(
            generated.reshape(-1, generated.shape[-1]), real.reshape(-1, real.shape[-1])
        )
        left_out = None if group is None else frechet_without_groups(generated, real, group)
        return value, left_out


def _pool(runs: Sequence[Scored]) -> _Pool:
    def features(idm: str, name: str) -> np.ndarray:
        return np.concatenate([getattr(getattr(run, idm), name) for run in runs])

    return _Pool(
        {idm: following.join([run.tallies[idm] for run in runs]) for idm in IDMS},
        quality.join([run.quality for run in runs]),
        {idm: (features(idm, "features"), features(idm, "real_features")) for idm in IDMS},
        np.concatenate([run.ids for run in runs]),
    )


def _runs(runs: Scored | Sequence[Scored]) -> list[Scored]:
    return [runs] if isinstance(runs, Scored) else list(runs)


def summarise(
    runs: Scored | Sequence[Scored], *, what: str = "", draws: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """All figures of a model (of several sets of continuations, pooled) and their 95% intervals.

    ``reward_idm`` and ``judge_idm`` hold `following.following`'s figures, ``quality`` holds
    psnr, ssim, motion, brightness, frechet_reward_idm and frechet_judge_idm; the ``ci95`` of each
    maps a figure to its interval. ``maps`` holds the main figures by map. ``what`` says in a few
    words what was scored, for the report.
    """
    runs = _runs(runs)
    pool = _pool(runs)
    options: dict[str, Any] = {"draws": draws, "seed": seed, "ids": pool.ids}
    out: dict[str, Any] = {
        "what": what,
        "clips": len(set(pool.ids.tolist())),
        "continuations": len(pool.ids),
        "actions_per_clip": runs[0].commanded.shape[1],
    }
    for idm in IDMS:
        intervals = bootstrap(pool.tallies[idm], **options)
        figures = following.following(pool.tallies[idm])
        out[f"{idm}_idm"] = figures | {"ci95": {k: v["ci95"] for k, v in intervals.items()}}
    seen = bootstrap(pool.quality, **options)
    for idm in IDMS:
        seen[f"frechet_{idm}_idm"] = jackknife(*pool.frechet(idm))
    out["quality"] = {k: v["value"] for k, v in seen.items()}
    out["quality"]["ci95"] = {k: v["ci95"] for k, v in seen.items()}
    out["maps"] = _by_map(runs, pool)
    return out


def _by_map(runs: list[Scored], pool: _Pool) -> dict[str, Any]:
    maps = np.array([name for run in runs for name in run.maps])
    out = {}
    for name in sorted(set(maps.tolist())):
        weights = (maps == name).astype(np.float64)[None]
        scores = {idm: pool.tallies[idm].scores(weights) for idm in IDMS}
        out[name] = {"clips": int(weights.sum())} | {
            f"{idm}_{figure}": float(scores[idm][figure][0])
            for idm in IDMS
            for figure in ("f1_macro", "reward")
        }
    return out


def value_of(summary: Mapping[str, Any] | None, key: str) -> float | None:
    """A figure of a summary by its name in the gains: judge_f1_macro, judge_f1/yaw, psnr, ..."""
    found: float | None = _find(summary, key, interval=False)
    return found


def interval_of(summary: Mapping[str, Any] | None, key: str) -> list[float] | None:
    """The 95% interval of that figure."""
    found: list[float] | None = _find(summary, key, interval=True)
    return found


def _find(summary: Mapping[str, Any] | None, key: str, *, interval: bool) -> Any:
    if summary is None:
        return None
    part, _, figure = key.partition("_")
    section = summary.get(f"{part}_idm") if part in IDMS else summary.get("quality")
    figure = figure if part in IDMS else key
    if section is None:
        return None
    if interval:
        return section.get("ci95", {}).get(figure)
    if "/" in figure:
        kind, task = figure.split("/", 1)
        return section.get(f"{kind}_per_task", {}).get(task)
    return section.get(figure)


def gains(
    base: Scored | Sequence[Scored],
    post: Scored | Sequence[Scored],
    control: Mapping[str, Any] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """The change of every figure from base to post, paired by clip.

    Give several runs on both sides (the base's once a run, on the same clips) to pool seeds; a
    clip that several runs share is drawn together. ``control`` is the stored summary of the base
    after continued pretraining; ``over_control`` is the gain relative to it.
    Keys: ``reward_`` and ``judge_`` with f1_macro, reward, camera_l1 and so on; psnr, ssim,
    motion, brightness, frechet_reward_idm, frechet_judge_idm. Signs are those of the figures.
    """
    a, b = _pool(_runs(base)), _pool(_runs(post))
    if not np.array_equal(a.ids, b.ids):
        raise InputError(
            "evaluation: base and post must be given the same clips in the same order, got others"
        )
    options: dict[str, Any] = {"draws": draws, "seed": seed, "ids": a.ids}
    changes: dict[str, Change] = {}
    for idm in IDMS:
        change = bootstrap_change(a.tallies[idm], b.tallies[idm], **options)
        changes |= {f"{idm}_{name}": value for name, value in change.items()}
    changes |= bootstrap_change(a.quality, b.quality, **options)
    for idm in IDMS:
        (before, before_left), (after, after_left) = a.frechet(idm), b.frechet(idm)
        left_out = None
        if before_left is not None and after_left is not None:
            left_out = before_left, after_left
        changes[f"frechet_{idm}_idm"] = jackknife_change(before, after, left_out)
    return {
        key: {**change, "over_control": _over(change["after"], value_of(control, key))}
        for key, change in changes.items()
    }


def _over(value: float, control: float | None) -> float | None:
    return None if not control else (value - control) / abs(control)
