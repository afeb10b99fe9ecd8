"""Video quality beside the real clip: PSNR, SSIM, Fréchet distance, motion, brightness.

Post-training on a reward can spoil the picture while the reward rises. Pixel rewards were hacked
by darker frames (arXiv 2509.23958), inverse rewards by nearly static video (arXiv 2603.17808);
hence the ratios of motion and of brightness.

Legend: N clips, L frames a clip of which the first is the prompt, T = L - 1, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from skimage.metrics import structural_similarity

from rlir.errors import InputError
from rlir.evaluation.bootstrap import GROUPS

# Two frames that round to the same bytes differ by up to the rounding error: a step's variance.
_ROUNDING = 1.0 / 12.0


@dataclass(frozen=True)
class Quality:
    """Per-clip statistics of generated clips beside the real ones, float64 [N] each."""

    psnr: np.ndarray
    """dB, mean over generated frames."""
    ssim: np.ndarray
    motion: np.ndarray
    """Mean |difference| of neighbouring frames, in grey levels."""
    real_motion: np.ndarray
    brightness: np.ndarray
    """Mean grey level of the generated frames."""
    real_brightness: np.ndarray

    @property
    def clips(self) -> int:
        return len(self.psnr)

    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Means over clips; motion and brightness are ratios of means, 1 as in real clips."""
        total = weights.sum(1)

        def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            under = weights @ b
            nothing = np.full_like(under, np.nan)
            return np.asarray(np.divide(weights @ a, under, out=nothing, where=under > 0))

        return {
            "psnr": weights @ self.psnr / total,
            "ssim": weights @ self.ssim / total,
            "motion": ratio(self.motion, self.real_motion),
            "brightness": ratio(self.brightness, self.real_brightness),
        }


def join(parts: Sequence[Quality]) -> Quality:
    """The clips of several runs, one after another."""
    names = [field.name for field in fields(Quality)]
    return Quality(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


def _check(generated: np.ndarray, real: np.ndarray) -> None:
    if generated.ndim != 5 or generated.shape[1] < 2 or generated.shape[4] != 3:
        raise InputError(
            f"quality: frames must be [clips, >= 2 frames, H, W, 3], got {generated.shape}"
        )
    if generated.shape != real.shape:
        raise InputError(f"quality: real must have shape {generated.shape}, got {real.shape}")
    if generated.dtype != np.uint8 or real.dtype != np.uint8:
        raise InputError(f"quality: frames must be uint8, got {generated.dtype} and {real.dtype}")


def psnr(generated: np.ndarray, real: np.ndarray) -> np.ndarray:
    """``mean over frames of 10 log10(255^2 / mse)`` in dB, [N], without the prompt frame.

    The error is taken to be at least that of rounding to bytes, 58.9 dB, so that a frame equal to
    the real one has a finite figure.
    """
    out = np.empty(len(generated))
    for i, (a, b) in enumerate(zip(generated, real, strict=True)):  # clip by clip, for memory
        mse = np.square(a[1:].astype(np.float32) - b[1:]).mean((1, 2, 3), dtype=np.float64)
        out[i] = (10 * np.log10(255.0**2 / np.maximum(mse, _ROUNDING))).mean()
    return out


def ssim(generated: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Structural similarity (7 x 7 window, mean over channels and generated frames), [N].

    In float32, which skimage computes in too: 2.4 times as fast as bytes, 1e-7 from them.
    """
    n, length = generated.shape[:2]
    out = np.zeros(n)
    for i in range(n):
        for t in range(1, length):
            a, b = (x[i, t].astype(np.float32) for x in (generated, real))
            out[i] += structural_similarity(a, b, channel_axis=-1, data_range=255)
    return np.asarray(out / (length - 1))


def _motion(frames: np.ndarray) -> np.ndarray:
    """Mean |frame t + 1 - frame t| over the clip, in grey levels, [N]."""
    return np.array([np.abs(np.diff(clip.astype(np.int16), axis=0)).mean() for clip in frames])


def quality(generated: np.ndarray, real: np.ndarray) -> Quality:
    """Per-clip quality of frames uint8 [N, L, H, W, 3] beside the real continuation."""
    _check(generated, real)
    return Quality(
        psnr=psnr(generated, real),
        ssim=ssim(generated, real),
        motion=_motion(generated),
        real_motion=_motion(real),
        brightness=generated[:, 1:].mean((1, 2, 3, 4)),
        real_brightness=real[:, 1:].mean((1, 2, 3, 4)),
    )


def _trace_of_root(a: np.ndarray, b: np.ndarray) -> float:
    """Trace of the square root of a b, for symmetric positive semi-definite a and b.

    a b has the eigenvalues of the symmetric a^1/2 b a^1/2: two symmetric eigenproblems instead
    of a Schur form, and never a complex number.
    """
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    inner = root @ b @ root
    return float(np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0)).sum())


def _distance(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    traces = np.trace(cov_a) + np.trace(cov_b) - 2 * _trace_of_root(cov_a, cov_b)
    # Rounding can take the distance of equal sets a hair below 0.
    return max(0.0, float(np.square(mean_a - mean_b).sum() + traces))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2)`` of feature sets [M, D], float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise InputError(f"frechet: features must be [>= 2, D], got {a.shape} and {b.shape}")
    return _distance(a.mean(0), np.atleast_2d(np.cov(a.T)), b.mean(0), np.atleast_2d(np.cov(b.T)))


def frechet_without_groups(a: np.ndarray, b: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The distance of clip features [N, T, D] with each group of clips left out, [GROUPS].

    Sums and products are taken a group once and subtracted, so a group costs one distance.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    shift = np.concatenate([a, b]).mean((0, 1))  # keeps the products well conditioned
    sums = [_group_sums(x - shift, group) for x in (a, b)]
    out = np.empty(GROUPS)
    for g in range(GROUPS):
        moments = []
        for count, first, second in sums:
            m = count.sum() - count[g]
            mean = (first.sum(0) - first[g]) / m
            product = second.sum(0) - second[g]
            moments += [mean, (product - m * np.outer(mean, mean)) / (m - 1)]
        out[g] = _distance(*moments)
    return out


def _group_sums(x: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    flat = [x[group == g].reshape(-1, x.shape[2]) for g in range(GROUPS)]
    count = np.array([len(f) for f in flat])
    return count, np.stack([f.sum(0) for f in flat]), np.stack([f.T @ f for f in flat])
