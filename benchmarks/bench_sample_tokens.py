"""sample_tokens with log-probability against softmax + sort + multinomial, by turns in one process.

    python benchmarks/bench_sample_tokens.py [--rounds 15] [--threads N] [--compile]

Peers: eager PyTorch, transformers' logits processors (left out where not installed: pip install -e
'.[bench]'), torch.compile on request. The limit of a row is one pass of exp over it, which nothing
can do without: torch.exp of as many float32 in place, in the same run.
"""

import argparse
import time
from collections.abc import Callable

import torch
from harness import emit, interleave, machine, table
from torch import Tensor

from rlir.ops import sample_tokens

TOP_P, TOP_K, VOCABULARY = 0.8, 50, 8192


def eager_top_p(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What rollout code does: sort, cut, renormalise, draw; log-probability on the support."""
    prob, order = logits.float().softmax(-1).sort(-1, descending=True)
    prob = prob.masked_fill(prob.cumsum(-1) - prob >= TOP_P, 0.0)
    prob = prob / prob.sum(-1, keepdim=True)
    at = torch.multinomial(prob, 1)
    return order.gather(1, at), prob.gather(1, at).log()


def eager_top_k(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, order = logits.float().topk(TOP_K, -1)
    prob = values.softmax(-1)
    at = torch.multinomial(prob, 1)
    return order.gather(1, at), prob.gather(1, at).log()


def eager_all(logits: Tensor) -> tuple[Tensor, Tensor]:
    logp = logits.float().log_softmax(-1)
    token = torch.multinomial(logp.exp(), 1)
    return token, logp.gather(1, token)


def transformers_top_p() -> Callable[[Tensor], object] | None:
    try:
        from transformers import TopPLogitsWarper
    except ImportError as error:
        print(f"left out: transformers ({error})")
        return None
    warper = TopPLogitsWarper(TOP_P)

    def call(logits: Tensor) -> tuple[Tensor, Tensor]:
        logp = warper(None, logits.float()).log_softmax(-1)
        token = torch.multinomial(logp.exp(), 1)
        return token, logp.gather(1, token)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="also torch.compile of eager")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, on a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    where = machine()
    print("  ".join(f"{k} {v}" for k, v in where.items()))
    warper = transformers_top_p()
    compiled = torch.compile(eager_top_p) if options.compile else None

    rows, results = [], []
    for n in (16, 192):
        g = torch.Generator().manual_seed(0)
        logits = (torch.randn(n, VOCABULARY, generator=g) * 2).bfloat16()
        scratch = -torch.rand(n, VOCABULARY, generator=g)
        calls: dict[str, Callable[[], object]] = {
            "top_p rlir": lambda x=logits: sample_tokens(x, top_p=TOP_P, seed=0, offset=0),
            "top_p rlir, support": lambda x=logits: sample_tokens(
                x, top_p=TOP_P, return_support=True, seed=0, offset=0
            ),
            "top_p eager": lambda x=logits: eager_top_p(x),
            "top_k rlir": lambda x=logits: sample_tokens(x, top_k=TOP_K, seed=0, offset=0),
            "top_k eager": lambda x=logits: eager_top_k(x),
            "all rlir": lambda x=logits: sample_tokens(x, seed=0, offset=0),
            "all eager": lambda x=logits: eager_all(x),
            "exp": lambda s=scratch: torch.exp(s),
        }
        if warper is not None:
            calls["top_p transformers"] = lambda x=logits: warper(x)
        if compiled is not None:
            calls["top_p torch.compile"] = lambda x=logits: compiled(x)
        with torch.inference_mode():
            times = interleave(calls, options.rounds, warmup=2, clock=clock)
        for name, seconds in times.items():
            eager = times.get(f"{name.split()[0]} eager")
            rows.append(
                (
                    f"{n} x {VOCABULARY}  {name}",
                    f"{seconds * 1e6:.0f}",
                    f"{seconds * 1e6 / n:.1f}",
                    f"{eager / seconds:.1f}" if eager else "",
                    f"{logits.numel() * 2 / seconds / 1e9:.2f}",
                    f"{100 * times['exp'] / seconds:.0f}",
                )
            )
        results.append(
            {
                "rows": n,
                "cpu_time": options.cpu_time,
                "microseconds": {k: round(s * 1e6, 1) for k, s in times.items()},
                "top_p_times_eager": round(times["top_p eager"] / times["top_p rlir"], 1),
                "percent_of_limit": round(100 * times["exp"] / times["top_p rlir"], 1),
            }
        )
    header = (
        "bfloat16, rows x vocabulary",
        *("us", "us a row", "x eager", "GB/s read", "% of one exp"),
    )
    print(table(header, rows))
    emit("sample_tokens", {"machine": where, "results": results})


if __name__ == "__main__":
    main()
