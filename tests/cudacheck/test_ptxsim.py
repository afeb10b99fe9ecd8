"""The PTX interpreter: what nvcc makes of the probes gives what the emulator and the formulas give,
typical bugs are found, and so are bugs that only the device branch of ptx.cuh has."""

import functools
import re
from fractions import Fraction

import numpy as np
import pytest

from cudacheck import toolkit
from cudacheck.probing import (
    APPROXIMATIONS,
    COMPUTED,
    COPIES,
    FAULTS,
    FOLDER,
    PRODUCT,
    TRANSPOSE,
    Probe,
    aligned,
    emulate,
    interpret,
)
from cudacheck.ptxsim import Kernel, PtxError, parse, run
from cudacheck.ptxsim.arithmetic import fma32

archs = pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
WHAT: dict[str, str] = {
    "missing_barrier": "race: read after a write by another thread",
    "wrong_wait": "before its cp.async was waited for",
    "wrong_tail": "out of bounds: global",
    "missing_warp_sync": "race: read after a write by another thread",
    "wrong_mask": "deadlock: 16 threads wait",
    "divergent_barrier": "exit before barrier",
    "never_written": "read of shared memory that was never written",
    "beyond_shared": "out of bounds: shared",
    "unaligned": "unaligned global access of 16 bytes",
    "writes_input": "write to the input",
}
"""Races between blocks in global memory are left to the emulator."""


@archs
@pytest.mark.parametrize("order", ["grid", "random"])
@pytest.mark.parametrize("probe", [*FAULTS, TRANSPOSE], ids=lambda p: p.name)
def test_right_kernels_pass(probe: Probe, arch: str, order: str) -> None:
    got = interpret(probe, f"{probe.name}_sound", "faults.cu", arch, order)
    assert np.array_equal(got, probe.want())


@archs
@pytest.mark.parametrize("probe", [p for p in FAULTS if p.name in WHAT], ids=lambda p: p.name)
def test_faults_are_found(probe: Probe, arch: str) -> None:
    with pytest.raises(PtxError, match=WHAT[probe.name]):
        interpret(probe, f"{probe.name}_faulty", "faults.cu", arch)


@archs
@pytest.mark.parametrize("probe", COMPUTED, ids=lambda p: p.name)
def test_computes_what_the_emulator_does(probe: Probe, arch: str) -> None:
    """Integers, floats, doubles, control flow, votes, atomics: bit for bit."""
    want, found = emulate(probe, f"{probe.name}_sound", "instructions_checked", "random")
    assert not found
    got = interpret(probe, f"{probe.name}_sound", "instructions.cu", arch)
    equal_nan = probe.output.dtype.kind == "f"
    assert np.array_equal(got, want, equal_nan=equal_nan)


@archs
def test_tensor_cores_and_copies(arch: str) -> None:
    got = interpret(PRODUCT, "product_sound", "instructions.cu", arch)
    np.testing.assert_allclose(got, PRODUCT.want(), rtol=0, atol=1e-5)
    wrong = interpret(PRODUCT, "product_faulty", "instructions.cu", arch)
    assert np.abs(wrong - PRODUCT.want()).max() > 0.1
    assert np.array_equal(interpret(COPIES, "copies_sound", "instructions.cu", arch), COPIES.want())


@archs
def test_approximate_functions(arch: str) -> None:
    want, _ = emulate(APPROXIMATIONS, "approximations_sound", "instructions")
    got = interpret(APPROXIMATIONS, "approximations_sound", "instructions.cu", arch)
    got, want = got.reshape(-1, 8), want.reshape(-1, 8)
    finite = np.isfinite(APPROXIMATIONS.input)
    assert np.array_equal(got[finite, 4], want[finite, 4])  # bf16 is exact
    np.testing.assert_allclose(
        got[:, [0, 1, 2, 3, 6, 7]].copy().view(np.float32),
        want[:, [0, 1, 2, 3, 6, 7]].copy().view(np.float32),
        rtol=1e-6,
        atol=2e-7,
    )


# --- Bugs of the device branch alone -------------------------------------------------------------

DEVICE_FAULTS: dict[str, tuple[str, str, Probe]] = {
    "pack_order": (': "f"(high), "f"(low)', ': "f"(low), "f"(high)', APPROXIMATIONS),
    "wrong_function": ("lg2.approx.ftz.f32", "ex2.approx.ftz.f32", APPROXIMATIONS),
    "not_transposed": ("x4.trans.shared", "x4.shared", PRODUCT),
    "fragments_of_b": ('"r"(b0), "r"(b1))', '"r"(b1), "r"(b0))', PRODUCT),
    "wait_for_less": ('"n"(kPending)', '"n"(kPending + 1)', COPIES),
    "tail_not_zero": (
        '16, %2;\\n" ::"r"(to), "l"(from), "r"(bytes)',
        '16;\\n" ::"r"(to), "l"(from)',
        COPIES,
    ),
}
"""Text of ptx.cuh, what it becomes, and the probe that should notice."""


@functools.cache
def planted(arch: str) -> dict[str, Kernel]:
    """All faults in one file: a copy of ptx.cuh and the probes in a namespace for each."""
    header = (toolkit.CSRC / "cuda" / "ptx.cuh").read_text()
    probes = (FOLDER / "instructions.cu").read_text()
    header = re.sub(r"#(pragma once|include .*)", "", header)
    probes = re.sub(r"#include .*|namespace ptx = .*", "", probes)
    text = '#include "probe.cuh"\n'
    for name, (old, new, _) in DEVICE_FAULTS.items():
        assert header.count(old) == 1, f"{name}: {old} is not once in ptx.cuh"
        copy = header.replace(old, new).replace("namespace rlir::ptx", f"namespace {name}_ptx")
        own = re.sub(r"\b(\w+)_sound\b", rf"{name}_\1_sound", probes)
        own = re.sub(r"RLIR_PROBE\((\w+)\)", rf"RLIR_PROBE_KERNEL({name}_\1_sound, \1<false>)", own)
        own = re.sub(r"\bptx::", f"{name}_ptx::", own)
        text += f"{copy}\nnamespace {name} {{\n{own}\n}}\n"
    source = toolkit.CACHE / "planted.cu"
    source.parent.mkdir(parents=True, exist_ok=True)
    if not source.exists() or source.read_text() != text:
        source.write_text(text)
    return toolkit.kernels(source, arch)


@archs
@pytest.mark.parametrize("fault", DEVICE_FAULTS)
def test_bugs_of_the_device_branch_are_found(fault: str, arch: str) -> None:
    probe = DEVICE_FAULTS[fault][2]
    kernel = planted(arch)[f"{fault}_{probe.name}_sound"]
    given, output, found = aligned(probe.input), aligned(probe.output), ""
    want, _ = emulate(probe, f"{probe.name}_sound", "instructions")
    grid, block, arguments = [probe.grid], [probe.block], [given, output, probe.n]
    try:
        run(kernel, grid, block, arguments, inputs=[given], outputs=[output])
    except PtxError as error:
        found = str(error)
    if fault == "wait_for_less":
        assert "before its cp.async was waited for" in found
    elif fault == "tail_not_zero":
        assert "out of bounds: global read" in found
    else:
        assert not found
        kind = np.float32 if probe is not COPIES else np.uint8
        close = np.isclose(output.view(kind), want.view(kind), rtol=1e-5, equal_nan=True)
        assert not close.all()


# --- The interpreter itself ----------------------------------------------------------------------

PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry f(.param .u64 f_param_0)
{
.reg .b32 %r<3>;
.reg .b64 %rd<2>;
ld.param.u64 %rd1, [f_param_0];
mov.u32 %r1, %tid.x;
@INSTRUCTION@
st.global.u32 [%rd1], %r1;
ret;
}
"""


def test_unknown_instructions_raise() -> None:
    output = np.zeros(1, np.uint32)
    run(parse(PTX.replace("@INSTRUCTION@", ""))["f"], [1], [1], [output], outputs=[output])
    for text in (
        "wgmma.fence.sync.aligned;",
        "frobnicate.u32 %r1, %r1;",
        "add.cc.u32 %r1, %r1, 1;",
    ):
        kernel = parse(PTX.replace("@INSTRUCTION@", text))["f"]
        with pytest.raises(PtxError):
            run(kernel, [1], [1], [output], outputs=[output])


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, (3, 4000), dtype=np.uint64).astype(np.uint32)
    bits = bits & np.uint32(0xBFFFFFFF) | np.uint32(0x30000000)  # moderate exponents
    a, b, c = bits.view(np.float32)
    c = np.where(rng.random(4000) < 0.5, -a * b, c).astype(np.float32)  # cancellation
    for x, y, z, got in zip(a, b, c, fma32(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        low, high = (np.nextafter(got, np.float32(s)) for s in (-np.inf, np.inf))
        error = abs(Fraction(float(got)) - exact)
        assert error <= abs(Fraction(float(low)) - exact)
        assert error <= abs(Fraction(float(high)) - exact)


def test_names_are_readable() -> None:
    mangled = "_ZN4rlir4cuda51_GLOBAL__N__462d15ae_18_group_advantage_cu_0bc5561111tile_kernel"
    assert toolkit.readable(f"{mangled}IdEEvNS0_14GroupAdvantageE") == "tile_kernel<double>"
    assert toolkit.readable(f"{mangled}INS_7Float16ELi16EEEvv") == "tile_kernel<Float16, 16>"
    assert toolkit.readable("plain") == "plain"
