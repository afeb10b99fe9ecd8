"""TRL's GRPO trainer on a tiny random Llama, made here: no downloads, seconds on a CPU."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

WORDS = [f"w{i}" for i in range(60)]


def tokenizer(words: int) -> PreTrainedTokenizerFast:
    names = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(words))]
    vocabulary = {name: i for i, name in enumerate(names)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def llama(words: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words + 3,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.3,
        )
    )
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    return model


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Share of even tokens: something that can be learned."""
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def train(trainer_class: type, out: Path, *, words: int = len(WORDS), **options: Any) -> Any:
    """A trainer of ``trainer_class`` after a few steps; its losses are in ``state.log_history``."""
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "beta": 0.1,
        "num_iterations": 2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
        **options,
    }
    prompts = [{"prompt": " ".join(WORDS[i : i + 3])} for i in range(0, 48, 3)]
    llama(words).save_pretrained(out / "base")  # the trainer reads the reference from there as well
    trainer = trainer_class(
        model=str(out / "base"),
        reward_funcs=reward,
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer(words),
    )
    trainer.train()
    return trainer
