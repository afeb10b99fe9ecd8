"""flow_sde_step against Flow-GRPO's formula in eager PyTorch, in one process, by turns.

    python benchmarks/bench_flow_sde_step.py [--rounds 15] [--threads N]

Drawing: a step with its log-probability. Scoring: log-probability and gradient of a sample that is
given, forward and backward. The limit is a copy of what must be read and written.
"""

import argparse
import math

import torch
from harness import emit, interleave, machine, table
from torch import Tensor

from rlir.ops import flow_sde_step


def flow_grpo(
    v: Tensor, x: Tensor, sigma: Tensor, then: Tensor, a: float, previous: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lines of Flow-GRPO's sde_step_with_logprob."""
    dt = then - sigma
    s = torch.sqrt(sigma / (1 - torch.where(sigma == 1, then, sigma))) * a
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    if previous is None:
        previous = mean + s * torch.sqrt(-1 * dt) * torch.randn_like(v)
    logprob = (
        -((previous.detach() - mean) ** 2) / (2 * ((s * torch.sqrt(-1 * dt)) ** 2))
        - torch.log(s * torch.sqrt(-1 * dt))
        - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    )
    return previous, logprob.mean(dim=tuple(range(1, logprob.ndim))), mean, s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine()
    print("  ".join(f"{k} {v}" for k, v in where.items()))

    rows, results = [], []
    compiled = torch.compile(flow_grpo)
    for shape in ((1, 16, 28, 48), (16, 16, 28, 48)):
        g = torch.Generator().manual_seed(0)
        v, x = (torch.randn(shape, generator=g) for _ in range(2))
        sigma = torch.full((shape[0], 1, 1, 1), 0.7)
        then = torch.full((shape[0], 1, 1, 1), 0.6)
        s, n = sigma.flatten(), then.flatten()
        later = flow_sde_step(v, x, s, n, noise_level=0.7).next
        leaf = v.clone().requires_grad_()
        target = torch.empty_like(x)

        def ours(v=leaf, x=x, s=s, n=n, later=later) -> None:
            out = flow_sde_step(v, x, s, n, noise_level=0.7, previous=later)
            torch.autograd.grad(out.logprob.sum(), v)

        def theirs(v=leaf, x=x, s=sigma, n=then, later=later) -> None:
            torch.autograd.grad(flow_grpo(v, x, s, n, 0.7, later)[1].sum(), v)

        def draw(f, v=v, x=x, s=sigma, n=then) -> object:
            with torch.inference_mode():
                return f(v, x, s, n, 0.7, None)

        def ours_draw(v=v, x=x, s=s, n=n) -> object:
            with torch.inference_mode():
                return flow_sde_step(v, x, s, n, noise_level=0.7)

        times = interleave(
            {
                "draw: rlir": ours_draw,
                "draw: eager": lambda d=draw: d(flow_grpo),
                "draw: torch.compile": lambda d=draw: d(compiled),
                "score: rlir": ours,
                "score: eager": theirs,
                "randn": lambda x=x: torch.randn_like(x),
                "copy": lambda x=x, t=target: t.copy_(x),
            },
            options.rounds,
        )
        # A draw reads two tensors and writes two; scoring reads three and writes one, then reads
        # two and writes one.
        limit = {"draw": 2 * times["copy"], "score": 3.5 * times["copy"]}
        for name, seconds in times.items():
            kind = name.split(":")[0]
            eager = times.get(f"{kind}: eager")
            rows.append(
                (
                    f"{' x '.join(map(str, shape))}  {name}",
                    f"{seconds * 1e6:.0f}",
                    f"{eager / seconds:.2f}" if eager else "",
                    f"{100 * limit[kind] / seconds:.0f}" if kind in limit else "",
                )
            )
        results.append(
            {
                "shape": shape,
                "microseconds": {k: round(t * 1e6, 1) for k, t in times.items()},
                "bytes": {"draw": 4 * x.nbytes, "score": 7 * x.nbytes},
                "percent_of_limit": {
                    k: round(100 * t / times[f"{k}: rlir"], 1) for k, t in limit.items()
                },
                "speedup": {k: round(times[f"{k}: eager"] / times[f"{k}: rlir"], 2) for k in limit},
            }
        )
    print(table(("float32", "us", "x eager", "% of limit"), rows))
    emit("flow_sde_step", {"machine": where, "results": results})


if __name__ == "__main__":
    main()
