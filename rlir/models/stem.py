"""The local-dynamics stem of the world model: what the previous frame and the action say of each
visual token, by convolutions over the previous frame's token grid.

Its forward pass is the rollout engine's (csrc/cpu/stem.h), so that the log-probabilities of a rollout are
the trainer's bit for bit. The backward pass goes through the same convolutions in PyTorch.

Legend: N frames, S visual tokens a frame, A action tokens, D hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlir import _library


def padded(x: Tensor) -> Tensor:
    """float32, the last dimension padded with zeros to whole groups of 16."""
    return F.pad(x.float(), (0, -x.shape[-1] % 16)).contiguous()


def pack(matrices: Sequence[Tensor], rounds: bool) -> Tensor:
    """Matrices of one shape in the panels of csrc/cpu/product.h; bfloat16 if ``rounds``."""
    dtype = torch.bfloat16 if rounds else torch.float32
    stacked = torch.stack([x.to(dtype) for x in matrices])
    packed: Tensor = torch.ops.rlir._decoder_pack.default(stacked, rounds)
    return packed


class Stem(nn.Module):
    """Codes of the previous frames [N, S] and actions [N, A] -> [N, S, D]."""

    def __init__(
        self,
        codes: int,
        grid: tuple[int, int],
        actions: int,
        channels: int,
        blocks: int,
        hidden: int,
    ):
        super().__init__()
        self.grid = grid
        self.embed = nn.Embedding(codes, 64)
        self.action = nn.Embedding(actions, 2 * channels * (blocks + 1))
        self.input = nn.Conv2d(64, channels, (3, 9), padding=(1, 4))
        self.blocks = nn.ModuleList(
            nn.Conv2d(channels, channels, (3, 5), padding=(1, 2)) for _ in range(blocks)
        )
        self.output = nn.Linear(channels, hidden)

    def convolutions(self) -> list[nn.Conv2d]:
        """Those of the residual blocks, typed."""
        return [x for x in self.blocks if isinstance(x, nn.Conv2d)]

    def reference(self, previous: Tensor, action: Tensor) -> Tensor:
        """``forward`` in plain PyTorch; its bits depend on the batch."""
        x = self.input(self.embed(previous).transpose(1, 2).unflatten(2, self.grid))
        film = self.action(action).sum(1)[:, :, None, None].chunk(len(self.blocks) + 1, 1)
        scale, shift = film[0].chunk(2, 1)
        x = F.gelu(x * (1 + scale) + shift)
        for convolution, modulation in zip(self.blocks, film[1:], strict=True):
            scale, shift = modulation.chunk(2, 1)
            x = x + F.gelu(convolution(x) * (1 + scale) + shift)
        out: Tensor = self.output(x.flatten(2).transpose(1, 2))
        return out

    def packed(self, rounds: bool) -> tuple[list[Tensor], list[int]]:
        """Weights and sizes as csrc/ops/stem.cpp wants them, rounded to bfloat16 or not."""
        convolutions = self.convolutions()
        dtype = torch.bfloat16 if rounds else torch.float32
        channels = self.input.out_channels

        def kernels(of: list[nn.Conv2d]) -> Tensor:
            """A matrix [channels, width * inputs padded] for each row of each kernel."""
            parts = [x.weight.permute(2, 0, 3, 1) for x in of]
            rows = [F.pad(x, (0, -x.shape[-1] % 16)).flatten(2) for x in parts]
            none = self.output.weight.new_empty(0, channels, 16)  # a stem without blocks
            joined = (torch.cat(rows) if rows else none).to(dtype)
            packed: Tensor = torch.ops.rlir._decoder_pack.default(joined, rounds)
            return packed

        film = self.action.weight.unflatten(1, (2 * (len(convolutions) + 1), -1))
        biases = [x.bias for x in convolutions if x.bias is not None]
        assert self.input.bias is not None
        blocks = torch.stack(biases) if biases else self.input.bias.new_zeros(0, 16)
        weights = [
            padded(self.embed.weight.to(dtype)),
            padded(film.to(dtype)),
            kernels([self.input]),
            padded(self.input.bias.to(dtype)),
            kernels(convolutions),
            padded(blocks.to(dtype)),
            pack([F.pad(self.output.weight, (0, -channels % 16))], rounds),
            padded(self.output.bias.to(dtype)),
        ]
        widths = [self.input.kernel_size[1], convolutions[0].kernel_size[1] if convolutions else 1]
        sizes = [*self.grid, self.embed.embedding_dim, channels, len(convolutions)]
        sizes += [self.output.out_features, *widths, self.embed.num_embeddings]
        return weights, [*sizes, self.action.num_embeddings, int(rounds)]

    def forward(self, previous: Tensor, action: Tensor) -> Tensor:
        """float32 [N, S, D]; action: token blocks counted from 0. On the CPU a frame's bits depend
        on that frame and its action alone. Operands of products are rounded to bfloat16 where the
        weights are, or under autocast.
        """
        if _library.PATH is None or self.embed.weight.device.type != "cpu":
            return self.reference(previous, action).float()
        out: Tensor = _Native.apply(previous, action, self, *self.parameters())
        return out


class _Native(torch.autograd.Function):
    """The engine's forward pass; gradients of the reference, which runs again for them."""

    @staticmethod
    def forward(ctx: Any, previous: Tensor, action: Tensor, stem: Stem, *_: Tensor) -> Tensor:
        ctx.autocast = torch.is_autocast_enabled("cpu")
        ctx.stem = stem
        ctx.save_for_backward(previous, action)
        rounds = ctx.autocast or stem.embed.weight.dtype == torch.bfloat16
        n, s = previous.shape
        out = torch.empty(n, s, stem.output.out_features)
        if out.numel():
            torch.ops.rlir._decoder_stem.default(
                *stem.packed(rounds), previous.contiguous(), action.contiguous(), out
            )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameters = list(ctx.stem.parameters())
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=ctx.autocast):
            out = ctx.stem.reference(*ctx.saved_tensors)
        grads = torch.autograd.grad(out, parameters, grad.to(out.dtype), allow_unused=True)
        return (None, None, None, *grads)
