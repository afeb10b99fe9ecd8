"""The emulator: right kernels pass in every order, typical bugs are found, layouts are measured."""

import numpy as np
import pytest

from cudacheck.emulator import ORDERS
from cudacheck.probing import (
    APPROXIMATIONS,
    COPIES,
    FAULTS,
    PRODUCT,
    TRANSPOSE,
    Probe,
    emulate,
    emulator,
)

probes = pytest.mark.parametrize("probe", FAULTS, ids=lambda p: p.name)
WHAT: dict[str, str] = {
    "missing_barrier": "race in shared memory",
    "wrong_wait": "before its cp.async was waited for",
    "wrong_tail": "out of bounds: read of 4 bytes at byte 400 of input, which has 400",
    "missing_warp_sync": "race in shared memory",
    "plain_add": "race between blocks in output",
    "wrong_mask": "deadlock: 16 threads wait in __shfl_xor_sync",
    "divergent_barrier": "exit before barrier",
    "never_written": "read of shared memory that was never written",
    "beyond_shared": "192 dynamic bytes",
    "unaligned": "unaligned",
    "writes_input": "write to the input",
    "reads_other_block": "race between blocks in output",
}
WITHOUT_INSTRUMENTS = {"wrong_mask", "divergent_barrier"}
"""Found by the plain build too, by name; of the others it may give wrong results."""
WRONG_RESULT = {"missing_barrier", "wrong_wait", "missing_warp_sync"}
"""Poison in shared memory and late copies make these wrong even in the plain build."""


@probes
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("library", ["faults", "faults_checked"])
def test_right_kernels_pass(probe: Probe, library: str, order: str) -> None:
    output, found = emulate(probe, f"{probe.name}_sound", library, order)
    assert not found
    assert np.array_equal(output, probe.want())


@probes
@pytest.mark.parametrize("order", ORDERS)
def test_the_checked_build_finds_the_fault(probe: Probe, order: str) -> None:
    _, found = emulate(probe, f"{probe.name}_faulty", "faults_checked", order)
    assert WHAT[probe.name] in found


@probes
def test_what_the_plain_build_shows_of_the_fault(probe: Probe) -> None:
    output, found = emulate(probe, f"{probe.name}_faulty", "faults")
    if probe.name in WITHOUT_INSTRUMENTS:
        assert WHAT[probe.name] in found
    else:
        assert not found
    if probe.name in WRONG_RESULT:
        assert not np.array_equal(output, probe.want())


def test_copies_that_land_at_once_hide_a_wrong_wait() -> None:
    probe = next(p for p in FAULTS if p.name == "wrong_wait")
    output, found = emulate(probe, "wrong_wait_faulty", "faults_checked", late=False)
    assert not found
    assert np.array_equal(output, probe.want())


@pytest.mark.parametrize("library", ["instructions", "instructions_checked"])
def test_matrix_instructions_and_copies(library: str) -> None:
    output, found = emulate(PRODUCT, "product_sound", library, "random")
    assert not found
    np.testing.assert_allclose(output, PRODUCT.want(), rtol=0, atol=1e-5)
    wrong, _ = emulate(PRODUCT, "product_faulty", library)
    assert np.abs(wrong - PRODUCT.want()).max() > 0.1
    output, found = emulate(COPIES, "copies_sound", library, "random")
    assert not found
    assert np.array_equal(output, COPIES.want())


def test_approximate_functions() -> None:
    output, found = emulate(APPROXIMATIONS, "approximations_sound", "instructions_checked")
    assert not found
    x = APPROXIMATIONS.input.astype(np.float64)
    y = output.reshape(-1, 8)[:, :4].view(np.float32)
    with np.errstate(all="ignore"):
        flushed = np.where(np.abs(x) < 2.0**-126, np.copysign(0.0, x), x)
        want = [2.0**flushed, np.log2(np.abs(flushed)), 1 / flushed, 1 / np.sqrt(np.abs(flushed))]
        want = [np.where(np.abs(w) < 2.0**-126, np.copysign(0.0, w), w) for w in want]
    np.testing.assert_allclose(y, np.stack(want, 1), rtol=1e-6, atol=0)


def test_the_profile_counts_bank_conflicts_and_sectors() -> None:
    for kernel, ratio in (("bank_conflict_sound", 1.0), ("bank_conflict_faulty", 32.0)):
        lib_output, found = emulate(TRANSPOSE, kernel, "faults_checked", profile=0)
        assert not found
        assert np.array_equal(lib_output, TRANSPOSE.want())
        places = emulator("faults_checked").profile()
        reads = [p for p in places if p.space == "shared" and p.kind == "read"]
        assert [p.ratio for p in reads] == [ratio]
        assert [p.requests for p in reads] == [32]
        assert all(p.ratio == 1.0 for p in places if p.space == "global")
