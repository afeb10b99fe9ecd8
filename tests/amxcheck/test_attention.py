"""The engine's attention by tiles has the bits of a panel's, wherever the parts meet."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from amxcheck.emulator import AMX, PROBES, compiled, missing, tiles
from amxcheck.test_amx import Floats, Words, pointer

Halves = NDArray[np.uint16]
NAN = np.uint32(0x7FC07FC0)
GROUP = 64  # slots whose keys lie together
BLOCK = 128

pytestmark = pytest.mark.skipif(missing() != "", reason=missing())


VECTORS = tuple(flag for flag in AMX if not flag.startswith("-mamx"))
"""The same code for vdpbf16ps."""


def probe(*faults: str, flags: tuple[str, ...] = AMX) -> ctypes.CDLL:
    defined = [f"-DRLIR_FAULT_{f}" for f in faults]
    library = compiled(PROBES / "attention_probe.cpp", *flags, *defined)
    for name in ("cache_scratch", "heads_scratch", "panel_scratch"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def bfloat16(rng: np.random.Generator, *shape: int) -> Halves:
    x = torch.from_numpy(rng.standard_normal(shape)).bfloat16()
    return x.view(torch.uint16).numpy()


def up(n: int, to: int) -> int:
    return -(-n // to) * to


def whole_words(rows: Halves) -> Words:
    """Rows of words, zeros up to a multiple of 16 elements."""
    padded = np.zeros((len(rows), up(rows.shape[1], 16)), np.uint16)
    padded[:, : rows.shape[1]] = rows
    return padded.view(np.uint32)


def key_cache(k: Halves, blank: int = 0) -> Words:
    """[slots / 64][words of d][64] of whole blocks; NaN where no slot is, and in the first ones."""
    n, words = len(k), k.shape[1] // 2
    cache = np.full((up(max(n, 1), BLOCK), words), NAN)
    cache[blank:n] = np.ascontiguousarray(k).view(np.uint32)[blank:]
    return np.ascontiguousarray(cache.reshape(-1, GROUP, words).transpose(0, 2, 1))


def value_cache(v: Halves, blank: int = 0) -> Words:
    """[words of slots][d padded to 16] of whole blocks, likewise; an odd half is zero."""
    n, d = v.shape
    rows = np.zeros((up(n, 2), up(d, 16)), np.uint32)
    rows[:n, :d] = v
    cache = np.full((up(max(n, 1), BLOCK) // 2, rows.shape[1]), NAN)
    words = rows[::2] | rows[1::2] << 16
    cache[blank // 2 : len(words)] = words[blank // 2 :]
    return cache


def scratch(floats: int) -> Floats:
    """NaN, aligned to 64 bytes."""
    x = np.full(floats + 16, np.nan, np.float32)
    return x[-(x.ctypes.data // 4) % 16 :][:floats]


def by_cache(
    library: ctypes.CDLL, q: Halves, k: Halves, v: Halves, shared: int, scale: float
) -> Floats:
    (queries, d), n = q.shape, len(k)
    words = whole_words(q)
    rows = np.full((queries, up(d, 16)), NAN)  # of as many words as there are sums
    rows[:, : words.shape[1]] = words
    out = np.full((queries, up(d, 16)), np.nan, np.float32)
    base = shared // BLOCK * BLOCK
    caches = [key_cache(k[base:shared]), value_cache(v[base:shared])]
    own = [key_cache(k[base:], shared - base), value_cache(v[base:], shared - base)]
    space = scratch(library.cache_scratch(ctypes.c_int64(d)))
    panel = scratch(library.panel_scratch(ctypes.c_int64(d)))
    with tiles():
        library.by_cache(
            *(pointer(out), pointer(rows), pointer(q), ctypes.c_int64(queries)),
            *(pointer(k), pointer(v), *map(pointer, caches), ctypes.c_int64(shared)),
            *(*map(pointer, own), ctypes.c_int64(n), ctypes.c_int64(up(n - base, BLOCK))),
            *(ctypes.c_int64(d), ctypes.c_float(scale), pointer(space), pointer(panel)),
        )
    return out[:, :d]


def by_panel(library: ctypes.CDLL, q: Halves, k: Halves, v: Halves, scale: float) -> Floats:
    (queries, d), n = q.shape, len(k)
    out = np.full((queries, d), np.nan, np.float32)
    space = scratch(library.panel_scratch(ctypes.c_int64(d)))
    with tiles():
        library.by_panel(
            *(pointer(out), pointer(q), ctypes.c_int64(queries), pointer(k), pointer(v)),
            *(ctypes.c_int64(n), ctypes.c_int64(d), ctypes.c_float(scale), pointer(space)),
        )
    return out


def by_heads(library: ctypes.CDLL, q: Halves, k: Halves, v: Halves, scale: float) -> Floats:
    """q [heads, queries, d]; k and v [slots, heads, d]."""
    heads, queries, d = q.shape
    out = np.full(q.shape, np.nan, np.float32)
    space = scratch(library.heads_scratch(ctypes.c_int64(d)))
    with tiles():
        library.by_heads(
            *(pointer(out), pointer(q), ctypes.c_int64(heads), ctypes.c_int64(queries)),
            *(pointer(k), pointer(v), ctypes.c_int64(len(k)), ctypes.c_int64(d)),
            *(ctypes.c_float(scale), pointer(space)),
        )
    return out


def exact(q: Halves, k: Halves, v: Halves, scale: float) -> NDArray[np.float64]:
    wide = [(x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for x in (q, k, v)]
    scores = wide[0] @ wide[1].T * scale
    weights = np.exp2(scores - scores.max(1, keepdims=True))
    return weights @ wide[2] / weights.sum(1, keepdims=True)


def assert_engine_is_a_panel(
    library: ctypes.CDLL, seed: int, queries: int, shared: int, own: int, d: int
) -> Floats:
    rng = np.random.default_rng(seed)
    q, k, v = (bfloat16(rng, n, d) for n in (queries, shared + own, shared + own))
    scale = 1.4426950408889634 / d**0.5
    got = by_cache(library, q, k, v, shared, scale)
    np.testing.assert_allclose(got, exact(q, k, v, scale), atol=0.02)
    want = by_panel(library, q, k, v, scale)
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))
    return got


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(1, 18),
    shared=st.integers(0, 90),
    own=st.integers(1, 150),
    d=st.sampled_from([2, 18, 32, 64, 96]),
)
def test_any_border(seed: int, queries: int, shared: int, own: int, d: int) -> None:
    assert_engine_is_a_panel(probe(), seed, queries, 2 * shared, own, d)


@pytest.mark.parametrize(
    ("shared", "own"), [(0, 1), (0, 256), (128, 1), (256, 40), (64, 64), (300, 3)]
)
def test_whole_blocks(shared: int, own: int) -> None:
    assert_engine_is_a_panel(probe(), 1, 4, shared, own, 128)


@pytest.mark.parametrize("queries", [1, 4, 16, 17, 48])
@pytest.mark.parametrize(("heads", "slots"), [(2, 300), (3, 128), (4, 77)])
def test_heads_that_go_together(queries: int, heads: int, slots: int) -> None:
    """Few queries and panels; a head has the bits that it has by itself."""
    rng, d, library = np.random.default_rng(queries + slots), 64, probe()
    q = bfloat16(rng, heads, queries, d)
    k, v = (bfloat16(rng, slots, heads, d) for _ in range(2))
    got = by_heads(library, q, k, v, 0.18)
    for h in range(heads):
        alone = (np.ascontiguousarray(x[:, h]) for x in (k, v))
        want = by_panel(library, q[h], *alone, 0.18)
        assert np.array_equal(got[h].view(np.uint32), want.view(np.uint32))


def test_another_order_shows() -> None:
    """Of vdpbf16ps, by which engine and panel agree as well."""
    sizes = {"seed": 2, "queries": 3, "shared": 42, "own": 200, "d": 64}
    found = [assert_engine_is_a_panel(probe(flags=flags), **sizes) for flags in (AMX, VECTORS)]
    assert (found[0] != found[1]).mean() > 0.5


@pytest.mark.parametrize("fault", ["TILE_BORDER", "TILE_KEEP"])
def test_a_fault_is_found(fault: str) -> None:
    sizes = {"seed": 0, "queries": 3, "shared": 42, "own": 200, "d": 64}
    assert_engine_is_a_panel(probe(), **sizes)
    faulty = probe(fault)
    with pytest.raises(AssertionError):
        assert_engine_is_a_panel(faulty, **sizes)
