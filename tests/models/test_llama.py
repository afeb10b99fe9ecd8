"""A Llama checkpoint is the same model here as in transformers, and goes out as it came in."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from testkit import WORLD_MODEL, same
from torch import Tensor

pytest.importorskip("transformers")

from llamas import (
    CODES,
    FRAMES,
    GRID,
    S,
    edit,
    exact,
    exact_ours,
    inputs,
    llama,
    load,
    predictions,
    saved,
    weights,
)
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from rlir import doctor
from rlir.actions.space import MINEWORLD
from rlir.checkpoints import CONFIG, WEIGHTS, read_json, save_model, write_json
from rlir.errors import InputError
from rlir.models.llama import save_llama
from rlir.models.load import load_world_model
from rlir.models.world_model import WorldModel, WorldModelConfig
from rlir.rollout import parity
from rlir.rollout.stepwise import inference_copy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A float32 checkpoint."""
    return saved(tmp_path / "llama", llama())


def within(got: Tensor, peer: Tensor, truth: Tensor) -> None:
    """At most twice the error of PyTorch in the same dtype, plus one ulp of the largest value."""
    error, allowed = ((x.double() - truth).abs().max() for x in (got, peer))
    ulp = torch.finfo(peer.dtype).eps * truth.abs().max()
    assert error <= 2 * allowed + ulp, (float(error), float(allowed))


@torch.no_grad()
@pytest.mark.parametrize("theta", [10000.0, 500.0])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (2, 1)])
def test_without_rounding_it_is_transformers_model(
    tmp_path: Path, heads: tuple[int, int], theta: float
) -> None:
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    theirs = llama(**sizes, rope_parameters={"rope_type": "default", "rope_theta": theta})
    ours = load(saved(tmp_path, theirs))
    codes, blocks, stream = inputs()
    out = exact(theirs, theta)(stream, output_hidden_states=True)
    ours = exact_ours(ours)
    hidden = predictions(out.hidden_states[-1])
    torch.testing.assert_close(ours.hidden(codes, blocks), hidden, rtol=1e-12, atol=1e-12)
    logits = predictions(out.logits)[..., :CODES]
    torch.testing.assert_close(ours(codes, blocks), logits, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_rounding_is_at_most_twice_that_of_transformers(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    ours = load(saved(tmp_path, llama().to(dtype)))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {x.dtype for x in ours.parameters()} == {torch.float32}, "masters"
    codes, blocks, stream = inputs()
    out = theirs(stream, output_hidden_states=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = ours.hidden(codes, blocks)
        logits = ours(codes, blocks)
    truth = exact(theirs)(stream, output_hidden_states=True)
    within(hidden, predictions(out.hidden_states[-1]), predictions(truth.hidden_states[-1]))
    within(logits, predictions(out.logits)[..., :CODES], predictions(truth.logits)[..., :CODES])


def test_it_is_a_world_model_without_stem_and_slots(folder: Path) -> None:
    model = load(folder)
    assert model.config == WorldModelConfig(
        space="mineworld", codes=CODES, rows=2, columns=3, frames=FRAMES, hidden=32, layers=2,
        heads=4, kv_heads=2, mlp=48, norm_eps=1e-4, stem_channels=0, stem_blocks=0,
        slot_embeddings=False, action_vocabulary=70,
    )  # fmt: skip
    assert model.stem is None
    assert model.embed_slots is None
    assert not model.training
    assert not any(x.requires_grad for x in model.parameters())
    again = WorldModel(model.config)
    again.load_state_dict(model.state_dict())
    assert same(dict(again.named_buffers()), dict(model.named_buffers())), "also what is not saved"
    assert again.lm_head.weight.shape == (CODES, 32), "nothing but codes is drawn"


@pytest.mark.parametrize("name", [*DTYPES, "mixed"])
def test_it_goes_out_as_it_came_in(tmp_path: Path, name: str) -> None:
    theirs = llama().to(DTYPES.get(name, torch.bfloat16))
    if name == "mixed":
        theirs.model.layers[0].mlp.up_proj.float()
        theirs.model.norm.float()
    before = saved(tmp_path / "before", theirs)
    save_llama(load(before), after := tmp_path / "after")
    assert same(weights(after), weights(before))
    assert read_json(after / CONFIG) == read_json(before / CONFIG)
    both = [LlamaForCausalLM.from_pretrained(x, dtype="auto") for x in (before, after)]
    logits = [model(inputs()[2]).logits for model in both]
    assert torch.equal(*logits)


def test_what_was_trained_goes_out_rounded_and_the_rest_as_it_was(tmp_path: Path) -> None:
    before = saved(tmp_path / "before", llama().bfloat16())
    model = load(before)
    with torch.no_grad():
        model.decoder_layers()[1].self_attn.qkv_proj.weight[32:48] += 1.001
        model.lm_head.weight[3] += 1.001
    save_llama(model, tmp_path / "after")
    old, new = weights(before), weights(tmp_path / "after")
    old["model.layers.1.self_attn.k_proj.weight"] = (
        old["model.layers.1.self_attn.k_proj.weight"].float() + 1.001
    ).bfloat16()
    old["lm_head.weight"][3] = (old["lm_head.weight"][3].float() + 1.001).bfloat16()
    assert same(new, old)
    save_llama(model, tmp_path / "wide", dtype=torch.float32)
    assert read_json(tmp_path / "wide" / CONFIG)["dtype"] == "float32"
    wide = weights(tmp_path / "wide")
    assert {x.dtype for x in wide.values()} == {torch.float32}
    assert torch.equal(wide["lm_head.weight"][:CODES], model.lm_head.weight), "not rounded"


def test_shards_are_one_model(tmp_path: Path, folder: Path) -> None:
    shards = saved(tmp_path / "shards", llama(), max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert same(load(shards).state_dict(), load(folder).state_dict())
    save_llama(load(shards), tmp_path / "one")
    assert same(weights(tmp_path / "one"), weights(folder))


def test_a_tied_head_is_a_copy_and_goes_out_untied(tmp_path: Path) -> None:
    theirs = llama(tie_word_embeddings=True)
    before = saved(tmp_path / "before", theirs)
    assert "lm_head.weight" not in weights(before)
    model = load(before)
    assert torch.equal(model.lm_head.weight, model.embed_tokens.weight[:CODES])
    assert model.lm_head.weight.data_ptr() != model.embed_tokens.weight.data_ptr()
    save_llama(model, after := tmp_path / "after")
    config = read_json(after / CONFIG)
    assert config == {**read_json(before / CONFIG), "tie_word_embeddings": False}
    found = weights(after)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    again = LlamaForCausalLM.from_pretrained(after)
    with torch.no_grad():
        stream = inputs()[2]
        assert torch.equal(again(stream).logits, theirs(stream).logits)


def test_a_tied_checkpoint_may_hold_its_table_twice_but_no_other_head(tmp_path: Path) -> None:
    folder = saved(tmp_path, llama(tie_word_embeddings=True))
    held = weights(folder)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, folder / WEIGHTS, {"format": "pt"})
    load(folder)
    held["lm_head.weight"][5, 5] += 1
    save_file(held, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head.weight must be model.embed_tokens.weight"):
        load(folder)


def test_the_rotary_frequencies_of_old_checkpoints_are_left_out(folder: Path) -> None:
    held = weights(folder)
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(held, folder / WEIGHTS, {"format": "pt"})
    load(folder)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": None, "rope_theta": 777.0},
        {"rope_parameters": None, "rope_theta": 777.0, "rope_scaling": None},
        {"rope_parameters": None, "rope_theta": 777, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 777.0}},
        {"rope_parameters": {"rope_theta": 777.0, "rope_type": "default"}},
    ],
)
def test_both_forms_of_the_rotary_base_are_read(folder: Path, rope: dict[str, Any]) -> None:
    edit(folder, lambda c: c.update(rope))
    assert load(folder).config.rope_theta == 777.0


def test_values_that_a_config_leaves_out_are_llamas(folder: Path) -> None:
    def drop(config: dict[str, Any]) -> None:
        for name in ("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "head_dim"):
            config.pop(name)
        config["num_key_value_heads"] = 2

    edit(folder, drop)
    config = load(folder).config
    assert (config.rope_theta, config.norm_eps, config.kv_heads) == (10000.0, 1e-6, 2)


def test_a_world_model_that_was_no_llama_becomes_one(tmp_path: Path) -> None:
    """Without rows for actions in its head: then these are zeros."""
    torch.manual_seed(0)
    config = dataclasses.replace(WORLD_MODEL, stem_channels=0, slot_embeddings=False)
    model = WorldModel(config).eval()
    save_llama(model, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not theirs.lm_head.weight[config.codes :].any()
    ours = load_world_model(tmp_path)
    tokens = config.vocabulary - config.codes
    assert ours.config == dataclasses.replace(config, stem_blocks=0, action_vocabulary=tokens)
    state = ours.state_dict()
    assert not state.pop("action_head").any()
    assert same(state, dict(model.state_dict()))


def test_all_rows_survive_the_projects_own_checkpoints(tmp_path: Path, folder: Path) -> None:
    model = load(folder)
    save_model(tmp_path / "ours", model, "world-model", model.config)
    save_llama(load_world_model(tmp_path / "ours"), tmp_path / "again")
    assert same(weights(tmp_path / "again"), weights(folder))
    config = read_json(tmp_path / "again" / CONFIG)
    assert config["eos_token_id"] is None, "2 is a visual code"
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert same(again.state_dict(), dict(llama().state_dict()))


def test_it_trains_and_rolls_out_in_bfloat16(folder: Path) -> None:
    model = load(folder).requires_grad_(True)
    codes, blocks, _ = inputs()
    logprob = parity.token_logprob(model, codes, blocks, 1.0)
    logprob.sum().backward()
    assert logprob.shape == (2, FRAMES - 1, S)
    assert all(x.grad is not None and x.grad.any() for x in model.parameters())
    policy = inference_copy(model)
    assert policy.lm_head.weight.dtype == torch.bfloat16
    assert same(policy.origin, model.origin)


def test_a_folder_is_a_world_model_of_mineworlds_grid(tmp_path: Path) -> None:
    """All of MineWorld's sizes but the width."""
    sizes = {"vocab_size": 8262, "hidden_size": 8, "intermediate_size": 8}
    theirs = llama(**sizes, max_position_embeddings=5552, num_hidden_layers=1)
    model = load_world_model(saved(tmp_path, theirs))
    config = model.config
    assert (config.rows, config.columns, config.frames, config.codes) == (14, 24, 16, 8192)
    assert (config.space, config.block, config.positions) == ("mineworld", 347, 5541)
    assert (config.vocabulary, config.action_vocabulary) == (8262, 70)
    edit(tmp_path, lambda c: c.update(max_position_embeddings=11104))
    assert load_world_model(tmp_path).config.frames == 32


def test_a_folder_says_its_grid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="a vocabulary of at least 8260, 8192 codes"):
        load_world_model(folder)
    write_json(folder / "rlir.json", {**GRID, "frames": 2})
    model = load_world_model(folder)
    assert model.config == dataclasses.replace(load(folder).config, frames=2)
    seen = []
    exactly = parity.Parity(1, 0, 0.0, 1.0, 0.0)
    monkeypatch.setattr(parity, "measure", lambda m, *_, **__: seen.append(m.config) or exactly)
    assert doctor.run_parity(folder) == 0
    assert seen == [model.config] * 4, "both dtypes, raster and diagonal"


def test_actions_come_in_mineworlds_tokens(folder: Path) -> None:
    model = load(folder)
    rest = torch.tensor([[10, 10, 0, 0, 0, 0, 0, 0, 0]])
    block = [65, 33, 54, *[66] * 7, 67]
    assert model.action_ids(rest).tolist() == [block]
    codes = torch.zeros(1, 2, S, dtype=torch.int64)
    stream = model.stream(codes, model.action_ids(rest)[None])
    assert stream[0, S : S + MINEWORLD.block_tokens].tolist() == [CODES + x for x in block]
