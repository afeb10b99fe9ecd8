"""An instruction that computes from registers to registers, with its operands as values."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from cudacheck.ptxsim.parser import Instruction

if TYPE_CHECKING:
    from cudacheck.ptxsim.machine import Machine

Handler = Callable[["Operation"], np.ndarray]
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}


def dtype_of(kind: str) -> type:
    """numpy's type for a PTX type; bf16 is its bits."""
    if kind == "pred":
        return np.bool_
    if kind.startswith("bf16"):
        return np.uint16 if kind == "bf16" else np.uint32
    return {"u": UNSIGNED, "b": UNSIGNED, "s": SIGNED, "f": FLOATS}[kind[0]][int(kind[1:])]


Handlers = dict[str, Handler]


def registrar(handlers: Handlers) -> Callable[..., Callable[[Handler], Handler]]:
    """A decorator that enters a function as what some instructions do."""

    def opcode(*names: str) -> Callable[[Handler], Handler]:
        def register(handler: Handler) -> Handler:
            handlers.update(dict.fromkeys(names, handler))
            return handler

        return register

    return opcode


class Operation:
    """An instruction with its operands as values."""

    def __init__(self, machine: "Machine", instruction: Instruction, lanes: np.ndarray) -> None:
        self.machine, self.instruction, self.lanes = machine, instruction, lanes
        self.parts, self.type = instruction.parts, instruction.type
        self.operands = instruction.operands

    def __call__(self, index: int, kind: str | None = None) -> np.ndarray:
        """Source operand ``index``, from 1, as the instruction's type or another."""
        return self.machine.read(self.operands[index], kind or self.type, self.lanes)

    @property
    def is_float(self) -> bool:
        return self.type[0] == "f"

    @property
    def bits(self) -> int:
        return int(self.type[1:])

    def flushed(self, x: np.ndarray) -> np.ndarray:
        """Subnormals to zero where the instruction says .ftz."""
        if "ftz" in self.parts and x.dtype == np.float32:
            return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)
        return x

    def finish(self, x: np.ndarray) -> np.ndarray:
        x = self.flushed(x)
        return np.clip(np.nan_to_num(x, nan=0.0), 0, 1) if "sat" in self.parts else x
