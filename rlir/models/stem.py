"""The world model's stem, and the same with the bits that it has in the rollout engine.

torch's convolutions give a frame other bits in another batch, so a trainer cannot reproduce with
them what a rollout drew from. The forward pass here is the engine's kernel (csrc/cpu/stem.cpp),
which also writes what the backward pass needs; convolutions' gradients are torch's.

Legend: N frames, S visual tokens, A action tokens, C channels, D hidden size.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlir import _library
from rlir.actions.space import action_space
from rlir.ops.linear import linear_gradients

if TYPE_CHECKING:
    from rlir.models.world_model import WorldModelConfig


class Stem(nn.Module):
    """What the previous frame and the action say of each visual token: [N, S] -> [N, S, D]."""

    def __init__(self, config: "WorldModelConfig"):
        super().__init__()
        c = config.stem_channels
        self.grid = (config.rows, config.columns)
        space = action_space(config.space)
        self.embed = nn.Embedding(config.codes, 64)
        self.action = nn.Embedding(space.vocabulary, 2 * c * (config.stem_blocks + 1))
        self.input = nn.Conv2d(64, c, (3, 9), padding=(1, 4))
        self.blocks = nn.ModuleList(
            nn.Conv2d(c, c, (3, 5), padding=(1, 2)) for _ in range(config.stem_blocks)
        )
        self.output = nn.Linear(c, config.hidden)

    def forward(self, previous: Tensor, action: Tensor) -> Tensor:
        """previous: codes [N, S]; action: token block [N, A] counted from 0."""
        x = self.input(self.embed(previous).transpose(1, 2).unflatten(2, self.grid))
        film = self.action(action).sum(1)[:, :, None, None].chunk(len(self.blocks) + 1, 1)
        scale, shift = film[0].chunk(2, 1)
        x = F.gelu(x * (1 + scale) + shift)
        for convolution, modulation in zip(self.blocks, film[1:], strict=True):
            scale, shift = modulation.chunk(2, 1)
            x = x + F.gelu(convolution(x) * (1 + scale) + shift)
        out: Tensor = self.output(x.flatten(2).transpose(1, 2))
        return out


def engine_stem(stem: Stem, previous: Tensor, action: Tensor, dtype: torch.dtype) -> Tensor:
    """``stem(previous, action)`` as the rollout engine computes it: float32 [N, S, D].

    Args:
        stem: the module; its weights may be float32 masters.
        previous: codes int64 [N, S]; action: token blocks int64 [N, A].
        dtype: of the policy. In bfloat16 all weights and the operands of products are rounded to
            it, as the engine does; the rest is float32.

    Returns:
        On the CPU a frame's bits depend on that frame and the weights alone. Gradients flow to all
        weights, in their dtypes. Elsewhere torch's modules serve, under autocast in bfloat16.
    """
    device = previous.device.type
    if _library.PATH is None or device != "cpu" or dtype == torch.float64:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            slow: Tensor = stem(previous, action)
            return slow if dtype == torch.float64 else slow.float()
    parameters = list(stem.parameters())
    if torch.is_grad_enabled() and any(x.requires_grad for x in parameters):
        out: Tensor = _EngineStem.apply(stem, dtype, previous, action, *parameters)
        return out
    with torch.no_grad():
        return _forward(stem, dtype, previous, action, saves=False)[0]


def packed_stem(stem: Stem, dtype: torch.dtype) -> tuple[list[Tensor], list[int]]:
    """Weights and sizes as csrc/ops/stem.cpp wants them, rounded to the policy's dtype."""
    convolutions = [stem.input, *_blocks(stem)]
    channels, rounds = stem.input.out_channels, dtype == torch.bfloat16

    def padded(x: Tensor) -> Tensor:
        """float32, the last dimension padded with zeros to whole groups of 16."""
        return F.pad(x.to(dtype).float(), (0, -x.shape[-1] % 16)).contiguous()

    def kernels(of: list[nn.Conv2d]) -> Tensor:
        """A matrix [channels, width * inputs padded] for each row of each kernel."""
        parts = [x.weight.to(dtype).permute(2, 0, 3, 1) for x in of]
        rows = [F.pad(x, (0, -x.shape[-1] % 16)).flatten(2) for x in parts]
        none = stem.output.weight.new_empty(0, channels, 16, dtype=dtype)  # without blocks
        return torch.ops.rlir._decoder_pack.default(torch.cat(rows) if rows else none, rounds)

    biases = [x.bias for x in convolutions if x.bias is not None]
    output = F.pad(stem.output.weight.to(dtype), (0, -channels % 16))
    weights = [
        padded(stem.embed.weight),
        padded(stem.action.weight.unflatten(1, (2 * len(convolutions), -1))),
        kernels(convolutions[:1]),
        padded(biases[0]),
        kernels(convolutions[1:]),
        padded(torch.stack(biases)[1:]),
        torch.ops.rlir._decoder_pack.default(output[None], rounds),
        padded(stem.output.bias),
    ]
    widths = [convolutions[0].kernel_size[1], convolutions[-1].kernel_size[1]]
    sizes = [*stem.grid, stem.embed.embedding_dim, channels, len(convolutions) - 1]
    sizes += [stem.output.out_features, *widths, stem.embed.num_embeddings]
    return weights, [*sizes, stem.action.num_embeddings, int(rounds)]


def _blocks(stem: Stem) -> list[nn.Conv2d]:
    return [x for x in stem.blocks if isinstance(x, nn.Conv2d)]


def _forward(
    stem: Stem, dtype: torch.dtype, previous: Tensor, action: Tensor, *, saves: bool
) -> tuple[Tensor, Tensor]:
    """The result, and float32 [N, convolutions, 2, S, C padded]: each convolution's output with
    its bias, and the x that it leads to.
    """
    (n, s), convolutions = previous.shape, len(_blocks(stem)) + 1
    out = torch.empty(n, s, stem.output.out_features)
    given = (*packed_stem(stem, dtype), previous.contiguous(), action.contiguous(), out)
    if not saves:
        torch.ops.rlir._decoder_stem.default(*given)
        return out, out.new_empty(0)
    channels = stem.input.out_channels
    saved = torch.empty(n, convolutions, 2, s, channels + -channels % 16)
    torch.ops.rlir._stem_saved.default(*given, saved)
    return out, saved


class _EngineStem(torch.autograd.Function):
    """Parameters in the order of ``Stem.parameters()``; they are the module's own."""

    @staticmethod
    def forward(
        ctx: Any,
        stem: Stem,
        dtype: torch.dtype,
        previous: Tensor,
        action: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        out, saved = _forward(stem, dtype, previous, action, saves=True)
        ctx.save_for_backward(previous, action, saved, *parameters)
        ctx.dtype, ctx.grid = dtype, stem.grid
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        previous, action, saved, *parameters = ctx.saved_tensors
        embed, table, *convolutions, out_weight, _ = parameters
        kernels, dtype = convolutions[::2], ctx.dtype
        n, s, d = grad.shape
        c = kernels[0].shape[0]
        film = F.embedding(action, table.to(dtype)).float().sum(1).view(n, len(kernels), 2, 1, c)
        last = saved[:, -1, 1, :, :c].reshape(-1, c).to(dtype)
        dx, d_out, d_out_bias = linear_gradients(grad.reshape(n * s, d), last, out_weight)
        dx = dx.view(n, s, c).float()
        d_film = torch.empty_like(film)
        d_convolutions: list[Tensor] = []
        for i in reversed(range(len(kernels))):
            scale, shift = film[:, i].unbind(1)
            value = saved[:, i, 0, :, :c]  # the convolution with its bias
            dm = torch.ops.aten.gelu_backward.default(dx, torch.addcmul(shift, value, 1 + scale))
            d_film[:, i, 0, 0], d_film[:, i, 1, 0] = (dm * value).sum(1), dm.sum(1)
            dm *= 1 + scale
            seen = F.embedding(previous, embed) if i == 0 else saved[:, i - 1, 1, :, :c]
            d_seen, d_kernel = _convolution_gradients(dm, seen, kernels[i], dtype, ctx.grid)
            d_convolutions[:0] = [d_kernel, dm.sum((0, 1))]
            dx = dx + d_seen if i > 0 else d_seen
        backward = torch.ops.rlir.embedding_backward.default
        d_embed = backward(dx.reshape(n * s, embed.shape[1]), previous.reshape(-1), embed)
        rows = d_film.reshape(n, 1, table.shape[1]).expand(-1, action.shape[1], -1).flatten(0, 1)
        d_table = backward(rows, action.reshape(-1), table)
        gradients = [d_embed, d_table, *d_convolutions, d_out, d_out_bias]
        typed = [g.to(x.dtype) for g, x in zip(gradients, parameters, strict=True)]
        return (None, None, None, None, *typed)


def _convolution_gradients(
    dy: Tensor, x: Tensor, kernel: Tensor, dtype: torch.dtype, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Gradients of an image [N, S, inputs] and the kernel of dy [N, S, outputs], in ``dtype``."""

    def image(rows: Tensor) -> Tensor:
        """Channels last in memory, as they are."""
        return rows.to(dtype).contiguous().unflatten(1, grid).permute(0, 3, 1, 2)

    dx, dw, _ = torch.ops.aten.convolution_backward.default(
        image(dy),
        image(x),
        kernel.to(dtype),
        None,
        [1, 1],
        [kernel.shape[2] // 2, kernel.shape[3] // 2],
        [1, 1],
        False,
        [0, 0],
        1,
        [True, True, False],
    )
    return dx.permute(0, 2, 3, 1).flatten(1, 2).float(), dw
