"""PSNR, SSIM and Fréchet distance equal scikit-image and SciPy; motion and brightness see hacks."""

import numpy as np
import pytest
import scipy.linalg
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from rlir.errors import InputError
from rlir.evaluation.bootstrap import GROUPS, bootstrap, groups
from rlir.evaluation.quality import (
    frechet_distance,
    frechet_without_groups,
    join,
    psnr,
    quality,
    ssim,
)


def clips(n=3, length=4, height=16, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, length, height, width, 3), np.uint8)


def noisy(frames, amount, seed=0):
    noise = np.random.default_rng(seed).integers(-amount, amount + 1, frames.shape)
    return np.clip(frames.astype(int) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(1, 2, 7, 9), (3, 5, 16, 24)])
def test_psnr_and_ssim_equal_scikit_image(shape):
    real = clips(*shape)
    generated = noisy(real, 20)
    for n in range(shape[0]):
        pairs = list(zip(real[n, 1:], generated[n, 1:], strict=True))
        wanted = np.mean([peak_signal_noise_ratio(a, b) for a, b in pairs])
        assert psnr(generated, real)[n] == pytest.approx(wanted)
        wanted = np.mean([structural_similarity(a, b, channel_axis=-1) for a, b in pairs])
        assert ssim(generated, real)[n] == pytest.approx(wanted)


def test_equal_clips():
    real = clips()
    scores = quality(real, real).scores(np.ones((1, 3)))
    assert scores["psnr"] == pytest.approx(58.92, abs=0.01)
    assert scores["ssim"] == pytest.approx(1.0)
    assert scores["motion"] == scores["brightness"] == 1.0


def test_the_prompt_frame_is_not_scored():
    real = clips()
    other = real.copy()
    other[:, 0] = 0
    assert (psnr(other, real) == psnr(real, real)).all()
    assert (ssim(other, real) == ssim(real, real)).all()


def test_static_video_has_no_motion():
    real = clips()
    scores = quality(np.repeat(real[:, :1], 4, axis=1), real).scores(np.ones((1, 3)))
    assert scores["motion"] == 0


def test_darkening_shows():
    real = clips(height=64, width=64)
    dark = (real * 0.8).astype(np.uint8)
    scores = quality(dark, real).scores(np.ones((1, 3)))
    assert scores["brightness"] == pytest.approx(0.8, abs=0.01)


def test_still_real_video_gives_no_motion_ratio():
    still = np.repeat(clips(length=1), 3, axis=1)
    scores = quality(still, still)
    assert np.isnan(scores.scores(np.ones((1, 3)))["motion"])
    assert bootstrap(scores, 10)["motion"]["ci95"] is None


def test_join_is_one_set_of_clips():
    real = clips(n=4)
    generated = noisy(real, 30)
    whole = quality(generated, real).scores(np.ones((1, 4)))
    parts = join([quality(generated[:1], real[:1]), quality(generated[1:], real[1:])])
    for name, value in parts.scores(np.ones((1, 4))).items():
        assert value == pytest.approx(whole[name])


def features(m, d, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) * scale + rng.normal(size=d)


@pytest.mark.parametrize(("m", "d"), [(50, 1), (40, 7), (300, 32)])
def test_frechet_equals_sqrtm(m, d):
    a, b = features(m, d, 0), features(m + 3, d, 1, 1.4)
    cov_a, cov_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_of_gaussians_in_closed_form():
    # Diagonal covariances: sum of (mean difference)^2 + (standard deviation difference)^2.
    a = np.array([[1.0, 0], [-1, 0], [0, 2], [0, -2]])
    b = 2 * a + [3, 0]
    wanted = 9 + np.square(a.std(0, ddof=1)).sum()
    assert frechet_distance(a, b) == pytest.approx(wanted)


def test_frechet_of_equal_sets_is_zero_also_when_rank_deficient():
    a = features(6, 20, 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a.astype(np.float32), a) >= 0


def test_frechet_without_groups_equals_leaving_them_out():
    rng = np.random.default_rng(3)
    a = rng.normal(size=(45, 4, 6)) + 100  # far from 0: the sums must be well conditioned
    b = rng.normal(1.0, 2.0, size=(45, 4, 6)) + 100
    group = groups(45)
    left_out = frechet_without_groups(a, b, group)
    assert left_out.shape == (GROUPS,)
    for g in (0, 7, GROUPS - 1):
        kept = [x[group != g].reshape(-1, 6) for x in (a, b)]
        assert left_out[g] == pytest.approx(frechet_distance(*kept), rel=1e-9)


def test_bad_input_is_named():
    real = clips()
    with pytest.raises(InputError, match="frames must be uint8"):
        quality(real.astype(np.float32), real)
    with pytest.raises(InputError, match="real must have shape"):
        quality(real, real[:2])
    with pytest.raises(InputError, match=">= 2 frames"):
        quality(real[:, :1], real[:, :1])
    with pytest.raises(InputError, match="features must be"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))
