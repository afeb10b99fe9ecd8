"""selected_logprob, forward and backward with entropy, against what trainers call today.

    python benchmarks/bench_selected_logprob.py [--rounds 5] [--threads N] [--rows 5376] [--compile]

Interleaved in one process: TRL's plain functions and its chunked one, Liger's chunked
log-probability (which has no entropy), and chunks of torch with checkpointing; peers that are not
installed are left out (pip install -e '.[bench]'). The limit is four head products (one forward,
one again and two more backward) at the rate that torch.mm reaches in the same run. Peak memory is
what a call adds to the process at its highest, less the gradients it returns.
"""

import argparse
import time
from collections.abc import Callable

import torch
from harness import emit, interleave, machine, peak_memory, table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlir.ops import selected_logprob, selected_logprob_reference

Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
CHUNK = 512
TOKENS_A_SEQUENCE = 336


def log_softmax_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = logits.float().log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return log_softmax_of(hidden @ weight.t(), targets)


def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    parts = [
        checkpoint(plain, h, weight, t, use_reentrant=False)
        for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def peers() -> dict[str, Call]:
    found: dict[str, Call] = {"torch plain": plain, f"torch chunks of {CHUNK}": checkpointed}
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax
    except ImportError as error:
        print(f"left out: TRL ({error})")
    else:

        def trl_plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits = (hidden @ weight.t()).unflatten(0, (-1, TOKENS_A_SEQUENCE))
            shape = (-1, TOKENS_A_SEQUENCE)
            logprob = selective_log_softmax(logits, targets.unflatten(0, shape))
            return logprob.flatten().float(), entropy_from_logits(logits).flatten().float()

        def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            out = ChunkedLogProbFunction.apply(
                hidden, weight, None, targets, 1.0, 2048, None, 1.0, ("entropy",)
            )
            return out[0], out[1]

        found |= {"TRL plain": trl_plain, "TRL chunked": trl_chunked}
    try:
        from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction
    except ImportError as error:
        print(f"left out: Liger ({error})")
    else:

        def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, None]:
            out = _ChunkedSelectiveLogProbFunction.apply(hidden, weight, targets, None, 1.0, 2048)
            return out, None

        found["Liger (no entropy)"] = liger
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=5376, help="a multiple of 336")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of plain")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, on a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    where = machine()
    print("  ".join(f"{k} {v}" for k, v in where.items()))

    n, h, v = options.rows, 1024, 8262
    dtype = getattr(torch, options.dtype)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=g).to(dtype)
    weight = (torch.randn(v, h, generator=g) / h**0.5).to(dtype)
    targets = torch.randint(0, v, (n,), generator=g)
    d_logprob, d_entropy = torch.randn(n, generator=g), torch.randn(n, generator=g)

    def step(op: Call) -> list[Tensor]:
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        logprob, entropy = op(*leaves, targets)
        loss = (logprob * d_logprob).sum()
        if entropy is not None and entropy.requires_grad:
            loss = loss + (entropy * d_entropy).sum()
        loss.backward()
        return [logprob.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    calls: dict[str, Call] = {"rlir": selected_logprob, **peers()}
    if options.compile:
        calls["torch.compile plain"] = torch.compile(plain)
    transposed = weight.t()
    times = interleave(
        {
            **{name: lambda op=op: step(op) for name, op in calls.items()},
            "rlir forward": lambda: selected_logprob(hidden, weight, targets),
            "head product": lambda: torch.mm(hidden, transposed),
        },
        options.rounds,
        warmup=1,
        clock=clock,
    )
    gradients = (hidden.numel() + weight.numel()) * hidden.element_size()
    peaks = {name: peak_memory(lambda op=op: step(op)) - gradients for name, op in calls.items()}
    truth = [
        t.detach()
        for t in selected_logprob_reference(hidden[:64].double(), weight.double(), targets[:64])
    ]
    error = float((selected_logprob(hidden[:64], weight, targets[:64])[0] - truth[0]).abs().max())
    flops, limit = 2 * n * h * v, 4 * times["head product"]
    best_peer = min(times[name] for name in calls if name != "rlir")
    rows = []
    for name, seconds in times.items():
        products = {"head product": 1, "rlir forward": 1, "rlir": 4}.get(name)
        rows.append(
            (
                name,
                f"{seconds * 1e3:.0f}",
                f"{best_peer / seconds:.2f}" if name in calls else "",
                f"{products * flops / seconds / 1e9:.0f}" if products else "",
                f"{100 * limit / seconds:.0f}" if name in calls else "",
                f"{peaks[name] / 2**20:.0f}" if name in peaks else "",
            )
        )
    header = (
        f"N {n}, H {h}, V {v}, {options.dtype}",
        *("ms", "x best peer", "GFLOP/s", "% of limit", "peak MiB"),
    )
    print(table(header, rows))
    results = {
        "rows": n,
        "dtype": options.dtype,
        "cpu_time": options.cpu_time,
        "milliseconds": {k: round(s * 1e3, 2) for k, s in times.items()},
        "peak_mib": {k: round(b / 2**20, 1) for k, b in peaks.items()},
        "times_best_peer": round(best_peer / times["rlir"], 2),
        "percent_of_limit": round(100 * limit / times["rlir"], 1),
        "peak_share_of_plain": round(
            peaks["rlir"] / peaks.get("TRL plain", peaks["torch plain"]), 3
        ),
        "max_error_of_logprob_against_float64": error,
    }
    emit("selected_logprob", {"machine": where, "results": results})


if __name__ == "__main__":
    main()
