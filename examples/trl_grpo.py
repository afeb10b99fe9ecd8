"""TRL's GRPO trainer with rlir's ops: the import is all that changes.

    python examples/trl_grpo.py [--steps 6] [--plain]

A tiny random Llama learns to write words of an even number: nothing is downloaded, and a CPU does
it in seconds. ``--plain`` runs TRL's own trainer, for the same losses to rounding.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from rlir.integrations.trl import FusedGRPOTrainer

WORDS = [f"w{i}" for i in range(60)]


def tokenizer() -> PreTrainedTokenizerFast:
    names = ["<pad>", "<eos>", "<unk>", *WORDS]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    prompts = [{"prompt": " ".join(WORDS[i : i + 3])} for i in range(0, 48, 3)]
    with tempfile.TemporaryDirectory() as out:
        llama().save_pretrained(Path(out) / "base")
        trainer = (GRPOTrainer if options.plain else FusedGRPOTrainer)(
            model=str(Path(out) / "base"),
            reward_funcs=even,
            args=GRPOConfig(
                output_dir=out,
                use_cpu=True,
                bf16=False,
                per_device_train_batch_size=16,
                num_generations=8,
                max_completion_length=12,
                max_steps=options.steps,
                learning_rate=1e-2,
                num_iterations=2,
                beta=0.01,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer(),
        )
        trainer.train()
    for step in trainer.state.log_history:
        if "loss" in step:
            print(f"loss {float(step['loss']):+.5f}  clip {step['clip_ratio/region_mean']:.3f}")


if __name__ == "__main__":
    main()
