"""Makes a checkpoint folder of a Llama with random weights, for peers that load such folders.

    python benchmarks/peers/llama_checkpoint.py FOLDER [--layers 20] [--hidden 1024] ...

The defaults are the shape of MineWorld-300M. Only torch and safetensors are needed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

STD = 0.02  # of every matrix, as transformers initialises them


def llama_config(options: argparse.Namespace) -> dict[str, Any]:
    theta = options.rope_theta
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_hidden_layers": options.layers,
        "hidden_size": options.hidden,
        "intermediate_size": options.mlp,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "head_dim": options.head_dim,
        "vocab_size": options.vocabulary,
        "max_position_embeddings": options.positions,
        "rms_norm_eps": options.norm_eps,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": STD,
        # No token ends a sample.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def llama_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, mlp, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * STD).bfloat16()

    def scale() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    weights = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": scale(),
            "self_attn.q_proj": matrix(heads * dim, hidden),
            "self_attn.k_proj": matrix(kv_heads * dim, hidden),
            "self_attn.v_proj": matrix(kv_heads * dim, hidden),
            "self_attn.o_proj": matrix(hidden, heads * dim),
            "post_attention_layernorm": scale(),
            "mlp.gate_proj": matrix(mlp, hidden),
            "mlp.up_proj": matrix(mlp, hidden),
            "mlp.down_proj": matrix(hidden, mlp),
        }
        weights |= {f"model.layers.{i}.{name}.weight": x for name, x in layer.items()}
    weights["model.norm.weight"] = scale()
    weights["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--mlp", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=8262)
    parser.add_argument("--positions", type=int, default=5552)
    parser.add_argument("--norm-eps", type=float, default=1e-5)
    parser.add_argument("--rope-theta", type=float, default=1e4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = llama_config(options)
    weights = llama_weights(config, options.seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    (options.folder / "config.json").write_text(text, encoding="utf-8")
    save_file(weights, options.folder / "model.safetensors", metadata={"format": "pt"})
    parameters = sum(x.numel() for x in weights.values())
    print(f"{options.folder}: {parameters / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main()
