"""The peer that is an engine: vLLM for CPUs, with its prefix cache, paged cache and log-probs.

    VENV/bin/python benchmarks/peers/generate_vllm.py CHECKPOINT [--separate] [--processes]

VENV is what make_vllm_environment.py makes. A group is one request of ``n`` samples, or with
--separate as many requests for the same prompt. Prints one JSON line, last; what vLLM logs goes to
the standard error.

The defaults are what was fastest on two cores of a busy machine. --processes is vLLM's own
arrangement, in which the engine's process polls its worker, here on a core that the worker needs.
Cores and the size of the cache are those of --threads and --memory-gib, not of VLLM_CPU_*.
"""

import argparse
import ctypes.util
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from workload import cache_budget, parse, parser, peak_rss, random_prompts, report


def advised() -> list[str]:
    """The libraries that vLLM's guide for CPUs says to preload, where they are installed."""
    iomp = Path(sys.prefix) / "lib" / "libiomp5.so"
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
    return [*([tcmalloc] if tcmalloc else []), *([str(iomp)] if iomp.is_file() else [])]


def prepare(options: Namespace) -> None:
    """Starts anew with what vLLM and its OpenMP read from the environment before they run."""
    if options.prepared:
        return
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    bound = ",".join(map(str, cores))
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_CPU_KVCACHE_SPACE"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": bound,
        "LD_PRELOAD": ":".join(options.preload),
    }
    if not options.processes:  # no worker, for which vLLM would set these
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(len(cores))}
        environment |= {"KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{bound}]"}
        environment |= {"KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
    # Bound, the new start sees one core: it is told how many there are.
    arguments = [sys.executable, *sys.argv, "--prepared", "--threads", str(len(cores))]
    os.execve(sys.executable, arguments, environment)


def run(llm: Any, prompts: torch.Tensor, options: Namespace, **changes: Any) -> tuple:
    """The loop of ``LLM.generate``, timed: seconds of each step of the engine, and its outputs."""
    from vllm import SamplingParams

    settings = {
        "n": options.group_size,
        "max_tokens": options.new_tokens,
        "temperature": 1.0,
        "top_p": options.top_p,
        "logprobs": 0,  # of the sampled token, before top-p
        "ignore_eos": True,
        "detokenize": False,
    } | changes
    copies = 1
    if options.separate:
        copies, settings["n"] = settings["n"], 1
    engine, steps, outputs = llm.llm_engine, [], []
    last = time.perf_counter()
    for i, prompt in enumerate(prompts.tolist()):
        for j in range(copies):
            parameters = SamplingParams(**settings)
            # Read once, at the end.
            parameters.output_kind = type(parameters.output_kind).FINAL_ONLY
            engine.add_request(f"{last}-{i}-{j}", {"prompt_token_ids": prompt}, parameters)
    while engine.has_unfinished_requests():
        outputs += engine.step()
        now = time.perf_counter()
        steps.append(now - last)
        last = now
    return steps, outputs


def logprobs(outputs: list) -> torch.Tensor:
    """[samples, new tokens]"""
    return torch.tensor(
        [
            [of[token].logprob for token, of in zip(x.token_ids, x.logprobs, strict=True)]
            for output in outputs
            for x in output.outputs
        ]
    )


def descendants() -> list[int]:
    """Processes started by this one, and by those."""
    found = [os.getpid()]
    for process in found:
        for task in Path(f"/proc/{process}/task").iterdir():
            found += map(int, (task / "children").read_text(encoding="utf-8").split())
    return found[1:]


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--separate", action="store_true", help="a request a sample")
    options.add_argument("--processes", action="store_true", help="an engine's and a worker's")
    options.add_argument("--eager", action="store_true", help="without torch.compile")
    # A prompt is shared up to its last whole block; multiples of 32 are the fast ones.
    options.add_argument("--block-size", type=int, default=32)
    options.add_argument("--batched-tokens", type=int, help="in a step; none: vLLM's own")
    options.add_argument("--preload", nargs="*", default=advised(), help="libraries")
    options.add_argument("--prepared", action="store_true", help=argparse.SUPPRESS)
    options = parse(options)
    prepare(options)

    import vllm

    llm = vllm.LLM(
        str(options.checkpoint),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        seed=options.seed,
        max_model_len=options.prompt_tokens + options.new_tokens,
        max_num_seqs=max(2, options.prompts * options.group_size),
        max_num_batched_tokens=options.batched_tokens,
        kv_cache_memory_bytes=cache_budget(options),
        block_size=options.block_size,
        enable_prefix_caching=True,
        enforce_eager=options.eager,
        generation_config="vllm",
    )
    one = random_prompts(options, 1)[:1]
    run(llm, one, options, max_tokens=min(2, options.new_tokens))  # warms up
    prompt, _ = run(llm, random_prompts(options, 2)[:1], options, n=1, max_tokens=1)
    steps, outputs = run(llm, random_prompts(options), options)
    # What follows the last sample's first token. Of many prompts the first are done some steps
    # before the last, so that a step counts as one of all samples only where tokens are many.
    first = len(steps) - (options.new_tokens - 1)
    report(
        "vllm",
        options,
        sum(steps[:first]),
        steps[first:],
        logprobs(outputs),
        peak_rss(descendants()),
        prompt_seconds=round(sum(prompt), 4),
        engine_steps=len(steps),
        separate=options.separate,
        processes=options.processes,
        eager=options.eager,
        block_size=options.block_size,
        preload=[Path(x).name for x in options.preload],
        cached_tokens=max(x.num_cached_tokens or 0 for x in outputs),
        vllm=vllm.__version__,
    )


if __name__ == "__main__":
    main()
