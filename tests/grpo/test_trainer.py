"""GRPO raises the reward, repeats itself exactly, and stops at a NaN with nothing lost."""

from pathlib import Path

import pytest
import torch
from testkit import one_line, same
from torch import Tensor
from toys import Even, Spoiled, bits, copied, real, rewards, toy

from rlir.checkpoints import load_state
from rlir.data.clips import Clips
from rlir.errors import InputError, TrainingError
from rlir.grpo import trainer as trainer_module
from rlir.grpo.config import GrpoConfig
from rlir.grpo.reward import Reward
from rlir.ops import group_advantage_reference
from rlir.training import STATE, step_generator

# -- learning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("credit", ["trajectory", "frame"])
def test_the_reward_rises(clips: Clips, tmp_path: Path, credit: str) -> None:
    trainer = toy(clips, steps=14, group_size=12, learning_rate=4e-3, credit=credit)
    trainer.run(tmp_path)
    found = rewards(trainer)
    assert sum(found[:2]) / 2 < 0.65
    assert sum(found[-2:]) / 2 > sum(found[:2]) / 2 + 0.15
    kl = [row["kl"] for row in trainer.curves]
    assert kl[-1] > kl[0], "it left the base"
    assert trainer.curves[-1]["entropy"] < trainer.curves[0]["entropy"]


def test_a_weight_on_the_divergence_keeps_it_near_the_base(clips: Clips, tmp_path: Path) -> None:
    kl = {}
    for weight in (0.0, 5.0):
        trainer = toy(clips, steps=8, learning_rate=4e-3, kl_weight=weight)
        trainer.run(tmp_path / str(weight))
        kl[weight] = trainer.curves[-1]["kl"]
    assert kl[5.0] < kl[0.0] / 2


def test_the_base_stays_as_it_was(clips: Clips, tmp_path: Path) -> None:
    trainer = toy(clips, steps=2, learning_rate=1e-2)
    before = {k: v.clone() for k, v in trainer.base.state_dict().items()}
    weights = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.run(tmp_path)
    assert same(trainer.base.state_dict(), before)
    assert not same(trainer.model.state_dict(), weights)


def test_the_first_ratio_is_that_of_the_policy_that_rolled_out(clips: Clips) -> None:
    metrics = toy(clips, minibatches=1, group_size=8).train_step()
    assert metrics["ratio"] == metrics["first_ratio"] == 1, "to the last bit"
    assert metrics["logprob_mismatch"] == 0
    assert metrics["clip_fraction"] == 0


def test_equal_rewards_move_nothing_but_towards_the_base(clips: Clips) -> None:
    class Same(Even):
        def __call__(self, frames: Tensor, actions: Tensor) -> Reward:
            return Reward(torch.full((len(frames), 2), 0.5), actions)

    trainer = toy(clips, Same(), kl_weight=0.0)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    metrics = trainer.train_step()
    assert metrics["grad_norm"] == 0
    assert metrics["reward_group_std"] == 0
    assert same(trainer.model.state_dict(), before)


def test_real_continuations_can_be_mixed_in(clips: Clips, tmp_path: Path) -> None:
    class Same(Even):
        def __call__(self, frames: Tensor, actions: Tensor) -> Reward:
            return Reward(torch.full((len(frames), 2), 0.5), actions)

    trainer = toy(clips, Same(), steps=8, learning_rate=4e-3, supervised_weight=1.0)

    def loss() -> float:
        with torch.no_grad():
            return float(trainer._supervised(torch.Generator().manual_seed(0)))

    before = loss()
    trainer.run(tmp_path)
    assert loss() < before - 0.1


def test_microbatches_change_memory_and_nothing_else(clips: Clips) -> None:
    """Also where the last microbatch is a smaller one."""
    found = []
    for size in (8, 3):
        trainer = toy(clips, microbatch=size, minibatches=1)
        norm = trainer.train_step()["grad_norm"]
        found.append((norm, torch.cat([p.grad.flatten() for p in trainer.model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=0.02)
    error = float((found[0][1] - found[1][1]).norm() / found[0][1].norm())
    assert error < 0.02  # bfloat16


# -- credit ------------------------------------------------------------------------------------


def test_trajectory_credit_is_one_advantage_a_rollout(clips: Clips) -> None:
    trainer = toy(clips)
    frame = torch.rand(8, 2)
    found = trainer.advantages(Reward(frame, torch.zeros(8, 2, 4)))
    expected = group_advantage_reference(frame.mean(1), group_size=4)
    assert found.shape == (8, 1, 1)
    torch.testing.assert_close(found[:, 0, 0], expected)


def test_frame_credit_compares_each_frame_with_the_same_frame_of_the_group(clips: Clips) -> None:
    trainer = toy(clips, credit="frame")
    frame = torch.rand(8, 2)
    found = trainer.advantages(Reward(frame, torch.zeros(8, 2, 4)))
    assert found.shape == (8, 2, 1)
    for t in range(2):
        expected = group_advantage_reference(frame[:, t], group_size=4)
        torch.testing.assert_close(found[:, t, 0], expected)


def test_groups_are_the_members_of_a_prompt(clips: Clips) -> None:
    """All of one group above all of the other: within each the advantages still sum to zero."""
    frame = torch.cat([torch.rand(4, 2), torch.rand(4, 2) + 10])
    found = toy(clips).advantages(Reward(frame, torch.zeros(8, 2, 4))).view(2, 4)
    torch.testing.assert_close(found.sum(1), torch.zeros(2), atol=1e-4, rtol=0)


# -- exactness ---------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    clips: Clips, tmp_path: Path, threads: int
) -> None:
    settings = {"steps": 3, "credit": "frame", "supervised_weight": 0.1, "learning_rate": 1e-3}
    whole = real(clips, **settings)
    whole.run(tmp_path / "whole")
    first = real(clips, **settings)
    first.run(tmp_path / "part", stop_after=1)
    assert first.step == 1
    torch.manual_seed(77)
    second = real(clips, **settings)
    second.load(tmp_path / "part" / STATE)
    second.run(tmp_path / "part", stop_after=1)
    third = real(clips, **settings)
    third.load(tmp_path / "part" / STATE)
    third.run(tmp_path / "part")
    assert third.step == 3
    assert len(third.curves) == 3
    assert same(bits(third), bits(whole))


def test_another_seed_is_another_run(clips: Clips, tmp_path: Path) -> None:
    found = []
    for seed in (0, 0, 1):
        trainer = toy(clips, steps=1, seed=seed)
        trainer.run(tmp_path / f"{len(found)}")
        found.append(bits(trainer))
    assert same(found[0], found[1])
    assert not same(found[0]["model"], found[2]["model"])


def test_states_are_saved_when_due_and_at_the_end(clips: Clips, tmp_path: Path) -> None:
    trainer, seen = toy(clips, steps=5, checkpoint_every=2), []

    def on_step(metrics: dict) -> dict:
        path = tmp_path / STATE
        seen.append(load_state(path)["step"] if path.exists() else None)
        return {"extra": metrics["step"] * 10.0}

    trainer.run(tmp_path, on_step)
    assert seen == [None, None, 2, 2, 4]
    assert load_state(tmp_path / STATE)["step"] == 5
    assert [row["extra"] for row in trainer.curves] == [10, 20, 30, 40, 50]


# -- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_reward_that_is_no_number_stops_at_its_step_and_clip(
    clips: Clips, tmp_path: Path, minibatches: int
) -> None:
    settings = {"steps": 3, "minibatches": minibatches}
    good = toy(clips, **settings)
    good.run(tmp_path / "good", stop_after=1)
    before = copied(good, tmp_path / "copy.pt")

    bad = toy(clips, Spoiled(step=1, rollout=6), **settings)
    with pytest.raises(TrainingError) as caught:
        bad.run(tmp_path / "bad")
    text = one_line(str(caught.value))
    assert text.startswith("step 1: every reward must be finite, got NaN for rollout 6 of ")
    # Which clip that is, from the seed alone.
    picked = torch.randint(len(bad.starts), (2,), generator=step_generator(0, 1))
    start = int(bad.starts[picked][6 // 4])
    episode = int(clips.episode[start])
    first = start - int((clips.episode < episode).sum())
    assert f"of {clips.recordings[episode].video.name} from frame {first};" in text

    saved = load_state(tmp_path / "bad" / STATE)
    assert same({k: saved[k] for k in before}, before)
    # With the fault gone the run goes on as if there had been none.
    good.run(tmp_path / "good")
    again = toy(clips, **settings)
    again.load(tmp_path / "bad" / STATE)
    again.run(tmp_path / "bad")
    assert same(bits(again), bits(good))


@pytest.mark.parametrize(("minibatches", "call"), [(1, 2), (2, 4), (2, 5)])
def test_a_gradient_that_is_no_number_stops_with_the_state_of_before_the_step(
    clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minibatches: int, call: int
) -> None:
    """In the first and in the second minibatch, when one optimizer step is done already."""
    settings = {"steps": 4, "minibatches": minibatches, "microbatch": 8}
    good = toy(clips, **settings)
    good.run(tmp_path / "good", stop_after=2)
    before = copied(good, tmp_path / "copy.pt")
    real_loss, calls = trainer_module.policy_loss, []

    def spoiled(*args: object, **options: object):
        loss, statistics = real_loss(*args, **options)
        calls.append(1)
        return (loss * torch.nan if len(calls) - 1 == call else loss), statistics

    bad = toy(clips, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "policy_loss", spoiled)
        with pytest.raises(TrainingError, match="step 2: the gradient must be finite, got norm"):
            bad.run(tmp_path / "bad")
    saved = load_state(tmp_path / "bad" / STATE)
    assert same({k: saved[k] for k in before}, before)
    good.run(tmp_path / "good")
    again = toy(clips, **settings)
    again.load(tmp_path / "bad" / STATE)
    again.run(tmp_path / "bad")
    assert same(bits(again), bits(good))


def test_a_state_that_cannot_be_written_leaves_the_last_one(
    clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = toy(clips, steps=3)
    trainer.run(tmp_path, stop_after=1)
    before = (tmp_path / STATE).read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space"):
            trainer.run(tmp_path)
    assert (tmp_path / STATE).read_bytes() == before


def test_too_few_clips_are_refused(clips: Clips) -> None:
    with pytest.raises(InputError, match="must hold at least 99 clips of 3 frames, found 35"):
        toy(clips, prompts=99)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2 .* got 1"),
        ({"group_size": 0}, "group_size must be at least 2"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"prompts": 0}, "prompts must be at least 1"),
        ({"minibatches": 0}, "minibatches must be at least 1"),
        ({"minibatches": 99}, "minibatches must be at most the 64 rollouts of an update, got 99"),
        ({"microbatch": 0}, "microbatch must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"frames": 1}, "frames must be at least 2"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0"),
        ({"clip_low": 0.0}, "clip_low must be above 0"),
        ({"kl_weight": -0.1}, "kl_weight must be at least 0"),
        ({"camera_weight": float("inf")}, "camera_weight must be at least 0"),
        ({"supervised_weight": 1.0, "supervised_clips": 0}, "supervised_clips must be at least"),
        ({"seed": -1}, "seed: must be from 0"),
        ({"seed": 2**40}, "seed: must be from 0"),
    ],
)
def test_settings_without_sense_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GrpoConfig(**wrong)
