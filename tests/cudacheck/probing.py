"""The probes: small kernels with a known right answer, one run for the emulator and one for PTX."""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cudacheck import toolkit
from cudacheck.emulator import Emulator
from cudacheck.ptxsim import run
from cudacheck.ptxsim.arithmetic import to_bf16

FOLDER = Path(__file__).parent / "probes"


def aligned(x: np.ndarray) -> np.ndarray:
    """A copy that begins at a multiple of 256 bytes, as memory on a GPU does."""
    room = np.empty(x.nbytes + 256, np.uint8)
    begin = -room.ctypes.data % 256
    out = room[begin : begin + x.nbytes].view(x.dtype)
    out[:] = x
    return out


@dataclass(frozen=True)
class Probe:
    """How a probe is launched, and what it should write."""

    name: str
    grid: int
    block: int
    n: int
    input: np.ndarray
    output: np.ndarray
    """What the output holds before."""
    expected: Callable[[np.ndarray], np.ndarray] | None = None
    shared: int = 0

    def want(self) -> np.ndarray:
        assert self.expected is not None
        return self.expected(self.input)


@functools.cache
def emulator(library: str) -> Emulator:
    return Emulator(library)


def emulate(
    probe: Probe, kernel: str, library: str, order: str = "fifo", **options: object
) -> tuple[np.ndarray, str]:
    """What a probe's kernel writes in the emulator, and what was found."""
    lib = emulator(library)
    lib.configure(order, 5, **options)
    given, output = aligned(probe.input), aligned(probe.output)
    code = lib.library.rlir_probe(
        kernel.encode(),
        *(probe.grid, probe.block, probe.shared),
        *(ctypes.c_void_p(given.ctypes.data), ctypes.c_size_t(given.nbytes)),
        *(ctypes.c_void_p(output.ctypes.data), ctypes.c_size_t(output.nbytes)),
        probe.n,
    )
    assert code in (0, 1), f"no kernel {kernel}"
    assert (code == 1) == bool(lib.error())
    return output, lib.error()


def interpret(probe: Probe, kernel: str, source: str, arch: str, order: str = "grid") -> np.ndarray:
    """What the PTX of a probe's kernel writes. Raises PtxError with what was found."""
    given, output = aligned(probe.input), aligned(probe.output)
    run(
        toolkit.kernels(FOLDER / source, arch)[kernel],
        [probe.grid],
        [probe.block],
        [given, output, probe.n],
        inputs=[given],
        outputs=[output],
        shared_bytes=probe.shared,
        order=order,
    )
    return output


def _reals(count: int, seed: int = 0) -> np.ndarray:
    """Small integers: their sums are exact in any order."""
    return np.random.default_rng(seed).integers(-50, 50, count).astype(np.float32)


def _reversed_in_warps(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, 32)[:, ::-1].ravel()


def _half_sums(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.full(16, x[:16].sum()), x[16:]])


def _tile_sums(x: np.ndarray) -> np.ndarray:
    each = x.view(np.uint32).reshape(5, 32, 4).sum((0, 2), dtype=np.uint32)
    return each[np.arange(32) ^ 1]


def _empty(count: int, dtype: type = np.float32) -> np.ndarray:
    return np.zeros(count, dtype)


def _words(count: int, high: int = 60_000, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, count).astype(np.uint32)


FAULTS = [
    Probe(
        "missing_barrier", 2, 128, 100, _reals(200), _empty(2), lambda x: x.reshape(2, 100).sum(1)
    ),
    Probe("wrong_wait", 1, 32, 5, _words(640), _empty(32, np.uint32), _tile_sums),
    Probe("wrong_tail", 2, 64, 100, _reals(100), _empty(100), lambda x: 2 * x),
    Probe("missing_warp_sync", 1, 64, 0, _reals(64), _empty(64), _reversed_in_warps),
    Probe("plain_add", 3, 32, 32, _reals(96), _empty(32), lambda x: x.reshape(3, 32).sum(0)),
    Probe("wrong_mask", 1, 32, 0, _reals(32), _empty(32), _half_sums),
    Probe(
        "divergent_barrier",
        *(1, 64, 50),
        _reals(50),
        _empty(64),
        lambda x: np.concatenate([np.roll(x, -1), np.zeros(14, np.float32)]),
    ),
    Probe(
        "never_written",
        *(1, 64, 60),
        _reals(60),
        _empty(64),
        lambda x: np.concatenate([x, np.zeros(4, np.float32)])[::-1],
    ),
    Probe(
        "beyond_shared",
        *(1, 64, 48),
        _reals(64),
        _empty(64),
        lambda x: np.concatenate([x[47::-1], np.zeros(16, np.float32)]),
        shared=192,
    ),
    Probe("unaligned", 1, 32, 0, _reals(140), _empty(32), lambda x: x[:128].reshape(32, 4).sum(1)),
    Probe("writes_input", 1, 32, 0, _reals(32), _empty(32), lambda x: x),
    Probe(
        "reads_other_block",
        *(2, 32, 64),
        _reals(64),
        _empty(66),
        lambda x: np.concatenate([x, x[[0, 32]]]),
    ),
]
TRANSPOSE = Probe(
    "bank_conflict", 1, 32, 0, _reals(1024), _empty(1024), lambda x: x.reshape(32, 32).T.ravel()
)


def _matrices() -> np.ndarray:
    return to_bf16(np.random.default_rng(1).standard_normal(768).astype(np.float32))


def _products(bits: np.ndarray) -> np.ndarray:
    a, b, v = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64).reshape(3, 16, 16)
    return np.stack([a @ b.T, a @ v]).astype(np.float32).ravel()


def _copied(data: np.ndarray) -> np.ndarray:
    chunks = np.concatenate([data, np.zeros(24, np.uint8)]).reshape(2, 32, 16)
    return chunks[:, ::-1].ravel()


PRODUCT = Probe("product", 1, 32, 0, _matrices(), _empty(512), _products)
COPIES = Probe(
    "copies",
    *(1, 32, 1000),
    np.random.default_rng(2).integers(1, 256, 1000).astype(np.uint8),
    _empty(1024, np.uint8),
    _copied,
)
SPECIAL = np.array([0.0, -0.0, 1e-40, np.inf, -np.inf, np.nan, 126.5, -140.0], np.float32)
APPROXIMATIONS = Probe(
    "approximations",
    *(1, 128, 0),
    np.concatenate([_reals(120) / np.float32(7), SPECIAL]),
    _empty(1024, np.uint32),
)
_edges = np.array([0, 0, 1, 2**31, 2**32 - 1, 2**31 - 1], np.uint32)
COMPUTED = [
    Probe(
        "integers",
        *(1, 256, 7),
        np.concatenate([_words(506, 2**32), _edges]),
        _empty(4096, np.uint32),
    ),
    Probe(
        "floats",
        1,
        128,
        5,
        _reals(256) / np.float32(13) + np.float32(0.01),
        _empty(2048, np.float64),
    ),
    Probe("warps", 1, 64, 0, _words(64), _empty(1024, np.uint32)),
    Probe("control", 1, 64, 9, _words(64), _empty(257, np.uint32)),
]
