"""The peer that needs no engine: ``generate`` of transformers, one group or more in a batch.

    python benchmarks/peers/generate_transformers.py CHECKPOINT [--prefill each] [--cache dynamic]

The defaults are the fastest that transformers offers. A prompt is prefilled once and its keys and
values copied to the group; ``--prefill each`` is plain ``num_return_sequences``, which prefills
each sample. The cache is static: with a dynamic one, transformers hands attention all query heads
one by one instead of packing those that share keys, and copies the cache at every step. Compiled
(as ``generate`` can with a static cache) and by ``generate_batch`` it is slower still on a CPU.

Prints one JSON line. Run it as a process of its own, for the peak of its memory.
"""

import time
from argparse import Namespace
from itertools import pairwise

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaForCausalLM, LogitsProcessor, StaticCache
from workload import cache_budget, model_config, parse, parser, peak_rss, random_prompts, report


class Recorder(LogitsProcessor):
    """Keeps the time of each token and its log-probability, without keeping all logits.

    It runs before top-p. A token is known only at the next call: ``gather`` takes the last ones.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.logprobs: list[Tensor] = []
        self.distribution: Tensor | None = None

    def gather(self, tokens: Tensor) -> None:
        if self.distribution is not None:
            self.logprobs.append(self.distribution.gather(1, tokens[:, -1:]))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.gather(input_ids)
        self.distribution = scores.log_softmax(-1)
        self.times.append(time.perf_counter())
        return scores


def batch_prompts(options: Namespace) -> int:
    """How many prompts' groups to generate at a time, as evenly as the budget allows."""
    config = model_config(options.checkpoint)
    token = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"]
    sample = 2 * token * (options.prompt_tokens + options.new_tokens)
    if options.prefill == "each":  # activations of all prompts at once, about four of the MLP's
        sample += 2 * 4 * config["intermediate_size"] * options.prompt_tokens
    fits = max(1, cache_budget(options) // (options.group_size * sample))
    rounds = -(-options.prompts // fits)
    return -(-options.prompts // rounds)


def shared_cache(model: LlamaForCausalLM, prompts: Tensor, options: Namespace) -> Cache:
    """Keys and values of all but the prompts' last tokens: computed once, a copy a sample."""
    prefixes = []
    for prompt in prompts[:, :-1].split(1):
        prefixes.append(DynamicCache(config=model.config))
        model(prompt, past_key_values=prefixes[-1], logits_to_keep=1)
    if options.cache == "static":
        positions = options.prompt_tokens + options.new_tokens
        cache: Cache = StaticCache(config=model.config, max_cache_len=positions)
    else:
        cache = DynamicCache(config=model.config)
    for i, layers in enumerate(zip(*(x.layers for x in prefixes), strict=True)):
        keys, values = (
            torch.cat([getattr(x, name) for x in layers]).repeat_interleave(options.group_size, 0)
            for name in ("keys", "values")
        )
        cache.update(keys, values, i)
    return cache


def generate(
    model: LlamaForCausalLM, prompts: Tensor, options: Namespace
) -> tuple[float, list[float], Tensor]:
    """Seconds to all first tokens, seconds of each later one, log-probs [samples, new tokens]."""
    recorder = Recorder()
    settings = {
        "max_new_tokens": options.new_tokens,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": options.top_p,
        "top_k": 0,
        "logits_processor": [recorder],
    }
    begin = time.perf_counter()
    if options.prefill == "once":
        settings["past_key_values"] = shared_cache(model, prompts, options)
        prompts = prompts.repeat_interleave(options.group_size, 0)
    else:
        settings["num_return_sequences"] = options.group_size
        settings["cache_implementation"] = options.cache
    tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    recorder.gather(tokens)
    # From one distribution to the next; what follows the last belongs to the last.
    times = [*recorder.times[:-1], time.perf_counter()] if options.new_tokens > 1 else []
    steps = [b - a for a, b in pairwise(times)]
    prefill = (times[0] if steps else time.perf_counter()) - begin
    return prefill, steps, torch.cat(recorder.logprobs, 1)


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--prefill", choices=["once", "each"], default="once")
    options.add_argument("--cache", choices=["static", "dynamic"], default="static")
    options.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    options = parse(options)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(
        options.checkpoint, dtype=torch.bfloat16, attn_implementation=options.attention
    ).eval()
    model(torch.zeros(1, 8, dtype=torch.int64))  # warms up

    size = batch_prompts(options)
    runs = [generate(model, x, options) for x in random_prompts(options).split(size)]
    report(
        "transformers",
        options,
        sum(x[0] for x in runs),
        # A step of all samples, however many batches they make.
        [sum(x) for x in zip(*(x[1] for x in runs), strict=True)],
        torch.cat([x[2] for x in runs]),
        peak_rss(),
        prefill=options.prefill,
        cache=options.cache,
        attention=options.attention,
        prompts_at_a_time=size,
        transformers=transformers.__version__,
    )


if __name__ == "__main__":
    main()
