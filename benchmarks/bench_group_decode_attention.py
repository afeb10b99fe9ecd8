"""group_decode_attention against torch's kernels on copied prefixes, in one process, by turns.

    python benchmarks/bench_group_decode_attention.py [--rounds 15] [--threads N] [--cpu-time]

A step of decoding with MineWorld-300M's attention (16 heads on 4 key heads of 64 channels): a
prompt of 15 frames (5205 tokens) that G rollouts share, and one frame (347) of each one's own.
Peers get prefix and suffix already joined; the joining is not timed.
"""

import torch
from attention_bench import Bench, bfloat16, expanded, heads_first, sdpa

from rlir.ops import group_decode_attention

PREFIX, SUFFIX, HEADS, KEY_HEADS, DIM = 5205, 347, 16, 4, 64


def main() -> None:
    bench = Bench("group_decode_attention", __doc__.splitlines()[0], rounds=15)
    with torch.inference_mode():
        for group, tokens in ((16, 1), (16, 12), (1, 1), (1, 12)):
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
            total, qt = PREFIX + SUFFIX, heads_first(q)
            mask = None
            if tokens > 1:
                mask = torch.ones(tokens, total, dtype=torch.bool).tril(total - tokens)
            calls = {
                "rlir": lambda a=(q, *prefix, *suffix), n=lengths, g=group: group_decode_attention(
                    *a, **n, group_size=g
                ),
                "SDPA": lambda a=(qt, *joined), m=mask: sdpa(*a, attn_mask=m, enable_gqa=True),
                "SDPA, copied heads": lambda a=(qt, *copied), m=mask: sdpa(*a, attn_mask=m),
            }
            flops = 4.0 * group * tokens * HEADS * DIM * total
            moved = 2.0 * (2 * q.numel() + sum(x.numel() for x in (*prefix, *suffix)))
            bench.run(f"{group} rollouts, {tokens} tokens each", calls, flops, moved)
    bench.finish()


if __name__ == "__main__":
    main()
