"""The stem with the engine's bits: against torch's convolutions, its gradients, its bits."""

import copy

import pytest
import torch
from backends import instruction_set, instruction_sets
from torch import Tensor

from rlir.models import world_model
from rlir.models.stem import engine_stem, packed_stem
from rlir.models.world_model import Stem, WorldModelConfig

DTYPES = (torch.float32, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def make(**sizes: int) -> Stem:
    torch.manual_seed(0)
    config = WorldModelConfig(codes=40, rows=3, columns=5, hidden=34, heads=1, kv_heads=1, **sizes)
    stem = world_model.WorldModel(config).stem
    for x in stem.parameters():
        torch.nn.init.normal_(x, std=0.1 if x.dim() > 2 else 0.5)
    return stem


def inputs(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    shape = {"generator": generator}
    return torch.randint(40, (n, 15), **shape), torch.randint(11, (n, 4), **shape)


def gradients(out: Tensor, stem: Stem, grad: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, list(stem.parameters()), grad.to(out.dtype))]


def assert_close(got: Tensor, peer: Tensor, truth: Tensor) -> None:
    """At most twice the error of PyTorch in the same dtype, plus one ulp of the largest value."""
    error, allowed = ((x.double() - truth).abs().max() for x in (got, peer))
    ulp = torch.finfo(got.dtype).eps * truth.abs().max()
    assert error <= 2 * allowed + ulp, f"error {error}, torch's {allowed}, ulp {ulp}"


def compare(stem: Stem, n: int, dtype: torch.dtype) -> None:
    previous, action = inputs(n)
    grad = torch.randn(n, 15, 34, generator=torch.Generator().manual_seed(1))
    got = gradients(engine_stem(stem, previous, action, dtype), stem, grad)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        peer = gradients(stem(previous, action), stem, grad)
    peer[0] = peer[0].float()
    exact = copy.deepcopy(stem).to(dtype).double()
    truth = gradients(exact(previous, action), exact, grad.double())
    for ours, theirs, true in zip(got, peer, truth, strict=True):
        assert_close(ours, theirs, true)


@dtypes
@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("channels", [16, 21])
def test_is_the_stem(dtype: torch.dtype, blocks: int, channels: int) -> None:
    compare(make(stem_blocks=blocks, stem_channels=channels), 6, dtype)


@dtypes
@pytest.mark.parametrize("isa", instruction_sets())
def test_has_the_bits_of_the_engine(dtype: torch.dtype, isa: str) -> None:
    """In any batch, with gradients or without, from masters or from the engine's copy of them."""
    stem = make(stem_blocks=2, stem_channels=21)
    rounded = copy.deepcopy(stem).to(dtype)
    previous, action = inputs(7)
    with instruction_set(isa):
        engine = torch.empty(7, 15, 34)
        torch.ops.rlir._decoder_stem(*packed_stem(rounded, dtype), previous, action, engine)
        got = engine_stem(stem, previous, action, dtype)
        assert got.requires_grad
        with torch.no_grad():
            alone = engine_stem(stem, previous[3:5], action[3:5], dtype)
    assert got.equal(engine)
    assert alone.equal(engine[3:5])


@dtypes
def test_bits_do_not_depend_on_instruction_set_or_threads(dtype: torch.dtype) -> None:
    stem, (previous, action) = make(stem_blocks=1, stem_channels=21), inputs(9)
    found = []
    for isa in instruction_sets():
        with instruction_set(isa):
            found.append(engine_stem(stem, previous, action, dtype))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    found.append(engine_stem(stem, previous, action, dtype))
    torch.set_num_threads(before)
    assert all(x.equal(found[0]) for x in found)


def test_no_frames() -> None:
    stem, (previous, action) = make(stem_blocks=1, stem_channels=16), inputs(0)
    out = engine_stem(stem, previous, action, torch.float32)
    assert out.shape == (0, 15, 34)
    assert all(x.eq(0).all() for x in gradients(out, stem, torch.zeros(0, 15, 34))[1:])
