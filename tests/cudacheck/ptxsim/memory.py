"""Memory of a PTX program: tensors, shared memory with a shadow that finds races, local memory.

Generic addresses: tensors at their real ones, shared and local memory and the parameters in windows
that no tensor can be in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cudacheck.ptxsim.parser import Kernel, PtxError

if TYPE_CHECKING:
    from cudacheck.ptxsim.machine import Machine

SHARED_BASE = 1024
"""Lower shared addresses are never valid."""
SHARED_WINDOW, LOCAL_WINDOW, PARAMETER_WINDOW = 1 << 50, 2 << 50, 3 << 50
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NOBODY, SEVERAL_WARPS, ONE_WARP = -1, -2, -3
"""Last readers of a byte: a lane, one of these, or ONE_WARP - warp."""


@dataclass
class Buffer:
    name: str
    array: np.ndarray
    writable: bool

    def __post_init__(self) -> None:
        assert self.array.flags.c_contiguous
        self.bytes = self.array.reshape(-1).view(np.uint8)
        self.begin = self.array.ctypes.data
        self.end = self.begin + self.array.nbytes


class Global:
    """Tensors and the module's constants."""

    def __init__(self, buffers: Sequence[Buffer], fail: Callable[[str], None]) -> None:
        self.buffers = sorted(buffers, key=lambda b: b.begin)
        self.begins = np.array([b.begin for b in self.buffers], np.int64)
        self.ends = np.array([b.end for b in self.buffers], np.int64)
        self.fail = fail

    def locate(self, address: np.ndarray, size: int, *, write: bool) -> np.ndarray:
        """The buffer of each address."""
        which = np.searchsorted(self.begins, address, "right") - 1
        bad = (which < 0) | (address + size > self.ends[np.maximum(which, 0)])
        if bad.any():
            at = int(address[bad][0])
            nearest = min(self.buffers, key=lambda b: min(abs(at - b.begin), abs(at - b.end)))
            self.fail(
                f"out of bounds: global {'write' if write else 'read'} of {size} bytes at byte "
                f"{at - nearest.begin} of {nearest.name}, which has {nearest.array.nbytes}"
            )
        if (address % size).any():
            self.fail(f"unaligned global access of {size} bytes")
        if write:
            for i in np.unique(which):
                if not self.buffers[i].writable:
                    self.fail(f"write to the input {self.buffers[i].name}")
        return which

    def read(self, address: np.ndarray, size: int) -> np.ndarray:
        """Bytes [lanes, size]."""
        which = self.locate(address, size, write=False)
        out = np.empty((len(address), size), np.uint8)
        for i in np.unique(which):
            here = which == i
            at = address[here] - self.buffers[i].begin
            out[here] = self.buffers[i].bytes[at[:, None] + np.arange(size)]
        return out

    def write(self, address: np.ndarray, data: np.ndarray) -> None:
        size = data.shape[1]
        which = self.locate(address, size, write=True)
        for i in np.unique(which):
            here = which == i
            at = address[here] - self.buffers[i].begin
            self.buffers[i].bytes[at[:, None] + np.arange(size)] = data[here]


class Shared:
    """Shared memory of all blocks, one after another, and who last touched each byte."""

    def __init__(self, kernel: Kernel, blocks: int, threads: int, dynamic_bytes: int) -> None:
        self.kernel, self.threads = kernel, threads
        self.static_end = SHARED_BASE + kernel.shared.bytes
        self.dynamic = -(-self.static_end // 128) * 128
        self.dynamic_end = self.dynamic + dynamic_bytes
        self.stride = -(-self.dynamic_end // 128) * 128
        size = blocks * self.stride
        self.bytes = np.full(size, 0xFF, np.uint8)  # NaN in every floating-point format
        self.written = np.zeros(size, bool)
        self.pending = np.zeros(size, bool)
        self.writer, self.write_epoch, self.write_time = (np.full(size, -1) for _ in range(3))
        self.reader, self.read_epoch, self.read_time = (np.full(size, -1) for _ in range(3))
        self.epoch = np.zeros(blocks, np.int64)  # counts barriers
        self.time = np.zeros(blocks * threads // 32, np.int64)  # counts warp barriers
        self.findings: list[str] = []

    def flat(
        self, address: np.ndarray, size: int, lanes: np.ndarray, fail: Callable[[str], None]
    ) -> np.ndarray:
        """Positions in the array of all blocks."""
        static = (address >= SHARED_BASE) & (address + size <= self.static_end)
        dynamic = (address >= self.dynamic) & (address + size <= self.dynamic_end)
        if not (static | dynamic).all():
            bad = int(address[~(static | dynamic)][0])
            fail(f"out of bounds: shared access of {size} bytes at address {bad}")
        if (address % size).any():
            fail(f"unaligned shared access of {size} bytes")
        return lanes // self.threads * self.stride + address

    def note(
        self,
        flat: np.ndarray,
        size: int,
        lanes: np.ndarray,
        kind: str,
        *,
        by_the_warp: bool = False,
    ) -> None:
        """Look for races with earlier accesses and remember these. kind: read, write, atomic."""
        at = (flat[:, None] + np.arange(size)).ravel()
        lane = np.repeat(lanes, size)
        warp, epoch = lane // 32, self.epoch[lane // self.threads]
        time = self.time[warp]
        wrote = self.writer[at]
        same = (self.write_epoch[at] == epoch) & (wrote != NOBODY)
        synced = (wrote // 32 == warp) & (self.write_time[at] < time)
        if kind != "atomic" and (same & ((wrote != lane) | by_the_warp) & ~synced).any():
            self.findings.append(f"race: {kind} after a write by another thread")
        if kind != "read":
            read = self.reader[at]
            ordered = (read >= 0) & (read // 32 == warp) & (self.read_time[at] < time)
            ordered |= (read <= ONE_WARP) & (ONE_WARP - read == warp) & (self.read_time[at] < time)
            same = (self.read_epoch[at] == epoch) & (read != NOBODY) & (read != lane)
            if (same & ~ordered).any():
                self.findings.append(f"race: {kind} after a read by another thread")
        if kind == "read" or kind == "atomic":
            if self.pending[at].any():
                self.findings.append("read of shared memory before its cp.async was waited for")
            elif not self.written[at].all():
                self.findings.append("read of shared memory that was never written")
        if kind == "write":
            if len(np.unique(at)) != len(at):
                self.findings.append("race: lanes of one store write the same byte")
            self.writer[at], self.write_epoch[at], self.write_time[at] = lane, epoch, time
        if kind != "read":
            self.written[at] = True
        if kind == "read":
            self._note_readers(at, lane, warp, epoch, time)

    def _note_readers(
        self,
        at: np.ndarray,
        lane: np.ndarray,
        warp: np.ndarray,
        epoch: np.ndarray,
        time: np.ndarray,
    ) -> None:
        before = self.reader[at]
        kept = (self.read_epoch[at] == epoch) & (before != NOBODY)
        before_warp = np.where(before >= 0, before // 32, ONE_WARP - before)
        # A read of this warp before its last barrier is ordered before whatever this one is.
        kept &= (before == SEVERAL_WARPS) | (before_warp != warp) | (self.read_time[at] >= time)
        several = kept & ((before == SEVERAL_WARPS) | (before_warp != warp))
        value = np.where(kept & (before != lane), ONE_WARP - warp, lane)
        value = np.where(several, SEVERAL_WARPS, value)
        unique, inverse, counts = np.unique(at, return_inverse=True, return_counts=True)
        if (counts > 1).any():  # several lanes of this instruction read one byte
            low, high = np.full(len(unique), 1 << 40), np.full(len(unique), -1)
            np.minimum.at(low, inverse, warp)
            np.maximum.at(high, inverse, warp)
            mixed = (low != high)[inverse] | (value == SEVERAL_WARPS)
            value = np.where(
                counts[inverse] > 1, np.where(mixed, SEVERAL_WARPS, ONE_WARP - warp), value
            )
        self.reader[at], self.read_epoch[at], self.read_time[at] = value, epoch, time


def load(
    machine: "Machine", space: str, address: np.ndarray, size: int, lanes: np.ndarray
) -> np.ndarray:
    """Bytes [lanes, size] of one state space, or of generic addresses."""
    if space == "generic":
        out = np.empty((len(address), size), np.uint8)
        for name, base in machine.windows(address):
            here = machine.in_window(address, name)
            out[here] = load(machine, name, address[here] - base, size, lanes[here])
        return out
    if space == "shared":
        flat = machine.shared.flat(address, size, lanes, machine.fail)
        machine.shared.note(flat, size, lanes, "read")
        machine.count_banks(flat, size, lanes)
        return machine.shared.bytes[flat[:, None] + np.arange(size)]
    if space == "local":
        at = (lanes * machine.local_stride + address)[:, None] + np.arange(size)
        return machine.local[at]
    if space == "param":
        return machine.parameters[address[:, None] + np.arange(size)]
    if space in ("global", "const"):
        return machine.memory.read(address, size)
    raise PtxError(f"state space {space}")


def store(
    machine: "Machine", space: str, address: np.ndarray, data: np.ndarray, lanes: np.ndarray
) -> None:
    size = data.shape[1]
    if space == "generic":
        for name, base in machine.windows(address):
            here = machine.in_window(address, name)
            store(machine, name, address[here] - base, data[here], lanes[here])
    elif space == "shared":
        flat = machine.shared.flat(address, size, lanes, machine.fail)
        machine.shared.note(flat, size, lanes, "write")
        machine.count_banks(flat, size, lanes)
        machine.shared.bytes[flat[:, None] + np.arange(size)] = data
    elif space == "local":
        at = (lanes * machine.local_stride + address)[:, None] + np.arange(size)
        machine.local[at] = data
    elif space == "global":
        machine.memory.write(address, data)
    else:
        raise PtxError(f"store to {space}")
