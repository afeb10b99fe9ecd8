"""What is no Llama as it is built here, or cannot be read, is refused in one line."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from testkit import DAMAGES, WORLD_MODEL, damage, one_line
from torch import Tensor

pytest.importorskip("transformers")

from llamas import edit, llama, load, saved, weights
from safetensors.torch import save_file

from rlir.checkpoints import CONFIG, WEIGHTS, write_json
from rlir.errors import InputError
from rlir.models.llama import save_llama
from rlir.models.load import load_world_model
from rlir.models.tensor_files import INDEX
from rlir.models.world_model import WorldModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A float32 checkpoint."""
    return saved(tmp_path / "llama", llama())


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
LAYERED = {"full_attention": {"rope_type": "default"}}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model_type": "mistral"}, "must have model_type 'llama', got 'mistral'"),
    "attention bias": ({"attention_bias": True}, "attention_bias False, got True"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias False, got True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'silu', got 'gelu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config None, got"),
    "scaling": ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling none or .*'llama3'"),
    "old scaling": ({"rope_scaling": {"type": "linear"}}, "rope_scaling none or .*'linear'"),
    "parameters": ({"rope_parameters": YARN}, "rope_parameters none or .*'yarn'"),
    "by layer": ({"rope_parameters": LAYERED}, "rope_parameters none or .*got"),
    "no parameters": ({"rope_parameters": 7}, "rope_parameters none or .*got 7"),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor of 1, got 0.5"),
    "theta": ({"rope_parameters": None, "rope_theta": -1}, "rope_theta above 0, got -1"),
    "eps": ({"rms_norm_eps": "small"}, "rms_norm_eps above 0, got 'small'"),
    "head size": ({"head_dim": 16}, "head_dim of .*, got 16, 32 and 4"),
    "hidden": ({"hidden_size": 32.0}, "whole hidden_size from 1, got 32.0"),
    "layers": ({"num_hidden_layers": 0}, "whole num_hidden_layers from 1, got 0"),
    "many layers": ({"num_hidden_layers": 10**9}, "must hold model.layers.2.*, found none"),
    "fewer layers": ({"num_hidden_layers": 1}, "must hold no other tensors, got model.layers.1"),
    "heads": ({"num_attention_heads": None}, "whole num_attention_heads from 1, got None"),
    "key heads": ({"num_key_value_heads": 3}, "must be a world model's decoder: "),
    "positions": ({"max_position_embeddings": True}, "max_position_embeddings from 1, got True"),
    "few positions": ({"max_position_embeddings": 22}, "at least 23 .2 frames., got 22"),
    "vocabulary": ({"vocab_size": 83}, "at least 84, 16 codes and the tokens of mineworld, got 83"),
    "other vocabulary": ({"vocab_size": 85}, r"must have shape \(85, 32\), got \(86, 32\)"),
    "width": ({"intermediate_size": 50}, r"gate_proj.weight must have shape \(50, 32\)"),
    "tied": ({"tie_word_embeddings": "no"}, "tie_word_embeddings true or false, got 'no'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_another_model_is_refused(folder: Path, case: str) -> None:
    changes, text = WRONG[case]
    edit(folder, lambda c: c.update(changes))
    with pytest.raises(InputError, match=text) as caught:
        load(folder)
    assert one_line(str(caught.value)).startswith(f"llama: {folder}")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"frames": 4}, "max_position_embeddings of at least 57 .4 frames., got 48"),
        ({"frames": 1}, "frames must be >= 2"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"codes": 19}, "at least 87, 19 codes and the tokens of mineworld, got 86"),
        ({"space": "quake"}, "action space must be one of"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(
    folder: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text) as caught:
        load(folder, **changes)
    one_line(str(caught.value))


NAME = "model.layers.1.self_attn.v_proj.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.pop(NAME), f"must hold {NAME}, found none"),
        (lambda w: w.pop("lm_head.weight"), "must hold lm_head.weight, found none"),
        (lambda w: w.update({NAME: w[NAME].T.contiguous()}), r"must have shape \(16, 32\), got"),
        (lambda w: w.update({NAME: w[NAME][0].clone()}), r"must have shape \(16, 32\), got \(32,"),
        (lambda w: w.update({NAME: w[NAME].to(torch.int8)}), "F32 or BF16 or F16, got I8"),
        (lambda w: w.update({NAME: w[NAME].double()}), "F32 or BF16 or F16, got F64"),
        (lambda w: w.update({"model.extra": w[NAME].clone()}), "no other tensors, got model.extra"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, change: Callable[[dict[str, Tensor]], object], text: str
) -> None:
    held = weights(folder)
    change(held)
    save_file(held, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=text) as caught:
        load(folder)
    assert one_line(str(caught.value)).startswith(f"llama: {folder}")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_file_that_cannot_be_read_is_named(folder: Path, file: str, kind: str) -> None:
    path = folder / file
    damage(path, kind)
    with pytest.raises(InputError) as caught:
        load(folder)
    assert str(folder) in (text := one_line(str(caught.value)))
    assert file in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda i: i.pop("weight_map"), "must hold a weight_map"),
        (lambda i: i.update(weight_map=[]), "must hold a weight_map"),
        (lambda i: i["weight_map"].update({NAME: 1}), "must hold a weight_map"),
        (lambda i: i["weight_map"].update({NAME: "../x.safetensors"}), "must name files beside it"),
        (lambda i: i["weight_map"].update({NAME: ".."}), "must be readable"),
        (lambda i: i["weight_map"].update({NAME: "none.safetensors"}), "none.safetensors must be"),
        (lambda i: i["weight_map"].pop(NAME), f"must hold {NAME}, found none"),
        (lambda i: i["weight_map"].update(x=i["weight_map"][NAME]), "must hold x, found none"),
    ],
)
def test_an_index_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    shards = saved(tmp_path, llama(), max_shard_size="20KB")
    edit(shards, change, INDEX)
    with pytest.raises(InputError, match=text) as caught:
        load(shards)
    assert one_line(str(caught.value)).startswith(f"llama: {shards}")


def test_a_model_that_is_no_llama_is_not_written(tmp_path: Path, folder: Path) -> None:
    for changes in ({"stem_channels": 0}, {"slot_embeddings": False}):
        model = WorldModel(dataclasses.replace(WORLD_MODEL, **changes))
        with pytest.raises(InputError, match="no stem and no slot embeddings"):
            save_llama(model, tmp_path / "out")
    with pytest.raises(InputError, match="dtype must be float32, bfloat16 or float16, got"):
        save_llama(load(folder), tmp_path / "out", dtype=torch.float64)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        ([], "must hold rows, columns, codes, space, frames and no more"),
        ({"columns": 3, "depth": 1}, "and no more, got"),
        ({"rows": 0}, "a whole rows from 1, got 0"),
        ({"frames": "16"}, "a whole frames from 1, got '16'"),
        ({"space": "quake"}, "action space must be one of"),
        ({"space": ["doom"]}, "action space must be one of"),
    ],
)
def test_a_grid_file_that_does_not_fit_is_refused(folder: Path, grid: Any, text: str) -> None:
    write_json(folder / "rlir.json", grid)
    with pytest.raises(InputError, match=text) as caught:
        load_world_model(folder)
    one_line(str(caught.value))


def test_another_hugging_face_model_is_named(folder: Path) -> None:
    edit(folder, lambda c: c.update(model_type="gpt2"))
    with pytest.raises(InputError, match="must have model_type 'llama', got 'gpt2'"):
        load_world_model(folder)
