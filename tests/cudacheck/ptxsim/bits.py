"""Instructions on bits: logic, shifts, fields, bytes, counts."""

from collections.abc import Callable

import numpy as np

from cudacheck.ptxsim.operation import UNSIGNED, Handlers, Operation, registrar
from cudacheck.ptxsim.parser import PtxError

HANDLERS: Handlers = {}
opcode = registrar(HANDLERS)


@opcode("and", "or", "xor")
def _logic(op: Operation) -> np.ndarray:
    functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    return functions[op.parts[0]](op(1), op(2))


@opcode("not")
def _not(op: Operation) -> np.ndarray:
    return ~op(1)


@opcode("shl", "shr")
def _shift(op: Operation) -> np.ndarray:
    a, bits = op(1), op.bits
    by = np.minimum(op(2, "u32"), bits)
    small = np.minimum(by, bits - 1).astype(a.dtype)
    if op.parts[0] == "shl":
        return np.where(by >= bits, a.dtype.type(0), a << small)
    if a.dtype.kind == "i":
        return a >> small
    return np.where(by >= bits, a.dtype.type(0), a >> small)


@opcode("shf")
def _funnel(op: Operation) -> np.ndarray:
    low, high, by = (op(i, "u32").astype(np.uint64) for i in (1, 2, 3))
    by = by & np.uint64(31) if "wrap" in op.parts else np.minimum(by, np.uint64(32))
    both = high << np.uint64(32) | low
    shifted = both << by >> np.uint64(32) if op.parts[1] == "l" else both >> by
    return shifted.astype(np.uint32)


@opcode("lop3")
def _lop3(op: Operation) -> np.ndarray:
    a, b, c = (op(i, "u32") for i in (1, 2, 3))
    table = int(str(op.operands[4]), 0)
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _mask(length: np.ndarray) -> np.ndarray:
    one = np.uint64(1)
    full = np.uint64((1 << 64) - 1)
    return np.where(length >= 64, full, (one << np.minimum(length, 63).astype(np.uint64)) - one)


@opcode("bfe")
def _extract(op: Operation) -> np.ndarray:
    bits = op.bits
    at, length = op(2, "u32") & 0xFF, op(3, "u32") & 0xFF
    a = op(1).astype(np.int64 if op.type[0] == "s" else np.uint64).view(np.uint64)
    shift = np.minimum(at, 63).astype(np.uint64)
    shifted = (
        (a.view(np.int64) >> shift.view(np.int64)).view(np.uint64)
        if op.type[0] == "s"
        else (a >> shift)
    )
    value = shifted & _mask(length)
    if op.type[0] == "s":
        top = np.minimum(at + length - 1, bits - 1).astype(np.uint64)
        sign = (a >> top) & np.uint64(1)
        value = np.where((sign == 1) & (length > 0), value | ~_mask(length), value)
    return np.where(length == 0, np.uint64(0), value).astype(UNSIGNED[bits])


@opcode("bfi")
def _insert(op: Operation) -> np.ndarray:
    a, b = op(1).astype(np.uint64), op(2).astype(np.uint64)
    at = (op(3, "u32") & 0xFF).astype(np.uint64)
    mask = _mask(op(4, "u32") & 0xFF) << at
    return ((b & ~mask) | (a << at & mask)).astype(UNSIGNED[op.bits])


@opcode("prmt")
def _permute(op: Operation) -> np.ndarray:
    if op.parts[-1] != "b32":
        raise PtxError(op.instruction.opcode)
    both = op(1, "u32").astype(np.uint64) | op(2, "u32").astype(np.uint64) << np.uint64(32)
    selector, result = op(3, "u32").astype(np.uint64), np.zeros(len(op.lanes), np.uint64)
    for i in range(4):
        choice = selector >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(choice & np.uint64(8), sign, byte)
        result |= byte << np.uint64(8 * i)
    return result.astype(np.uint32)


def _each(function: Callable[[int], int], x: np.ndarray) -> np.ndarray:
    return np.array([function(int(v)) for v in x], np.uint32)


@opcode("popc", "clz", "bfind", "brev")
def _counted(op: Operation) -> np.ndarray:
    bits, name = op.bits, op.parts[0]
    if name == "popc":
        return _each(int.bit_count, op(1))
    if name == "clz":
        return _each(lambda v: bits - v.bit_length(), op(1))
    if name == "brev":
        reverse = [int(f"{int(v):0{bits}b}"[::-1], 2) for v in op(1)]
        return np.array(reverse, UNSIGNED[bits])
    x = op(1)
    if op.type[0] == "s":
        x = np.where(x < 0, ~x, x)
    top = _each(lambda v: (v.bit_length() - 1) & 0xFFFFFFFF, x)
    if "shiftamt" in op.parts:
        top = np.where(top == 0xFFFFFFFF, top, np.uint32(bits - 1) - top)
    return top
