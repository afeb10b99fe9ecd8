"""Image tokenizer: a convolutional autoencoder with finite scalar quantisation (FSQ).

frame [3, H, W] -> codes [H / 8, W / 8] -> frame. FSQ (arXiv 2309.15505): each latent channel is
bounded and rounded to a few levels, the codebook is their product; there is nothing to collapse.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ

from rlir.errors import InputError


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of a tokenizer."""

    height: int = 64
    """Frame height in pixels."""
    width: int = 96
    """Frame width in pixels."""
    patch: tuple[int, int] = (8, 12)
    """Pixels a token stands for, down and across: 8 x 8 or 8 x 12."""
    levels: tuple[int, ...] = (8, 8, 8, 8)
    """Levels of each quantised channel; their product is the number of codes."""
    channels: int = 32
    """Channels at half resolution; doubled at a quarter, four times that on the token grid."""
    blocks: int = 2
    """Residual blocks of the encoder on the token grid; the decoder has one more."""

    def __post_init__(self) -> None:
        if self.patch not in ((8, 8), (8, 12)):
            raise InputError(f"tokenizer: patch must be (8, 8) or (8, 12), got {self.patch}")
        whole = self.height % self.patch[0] == 0 and self.width % self.patch[1] == 0
        if self.height < 1 or self.width < 1 or not whole:
            raise InputError(
                f"tokenizer: frames must be whole patches of {self.patch}, "
                f"got {self.height} x {self.width}"
            )
        if not self.levels or min(self.levels) < 2:
            raise InputError(f"tokenizer: levels must each be at least 2, got {self.levels}")
        if self.channels < 8 or self.channels % 8 or self.blocks < 0:
            raise InputError(
                f"tokenizer: channels must be a multiple of 8 and blocks >= 0, "
                f"got {self.channels} and {self.blocks}"
            )

    @property
    def rows(self) -> int:
        return self.height // self.patch[0]

    @property
    def columns(self) -> int:
        return self.width // self.patch[1]

    @property
    def tokens(self) -> int:
        """Visual tokens a frame."""
        return self.rows * self.columns

    @property
    def codes(self) -> int:
        """Size of the codebook."""
        return math.prod(self.levels)


class ResidualBlock(nn.Module):
    """x + W2 silu(W1 silu(norm(x))), W1 3x3 and W2 1x1."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(F.silu(self.first(F.silu(self.norm(x)))))
        return out


class Tokenizer(nn.Module):
    """Frames to codes and back. Frames are float [N, 3, H, W] in [-1, 1]."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        c, latent = config.channels, len(config.levels)
        wide = config.patch[1] // 4  # the last stage's stride across: 2 or 3
        self.encoder = nn.Sequential(
            nn.Conv2d(3, c, 4, 2, 1),
            ResidualBlock(c),
            nn.Conv2d(c, 2 * c, 4, 2, 1),
            ResidualBlock(2 * c),
            nn.Conv2d(2 * c, 4 * c, (4, 2 + wide), (2, wide), 1),
            *(ResidualBlock(4 * c) for _ in range(config.blocks)),
            nn.GroupNorm(8, 4 * c),
            nn.SiLU(),
            nn.Conv2d(4 * c, latent, 1),
        )
        self.quantizer = FSQ(list(config.levels), channel_first=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, 4 * c, 3, padding=1),
            *(ResidualBlock(4 * c) for _ in range(config.blocks + 1)),
            nn.ConvTranspose2d(4 * c, 2 * c, (2, wide), (2, wide)),
            ResidualBlock(2 * c),
            ResidualBlock(2 * c),
            nn.Conv2d(2 * c, 4 * c, 1),
            nn.PixelShuffle(2),
            ResidualBlock(c),
            ResidualBlock(c),
            nn.Conv2d(c, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction [N, 3, H, W] (straight-through gradients) and codes [N, rows, columns]."""
        quantized, codes = self.quantizer(self.encoder(frames))
        return self.decoder(quantized), codes

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Codes in raster order, int64 [N, tokens]."""
        _, codes = self.quantizer(self.encoder(frames))
        return codes.flatten(1).long()

    @torch.no_grad()
    def latents(self) -> Tensor:
        """The quantised latent of every code, float32 [codes, channels] in [-1, 1]."""
        codes = torch.arange(self.config.codes)[:, None, None]
        latent: Tensor = self.quantizer.indices_to_codes(codes)
        return latent.flatten(1).float()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Frames float32 [N, 3, H, W] in [-1, 1] of codes [N, tokens]."""
        grid = codes.reshape(-1, self.config.rows, self.config.columns)
        latent = self.quantizer.indices_to_codes(grid)
        frames: Tensor = self.decoder(latent.to(self.decoder[0].weight.dtype))
        return frames.float().clamp(-1, 1)
