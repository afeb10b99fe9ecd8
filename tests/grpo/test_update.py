"""What an update takes: the rollouts with the largest advantages, at the schedule's rate."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import SMALL, Even, toy

from rlir import _library
from rlir.data.clips import Clips
from rlir.errors import InputError
from rlir.grpo import trainer as trainer_module
from rlir.grpo.config import GrpoConfig
from rlir.grpo.reward import Reward


def test_the_update_keeps_the_largest_advantages(clips: Clips) -> None:
    trainer = toy(clips, prompts=3, kept=5)
    advantages = torch.randn(12, 2, 1)
    kept = trainer.kept(advantages)
    weight = advantages.square().sum((1, 2))
    left = sorted(set(range(12)) - set(kept.tolist()))
    assert len(kept) == 5
    assert weight[kept].min() >= weight[left].max()
    tied = trainer.kept(torch.ones(12, 2, 1))
    assert tied.tolist() == [0, 1, 2, 3, 4], "ties: the first ones, so that a run repeats itself"
    assert toy(clips).kept(torch.randn(8, 1, 1)).tolist() == list(range(8))


def test_rollouts_that_are_left_out_do_not_move_the_policy(clips: Clips, tmp_path: Path) -> None:
    """A reward that splits one group alone: keeping that group's rows is keeping everything."""

    class Split(Even):
        scored = 0

        def __call__(self, frames: Tensor, actions: Tensor) -> Reward:
            reward = super().__call__(frames, actions)
            if self.scored:
                reward.frame[:] = 0.5
            self.scored += 1
            return reward

    weights = []
    for kept in (4, 0):
        trainer = toy(clips, Split(), steps=1, kept=kept, kl_weight=0.0, minibatches=1)
        trainer.run(tmp_path / str(kept))
        weights.append(trainer.model.lm_head.weight)
    # Adam divides the gradient's scale out: half the rows, the same direction.
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-6)


def test_a_linear_schedule_ends_near_nothing() -> None:
    config = GrpoConfig(steps=10, warmup=2, learning_rate=1.0, schedule="linear")
    rates = [config.learning_rate_at(step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(1 / 8)
    assert rates[2:] == sorted(set(rates[2:]), reverse=True), "falls at every step"
    constant = GrpoConfig(steps=10, warmup=2, learning_rate=1.0)
    assert [constant.learning_rate_at(step) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"kept": 9}, "grpo: kept must be from 0 to prompts * group_size = 8, got 9"),
        ({"kept": -1}, "grpo: kept must be from 0"),
        ({"kept": 1}, "grpo: minibatches must be at most the 1 rollouts of an update, got 2"),
    ],
)
def test_kept_that_cannot_be(settings: dict, line: str) -> None:
    with pytest.raises(InputError, match=re.escape(line)):
        GrpoConfig(**{**SMALL, **settings})


@pytest.mark.skipif(_library.PATH is None, reason="int8 is native")
def test_rollouts_of_int8_weights_are_corrected(clips: Clips, tmp_path: Path) -> None:
    trainer = toy(clips, steps=2, rollout_weights="int8", minibatches=1)
    seen: list[dict] = []
    real = trainer_module.policy_loss

    def watched(*args: Tensor, **options: object):
        seen.append({"old": args[1], "logprob": args[0].detach(), **options})
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "policy_loss", watched)
        trainer.run(tmp_path)
    for call in seen:
        assert torch.equal(call["old"], call["logprob"]), "the policy before the update"
        assert not torch.equal(call["old"], call["rollout_logprob"]), "and the one that drew"
        assert call["truncated_importance"] == 2.0
    assert all(0 < x["logprob_mismatch"] < 0.2 for x in trainer.curves)
    plain = toy(clips, steps=1, minibatches=1)
    plain.run(tmp_path / "plain")
    assert plain.curves[0]["logprob_mismatch"] == 0


@pytest.mark.skipif(_library.PATH is None, reason="the bits are the native kernels'")
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 2, "row_end": "refresh"},
        {"top_p": 0.7},
        {"window": 1, "row_end": "refresh", "top_p": 0.9, "temperature": 1.3},
    ],
    ids=str,
)
def test_the_update_scores_the_policy_that_drew(
    clips: Clips, tmp_path: Path, options: dict
) -> None:
    trainer = toy(clips, steps=3, minibatches=2, **options)
    trainer.run(tmp_path)
    for step in trainer.curves:
        assert step["logprob_mismatch"] == 0
        assert step["first_ratio"] == 1


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"top_p": 0.0}, "grpo: top_p must be above 0 and at most 1, got 0.0"),
        ({"window": -1}, "grpo: window must be at least 0, got -1"),
        ({"truncated_importance": 0.0}, "grpo: truncated_importance must be above 0, got 0.0"),
    ],
)
def test_rollouts_that_cannot_be(settings: dict, line: str) -> None:
    with pytest.raises(InputError, match=re.escape(line)):
        GrpoConfig(**{**SMALL, **settings})


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_minibatch_has_its_share_of_every_group(clips: Clips, count: int) -> None:
    trainer = toy(clips, prompts=4, group_size=6, kept=14, minibatches=count)
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 6, 8, 13, 18, 19, 20, 21, 22])
    sizes = {0: 6, 1: 2, 2: 1, 3: 5}
    seen = set()
    for seed in range(20):
        found = trainer.minibatches(rows, torch.Generator().manual_seed(seed))
        assert len(found) == count
        assert torch.cat(found).sort().values.equal(rows)
        assert {len(x) - len(rows) // count for x in found} <= {0, 1}
        for part in found:
            groups, members = (part // 6).unique_consecutive(return_counts=True)
            assert len(groups) == len(groups.unique()), "members of a group are together"
            for group, n in zip(groups.tolist(), members.tolist(), strict=True):
                assert abs(n - sizes[group] / count) < 1
        seen.add(tuple(torch.cat(found).tolist()))
    assert len(seen) > 8, "who is in which minibatch changes"
