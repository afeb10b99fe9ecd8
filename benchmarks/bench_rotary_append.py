"""rotary_append_ against torch, in one process, by turns.

    python benchmarks/bench_rotary_append.py [--rounds 31] [--threads N]

torch rotates q and k in their dtype, as Llama models do, and writes k and v with an indexed
assignment. The limit is a copy of the bytes that must be read and written.
"""

import argparse

import torch
from harness import emit, interleave, machine, table
from torch import Tensor

from rlir.ops import rotary_append_

SHAPES = ((16, 1, "a token of 16 rollouts"), (16, 12, "12 of each"), (1, 1, "one token"))
CAPACITY, HEADS, KV_HEADS, DIM = 1024, 16, 4, 64


def candidates(b: int, t: int, dtype: torch.dtype) -> dict:
    qkv = torch.randn(b, t, HEADS + 2 * KV_HEADS, DIM).to(dtype)
    q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], 2)
    cache_k, cache_v = (torch.zeros(b, CAPACITY, KV_HEADS, DIM, dtype=dtype) for _ in range(2))
    angle = torch.arange(CAPACITY)[:, None] * 10000 ** (-torch.arange(0, DIM, 2) / DIM)
    cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))
    low_cos, low_sin = cos.to(dtype), sin.to(dtype)
    positions = (torch.arange(t) * 23 + 40).repeat(b, 1)
    rows = torch.arange(b)[:, None]
    target = torch.empty_like(qkv)

    def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        turned = torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1)
        return x * cosine + turned * sine

    def eager() -> Tensor:
        cosine, sine = low_cos[positions][:, :, None], low_sin[positions][:, :, None]
        cache_k[rows, positions] = turn(k, cosine, sine)
        cache_v[rows, positions] = v
        return turn(q, cosine, sine)

    return {
        "rlir": lambda: rotary_append_(q, k, v, cos, sin, cache_k, cache_v, positions),
        "torch": eager,
        "copy": lambda: target.copy_(qkv),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine()
    print("  ".join(f"{k} {v}" for k, v in where.items()))
    rows, results = [], []
    for b, t, name in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            times = interleave(candidates(b, t, dtype), options.rounds)
            short = str(dtype).removeprefix("torch.")
            micro = {k: round(s * 1e6, 1) for k, s in times.items()}
            rows.append(
                (f"{name}, {short}", *micro.values(), f"{micro['torch'] / micro['rlir']:.1f}")
            )
            results.append({"batch": b, "tokens": t, "dtype": short, "microseconds": micro})
    print(table(("us", "rlir", "torch", "copy", "x torch"), rows))
    emit("rotary_append", {"machine": where, "results": results})


if __name__ == "__main__":
    main()
