"""group_decode_attention against torch's kernels on copied prefixes, in one process, by turns.

    python benchmarks/bench_group_decode_attention.py [--rounds 15] [--threads N] [--cpu-time]

A step of decoding with MineWorld-300M's attention (16 heads on 4 key heads of 64 channels): a
prompt of 15 frames (5205 tokens) that G rollouts share, and one frame (347) of each one's own.
Peers get prefix and suffix already joined; the joining is not timed. A call by itself, again and
again, may find its keys in a cache; the layers of a model in turn find theirs in memory.
"""

from collections.abc import Callable

import torch
from attention_bench import Bench, bfloat16, expanded, heads_first, sdpa

from rlir.ops import group_decode_attention

PREFIX, SUFFIX, HEADS, KEY_HEADS, DIM = 5205, 347, 16, 4, 64
TOTAL = PREFIX + SUFFIX
CASES = ((16, 1, 1), (16, 12, 1), (1, 1, 1), (1, 12, 1), (16, 1, 8), (1, 1, 20))
"""Rollouts, tokens of each, layers."""


def layer(group: int, tokens: int) -> dict[str, Callable[[], object]]:
    q = bfloat16(group, tokens, HEADS, DIM)
    prefix = [bfloat16(1, PREFIX, KEY_HEADS, DIM) for _ in range(2)]
    suffix = [bfloat16(group, SUFFIX, KEY_HEADS, DIM) for _ in range(2)]
    lengths = {
        "prefix_lengths": torch.tensor([PREFIX]),
        "suffix_lengths": torch.full((group,), SUFFIX),
    }
    joined = [
        heads_first(torch.cat([p.expand(group, -1, -1, -1), s], 1))
        for p, s in zip(prefix, suffix, strict=True)
    ]
    copied = [expanded(x, HEADS) for x in joined]
    qt, mask = heads_first(q), None
    if tokens > 1:
        mask = torch.ones(tokens, TOTAL, dtype=torch.bool).tril(TOTAL - tokens)
    return {
        "rlir": lambda: group_decode_attention(q, *prefix, *suffix, **lengths, group_size=group),
        "SDPA": lambda: sdpa(qt, *joined, attn_mask=mask, enable_gqa=True),
        "SDPA, copied heads": lambda: sdpa(qt, *copied, attn_mask=mask),
    }


def main() -> None:
    bench = Bench("group_decode_attention", __doc__.splitlines()[0], rounds=15)
    with torch.inference_mode():
        for group, tokens, layers in CASES:
            made = [layer(group, tokens) for _ in range(layers)]
            calls = {
                name: lambda some=[x[name] for x in made]: [call() for call in some]
                for name in made[0]
            }
            flops = 4.0 * group * tokens * HEADS * DIM * TOTAL
            keys = 2 * KEY_HEADS * DIM * (PREFIX + group * SUFFIX)
            moved = 2.0 * (2 * group * tokens * HEADS * DIM + keys)
            name = f"{group} rollouts, {tokens} tokens each"
            if layers > 1:
                name += f", {layers} layers"
            bench.run(name, calls, layers * flops, layers * moved)
    bench.finish()


if __name__ == "__main__":
    main()
