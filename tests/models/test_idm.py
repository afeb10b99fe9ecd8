"""Inverse dynamics models: exact matching, any length, and no clip sees another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testkit import IDMS, SIZE, examples, picture
from torch import Tensor

from rlir.actions.space import DOOM
from rlir.data.clips import to_unit
from rlir.errors import InputError
from rlir.models.idm import InverseDynamics, InverseDynamicsConfig, correlation_volume


def frames(b: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(b, length, 3, *SIZE, generator=generator) * 2 - 1


def naive_volume(a: Tensor, b: Tensor, shift: int) -> Tensor:
    n, _, h, w = a.shape
    out = a.new_zeros(n, 2 * shift + 1, h, w)
    for k in range(-shift, shift + 1):
        for x in range(w):
            if 0 <= x + k < w:
                out[:, shift + k, :, x] = (a[..., x] * b[..., x + k]).sum(1)
    return out


@settings(max_examples=examples(60))
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9)),
    shift=st.integers(0, 12),
    seed=st.integers(0, 999),
)
def test_the_correlation_volume_is_the_sum_over_channels(
    shape: tuple[int, int, int, int], shift: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(correlation_volume(a, b, shift), naive_volume(a, b, shift))


def test_the_correlation_volume_peaks_at_the_shift() -> None:
    torch.manual_seed(0)
    a = torch.nn.functional.normalize(torch.randn(1, 16, 3, 20), dim=1)
    b = torch.roll(a, 4, 3)
    best = correlation_volume(a, b, 6).argmax(1)
    assert (best[..., :16] == 6 + 4).all()


def test_the_correlation_volume_has_a_gradient() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 2, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: correlation_volume(x, y, 2), (a, b))


@pytest.mark.parametrize("length", range(2, 8))
def test_any_clip_length_has_an_action_between_neighbours(
    idm: InverseDynamics, length: int
) -> None:
    assert idm.config.max_frames == 7
    logits = idm(frames(3, length))
    assert [x.shape for x in logits] == [(3, length - 1, size) for size in DOOM.factor_sizes]
    assert all(x.isfinite().all() for x in logits)


@pytest.mark.parametrize("length", [1, 8, 20])
def test_other_clip_lengths_are_refused(idm: InverseDynamics, length: int) -> None:
    with pytest.raises(InputError, match=f"clips must have 2 to 7 frames, got {length}"):
        idm(frames(1, length))


def test_reading_does_not_depend_on_the_batch(idm: InverseDynamics) -> None:
    x = frames(7, 5)
    classes, features = idm.read(x)
    assert classes.shape == (7, 4, 4)
    assert features.shape == (7, 4, idm.trunk.width)
    assert features.dtype == torch.float32
    for batch in (1, 2, 3):
        again, other = idm.read(x, batch=batch)
        torch.testing.assert_close(other, features, atol=0.02, rtol=0.02)  # bfloat16
        assert (again == classes).float().mean() > 0.9
    assert (classes >= 0).all()
    assert (classes < torch.tensor(DOOM.factor_sizes)).all()


def test_clips_of_a_batch_do_not_see_each_other(idm: InverseDynamics) -> None:
    x = frames(3, 4)
    torch.testing.assert_close(idm.features(x)[1:2], idm.features(x[1:2]), atol=1e-5, rtol=1e-4)


def test_the_whole_clip_is_seen(idm: InverseDynamics) -> None:
    """Non-causal, as the published model: a later frame informs an earlier action."""
    x = frames(1, 5)
    other = x.clone()
    other[:, -1] = -other[:, -1]
    assert not torch.allclose(idm.features(x)[:, 0], idm.features(other)[:, 0], atol=1e-7)


def walls(seeds: range) -> tuple[Tensor, Tensor]:
    """Walls that scroll, then the same with time turned round, and the class of their turns."""
    clips = to_unit(torch.stack([torch.from_numpy(picture(3, seed, *SIZE)) for seed in seeds]))
    turns = torch.tensor([0] * len(clips) + [10] * len(clips))
    return torch.cat([clips, clips.flip(1)]), turns[:, None].expand(-1, 2)


def test_it_learns_to_tell_left_from_right(idm: InverseDynamics) -> None:
    """Some steps, each on other walls, and walls it never saw: the architectures see motion."""
    idm.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(idm.parameters(), lr=3e-3)
    for step in range(30):
        clips, turns = walls(range(16 * step, 16 * step + 16))
        yaw = idm(clips)[0]
        loss = torch.nn.functional.cross_entropy(yaw.flatten(0, 1), turns.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clips, turns = walls(range(5000, 5008))
    assert float((idm.eval()(clips)[0].argmax(-1) == turns).float().mean()) > 0.85


def test_the_two_architectures_share_no_layer() -> None:
    names = []
    for config in IDMS.values():
        model = InverseDynamics(config)
        names.append({name for name, _ in model.trunk.named_parameters()})
    assert not {n for n in names[0] & names[1] if not n.startswith("project.")}


@pytest.mark.parametrize(
    "wrong",
    [
        {"architecture": "other"},
        {"height": 60},
        {"width": 40},
        {"height": 0},
        {"channels": 12},
        {"channels": 0},
        {"hidden": 12},
        {"hidden": 0},
        {"shift": -1},
        {"max_frames": 1},
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match="idm: "):
        InverseDynamicsConfig(**wrong)
