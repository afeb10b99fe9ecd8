"""video_attention against torch's kernels, in one process, by turns.

    python benchmarks/bench_video_attention.py [--rounds 7] [--threads N] [--no-compile]

Frames of 336 visual and 11 action tokens, 16 heads on 4 key heads of 64 channels (MineWorld-300M's
attention), 4 and 16 frames; and the Doom model's clips. Peers: scaled_dot_product_attention with
shared and with copied key heads (a mask tensor where the mask is not causal), and FlexAttention.
"""

from collections.abc import Callable

import torch
from attention_bench import Bench, bfloat16, both_ways, expanded, heads_first, sdpa
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from rlir.ops import Mask, causal, frame_causal, video_attention, visible

HEADS, KEY_HEADS, DIM, FRAME = 16, 4, 64, 347


def flex(mask: Mask, seen: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    t = len(seen)
    if mask.kind == "causal":
        blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, t, t, device="cpu")
    else:
        frame = (torch.arange(t) + 11) // FRAME
        image = (torch.arange(t) + 11) % FRAME >= 11

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) | (image[i] & (frame[i] == frame[j]))

        blocks = create_block_mask(sees, None, None, t, t, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks, enable_gqa=True)


def main() -> None:
    bench = Bench("video_attention", __doc__.splitlines()[0])
    with torch.inference_mode():
        for tokens in (4 * FRAME, 16 * FRAME):
            for mask in (causal(), frame_causal(336, 11)):
                q, k, v = (bfloat16(1, tokens, h, DIM) for h in (HEADS, KEY_HEADS, KEY_HEADS))
                seen = visible(mask, torch.arange(tokens), tokens)
                assert seen.dtype == torch.bool
                qt, kt, vt = map(heads_first, (q, k, v))
                ke, ve = expanded(kt, HEADS), expanded(vt, HEADS)
                how = {"is_causal": True} if mask.kind == "causal" else {"attn_mask": seen}
                calls = {
                    "rlir": lambda q=q, k=k, v=v, m=mask: video_attention(q, k, v, mask=m),
                    "SDPA": lambda a=(qt, kt, vt), h=how: sdpa(*a, enable_gqa=True, **h),
                    "SDPA, copied heads": lambda a=(qt, ke, ve), h=how: sdpa(*a, **h),
                }
                if bench.compiles:
                    run = flex(mask, seen)
                    calls["FlexAttention"] = lambda a=(qt, kt, vt), f=run: f(*a)
                flops = 4.0 * int(seen.sum()) * HEADS * DIM
                moved = 2.0 * (2 * q.numel() + k.numel() + v.numel())
                bench.run(f"forward, {mask.kind}, {tokens}", calls, flops, moved)
    for batch, tokens, heads, key_heads in (
        (1, 4 * FRAME, HEADS, KEY_HEADS),
        (1, 16 * FRAME, HEADS, KEY_HEADS),
        (16, 335, 4, 2),
    ):
        leaves = [bfloat16(batch, tokens, h, DIM) for h in (heads, key_heads, key_heads)]
        qt, kt, vt = map(heads_first, leaves)
        copied = (qt, expanded(kt, heads), expanded(vt, heads))
        grad = bfloat16(batch, tokens, heads, DIM)
        calls = {
            "rlir": both_ways(
                lambda q, k, v: video_attention(q, k, v, mask=causal()), leaves, grad
            ),
            "SDPA, copied heads": both_ways(
                lambda q, k, v: sdpa(q, k, v, is_causal=True), copied, heads_first(grad)
            ),
        }
        pairs = batch * tokens * (tokens + 1) / 2
        moved = 2.0 * 4 * sum(x.numel() for x in leaves)
        name = f"both ways, causal, {batch} x {tokens}"
        bench.run(name, calls, 14 * pairs * heads * DIM, moved)
    bench.finish()


if __name__ == "__main__":
    main()
