"""group_attention against whole sequences through video_attention, in one process, by turns.

    python benchmarks/bench_group_attention.py [--rounds 3] [--threads N] [--cpu-time]

Training on one prompt of 8 frames (2776 tokens) and 8 continuations of 4 (1388), MineWorld-300M's
attention, forward and backward. The other way computes the prompt eight times; counting pairs of
tokens it is 1.64 times the work.
"""

import torch
from attention_bench import Bench, bfloat16
from harness import peak_memory
from torch import Tensor

from rlir.ops import causal, group_attention, video_attention

PROMPT, OWN, GROUP, HEADS, KEY_HEADS, DIM = 2776, 1388, 8, 16, 4, 64


def main() -> None:
    bench = Bench("group_attention", __doc__.splitlines()[0], rounds=3)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    prompt = [bfloat16(1, PROMPT, h, DIM) for h in heads]
    own = [bfloat16(GROUP, OWN, h, DIM) for h in heads]
    grads = bfloat16(1, PROMPT, HEADS, DIM), bfloat16(GROUP, OWN, HEADS, DIM)

    def shared() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (*prompt, *own)]
        out = group_attention(*leaves, group_size=GROUP, mask=causal())
        return torch.autograd.grad(out, leaves, grads)

    def whole() -> tuple[Tensor, ...]:
        """The prompt as one tensor that all sequences copy, as a trainer without the op does."""
        leaves = [x.detach().requires_grad_() for x in (*prompt, *own)]
        joined = [
            torch.cat([p.expand(GROUP, -1, -1, -1), s], 1)
            for p, s in zip(leaves[:3], leaves[3:], strict=True)
        ]
        out = video_attention(*joined, mask=causal())
        grad = torch.cat([grads[0].expand(GROUP, -1, -1, -1) / GROUP, grads[1]], 1)
        return torch.autograd.grad(out, leaves, grad)

    pairs = PROMPT * (PROMPT + 1) / 2 + GROUP * (OWN * PROMPT + OWN * (OWN + 1) / 2)
    moved = 2.0 * 4 * sum(x.numel() for x in (*prompt, *own))
    flops = 14 * pairs * HEADS * DIM
    bench.run("both ways", {"rlir": shared, "whole sequences": whole}, flops, moved)
    memory = {"rlir": peak_memory(shared), "whole sequences": peak_memory(whole)}
    print("peak MiB:", ", ".join(f"{k} {v / 2**20:.0f}" for k, v in memory.items()))
    bench.finish(peak_bytes=memory)


if __name__ == "__main__":
    main()
