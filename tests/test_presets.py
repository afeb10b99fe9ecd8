"""The parts of a preset fit together, and nothing is tested on what it was trained on."""

import pytest

from rlir.actions.space import action_space
from rlir.data.doom import TRAIN_MAPS, UNSEEN_MAPS, episode_seed
from rlir.errors import InputError
from rlir.presets import PRESETS, Preset, preset

presets = pytest.mark.parametrize("chosen", PRESETS.values(), ids=PRESETS)


def test_presets_go_by_name() -> None:
    assert set(PRESETS) == {"doom-tiny", "doom", "doom-smoke"}
    assert preset("doom") is PRESETS["doom"]
    with pytest.raises(InputError, match=r"preset must be one of .* got 'quake'"):
        preset("quake")


@presets
def test_the_world_model_speaks_the_tokenizers_codes(chosen: Preset) -> None:
    tokenizer, world = chosen.tokenizer.model, chosen.world_model.model
    assert (world.rows, world.columns, world.codes) == (
        tokenizer.rows,
        tokenizer.columns,
        tokenizer.codes,
    )


@presets
def test_the_idms_see_what_the_tokenizer_draws(chosen: Preset) -> None:
    tokenizer, world = chosen.tokenizer.model, chosen.world_model.model
    for idm in (chosen.reward_idm.model, chosen.judge_idm.model):
        assert (idm.height, idm.width) == (tokenizer.height, tokenizer.width)
        assert idm.space == world.space
        assert idm.max_frames >= world.frames
        assert action_space(idm.space).factors


@presets
def test_the_judge_shares_neither_architecture_nor_seed_with_the_reward(chosen: Preset) -> None:
    reward, judge = chosen.reward_idm, chosen.judge_idm
    assert reward.model.architecture != judge.model.architecture
    if chosen is not PRESETS["doom-smoke"]:
        assert reward.fit.seed != judge.fit.seed


@presets
def test_clips_fit_the_world_model(chosen: Preset) -> None:
    frames = chosen.world_model.model.frames
    assert chosen.grpo.frames <= frames
    assert chosen.evaluation.frames <= frames


@presets
def test_no_two_sets_share_an_episode(chosen: Preset) -> None:
    sets = {**chosen.pretraining_data, **chosen.post_training_data}
    assert set(sets) == {"train", "judge", "validation", "prompts", "test", "test-unseen"}
    episodes = [
        (of.maps[i % len(of.maps)], episode_seed(of.seed, i))
        for of in sets.values()
        for i in range(of.episodes)
    ]
    assert len(set(episodes)) == len(episodes)


@presets
def test_unseen_maps_are_in_one_set_alone(chosen: Preset) -> None:
    sets = {**chosen.pretraining_data, **chosen.post_training_data}
    for name, of in sets.items():
        assert set(of.maps) <= set(UNSEEN_MAPS if name == "test-unseen" else TRAIN_MAPS)


@presets
def test_there_is_enough_to_evaluate_on(chosen: Preset) -> None:
    """Clips that share no frame, at the worst offset of the first."""
    for name, count in (
        ("test", chosen.evaluation.clips),
        ("test-unseen", chosen.evaluation.unseen_clips),
    ):
        of, length = chosen.post_training_data[name], chosen.evaluation.frames
        assert of.episodes * (of.frames // length - 1) >= count
