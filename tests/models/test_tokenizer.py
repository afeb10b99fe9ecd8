"""Codes are in range, decoding them gives frames, and impossible sizes are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testkit import examples

from rlir.errors import InputError
from rlir.models.tokenizer import Tokenizer, TokenizerConfig


def make(**sizes: object) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(TokenizerConfig(**{"channels": 8, "blocks": 1, **sizes})).eval()


@settings(max_examples=examples(15))
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.sampled_from([(8, 8), (8, 12)]),
    levels=st.sampled_from([(4, 4), (8, 8, 8), (3,), (8, 5, 5)]),
    n=st.integers(1, 3),
)
def test_codes_are_in_range_and_decode_to_frames_of_the_size(
    rows: int, columns: int, patch: tuple[int, int], levels: tuple[int, ...], n: int
) -> None:
    height, width = rows * patch[0], columns * patch[1]
    model = make(height=height, width=width, patch=patch, levels=levels)
    frames = torch.rand(n, 3, height, width) * 2 - 1
    codes = model.encode(frames)
    assert codes.shape == (n, rows * columns) == (n, model.config.tokens)
    assert codes.dtype == torch.int64
    assert 0 <= int(codes.min()) <= int(codes.max()) < model.config.codes
    decoded = model.decode(codes)
    assert decoded.shape == frames.shape
    assert decoded.dtype == torch.float32
    assert float(decoded.abs().max()) <= 1


def test_decoding_codes_is_the_reconstruction() -> None:
    model = make(height=16, width=48, levels=(4, 4))
    frames = torch.rand(3, 3, 16, 48) * 2 - 1
    drawn, codes = model(frames)
    torch.testing.assert_close(model.decode(codes.flatten(1)), drawn.clamp(-1, 1))
    assert torch.equal(model.encode(frames), codes.flatten(1))


def test_every_code_is_a_latent_of_its_own() -> None:
    model = make(levels=(4, 4, 3))
    latent = model.quantizer.indices_to_codes(torch.arange(48).view(1, 6, 8))
    assert len(latent.flatten(2)[0].T.unique(dim=0)) == 48


def test_codes_stand_in_raster_order() -> None:
    """A change of the last code of the first row changes that corner of the decoded frame."""
    model = make(height=64, width=96, blocks=0)
    codes = torch.zeros(1, 64, dtype=torch.int64)
    other = codes.clone()
    other[0, 7] = 4095  # first row, last column
    change = (model.decode(codes) - model.decode(other)).abs()[0].sum(0)
    assert float(change[:16, -24:].max()) == float(change.max())
    # Elsewhere only the normalisation over the whole picture changes a little.
    assert float(change[40:].max()) < 0.1 * float(change.max())
    assert float(change[:, :40].max()) < 0.1 * float(change.max())


def test_gradients_pass_the_quantiser() -> None:
    model = make(height=16, width=48)
    drawn, _ = model(torch.rand(2, 3, 16, 48))
    drawn.square().mean().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.encoder.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patch": (4, 4)}, r"patch must be \(8, 8\) or \(8, 12\), got \(4, 4\)"),
        ({"height": 60}, "frames must be whole patches of .* got 60 x 96"),
        ({"width": 100}, "frames must be whole patches of .* got 64 x 100"),
        ({"height": 0}, "frames must be whole patches of .* got 0 x 96"),
        ({"levels": ()}, "levels must each be at least 2"),
        ({"levels": (8, 1)}, "levels must each be at least 2"),
        ({"channels": 12}, "channels must be a multiple of 8"),
        ({"channels": 0}, "channels must be a multiple of 8"),
        ({"blocks": -1}, "blocks >= 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenizerConfig(**wrong)
