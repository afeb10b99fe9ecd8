"""Static budgets of the CUDA kernels on every architecture: no spills, few registers, enough blocks
per multiprocessor, wide loads where they are meant. A new kernel gets a line in BUDGETS."""

import re
from dataclasses import dataclass

import pytest

from cudacheck import attention_calls, toolkit
from cudacheck.emulator import cuda_ops


@dataclass(frozen=True)
class Budget:
    threads: int
    """Of a block."""
    registers: int
    """At most, on every architecture."""
    blocks: int
    """Per multiprocessor at least."""
    dynamic: int = 0
    """Bytes of dynamic shared memory, at most."""
    shared: int = 0
    """Bytes of static shared memory, at most."""
    has: tuple[str, ...] = ()
    """Regular expressions of machine code that must be there."""


TENSOR = (r"HMMA\.16816\S*BF16", r"LDSM\S*\.4", r"LDGSTS\S*\.128")
SCALAR = (r"FFMA", r"LDG\S*\.128", r"LDS\S*\.128")
ATTENTION = (*TENSOR, r"LDSM\S*\.MT88\.4", r"MUFU\.EX2")
WIDE = (r"LDGSTS\S*\.128", r"LDS\S*\.128", r"STG\S*\.128")
BUDGETS: dict[str, dict[str, Budget]] = {
    "decode_actions": {
        "decode_kernel": Budget(threads=256, registers=56, blocks=4, shared=1536),
    },
    "flow_sde_step": {
        "step_kernel": Budget(threads=256, registers=64, blocks=4, shared=18456),
        "finish_kernel": Budget(threads=32, registers=48, blocks=24),
        "backward_kernel": Budget(threads=256, registers=56, blocks=4, shared=16),
    },
    "group_advantage": {
        "batch_kernel": Budget(threads=16, registers=64, blocks=16),
        "scattered_kernel": Budget(threads=128, registers=72, blocks=7),
        "tile_kernel": Budget(threads=128, registers=64, blocks=8, dynamic=8192, has=WIDE),
    },
    "group_attention": {},  # video_attention's kernels
    # Registers: a block of an attention kernel has sums, scores and queries in them.
    "group_decode_attention": {
        "chunk_kernel": Budget(threads=128, registers=250, blocks=1, dynamic=66768, has=ATTENTION),
        "merge_kernel": Budget(threads=128, registers=48, blocks=10, has=(r"LDG\S*\.128",)),
    },
    "inverse_reward": {
        "reward_kernel": Budget(threads=128, registers=80, blocks=6, shared=2624),
    },
    "policy_loss": {
        "row_kernel": Budget(threads=256, registers=112, blocks=2, shared=44160),
        "finish_kernel": Budget(threads=256, registers=64, blocks=4, shared=8848),
        "backward_kernel": Budget(threads=256, registers=80, blocks=3),
    },
    "rotary": {
        "rotary_kernel": Budget(threads=256, registers=64, blocks=4),
    },
    "rotary_append": {
        "append_kernel": Budget(threads=128, registers=64, blocks=8),
    },
    "sample_tokens": {  # shared memory for 4096 tokens
        "sample_kernel": Budget(
            threads=512, registers=112, blocks=1, dynamic=33152, shared=1920, has=(r"LDG\S*\.128",)
        ),
    },
    # A block a multiprocessor: 128 x 256 sums of a tile are in its registers.
    "selected_logprob": {
        "tile_kernel": Budget(threads=256, registers=240, blocks=1, dynamic=98304),
        "logits_kernel": Budget(threads=256, registers=240, blocks=1, dynamic=98304),
        "rows_kernel": Budget(threads=128, registers=64, blocks=8),
        "pack_kernel": Budget(threads=128, registers=48, blocks=10, has=(r"STG\S*\.128",)),
    },
    "video_attention": {
        "attend_kernel": Budget(threads=128, registers=255, blocks=1, dynamic=100048),
        "simt_kernel": Budget(threads=256, registers=128, blocks=1, dynamic=50176),
    },
    "video_attention_backward": {
        "rows_kernel": Budget(threads=128, registers=64, blocks=8, shared=128),
        "queries_kernel": Budget(
            threads=128, registers=255, blocks=1, dynamic=65552, has=(*ATTENTION, r"STG\S*\.128")
        ),
        "keys_kernel": Budget(
            threads=128, registers=255, blocks=1, dynamic=67072, has=(*ATTENTION, r"STG\S*\.128")
        ),
        "simt_queries_kernel": Budget(threads=256, registers=128, blocks=1, dynamic=75264),
        "simt_keys_kernel": Budget(threads=256, registers=128, blocks=1, dynamic=75264),
    },
    "selected_logprob_backward": {
        "gradient_kernel": Budget(threads=256, registers=240, blocks=1, dynamic=98304),
        "hidden_kernel": Budget(threads=256, registers=240, blocks=1, dynamic=98304),
        "weight_kernel": Budget(threads=256, registers=240, blocks=1, dynamic=98304),
        "bias_kernel": Budget(threads=128, registers=40, blocks=12),
    },
}
"""op -> kernel, without template arguments -> budget."""

FORMS: dict[str, Budget] = {
    # Heads of 32 and 64, which more blocks fit of; with 64, shared memory of sm_120 has one.
    **{
        f"attend_kernel<{d}, {m}, {parts}>": Budget(
            threads=128,
            registers=registers,
            blocks=1 if d == 64 else 2,
            dynamic=attention_calls.tile_bytes(d, m, keeps=True),
            has=(*ATTENTION, r"STG\S*\.128"),
        )
        for d, m, registers in ((32, 1, 128), (32, 2, 255), (64, 1, 168), (64, 2, 255))
        for parts in (1, 2)
    },
    **{
        f"chunk_kernel<{d}>": Budget(
            threads=128,
            registers=168,
            blocks=2,
            dynamic=attention_calls.tile_bytes(d, 1, keeps=False),
            has=ATTENTION,
        )
        for d in (32, 64)
    },
    **{
        f"queries_kernel<{d}, {parts}>": Budget(
            threads=128,
            registers=248,
            blocks=2,
            dynamic=attention_calls.query_gradient_bytes(d),
            has=ATTENTION,
        )
        for d in (32, 64)
        for parts in (1, 2)
    },
    "keys_kernel<32>": Budget(
        threads=128, registers=216, blocks=2, dynamic=attention_calls.key_gradient_bytes(32)
    ),
}
"""The same of forms of a kernel, with its template arguments, that need less."""

HAS = {
    "step_kernel<float, 1>": (r"LDG\S*\.128", r"STG\S*\.128"),
    "step_kernel<double, 1>": (r"LDG\S*\.128", r"STG\S*\.128"),
    "backward_kernel<float, 1>": (r"LDG\S*\.128", r"STG\S*\.128"),
    "backward_kernel<double, 1>": (r"LDG\S*\.128", r"STG\S*\.128"),
    "row_kernel<float, 1>": (r"LDG\S*\.128", r"STS\S*\.128"),
    "row_kernel<double, 1>": (r"LDG\S*\.128", r"STS\S*\.128"),
    "rotary_kernel<1>": (r"LDG\S*\.128", r"STG\S*\.128"),
    "append_kernel<1>": (r"LDG\S*\.128", r"STG\S*\.128"),
    **{f"{name}_kernel<1>": TENSOR for name in ("tile", "logits", "gradient", "hidden", "weight")},
    **{f"{name}_kernel<0>": SCALAR for name in ("tile", "logits", "gradient", "hidden", "weight")},
}
"""Machine code that must be in one of the forms of a kernel, with its template arguments."""

# Per multiprocessor: threads, bytes of shared memory, blocks (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability"). All have 65,536 registers, given out by 256
# to a warp, and reserve 1 KiB of shared memory a block.
LIMITS = {
    "sm_80": (2048, 164 << 10, 32),
    "sm_90": (2048, 228 << 10, 32),
    "sm_100": (2048, 228 << 10, 32),
    "sm_120": (1536, 100 << 10, 24),
}


def blocks_per_multiprocessor(arch: str, threads: int, registers: int, shared: int) -> int:
    most_threads, most_shared, most_blocks = LIMITS[arch]
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    # Registers belong to four partitions; a warp stays in one.
    by_registers = 65536 // 4 // per_warp * 4 // warps
    by_shared = most_shared // (-(-shared // 128) * 128 + 1024)
    return min(most_threads // 32 // warps, by_registers, by_shared, most_blocks)


def test_occupancy_of_known_cases() -> None:
    """As NVIDIA's occupancy calculator has it."""
    assert blocks_per_multiprocessor("sm_80", 128, 32, 0) == 16
    assert blocks_per_multiprocessor("sm_80", 256, 64, 0) == 4
    assert blocks_per_multiprocessor("sm_80", 128, 138, 40960) == 3
    assert blocks_per_multiprocessor("sm_90", 1024, 64, 0) == 1
    assert blocks_per_multiprocessor("sm_120", 32, 16, 0) == 24


def test_every_kernel_has_a_budget() -> None:
    assert set(BUDGETS) == {*cuda_ops(), *cuda_ops("PARTS")}
    for op in BUDGETS:
        text = (toolkit.CSRC / "cuda" / f"{op}.cu").read_text()
        found = re.findall(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", text)
        assert set(found) == set(BUDGETS[op])


@pytest.mark.parametrize("arch", toolkit.ARCHS)
@pytest.mark.parametrize("op", BUDGETS)
def test_kernels_keep_to_their_budget(op: str, arch: str) -> None:
    source = toolkit.CSRC / "cuda" / f"{op}.cu"
    usage = toolkit.usage(source, arch)
    code = toolkit.machine_code(source, arch)
    assert {name.split("<")[0] for name in usage} == set(BUDGETS[op])
    for name, used in usage.items():
        budget = FORMS.get(name, BUDGETS[op][name.split("<")[0]])
        assert used.spilled == 0, name
        assert used.stack == 0, name
        assert used.registers <= budget.registers, f"{name}: {used.registers} registers"
        assert used.shared <= budget.shared, f"{name}: {used.shared} bytes of shared memory"
        shared = used.shared + budget.dynamic
        blocks = blocks_per_multiprocessor(arch, budget.threads, used.registers, shared)
        assert blocks >= budget.blocks, f"{name}: {blocks} blocks per multiprocessor"
        for pattern in (*budget.has, *HAS.get(name, ())) if code else ():
            assert any(re.match(pattern, opcode) for opcode in code[name]), f"{name}: no {pattern}"


def test_the_copies_of_the_ptx_are_wide() -> None:
    """What can be said without nvdisasm."""
    text = toolkit.ptx(toolkit.CSRC / "cuda" / "group_advantage.cu", "sm_80")
    assert re.search(r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16, %r\d+;", text)
    assert re.search(r"st\.global\.v4\.\w32", text)
