"""The world model's training attention against torch's kernel, forward and backward, by turns.

    python benchmarks/bench_training_attention.py [--rounds 11] [--threads N] [--process-time]

16 clips of the embedded model's 335 positions, 4 heads on 2 key heads of 64 channels, bfloat16. The
limit is the products' time alone: their multiplications at the rate of a large square product.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import emit, interleave, machine, table
from torch import Tensor

from rlir.models.world_model import causal_attention

CLIPS, HEADS, KEY_HEADS, POSITIONS, CHANNELS = 16, 4, 2, 335, 64
SQUARE = 1024


def torch_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--process-time", action="store_true", help="on a busy machine, one thread")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine()
    print("  ".join(f"{k} {v}" for k, v in where.items()))

    g = torch.Generator().manual_seed(0)

    def leaf(heads: int) -> Tensor:
        x = torch.randn(CLIPS, heads, POSITIONS, CHANNELS, generator=g)
        return x.bfloat16().requires_grad_()

    q, k, v = leaf(HEADS), leaf(KEY_HEADS), leaf(KEY_HEADS)
    grad = torch.randn(q.shape, generator=g).bfloat16()

    def both(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        attention(q, k, v).backward(grad)

    square = torch.randn(SQUARE, SQUARE, generator=g).bfloat16()
    times = interleave(
        {
            "rlir": lambda: both(causal_attention),
            "torch": lambda: both(torch_kernel),
            "square product": lambda: square @ square,
        },
        options.rounds,
        warmup=2,
        clock=time.process_time if options.process_time else time.perf_counter,
    )
    # Two products forward and four backward, half of each below the diagonal.
    flops = 6 * CLIPS * HEADS * POSITIONS**2 * CHANNELS
    limit = flops / (2 * SQUARE**3 / times["square product"])
    truth = torch_kernel(q.double(), k.double(), v.double())
    errors = {
        name: float((f(q, k, v).double() - truth).abs().max().detach())
        for name, f in (("rlir", causal_attention), ("torch", torch_kernel))
    }
    rows = [
        (name, f"{1e3 * times[name]:.1f}", f"{times['torch'] / times[name]:.2f}",
         f"{100 * limit / times[name]:.0f}", f"{errors[name]:.1e}")
        for name in ("rlir", "torch")
    ]  # fmt: skip
    print(table(("16 clips of 335 positions", "ms", "x torch", "% of limit", "error"), rows))
    emit(
        "training_attention",
        {
            "machine": where,
            "milliseconds": {name: round(1e3 * t, 3) for name, t in times.items()},
            "percent_of_limit": round(100 * limit / times["rlir"], 1),
            "max_error_against_float64": errors,
        },
    )


if __name__ == "__main__":
    main()
