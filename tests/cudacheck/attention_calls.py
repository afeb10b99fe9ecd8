"""The structs of csrc/cuda/video_attention.cuh and its like, made of tensors, for runs of PTX."""

import ctypes as c
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cudacheck.probing import aligned
from rlir.ops import Mask

KINDS = {"causal": 0, "frame_causal": 1, "diagonal": 2}
REFRESHED = 3
THREADS, SIMT_THREADS = 128, 256


class Heads(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("batch", c.c_int64),
        ("token", c.c_int32),
        ("head", c.c_int32),
    ]


class KeyPart(c.Structure):
    _fields_ = [
        ("k", Heads),
        ("v", Heads),
        ("slots", c.c_int64),
        ("lengths", c.c_void_p),
        ("length_stride", c.c_int64),
    ]


class AttentionMask(c.Structure):
    _fields_ = [
        ("kind", c.c_int32),
        *((name, c.c_int64) for name in ("image", "action", "window", "rows", "columns")),
        *((name, c.c_int64) for name in ("ahead", "context")),
    ]


class Attention(c.Structure):
    _fields_ = [
        ("dtype", c.c_int32),
        ("q", Heads),
        ("part", KeyPart * 2),
        ("parts", c.c_int32),
        *((name, c.c_int64) for name in ("sequences", "group", "tokens", "heads", "kv_heads")),
        ("depth", c.c_int64),
        ("positions", c.c_void_p),
        *((name, c.c_int64) for name in ("position_batch", "position_token")),
        ("q_lengths", c.c_void_p),
        ("q_length_stride", c.c_int64),
        ("mask", AttentionMask),
        ("scale", c.c_double),
    ]


class Forward(c.Structure):
    """struct AttentionForward."""

    _fields_ = [("call", Attention), ("out", c.c_void_p), ("lse", c.c_void_p)]


class GradientRows(c.Structure):
    _fields_ = [(name, c.c_void_p) for name in ("lse", "delta", "sights", "spans")]


class Backward(c.Structure):
    """struct AttentionBackward."""

    _fields_ = [
        ("call", Attention),
        ("grad_out", Heads),
        ("out", Heads),
        ("lse", c.c_void_p),
        ("grad_lse", c.c_void_p),
        ("grad_lse_strides", c.c_int64 * 3),
        ("rows", GradientRows * 2),
        ("dq", c.c_void_p),
        ("dk", c.c_void_p * 2),
        ("dv", c.c_void_p * 2),
    ]


def mask_struct(mask: Mask) -> AttentionMask:
    """As csrc/ops/attention_mask.h makes it."""
    n, out = mask.numbers, AttentionMask(kind=KINDS[mask.kind])
    if mask.kind == "causal":
        out.window = n[0]
    elif mask.kind == "frame_causal":
        out.image, out.action, out.window = n
    else:
        out.rows, out.columns, out.ahead, out.action, out.window, out.context, refresh = n
        out.image = out.rows * (out.columns + refresh) - refresh
        out.kind = REFRESHED if refresh and out.rows > 1 else out.kind
    return out


class Memory:
    """Arrays that a kernel reads or writes."""

    def __init__(self) -> None:
        self.inputs: list[np.ndarray] = []
        self.outputs: list[np.ndarray] = []

    def give(self, x: Tensor) -> int:
        """The address of a copy."""
        raw = x.detach().contiguous().view(torch.uint8).numpy().ravel()
        self.inputs.append(aligned(raw))
        return self.inputs[-1].ctypes.data

    def take(self, size: int) -> np.ndarray:
        """Bytes for results."""
        self.outputs.append(aligned(np.zeros(max(size, 16), np.uint8)))
        return self.outputs[-1]

    def heads(self, x: Tensor) -> Heads:
        _, tokens, heads, depth = x.shape
        return Heads(self.give(x), tokens * heads * depth, heads * depth, depth)

    def keys(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> KeyPart:
        at = None if lengths is None else self.give(lengths)
        return KeyPart(self.heads(k), self.heads(v), k.shape[1], at, 1)

    def attention(
        self,
        q: Tensor,
        parts: Sequence[KeyPart],
        mask: Mask,
        kv_heads: int,
        group: int = 1,
        *,
        positions: Tensor | None = None,
        q_lengths: Tensor | None = None,
        scale: float | None = None,
    ) -> Attention:
        sequences, tokens, heads, depth = q.shape
        a = Attention(
            dtype={torch.float32: 1, torch.bfloat16: 2}[q.dtype],
            q=self.heads(q),
            parts=len(parts),
            sequences=sequences,
            group=group,
            tokens=tokens,
            heads=heads,
            kv_heads=kv_heads,
            depth=depth,
            mask=mask_struct(mask),
            scale=1 / math.sqrt(depth) if scale is None else scale,
        )
        for i, part in enumerate(parts):
            a.part[i] = part
        if positions is not None:
            a.positions = self.give(positions)
            a.position_batch, a.position_token = positions.stride()
        if q_lengths is not None:
            a.q_lengths, a.q_length_stride = self.give(q_lengths), 1
        return a

    def options(self, shared: int) -> dict[str, Any]:
        return {"inputs": self.inputs, "outputs": self.outputs, "shared_bytes": shared}


def tensor(raw: np.ndarray, dtype: torch.dtype, *shape: int) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(raw[:size]).view(dtype).view(shape)


def tall(depth: int, rows: int, mask: Mask) -> int:
    """Rows of a tile over 64 (video_attention.cu)."""
    refreshed = mask_struct(mask).kind == REFRESHED
    return 1 if depth == 128 or rows <= 64 or refreshed else 2


def tile_bytes(depth: int, tall: int, *, keeps: bool) -> int:
    """AttentionTile::kShared."""
    kept = THREADS * tall * (2 * depth + 4) if keeps else 0
    return 4 * 64 * depth * 2 + 64 * tall * 16 + 4 * 16 + 16 + kept


def simt_bytes(depth: int) -> int:
    """SimtTile::kShared."""
    return (32 * depth + 32 * max(132, depth) + 32 * 132) * 4


def query_gradient_bytes(depth: int) -> int:
    return 4 * 64 * depth * 2 + 16


def key_gradient_bytes(depth: int) -> int:
    rows = 32 if depth == 128 else 64
    return 2 * 64 * depth * 2 + 2 * (2 * rows * depth * 2 + rows * 24)


def simt_gradient_bytes(depth: int) -> int:
    return (4 * 32 * (depth + 1) + 2 * 32 * 33 + 2 * 32) * 4 + 32 * 16
