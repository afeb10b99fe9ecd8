"""Runs a kernel: all threads of a grid as lanes of numpy arrays, those at the lowest program
counter first. Barriers and warp collectives wait until those they name have arrived.
"""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from cudacheck.ptxsim import arithmetic, bits, warps
from cudacheck.ptxsim.memory import (
    LOCAL_WINDOW,
    PARAMETER_WINDOW,
    SHARED_BASE,
    SHARED_WINDOW,
    Buffer,
    Global,
    Shared,
    load,
    store,
)
from cudacheck.ptxsim.operation import SIGNED, UNSIGNED, Operation, dtype_of
from cudacheck.ptxsim.parser import Instruction, Kernel, Operand, PtxError

HANDLERS = arithmetic.HANDLERS | bits.HANDLERS
RUNNING, AT_BARRIER, IN_COLLECTIVE, DONE = range(4)
SPACES = ("shared", "global", "local", "param", "const")
IGNORED = ("membar", "fence", "nanosleep", "prefetch", "prefetchu", "griddepcontrol", "discard")
MAX_STEPS = 2_000_000
BASES = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAMETER_WINDOW, "global": 0}


class Machine:
    """A launch of a kernel. ``order``: "grid", or "random" for a random warp at each step."""

    def __init__(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        buffers: Sequence[Buffer],
        *,
        shared_bytes: int = 0,
        order: str = "grid",
        seed: int = 0,
    ) -> None:
        grid, block = [*grid, 1, 1][:3], [*block, 1, 1][:3]
        self.kernel, self.order = kernel, order
        self.random = np.random.default_rng(seed)
        # A warp that is not full gets lanes that are done before they begin.
        threads = int(np.prod(block))
        self.threads = -(-threads // 32) * 32
        blocks = int(np.prod(grid))
        self.lanes = blocks * self.threads
        lane = np.arange(self.lanes)
        thread, number = lane % self.threads, lane // self.threads
        self.warp = lane // 32
        self.special = {"laneid": thread % 32, "warpid": thread // 32}
        for i, axis in enumerate("xyz"):
            step, over = int(np.prod(block[:i])), int(np.prod(grid[:i]))
            self.special[f"tid.{axis}"] = thread // step % block[i]
            self.special[f"ctaid.{axis}"] = number // over % grid[i]
            self.special[f"ntid.{axis}"] = np.full(self.lanes, block[i])
            self.special[f"nctaid.{axis}"] = np.full(self.lanes, grid[i])
        self.special["lanemask_lt"] = (1 << lane % 32) - 1
        self.special["lanemask_le"] = (2 << lane % 32) - 1
        self.special["lanemask_eq"] = 1 << lane % 32
        self.special = {f"%{k}": v.astype(np.uint32) for k, v in self.special.items()}

        self.state = np.full(self.lanes, RUNNING)
        self.state[thread >= threads] = DONE
        self.exists = self.state != DONE
        self.at = np.zeros(self.lanes, np.int64)
        self.registers: dict[str, np.ndarray] = {}
        self.parameters = self._pack(arguments)
        constants = [Buffer(n, a, False) for n, a in kernel.constants.items() if len(a)]
        self.memory = Global([*buffers, *constants], self.fail)
        self.shared = Shared(kernel, blocks, self.threads, shared_bytes)
        self.local_stride = max(16, -(-kernel.local.bytes // 16) * 16)
        self.local = np.zeros(self.lanes * self.local_stride, np.uint8)
        self.call = {
            name: np.zeros((self.lanes, max(size, 1)), np.uint8)
            for name, size in kernel.call_parameters.items()
        }
        self.copies: list[warps.Copies] = []
        self.committed = np.zeros(self.lanes, np.int64)
        self.findings: dict[str, int] = {}
        self.executed: dict[str, int] = {}
        self.banks: dict[str, tuple[int, int]] = {}
        self.current: Instruction | None = None

    def _pack(self, arguments: Sequence[Any]) -> np.ndarray:
        """The block of kernel parameters: arrays are pointers, bytes are structs."""
        data = np.zeros(self.kernel.parameters.bytes, np.uint8)
        names = list(self.kernel.parameters.offset)
        for name, size, value in zip(names, self.kernel.sizes, arguments, strict=True):
            if isinstance(value, np.ndarray):
                raw = struct.pack("<Q", value.ctypes.data)
            elif isinstance(value, bytes):
                raw = value
            elif isinstance(value, float):
                raw = struct.pack("<f" if size == 4 else "<d", value)
            else:
                raw = int(value).to_bytes(size, "little", signed=value < 0)
            if len(raw) != size:
                raise PtxError(f"parameter {name} has {size} bytes, got {len(raw)}")
            begin = self.kernel.parameters.offset[name]
            data[begin : begin + size] = np.frombuffer(raw, np.uint8)
        return data

    # --- Findings ------------------------------------------------------------------------------

    def report(self, text: str) -> None:
        if self.current is not None:
            text = f"{text} in {self.current.opcode} at {self.current.where}"
        self.findings[text] = self.findings.get(text, 0) + 1

    def fail(self, text: str) -> None:
        self.report(text)
        raise PtxError("; ".join(self.findings))

    # --- Registers and operands ----------------------------------------------------------------

    def register(self, name: str) -> np.ndarray:
        if name not in self.registers:
            kind = self.kernel.registers[name]
            if kind == "pred":
                self.registers[name] = np.zeros(self.lanes, bool)
            else:
                size = int(kind[1:]) // 8
                self.registers[name] = np.full(self.lanes, -1, SIGNED[8 * size]).view(
                    UNSIGNED[8 * size]
                )
        return self.registers[name]

    def read(self, operand: Operand, kind: str, lanes: np.ndarray) -> np.ndarray:
        """An operand as a PTX type, one value a lane."""
        assert isinstance(operand, str)
        dtype = dtype_of(kind)
        if operand in self.kernel.registers:
            value = self.register(operand)[lanes]
            if kind == "pred":
                return value
            size = np.dtype(dtype).itemsize
            if value.dtype.itemsize != size:
                value = value.astype(UNSIGNED[8 * size])
            return value.view(dtype)
        if operand.startswith("!"):
            return ~self.read(operand[1:], kind, lanes)
        if operand in self.special:
            return self.special[operand][lanes].astype(dtype)
        return np.broadcast_to(self.immediate(operand, kind), lanes.shape)

    def immediate(self, operand: str, kind: str) -> np.ndarray:
        dtype = dtype_of(kind)
        head = operand[:2].lower()
        if head == "0f" and kind != "pred":
            value = np.array(int(operand[2:], 16), np.uint32).view(np.float32)
            return value.astype(np.float64) if kind == "f64" else value.view(dtype)
        if head == "0d" and kind != "pred":
            return np.array(int(operand[2:], 16), np.uint64).view(dtype)
        kernel = self.kernel
        if operand in kernel.shared.offset:
            number = SHARED_BASE + kernel.shared.offset[operand]
        elif operand in kernel.dynamic:
            number = self.shared.dynamic
        elif operand in kernel.local.offset:
            number = kernel.local.offset[operand]
        elif operand in kernel.constants:
            number = kernel.constants[operand].ctypes.data
        elif operand in kernel.parameters.offset:
            number = kernel.parameters.offset[operand]
        else:
            try:
                number = int(operand.rstrip("U"), 0)
            except ValueError:
                raise PtxError(f"operand {operand}") from None
        if kind == "pred":
            return np.array(bool(number))
        if kind[0] == "f":
            return np.array(number, dtype)
        size = np.dtype(dtype).itemsize
        return np.array(number & ((1 << 8 * size) - 1), UNSIGNED[8 * size]).view(dtype)

    def write(self, operand: Operand, value: np.ndarray, lanes: np.ndarray) -> None:
        assert isinstance(operand, str)
        if operand == "_":
            return
        target = self.register(operand)
        value = np.asarray(value)
        if target.dtype != bool:
            if value.dtype.itemsize != target.dtype.itemsize:  # sign or zero extension, truncation
                signed = value.dtype.kind == "i"
                value = value.astype((SIGNED if signed else UNSIGNED)[8 * target.dtype.itemsize])
            value = np.ascontiguousarray(value).view(target.dtype)
        target[lanes] = value

    def address(self, operand: Operand, lanes: np.ndarray) -> np.ndarray:
        assert isinstance(operand, tuple)
        _, base, offset = operand
        if base in self.kernel.registers:
            kind = "u" + self.kernel.registers[base][1:]
            return self.read(base, kind, lanes).astype(np.int64) + offset
        return np.broadcast_to(self.immediate(base, "s64"), lanes.shape) + offset

    # --- State spaces --------------------------------------------------------------------------

    def in_window(self, address: np.ndarray, name: str) -> np.ndarray:
        return (address >> 50) == (BASES[name] >> 50)

    def windows(self, address: np.ndarray) -> list[tuple[str, int]]:
        return [(n, base) for n, base in BASES.items() if self.in_window(address, n).any()]

    def space(self, instruction: Instruction) -> str:
        for part in instruction.parts[1:]:
            name = part.split("::")[0]
            if name in SPACES:
                return name
        return "generic"

    def count_banks(self, flat: np.ndarray, size: int, lanes: np.ndarray) -> None:
        """Wavefronts of the first warp here, and the fewest possible, by place."""
        warp = self.warp[lanes]
        first = warp == warp[0]
        lane, at = lanes[first] % 32, flat[first] % self.shared.stride
        together = 8 if size >= 16 else 16 if size == 8 else 32
        assert self.current is not None
        done, fewest = self.banks.get(self.current.where, (0, 0))
        for phase in range(32 // together):
            here = at[lane // together == phase]
            if len(here):
                words = np.unique((here[:, None] + np.arange(0, max(size, 4), 4)) // 4)
                done += int(np.bincount(words % 32).max())
                fewest += 1
        self.banks[self.current.where] = (done, fewest)

    # --- Control -------------------------------------------------------------------------------

    def run(self) -> None:
        """Until all threads have returned. Raises PtxError with everything found."""
        instructions, steps = self.kernel.instructions, 0
        leaders = set(self.kernel.labels.values())
        while (self.state != DONE).any():
            running = np.nonzero(self.state == RUNNING)[0]
            if not len(running):
                where = sorted({instructions[i].where for i in self.at[self.state != DONE]})
                self.current = None
                waiting = int((self.state != DONE).sum())
                self.fail(f"deadlock: {waiting} threads wait at {', '.join(where)}")
            if self.order == "random":
                chosen = self.random.choice(np.unique(self.warp[running]))
                running = running[self.warp[running] == chosen]
            at = int(self.at[running].min())
            lanes = running[self.at[running] == at]
            while self.step(at, lanes):
                at += 1
                steps += 1
                if steps > MAX_STEPS:
                    self.fail(f"more than {MAX_STEPS} instructions")
                if at in leaders:
                    break
        if self.findings:
            raise PtxError("; ".join(f"{t} ({n} times)" for t, n in self.findings.items()))

    def step(self, at: int, lanes: np.ndarray) -> bool:
        """One instruction. True: all these lanes go on with the next one."""
        if at >= len(self.kernel.instructions):
            self.state[lanes] = DONE
            return False
        instruction = self.kernel.instructions[at]
        self.current = instruction
        active = lanes
        if instruction.predicate is not None:
            name, negated = instruction.predicate
            active = lanes[self.register(name)[lanes] != negated]
        self.at[lanes] = at + 1
        if not len(active):
            return True
        opcode, operands = instruction.parts[0], instruction.operands
        self.executed[instruction.opcode] = self.executed.get(instruction.opcode, 0) + 1
        if opcode == "bra":
            self.at[active] = self.kernel.labels[str(operands[0])]
            return False
        if opcode == "brx":
            index = self.read(operands[0], "u32", active)
            targets = [self.kernel.labels[t] for t in self.kernel.tables[str(operands[1])]]
            self.at[active] = np.array(targets)[index]
            return False
        if opcode in ("ret", "exit"):
            warps.leave(self, active)
            return False
        if opcode == "%call":
            self.register(str(operands[1]))[active] = at + 1
            self.at[active] = self.kernel.labels[str(operands[0])]
            return False
        if opcode == "%return":
            self.at[active] = self.register(str(operands[0]))[active].astype(np.int64)
            return False
        if opcode in ("bar", "barrier") and "warp" not in instruction.parts:
            warps.wait_at_barrier(self, instruction, active)
            return False
        if warps.is_collective(instruction):
            return warps.arrive(self, instruction, at, lanes, active)
        self.execute(instruction, active)
        return True

    def execute(self, instruction: Instruction, lanes: np.ndarray) -> None:
        opcode, operands = instruction.parts[0], instruction.operands
        if opcode in ("ld", "ldu"):
            self.load(instruction, lanes)
        elif opcode == "st":
            self.store(instruction, lanes)
        elif opcode in ("atom", "red"):
            warps.atomic(self, instruction, lanes)
        elif opcode == "cp":
            warps.copy(self, instruction, lanes)
        elif opcode == "%copy":
            self.call[str(operands[0])][lanes] = self.call[str(operands[1])][lanes]
        elif opcode == "%system":
            self.fail(f"the kernel called {operands[0]}")
        elif opcode == "trap":
            self.fail("trap")
        elif opcode == "cvta":
            base = BASES[self.space(instruction)]
            value = self.read(operands[1], instruction.type, lanes)
            sign = -1 if "to" in instruction.parts else 1
            self.write(operands[0], (value.astype(np.int64) + sign * base).astype(np.uint64), lanes)
        elif opcode not in IGNORED:
            with np.errstate(all="ignore"):
                self.compute(instruction, lanes)
        for finding in self.shared.findings:
            self.report(finding)
        self.shared.findings.clear()

    def compute(self, instruction: Instruction, lanes: np.ndarray) -> None:
        handler = HANDLERS.get(instruction.parts[0])
        if handler is None:
            raise PtxError(f"unknown instruction {instruction.opcode} {instruction.operands}")
        result = handler(Operation(self, instruction, lanes))
        if result is not None:
            self.write(instruction.operands[0], result, lanes)

    def load(self, instruction: Instruction, lanes: np.ndarray) -> None:
        target, source = instruction.operands
        size = np.dtype(dtype_of(instruction.type)).itemsize
        targets = target if isinstance(target, list) else [target]
        total = size * len(targets)
        assert isinstance(source, tuple)
        if source[1] in self.call:
            data = self.call[source[1]][lanes, source[2] : source[2] + total]
        else:
            address = self.address(source, lanes)
            data = load(self, self.space(instruction), address, total, lanes)
        for i, name in enumerate(targets):
            part = np.ascontiguousarray(data[:, i * size : (i + 1) * size])
            self.write(name, part.view(dtype_of(instruction.type))[:, 0], lanes)

    def store(self, instruction: Instruction, lanes: np.ndarray) -> None:
        target, source = instruction.operands
        sources = source if isinstance(source, list) else [source]
        dtype = dtype_of(instruction.type)
        values = [self.read(x, instruction.type, lanes).astype(dtype) for x in sources]
        data = np.stack(values, 1).view(np.uint8)
        assert isinstance(target, tuple)
        if target[1] in self.call:
            self.call[target[1]][lanes, target[2] : target[2] + data.shape[1]] = data
        else:
            space = self.space(instruction)
            store(self, space, self.address(target, lanes), data, lanes)


def run(
    kernel: Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Any],
    *,
    inputs: Sequence[np.ndarray] = (),
    outputs: Sequence[np.ndarray] = (),
    shared_bytes: int = 0,
    order: str = "grid",
    seed: int = 0,
) -> Machine:
    """Launch a kernel and wait. It may read inputs, and read and write outputs, nothing else."""
    buffers = [Buffer(f"input {i}", a, False) for i, a in enumerate(inputs) if a.size]
    buffers += [Buffer(f"output {i}", a, True) for i, a in enumerate(outputs) if a.size]
    options = {"shared_bytes": shared_bytes, "order": order, "seed": seed}
    machine = Machine(kernel, grid, block, arguments, buffers, **options)
    machine.run()
    return machine
