"""The stream is laid out as published, is strictly causal, and actions matter."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testkit import WORLD_MODEL, examples, stirred
from torch import Tensor

from rlir.actions.space import DOOM
from rlir.errors import InputError
from rlir.models.tokenizer import Tokenizer, TokenizerConfig
from rlir.models.world_model import (
    WorldModel,
    WorldModelConfig,
    rotary_table,
)
from rlir.ops import rotary

B, L, S, V = 2, WORLD_MODEL.frames, WORLD_MODEL.tokens, WORLD_MODEL.codes


def inputs(seed: int = 0, length: int = L) -> tuple[Tensor, Tensor]:
    """Codes and action classes."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(V, (B, length, S), generator=generator)
    sizes = DOOM.factor_sizes
    actions = [torch.randint(n, (B, length - 1), generator=generator) for n in sizes]
    return codes, torch.stack(actions, -1)


@pytest.fixture(scope="module")
def model() -> WorldModel:
    torch.manual_seed(0)
    return stirred(WorldModel(WORLD_MODEL)).eval()


def test_logits_are_of_the_visual_tokens_of_generated_frames(model: WorldModel) -> None:
    codes, actions = inputs()
    logits = model(codes, model.action_ids(actions))
    assert logits.shape == (B, L - 1, S, V)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@torch.no_grad()
def changed(model: WorldModel, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """Which predicted tokens [L - 1, S] see another distribution."""
    x, y = (model(codes, model.action_ids(actions)) for codes, actions in (a, b))
    return (x != y).any(-1).any(0)


@settings(max_examples=examples(40))
@given(frame=st.integers(0, L - 1), slot=st.integers(0, S - 1), seed=st.integers(0, 99))
def test_a_token_changes_nothing_before_itself(frame: int, slot: int, seed: int) -> None:
    model = stirred(WorldModel(WORLD_MODEL)).eval()
    codes, actions = inputs(seed)
    other = codes.clone()
    other[:, frame, slot] = (other[:, frame, slot] + 1) % V
    seen = changed(model, (codes, actions), (other, actions)).flatten()
    itself = (frame - 1) * S + slot  # its own distribution is made without it
    assert not seen[: max(0, itself + 1)].any()
    if itself + 1 < len(seen):
        assert seen[itself + 1 :].any(), "what follows does see it"


@settings(max_examples=examples(40))
@given(step=st.integers(0, L - 2), factor=st.integers(0, 3), seed=st.integers(0, 99))
def test_an_action_changes_its_frame_and_nothing_before(step: int, factor: int, seed: int) -> None:
    model = stirred(WorldModel(WORLD_MODEL)).eval()
    codes, actions = inputs(seed)
    other = actions.clone()
    other[:, step, factor] = (other[:, step, factor] + 1) % DOOM.factor_sizes[factor]
    seen = changed(model, (codes, actions), (codes, other))
    assert not seen[:step].any()
    assert seen[step].all(), "every token of the frame sees its action"


def test_the_stem_sees_the_action_and_the_previous_frame_alone(model: WorldModel) -> None:
    codes, actions = inputs()
    blocks = model.action_ids(actions)
    out = model.stem(codes[:, 1], blocks[:, 1])
    assert out.shape == (B, S, WORLD_MODEL.hidden)
    assert not torch.allclose(out, model.stem(codes[:, 2], blocks[:, 1]))
    assert not torch.allclose(out, model.stem(codes[:, 1], blocks[:, 2]))


def test_the_stream_is_image_action_image(model: WorldModel) -> None:
    codes, actions = inputs()
    blocks = model.action_ids(actions)
    stream = model.stream(codes, blocks)
    a = DOOM.block_tokens
    assert stream.shape[1] == WORLD_MODEL.positions == S + (L - 1) * (a + S)
    assert torch.equal(stream[:, :S], codes[:, 0])
    for i in range(1, L):
        start = S + (i - 1) * (a + S)
        assert torch.equal(stream[:, start : start + a], blocks[:, i - 1] + V)
        assert torch.equal(stream[:, start + a : start + a + S], codes[:, i])
    assert (stream[:, S : S + a] >= V).all(), "action tokens lie above the visual codes"
    assert int(stream.max()) < model.embed_tokens.num_embeddings


def test_slots_name_the_place_in_a_block(model: WorldModel) -> None:
    a, block = DOOM.block_tokens, WORLD_MODEL.block
    slots = model.slots(0, WORLD_MODEL.positions)
    assert slots[:S].tolist() == list(range(a, block)), "the first image has an image's slots"
    assert slots[S : S + block].tolist() == list(range(block))
    assert torch.equal(model.slots(5, 9), slots[5:14])


@pytest.mark.parametrize("length", range(2, L + 1))
def test_shorter_clips_are_the_beginning_of_longer_ones(model: WorldModel, length: int) -> None:
    codes, actions = inputs()
    whole = model(codes, model.action_ids(actions))
    part = model(codes[:, :length], model.action_ids(actions[:, : length - 1]))
    torch.testing.assert_close(part, whole[:, : length - 1])


def test_clips_of_a_batch_do_not_see_each_other(model: WorldModel) -> None:
    codes, actions = inputs()
    whole = model(codes, model.action_ids(actions))
    alone = model(codes[1:], model.action_ids(actions[1:]))
    assert torch.equal(whole[1:], alone), "nor do they change each other's bits"


def test_the_rotary_embedding_sees_distances_alone() -> None:
    table = rotary_table(WORLD_MODEL)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, table.shape[-1])

    def product(i: int, j: int) -> Tensor:
        turned = (rotary(x, *table[:, at : at + 1]) for x, at in ((q, i), (k, j)))
        return torch.stack(list(turned)).prod(0).sum()

    torch.testing.assert_close(product(9, 4), product(29, 24))
    assert not torch.isclose(product(9, 4), product(9, 5))
    torch.testing.assert_close(rotary(q, *table[:, 7:8]).norm(), q.norm())


def test_it_begins_as_a_model_without_a_stem() -> None:
    """The stem's output starts at zero: early training is that of the plain decoder."""
    model = WorldModel(WORLD_MODEL)
    codes, actions = inputs()
    assert not model.stem(codes[:, 0], model.action_ids(actions)[:, 0]).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden": 30},
        {"heads": 3},
        {"kv_heads": 3},
        {"hidden": 4},
        {"hidden": 1040},
        {"codes": 0},
        {"rows": -1},
        {"layers": 0},
        {"heads": 0},
        {"frames": 1},
        {"stem_channels": -1},
        {"stem_blocks": -1},
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="world model: "):
        dataclasses.replace(WORLD_MODEL, **wrong)


def test_a_vocabulary_has_room_for_the_spaces_tokens() -> None:
    tokens = DOOM.vocabulary
    with pytest.raises(InputError, match=f"action_vocabulary must be at least the {tokens} tokens"):
        dataclasses.replace(WORLD_MODEL, action_vocabulary=tokens - 1)
    model = WorldModel(dataclasses.replace(WORLD_MODEL, action_vocabulary=tokens + 3))
    assert len(model.embed_tokens.weight) == V + tokens + 3
    assert model.action_head.shape == (tokens + 3, WORLD_MODEL.hidden)
    assert len(model.lm_head.weight) == V, "actions are not drawn"


@pytest.mark.parametrize("without", [{"stem_channels": 0}, {"slot_embeddings": False}])
def test_it_works_without_a_stem_or_slots(without: dict[str, int]) -> None:
    config = dataclasses.replace(WORLD_MODEL, **without)
    model = stirred(WorldModel(config)).eval()
    assert (model.stem is None) == ("stem_channels" in without)
    assert (model.embed_slots is None) == ("slot_embeddings" in without)
    model.relate_codes(Tokenizer(TokenizerConfig(levels=(4, 4))).latents())
    codes, actions = inputs()
    other, after = codes.clone(), 2 * S - S // 2  # a token of frame 2, and what precedes it
    other[:, 2, S // 2] = (other[:, 2, S // 2] + 1) % V
    seen = changed(model, (codes, actions), (other, actions)).flatten()
    assert not seen[: after + 1].any()
    assert seen[after + 1 :].all()


def test_an_unknown_action_space_is_refused() -> None:
    with pytest.raises(InputError, match="action space must be one of"):
        WorldModel(WorldModelConfig(space="quake"))


def test_codes_that_share_levels_begin_alike() -> None:
    """The closer two codes in the quantiser's grid, the closer their rows; the scale is kept."""
    torch.manual_seed(0)
    model = WorldModel(dataclasses.replace(WORLD_MODEL, codes=1000))
    tables = (model.embed_tokens.weight, model.stem.embed.weight, model.lm_head.weight)
    before = [float(table[:1000].detach().std()) for table in tables]
    actions = model.embed_tokens.weight[1000:].clone()
    model.relate_codes(Tokenizer(TokenizerConfig(levels=(8, 5, 5, 5))).latents())
    near, far = (0, 1), (0, 999)  # one level apart; no level in common
    for table, std in zip(tables, before, strict=True):
        alike = torch.nn.functional.cosine_similarity
        assert float(alike(table[near[0]], table[near[1]], dim=0)) > 0.5
        assert abs(float(alike(table[far[0]], table[far[1]], dim=0))) < 0.5
        assert 0.7 < float(table[:1000].std()) / std < 1.4
        assert len(table[:1000].unique(dim=0)) == 1000
    assert torch.equal(model.embed_tokens.weight[1000:], actions)
