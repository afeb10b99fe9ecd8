"""Train the image tokenizer on frames."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from rlir.data.clips import Clips, to_unit
from rlir.models.tokenizer import Tokenizer, TokenizerConfig
from rlir.training import FitConfig


@dataclass(frozen=True)
class TokenizerTraining:
    """A tokenizer and how it is trained."""

    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(steps=5000, batch=32, learning_rate=1.5e-3)
    )
    gradient_weight: float = 0.1
    """Weight of the L1 loss on image gradients, which keeps edges sharp."""
    validation_frames: int = 512
    """Held-out frames of an evaluation."""


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB of frames in [-1, 1], [N]."""
    error = (a.float() - b.float()).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-10) / 4)


def _gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


class TokenizerTask:
    """Loss ``8 MSE + 0.2 L1 + w L1(gradients)``: MSE is what PSNR measures."""

    def __init__(self, config: TokenizerTraining, train: Clips, validation: Clips):
        torch.manual_seed(config.fit.seed)
        self.config = config
        self.model = Tokenizer(config.model)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train = train
        stride = max(1, len(validation.frames) // config.validation_frames)
        self.held_out = to_unit(torch.from_numpy(validation.frames[::stride].copy()))

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(self.train.frames), (self.config.fit.batch,), generator=generator)
        frames = to_unit(torch.from_numpy(self.train.frames[rows.numpy()]))
        mirrored = torch.rand(len(frames), generator=generator) < 0.5
        frames[mirrored] = frames[mirrored].flip(-1)
        frames = frames.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = self.model(frames)
        out = out.float()
        edges = sum(
            F.l1_loss(a, b) for a, b in zip(_gradients(out), _gradients(frames), strict=True)
        )
        loss = 8 * F.mse_loss(out, frames) + 0.2 * F.l1_loss(out, frames)
        return loss + self.config.gradient_weight * edges, {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        quality, codes = [], []
        for frames in self.held_out.split(64):
            with torch.autocast("cpu", torch.bfloat16):
                out, index = self.model(frames.contiguous(memory_format=torch.channels_last))
            quality.append(psnr(out.float().clamp(-1, 1), frames))
            codes.append(index.flatten())
        used = torch.cat(codes).unique().numel()
        return {"psnr": float(torch.cat(quality).mean()), "codes_used": used}
