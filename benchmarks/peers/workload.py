"""What the language-model peers share: the work load, its options, and one JSON line of results.

Each prompt is continued by a group of samples, one token at a time, with the log-probability of
every sampled token under the untruncated distribution. The defaults are a frame of MineWorld: a
prompt of 2,776 tokens, 16 samples, 336 tokens each. It imports neither rlir nor a peer, so that it
serves in each peer's own environment.
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
OVERHEAD = 3 * GIB // 2  # code, activations and whatever else is neither weights nor cache


def parser(description: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description)
    options.add_argument("checkpoint", type=Path, help="a folder, say of llama_checkpoint.py")
    options.add_argument("--prompts", type=int, default=1)
    options.add_argument("--prompt-tokens", type=int, default=2776)
    options.add_argument("--group-size", type=int, default=16)
    options.add_argument("--new-tokens", type=int, default=336)
    options.add_argument("--top-p", type=float, default=0.8)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument("--memory-gib", type=float, default=12.0, help="weights, cache and all")
    options.add_argument("--prefill-only", action="store_true", help="one new token a sample")
    return options


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    known = options.parse_args()
    if known.prefill_only:
        known.new_tokens = 1
    return known


def model_config(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))


def weight_bytes(checkpoint: Path) -> int:
    return sum(x.stat().st_size for x in checkpoint.glob("*.safetensors"))


def cache_budget(options: argparse.Namespace) -> int:
    """Bytes that the memory limit leaves to keys and values."""
    budget = int(options.memory_gib * GIB) - weight_bytes(options.checkpoint) - OVERHEAD
    if budget <= 0:
        raise SystemExit(f"--memory-gib {options.memory_gib}: no room for a cache")
    return budget


def random_prompts(options: argparse.Namespace, call: int = 0) -> torch.Tensor:
    """Token ids [prompts, prompt_tokens], other ones for each ``call``."""
    generator = torch.Generator().manual_seed(1000 * options.seed + call)
    vocabulary = model_config(options.checkpoint)["vocab_size"]
    size = (options.prompts, options.prompt_tokens)
    return torch.randint(vocabulary, size, generator=generator)


def peak_rss(processes: Sequence[int] = ()) -> int:
    """Bytes at the highest, of this process and the others given, summed (Linux).

    Pages that processes share, those of libraries for the most part, count in each.
    """
    total = 0
    for process in ("self", *processes):
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
        total += next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) * 1024
    return total


def report(
    peer: str,
    options: argparse.Namespace,
    prefill: float,
    steps: Sequence[float],
    logprobs: torch.Tensor,
    rss: int,
    /,
    **more: Any,
) -> None:
    """Prints the JSON line.

    ``prefill`` is seconds until every sample has its first token, ``steps`` the seconds of each
    later token of all samples, ``logprobs`` those of all tokens [samples, new tokens]; ``more`` is
    what the peer was told.
    """
    samples = options.prompts * options.group_size
    if tuple(logprobs.shape) != (samples, options.new_tokens) or not logprobs.isfinite().all():
        raise RuntimeError(f"{peer}: log-probs of {samples} samples, got {tuple(logprobs.shape)}")
    total = prefill + sum(steps)
    record = {
        "peer": peer,
        "prompts": options.prompts,
        "prompt_tokens": options.prompt_tokens,
        "group_size": options.group_size,
        "new_tokens": options.new_tokens,
        "top_p": options.top_p,
        "threads": options.threads,
        "prefill_seconds": round(prefill, 4),
        "decode_seconds": round(sum(steps), 4),
        "total_seconds": round(total, 4),
        # The first step is still warming up.
        "step_ms": round(1e3 * statistics.median(steps[1:]), 3) if len(steps) > 1 else None,
        "tokens_per_second": round(samples * options.new_tokens / total, 2),
        "peak_rss_gib": round(rss / GIB, 3),
        "mean_logprob": round(logprobs.mean().item(), 4),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        **more,
    }
    print(json.dumps(record), flush=True)
