"""What threads do together: barriers, shuffles, votes, matrix instructions, atomics, cp.async."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cudacheck.ptxsim import machine as machines
from cudacheck.ptxsim.operation import dtype_of
from cudacheck.ptxsim.parser import Instruction, PtxError

if TYPE_CHECKING:
    from cudacheck.ptxsim.machine import Machine

ALL = 0xFFFFFFFF


@dataclass
class Copies:
    """cp.async instructions on their way: what one instruction copies for several lanes."""

    lanes: np.ndarray
    flat: np.ndarray
    source: np.ndarray
    size: int
    read: np.ndarray
    """Bytes that are read; the rest becomes zero."""
    group: np.ndarray
    """-1: not committed."""

    def only(self, chosen: np.ndarray) -> "Copies":
        per_lane = (self.lanes, self.flat, self.source, self.read, self.group)
        lanes, flat, source, read, group = (x[chosen] for x in per_lane)
        return Copies(lanes, flat, source, self.size, read, group)


# --- Barriers of a block -------------------------------------------------------------------------


def leave(machine: "Machine", lanes: np.ndarray) -> None:
    machine.state[lanes] = machines.DONE
    if any(np.isin(c.lanes, lanes).any() for c in machine.copies):
        machine.report("a thread returned without waiting for its cp.async")
    _release(machine)


def wait_at_barrier(machine: "Machine", instruction: Instruction, lanes: np.ndarray) -> None:
    if "sync" not in instruction.parts or len(instruction.operands) > 1:
        raise PtxError(instruction.opcode)
    machine.state[lanes] = machines.AT_BARRIER
    _release(machine)


def _release(machine: "Machine") -> None:
    state = machine.state.reshape(-1, machine.threads)
    waits, done = state == machines.AT_BARRIER, state == machines.DONE
    for block in np.nonzero((waits | done).all(1) & waits.any(1))[0]:
        lanes = np.arange(block * machine.threads, (block + 1) * machine.threads)
        there = lanes[machine.state[lanes] == machines.AT_BARRIER]
        if len(np.unique(machine.at[there])) > 1:
            machine.report("divergent barrier: threads of a block met at different ones")
        if (machine.exists[lanes] & (machine.state[lanes] == machines.DONE)).any():
            machine.report("exit before barrier: threads of the block have returned")
        machine.state[there] = machines.RUNNING
        machine.shared.epoch[block] += 1


# --- Collectives of a warp -----------------------------------------------------------------------


def is_collective(instruction: Instruction) -> bool:
    parts = instruction.parts
    return parts[0] in ("shfl", "vote", "match", "redux", "ldmatrix", "mma") or (
        parts[0] in ("bar", "barrier") and "warp" in parts
    )


def _masks(machine: "Machine", instruction: Instruction, lanes: np.ndarray) -> np.ndarray:
    if instruction.parts[0] in ("ldmatrix", "mma"):
        return np.full(len(lanes), ALL, np.int64)
    return machine.read(instruction.operands[-1], "u32", lanes).astype(np.int64)


def arrive(
    machine: "Machine",
    instruction: Instruction,
    at: int,
    lanes: np.ndarray,
    active: np.ndarray,
) -> bool:
    """Lanes come to a collective; it runs for those whose whole mask is there."""
    waiting = np.nonzero((machine.state == machines.IN_COLLECTIVE) & (machine.at == at + 1))[0]
    here = np.union1d(active, waiting)
    masks = _masks(machine, instruction, here)
    if not (masks >> (here % 32) & 1).all():
        machine.fail("a mask without the calling lane")
    present = np.zeros(machine.lanes, np.int64)
    present[here] = 1
    weights = np.int64(1) << np.arange(32)
    exists = (machine.exists.reshape(-1, 32) * weights).sum(1)[machine.warp[here]]
    masks = masks & exists
    arrived = (present.reshape(-1, 32) * weights).sum(1)[machine.warp[here]]
    complete = (masks & ~arrived) == 0
    ready = here[complete]
    machine.state[here] = machines.IN_COLLECTIVE
    machine.state[ready] = machines.RUNNING
    if len(ready):
        _agree(machine, ready, masks[complete])
        _run(machine, instruction, ready, masks[complete])
        for finding in machine.shared.findings:
            machine.report(finding)
        machine.shared.findings.clear()
    return len(lanes) == len(active) and np.array_equal(ready, lanes)


def _agree(machine: "Machine", lanes: np.ndarray, masks: np.ndarray) -> None:
    full = np.zeros(machine.lanes, np.int64)
    full[lanes] = masks
    for bit in range(32):
        other = full[lanes - lanes % 32 + bit]
        if ((masks >> bit & 1 == 1) & (other != masks)).any():
            machine.fail("lanes of one collective with different masks")


def _run(
    machine: "Machine", instruction: Instruction, lanes: np.ndarray, masks: np.ndarray
) -> None:
    opcode = instruction.parts[0]
    if opcode in ("bar", "barrier"):
        machine.shared.time[np.unique(machine.warp[lanes])] += 1
    elif opcode == "shfl":
        _shuffle(machine, instruction, lanes)
    elif opcode in ("vote", "match", "redux"):
        _vote(machine, instruction, lanes, masks)
    elif opcode == "ldmatrix":
        _load_matrices(machine, instruction, lanes)
    else:
        _multiply(machine, instruction, lanes)


def _shuffle(machine: "Machine", instruction: Instruction, lanes: np.ndarray) -> None:
    target, source, b, c, _ = instruction.operands
    values = np.zeros(machine.lanes, np.uint32)
    values[lanes] = machine.read(source, "u32", lanes)
    valid = np.zeros(machine.lanes, bool)
    valid[lanes] = True
    by = machine.read(b, "u32", lanes).astype(np.int64) & 31
    clamp = machine.read(c, "u32", lanes).astype(np.int64)
    lane = lanes % 32
    segment, bound = clamp >> 8 & 31, clamp & 31
    highest = (lane & segment) | (bound & ~segment & 31)
    mode = instruction.parts[2]
    if mode == "up":
        wanted = lane - by
        inside = wanted >= highest
    elif mode == "down":
        wanted = lane + by
        inside = wanted <= highest
    elif mode == "bfly":
        wanted = lane ^ by
        inside = wanted <= highest
    else:
        wanted = (lane & segment) | (by & ~segment & 31)
        inside = wanted <= highest
    origin = lanes - lane + np.where(inside, wanted, lane)
    result = np.where(valid[origin], values[origin], np.uint32(0x7FC0DEAD))
    names = str(target).split("|")
    machine.write(names[0], result, lanes)
    if len(names) > 1:
        machine.write(names[1], inside, lanes)


def _vote(
    machine: "Machine", instruction: Instruction, lanes: np.ndarray, masks: np.ndarray
) -> None:
    target, source, _ = instruction.operands
    opcode, mode = (
        instruction.parts[0],
        instruction.parts[2 if instruction.parts[1] == "sync" else 1],
    )
    kind = instruction.type if opcode != "vote" else "pred"
    if opcode == "vote" and mode not in ("ballot", "any", "all"):
        raise PtxError(instruction.opcode)
    values = np.zeros(machine.lanes, dtype_of(kind))
    values[lanes] = machine.read(source, kind, lanes)
    warp = values.reshape(-1, 32)[machine.warp[lanes]]  # [lanes, 32]
    member = (masks[:, None] >> np.arange(32) & 1).astype(bool)
    weights = np.uint64(1) << np.arange(32, dtype=np.uint64)
    if opcode == "vote":
        bits = ((warp & member) * weights).sum(1)
        if mode == "ballot":
            result = bits.astype(np.uint32)
        else:
            result = bits != 0 if mode == "any" else bits == masks.astype(np.uint64)
    elif opcode == "match":
        if mode != "any":
            raise PtxError(instruction.opcode)
        equal = (warp == values[lanes][:, None]) & member
        result = (equal * weights).sum(1).astype(np.uint32)
    else:
        functions = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }
        reduced = [functions[mode].reduce(w[m]) for w, m in zip(warp, member, strict=True)]
        result = np.array(reduced).astype(values.dtype)
    machine.write(target, result, lanes)


# --- Matrices ------------------------------------------------------------------------------------


def _load_matrices(machine: "Machine", instruction: Instruction, lanes: np.ndarray) -> None:
    if "m8n8" not in instruction.parts or instruction.type != "b16":
        raise PtxError(instruction.opcode)
    targets, source = instruction.operands
    assert isinstance(targets, list)
    count, warps = len(targets), len(lanes) // 32
    address = machine.address(source, lanes).reshape(warps, 32)[:, : 8 * count].ravel()
    who = lanes.reshape(warps, 32)[:, : 8 * count].ravel()
    flat = machine.shared.flat(address, 16, who, machine.fail)
    machine.shared.note(flat, 16, who, "read", by_the_warp=True)
    machine.count_banks(flat, 16, who)
    rows = machine.shared.bytes[flat[:, None] + np.arange(16)].view(np.uint16)
    rows = rows.reshape(warps, count, 8, 8)
    if "trans" in instruction.parts:
        rows = rows.transpose(0, 1, 3, 2)
    pairs = np.ascontiguousarray(rows).reshape(warps, count, 32, 2).astype(np.uint32)
    values = pairs[..., 0] | pairs[..., 1] << np.uint32(16)
    for i, name in enumerate(targets):
        machine.write(name, values[:, i].ravel(), lanes)


def _multiply(machine: "Machine", instruction: Instruction, lanes: np.ndarray) -> None:
    if instruction.opcode != "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32":
        raise PtxError(instruction.opcode)
    targets, a_names, b_names, c_names = instruction.operands
    assert isinstance(targets, list)
    warps = len(lanes) // 32
    g, t = np.arange(32) // 4, np.arange(32) % 4

    def values(name: str, kind: str) -> np.ndarray:
        return machine.read(name, kind, lanes).reshape(warps, 32)

    def halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low = (x << np.uint32(16)).view(np.float32)
        return low, (x & np.uint32(0xFFFF0000)).view(np.float32)

    a, b, c = np.empty((warps, 16, 16)), np.empty((warps, 16, 8)), np.empty((warps, 16, 8))
    for i, name in enumerate(a_names):
        row, column = g + 8 * (i & 1), 2 * t + 8 * (i >> 1)
        a[:, row, column], a[:, row, column + 1] = halves(values(name, "u32"))
    for i, name in enumerate(b_names):
        row = 2 * t + 8 * i
        b[:, row, g], b[:, row + 1, g] = halves(values(name, "u32"))
    for i, name in enumerate(c_names):
        c[:, g + 8 * (i >> 1), 2 * t + (i & 1)] = values(name, "f32")
    d = (c + a @ b).astype(np.float32)
    for i, name in enumerate(targets):
        machine.write(name, d[:, g + 8 * (i >> 1), 2 * t + (i & 1)].ravel(), lanes)


# --- Atomics -------------------------------------------------------------------------------------


def atomic(machine: "Machine", instruction: Instruction, lanes: np.ndarray) -> None:
    """Lane by lane, so that each gets the value before its own."""
    operands = list(instruction.operands)
    target = operands.pop(0) if instruction.parts[0] == "atom" else "_"
    kind = instruction.type
    size = np.dtype(dtype_of(kind)).itemsize
    address = machine.address(operands[0], lanes)
    values = [machine.read(x, kind, lanes) for x in operands[1:]]
    space = machine.space(instruction)
    if space == "generic":
        (space, base), *others = machine.windows(address)
        if others:
            raise PtxError("an atomic on several state spaces at once")
        address = address - base
    if space == "shared":
        at = machine.shared.flat(address, size, lanes, machine.fail)
        machine.shared.note(at, size, lanes, "atomic")
    else:
        which = machine.memory.locate(address, size, write=True)
    names = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    name = next(p for p in instruction.parts if p in names)
    old = np.empty(len(lanes), dtype_of(kind))
    for i in range(len(lanes)):
        if space == "shared":
            memory = machine.shared.bytes[at[i] : at[i] + size].view(old.dtype)
        else:
            buffer = machine.memory.buffers[which[i]]
            begin = address[i] - buffer.begin
            memory = buffer.bytes[begin : begin + size].view(old.dtype)
        old[i] = memory[0]
        memory[0] = _changed(name, memory[0], *(v[i] for v in values))
    machine.write(target, old, lanes)


def _changed(name: str, old: np.generic, value: np.generic, other: np.generic | None = None):
    with np.errstate(over="ignore"):
        if name == "add":
            return old + value
        if name in ("min", "max"):
            return min(old, value) if name == "min" else max(old, value)
        if name in ("and", "or", "xor"):
            return {"and": old & value, "or": old | value, "xor": old ^ value}[name]
        if name == "exch":
            return value
        if name == "cas":
            return other if old == value else old
    raise PtxError(f"atomic {name}")


# --- cp.async ------------------------------------------------------------------------------------


def copy(machine: "Machine", instruction: Instruction, lanes: np.ndarray) -> None:
    parts = instruction.parts
    if parts[1] != "async" or "bulk" in parts:
        raise PtxError(instruction.opcode)
    if parts[2] == "commit_group":
        mine = np.zeros(machine.lanes, bool)
        mine[lanes] = True
        for c in machine.copies:
            open_ = mine[c.lanes] & (c.group < 0)
            c.group[open_] = machine.committed[c.lanes[open_]]
        machine.committed[lanes] += 1
    elif parts[2] in ("wait_group", "wait_all"):
        _wait(machine, instruction, lanes)
    elif parts[2] in ("ca", "cg"):
        _start(machine, instruction, lanes)
    else:
        raise PtxError(instruction.opcode)


def _start(machine: "Machine", instruction: Instruction, lanes: np.ndarray) -> None:
    target, source, size_text, *rest = instruction.operands
    size = int(str(size_text))
    read = (
        machine.read(rest[0], "u32", lanes).astype(np.int64) if rest else np.full(len(lanes), size)
    )
    flat = machine.shared.flat(machine.address(target, lanes), size, lanes, machine.fail)
    address = machine.address(source, lanes)
    if (address % size).any():
        machine.fail("cp.async from an address that is not aligned")
    for count in np.unique(read):
        if count > size:
            machine.fail(f"cp.async of {count} bytes of {size}")
        here = address[read == count]
        for at in range(count):  # bounds
            machine.memory.locate(here + at, 1, write=False)
    machine.shared.note(flat, size, lanes, "write")
    at = (flat[:, None] + np.arange(size)).ravel()
    machine.shared.bytes[at], machine.shared.pending[at] = 0xFF, True
    group = np.full(len(lanes), -1)
    machine.copies.append(Copies(lanes.copy(), flat, address, size, read, group))


def _wait(machine: "Machine", instruction: Instruction, lanes: np.ndarray) -> None:
    mine = np.zeros(machine.lanes, bool)
    mine[lanes] = True
    pending = int(str(instruction.operands[0])) if instruction.operands else 0
    kept = []
    for c in machine.copies:
        due = mine[c.lanes] & (c.group >= 0) & (c.group < machine.committed[c.lanes] - pending)
        if instruction.parts[2] == "wait_all":
            due = mine[c.lanes]
        _land(machine, c.only(due))
        if not due.all():
            kept.append(c.only(~due))
    machine.copies = kept


def _land(machine: "Machine", c: Copies) -> None:
    if not len(c.lanes):
        return
    at = c.flat[:, None] + np.arange(c.size)
    machine.shared.pending[at.ravel()] = False
    machine.shared.note(c.flat, c.size, c.lanes, "write")
    data = np.zeros((len(c.lanes), c.size), np.uint8)
    for count in np.unique(c.read):
        if count:
            here = c.read == count
            for i in range(int(count)):
                data[here, i] = machine.memory.read(c.source[here] + i, 1)[:, 0]
    machine.shared.bytes[at] = data
