"""A Hugging Face Llama's config.json: which ones are a decoder as it is built here."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlir.checkpoints import read_json
from rlir.errors import InputError
from rlir.models.world_model import WorldModelConfig

_SIZES = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp": "intermediate_size",
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
}
"""Whole numbers: the project's names and the file's."""


@dataclass(frozen=True)
class LlamaConfig:
    """What a config.json says, by the project's names."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    positions: int
    rope_theta: float
    norm_eps: float
    tied: bool
    """Whether the head is the embedding table."""
    text: dict[str, Any]
    """The file."""

    def decoder(self) -> dict[str, Any]:
        """The part of a WorldModelConfig that a Llama has."""
        names = ("hidden", "layers", "heads", "kv_heads", "mlp", "rope_theta", "norm_eps")
        return {name: getattr(self, name) for name in names}


def read_llama_config(path: Path) -> LlamaConfig:
    """The config, or an InputError that names what this decoder does not do."""
    text = read_json(path)
    kind = text.get("model_type") if isinstance(text, dict) else text
    if not isinstance(text, dict) or kind != "llama":
        raise InputError(f"llama: {path} must have model_type 'llama', got {kind!r}")
    for name, built in (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("hidden_act", "silu"),
        ("quantization_config", None),
    ):
        if (got := text.get(name, built)) != built:
            raise InputError(f"llama: {path} must have {name} {built!r}, got {got!r}")
    sizes: dict[str, int] = {}
    for ours, name in _SIZES.items():
        value = text.get(name)
        if ours == "kv_heads" and value is None:
            value = sizes["heads"]
        if type(value) is not int or value < 1:
            raise InputError(f"llama: {path} must have a whole {name} from 1, got {value!r}")
        sizes[ours] = value
    dim = text.get("head_dim")
    if dim is not None and dim * sizes["heads"] != sizes["hidden"]:
        raise InputError(
            f"llama: {path} must have a head_dim of hidden_size / num_attention_heads, "
            f"got {dim!r}, {sizes['hidden']} and {sizes['heads']}"
        )
    tied = text.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        raise InputError(f"llama: {path} must have tie_word_embeddings true or false, got {tied!r}")
    theta = _positive(path, "rope_theta", _rope_theta(path, text))
    eps = _positive(path, "rms_norm_eps", text.get("rms_norm_eps", 1e-6))
    return LlamaConfig(**sizes, rope_theta=theta, norm_eps=eps, tied=tied, text=text)


def _positive(path: Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise InputError(f"llama: {path} must have a {name} above 0, got {value!r}")
    return float(value)


def _rope_theta(path: Path, text: dict[str, Any]) -> Any:
    """Base of the rotary embedding, of which only the plain one is built here.

    transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling.
    """
    theta = text.get("rope_theta", 10000.0)
    turned = text.get("partial_rotary_factor")  # the share of a head's channels
    for name in ("rope_scaling", "rope_parameters"):
        given = text.get(name)
        if given is None:
            continue
        kind = given
        if isinstance(given, dict) and not any(isinstance(x, dict) for x in given.values()):
            kind = given.get("rope_type", given.get("type"))
            theta = given.get("rope_theta", theta)
            turned = given.get("partial_rotary_factor", turned)
        if kind not in (None, "default"):
            raise InputError(f"llama: {path} must have {name} none or 'default', got {kind!r}")
    if turned not in (None, 1):
        raise InputError(f"llama: {path} must have a partial_rotary_factor of 1, got {turned!r}")
    return theta


def described(config: WorldModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a world model that was not loaded from one."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.hidden // config.heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        # Llama's own defaults would be visual codes.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
