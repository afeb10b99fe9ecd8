"""Instructions that compute from registers to registers. Each gives what the hardware does, bit for
bit, but for the approximate functions, which are computed well and rounded.
"""

import ctypes
from collections.abc import Callable

import numpy as np

from cudacheck.ptxsim.operation import SIGNED, UNSIGNED, Handlers, Operation, registrar
from cudacheck.ptxsim.parser import PtxError

HANDLERS: Handlers = {}
opcode = registrar(HANDLERS)
_libm = ctypes.CDLL("libm.so.6")
_libm.fma.restype = ctypes.c_double
_libm.fma.argtypes = [ctypes.c_double] * 3
_fma64 = np.frompyfunc(_libm.fma, 3, 1)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to bf16 bits, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str = "rn") -> np.ndarray:
    """a b + c rounded once. The product is exact in float64, that of the sum has a known error."""
    p, w = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    s = p + w
    t = s - p
    error = (p - (s - t)) + (w - t)
    exact = (error == 0) | ~np.isfinite(s)
    if mode != "rn":
        near = s.astype(np.float32)
        rest = np.where(np.isfinite(s), (s - near) + np.where(exact, 0.0, error), 0.0)
        return _directed(near, rest, mode, s > 0)
    # To odd in float64, and so correctly in float32.
    odd = s.view(np.int64) & 1 == 1
    away = (error > 0) == (s > 0)
    fixed = (s.view(np.int64) + np.where(away, 1, -1)).view(np.float64)
    return np.where(exact | odd, s, fixed).astype(np.float32)


def _directed(near: np.ndarray, rest: np.ndarray, mode: str, positive: np.ndarray) -> np.ndarray:
    """near + rest rounded down (rm), up (rp) or to zero (rz), for rest below half a step."""
    kind = near.dtype.type
    down = np.where(rest < 0, np.nextafter(near, kind(-np.inf)), near)
    up = np.where(rest > 0, np.nextafter(near, kind(np.inf)), near)
    return down if mode == "rm" else up if mode == "rp" else np.where(positive, down, up)


# --- Arithmetic ----------------------------------------------------------------------------------


@opcode("add", "sub", "mul", "fma", "mad", "mul24")
def _arithmetic(op: Operation) -> np.ndarray:
    name, parts = op.parts[0], op.parts
    if "cc" in parts or op.type in ("f16", "f16x2", "bf16", "bf16x2", "f32x2"):
        raise PtxError(f"unknown instruction {op.instruction.opcode}")
    if op.is_float:
        mode = next((m for m in ("rz", "rm", "rp") if m in parts), "rn")
        a, b = op.flushed(op(1)), op.flushed(op(2))
        if mode != "rn":
            if op.type != "f32":
                raise PtxError(f"unknown instruction {op.instruction.opcode}")
            one, zero = np.ones_like(a), np.zeros_like(a)
            terms = {"add": (a, one, b), "sub": (a, one, -b), "mul": (a, b, zero)}
            terms |= {"fma": (a, b, op.flushed(op(3)))} if name == "fma" else {}
            return op.finish(fma32(*terms[name], mode))
        if name in ("fma", "mad"):
            c = op.flushed(op(3))
            if op.type == "f32":
                return op.finish(fma32(a, b, c))
            return _fma64(a, b, c).astype(np.float64)
        return op.finish({"add": np.add, "sub": np.subtract, "mul": np.multiply}[name](a, b))
    if name in ("add", "sub"):
        return op(1) + op(2) if name == "add" else op(1) - op(2)
    if name == "mul24":
        raise PtxError("mul24")
    if "wide" in parts:
        wide = f"{op.type[0]}{2 * op.bits}"
        dtype = {"s": SIGNED, "u": UNSIGNED}[op.type[0]][2 * op.bits]
        product = op(1).astype(dtype) * op(2).astype(dtype)
        return product + op(3, wide) if name == "mad" else product
    product = _high(op(1), op(2), op.bits) if "hi" in parts else op(1) * op(2)
    return product + op(3) if name == "mad" else product


def _high(a: np.ndarray, b: np.ndarray, bits: int) -> np.ndarray:
    if bits < 64:
        wide = SIGNED[2 * bits] if a.dtype.kind == "i" else UNSIGNED[2 * bits]
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    mask = (1 << 64) - 1
    high = [(int(x) * int(y) >> 64) & mask for x, y in zip(a, b, strict=True)]
    return np.array(high, np.uint64)


@opcode("div", "rem")
def _divide(op: Operation) -> np.ndarray:
    a, b = op(1), op(2)
    if op.is_float:
        return op.finish(op.flushed(a) / op.flushed(b))
    if (b == 0).any():
        op.machine.fail("integer division by zero")
    if a.dtype.kind == "u":
        return a // b if op.parts[0] == "div" else a % b
    quotient = np.abs(a) // np.abs(b) * (np.sign(a) * np.sign(b))
    return quotient if op.parts[0] == "div" else a - quotient * b


@opcode("abs")
def _abs(op: Operation) -> np.ndarray:
    return op.flushed(np.abs(op(1)))


@opcode("neg")
def _neg(op: Operation) -> np.ndarray:
    return op.flushed(-op(1))


@opcode("min", "max")
def _min_max(op: Operation) -> np.ndarray:
    a, b = op(1), op(2)
    low = op.parts[0] == "min"
    if not op.is_float:
        return np.minimum(a, b) if low else np.maximum(a, b)
    a, b = op.flushed(a), op.flushed(b)
    if "NaN" in op.parts:
        return np.minimum(a, b) if low else np.maximum(a, b)
    # -0 is below +0
    result = np.fmin(a, b) if low else np.fmax(a, b)
    both_zero = (a == 0) & (b == 0)
    sign = np.signbit(a) | np.signbit(b) if low else np.signbit(a) & np.signbit(b)
    return np.where(both_zero, np.where(sign, -0.0, 0.0), result).astype(a.dtype)


@opcode("copysign")
def _copysign(op: Operation) -> np.ndarray:
    return np.copysign(op(2), op(1))


APPROXIMATE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@opcode(*APPROXIMATE)
def _function(op: Operation) -> np.ndarray:
    x = op.flushed(op(1))
    if x.dtype == np.float16:
        raise PtxError(op.instruction.opcode)
    if op.parts[0] == "sqrt" or x.dtype == np.float64:  # rounded correctly
        return op.finish(APPROXIMATE[op.parts[0]](x).astype(x.dtype))
    return op.finish(APPROXIMATE[op.parts[0]](x.astype(np.float64)).astype(np.float32))


# --- Moves, comparisons, conversions -------------------------------------------------------------


@opcode("mov")
def _move(op: Operation) -> np.ndarray | None:
    target, source = op.operands[0], op.operands[1]
    machine, lanes = op.machine, op.lanes
    if isinstance(source, list):  # several registers into a wider one
        width = op.bits // len(source)
        value = np.zeros(len(lanes), np.uint64)
        for i, name in enumerate(source):
            part = machine.read(name, f"u{width}", lanes).astype(np.uint64)
            value |= part << np.uint64(width * i)
        return value.astype(UNSIGNED[op.bits])
    if isinstance(target, list):
        width = op.bits // len(target)
        value = op(1, f"u{op.bits}").astype(np.uint64)
        for i, name in enumerate(target):
            machine.write(name, (value >> np.uint64(width * i)).astype(UNSIGNED[width]), lanes)
        return None
    return op(1)


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
SAME_AS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _compare(op: Operation) -> np.ndarray:
    name, a, b = op.parts[1], op.flushed(op(1)), op.flushed(op(2))
    if not op.is_float:
        return COMPARE[SAME_AS.get(name, name)](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return unordered if name == "nan" else ~unordered
    if len(name) == 3:  # equ, neu, ltu, ...: true for NaN
        return COMPARE[name[:2]](a, b) | unordered
    return COMPARE[name](a, b) & ~unordered


@opcode("setp")
def _set_predicate(op: Operation) -> None:
    first = _compare(op)
    second = ~first
    if op.parts[2] in JOIN:
        other = op(3, "pred")
        first, second = JOIN[op.parts[2]](first, other), JOIN[op.parts[2]](second, other)
    targets = str(op.operands[0]).split("|")
    for name, value in zip(targets, (first, second), strict=False):
        op.machine.write(name, value, op.lanes)


@opcode("selp")
def _select(op: Operation) -> np.ndarray:
    return np.where(op(3, "pred"), op(1), op(2))


@opcode("slct")
def _select_by_sign(op: Operation) -> np.ndarray:
    kind = op.parts[-2]
    return np.where(op(3, op.type) >= 0, op(1, kind), op(2, kind))


ROUND: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


@opcode("cvt")
def _convert(op: Operation) -> np.ndarray:
    target, source = op.parts[-2], op.parts[-1]
    if target in ("bf16x2", "bf16") and source == "f32":
        high = to_bf16(op(1, "f32"))
        if target == "bf16":
            return high
        return high.astype(np.uint32) << np.uint32(16) | to_bf16(op(2, "f32"))
    if source == "bf16" and target == "f32":
        return (op(1, "u16").astype(np.uint32) << np.uint32(16)).view(np.float32)
    if "16x2" in target + source or "bf16" in (target, source):
        raise PtxError(op.instruction.opcode)
    x = op(1, source)
    mode = next((m for m in op.parts[1:-2] if m in ROUND), None)
    if target[0] == "f":
        size = int(target[1:]) // 8
        dtype = {2: np.float16, 4: np.float32, 8: np.float64}[size]
        if mode is not None:
            x = ROUND[mode](x)
        elif (way := next((m for m in ("rz", "rm", "rp") if m in op.parts), None)) is not None:
            if np.dtype(dtype).itemsize == 8:
                raise PtxError(op.instruction.opcode)
            near = x.astype(dtype)
            rest = x.astype(np.float64) - near
            return _directed(near, np.where(np.isfinite(rest), rest, 0), way, x > 0)
        return op.finish(op.flushed(x).astype(dtype))
    bits = int(target[1:])
    dtype = (SIGNED if target[0] == "s" else UNSIGNED)[bits]
    if source[0] != "f":
        if "sat" in op.parts:
            raise PtxError(op.instruction.opcode)
        return x.astype(dtype)
    if mode is None:
        raise PtxError(op.instruction.opcode)
    limits = np.iinfo(dtype)
    rounded = np.nan_to_num(ROUND[mode](op.flushed(x).astype(np.float64)), nan=0.0)
    inside = (rounded > limits.min) & (rounded < limits.max)
    edges = np.where(rounded <= limits.min, limits.min, limits.max).astype(dtype)
    return np.where(inside, np.where(inside, rounded, 0).astype(dtype), edges)
