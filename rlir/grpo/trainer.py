"""GRPO with inverse rewards: roll out groups, read the actions back, reinforce what obeyed.

A step: prompts are drawn; each is continued ``group_size`` times under its own real actions; the
tokenizer draws the frames; the inverse dynamics model scores them; a rollout's advantage is its
reward relative to its group; the policy is updated with a clipped objective and a KL penalty to
the frozen base. All randomness of step i comes from (seed, i): a resumed run repeats it exactly.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlir import console
from rlir.checkpoints import load_state, save_state
from rlir.data.clips import Clips
from rlir.errors import InputError, TrainingError
from rlir.grpo.config import GrpoConfig
from rlir.grpo.loss import LossStatistics, policy_loss
from rlir.grpo.reward import InverseReward, Reward, draw
from rlir.models.tokenizer import Tokenizer
from rlir.models.world_model import WorldModel
from rlir.ops import group_advantage
from rlir.rollout.engine import RolloutEngine, rollout_seed
from rlir.rollout.parity import Parity, compare, group_logprob
from rlir.rollout.stepwise import inference_copy
from rlir.rollout.trajectories import Trajectories, prompts_of
from rlir.tracing import span
from rlir.training import STATE, InterruptedRun, interruptible, make_optimizer, step_generator

Metrics = dict[str, float]


class GrpoTrainer:
    """Owns the policy, the frozen base, the optimizer and the curves."""

    def __init__(
        self,
        config: GrpoConfig,
        model: WorldModel,
        tokenizer: Tokenizer,
        reward: InverseReward,
        clips: Clips,
        codes: Tensor,
    ):
        self.config, self.tokenizer, self.reward = config, tokenizer, reward
        self.clips, self.codes = clips, codes
        self.starts = clips.starts(config.frames)
        if len(self.starts) < config.prompts:
            raise InputError(
                f"grpo: {clips.directory} must hold at least {config.prompts} clips of "
                f"{config.frames} frames, found {len(self.starts)}"
            )
        self.model = model
        self.base = inference_copy(model)
        self.optimizer = make_optimizer(model, config.learning_rate, 0.0, 0.95)
        self.step = 0
        self.seconds: dict[str, float] = {"rollout": 0.0, "reward": 0.0, "update": 0.0}
        self.curves: list[Metrics] = []

    # -- state ---------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "curves": self.curves,
            "config": asdict(self.config),
        }
        with span("checkpoint", self.step):
            save_state(path, state)

    def load(self, path: Path) -> None:
        state = load_state(path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.curves = state["curves"]

    # -- a step --------------------------------------------------------------------------------

    def advantages(self, reward: Reward) -> Tensor:
        """[B, T, 1], broadcast over a frame's tokens. Groups are consecutive rows."""
        g = self.config.group_size
        if self.config.credit == "trajectory":
            return group_advantage(reward.frame.mean(1), group_size=g)[:, None, None]
        per_frame = [group_advantage(column, group_size=g) for column in reward.frame.unbind(1)]
        return torch.stack(per_frame, 1)[:, :, None]

    def kept(self, advantages: Tensor) -> Tensor:
        """Rows [kept] that the update takes. The gradient is a sum weighted by advantages: leaving
        out the smallest leaves most of it, and an update costs more than a rollout.
        (PODS, arXiv 2504.13818, keeps the rewards of the largest variance.)
        """
        weight = advantages.square().flatten(1).sum(1)
        count = self.config.kept or len(weight)
        return weight.argsort(descending=True, stable=True)[:count].sort().values

    def minibatches(self, rows: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Rows as the update takes them: each minibatch has its share of every group, drawn at
        random, so that all go uphill for all prompts; in it the members of a group are together, so
        that they share its prompt.
        """
        rows = rows[torch.randperm(len(rows), generator=generator)]
        turn = torch.randperm(self.config.prompts, generator=generator)
        rows = rows[turn[rows // self.config.group_size].argsort(stable=True)]
        count = self.config.minibatches
        return [rows[first::count] for first in range(count)]

    def roll_out(self, generator: torch.Generator) -> tuple[Trajectories, Reward, Tensor]:
        """Rollouts, their reward and the prompts' starts."""
        config = self.config
        picked = torch.randint(len(self.starts), (config.prompts,), generator=generator)
        starts = self.starts[picked]
        prompts = self.clips.clip(self.codes, starts, 1)[:, 0]
        actions = self.clips.clip(self.clips.actions, starts, config.frames)[:, :-1]
        begin = time.perf_counter()
        scored: dict[int, Reward] = {}

        def score(index: int, group: Trajectories) -> None:
            commanded = actions[index].expand(config.group_size, -1, -1)
            scored[index] = self.reward(draw(self.tokenizer, group.codes), commanded)

        # A group is scored as soon as it is drawn, while others may still roll.
        rollouts = RolloutEngine(self.model, weights=config.rollout_weights).rollout(
            prompts_of(prompts, actions),
            group_size=config.group_size,
            schedule=config.rollout_schedule(),
            sampling=config.sampling(),
            seed=rollout_seed(config.seed, self.step),
            on_group=score,
        )
        groups = [scored[i] for i in range(len(scored))]
        reward = Reward(torch.cat([x.frame for x in groups]), torch.cat([x.read for x in groups]))
        rolling = rollouts.timings.get("rolling", 0.0)
        self.seconds["rollout"] += rolling
        self.seconds["reward"] += time.perf_counter() - begin - rolling
        return rollouts, reward, starts

    def _check_reward(self, reward: Reward, starts: Tensor) -> None:
        bad = (~reward.frame.isfinite()).any(1).nonzero().flatten().tolist()
        if bad:
            start = int(starts[bad[0] // self.config.group_size])
            recording = self.clips.recordings[int(self.clips.episode[start])]
            first = int((self.clips.episode[:start] == self.clips.episode[start]).sum())
            raise TrainingError(
                f"step {self.step}: every reward must be finite, got NaN for rollout {bad[0]} of "
                f"{recording.video.name} from frame {first}; state saved"
            )

    def _logprob(self, model: WorldModel, rollouts: Trajectories, rows: Tensor) -> Tensor:
        """Of drawn tokens: under the schedule and on the support they were drawn from. Rows of a
        group are neighbours, and their prompt is computed once.
        """
        return group_logprob(
            model,
            rollouts.codes[rows],
            rollouts.actions[rows],
            rollouts.group[rows].unique_consecutive(return_counts=True)[1].tolist(),
            self.config.temperature,
            schedule=rollouts.schedule,
            support=None if rollouts.support is None else rollouts.support[rows],
        )

    def _correction(self, rollouts: Trajectories, rows: Tensor) -> dict[str, Any]:
        """For tokens that another policy drew."""
        if rollouts.same_policy:
            return {}
        cap = self.config.truncated_importance
        return {"rollout_logprob": rollouts.logprob[rows], "truncated_importance": cap}

    @torch.no_grad()
    def _old_logprob(self, rollouts: Trajectories, rows: Tensor) -> Tensor:
        """Of the policy before the update: what the rollout says, unless another one drew it."""
        if rollouts.same_policy:
            return rollouts.logprob
        out = torch.zeros_like(rollouts.logprob)
        for part in rows.split(self.config.microbatch):
            out[part] = self._logprob(self.model, rollouts, part)
        return out

    def _supervised(self, generator: torch.Generator) -> Tensor:
        config = self.config
        n = (config.supervised_clips,)
        starts = self.starts[torch.randint(len(self.starts), n, generator=generator)]
        codes = self.clips.clip(self.codes, starts, config.frames)
        actions = self.clips.clip(self.clips.actions, starts, config.frames)[:, :-1]
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(codes, self.model.action_ids(actions))
        return F.cross_entropy(logits.flatten(0, 2), codes[:, 1:].flatten())

    def _minibatch(
        self,
        rows: Tensor,
        rollouts: Trajectories,
        old_logprob: Tensor,
        advantages: Tensor,
    ) -> tuple[LossStatistics, Parity]:
        """Accumulate the gradient of one minibatch, microbatch by microbatch. Also says how far
        the policy is from the one that rolled out.
        """
        config, total = self.config, len(rows)
        parts: list[tuple[float, LossStatistics]] = []
        scored: list[Tensor] = []
        for part in rows.split(config.microbatch):
            share = len(part) / total
            with torch.no_grad():
                ref = self._logprob(self.base, rollouts, part)
            logprob = self._logprob(self.model, rollouts, part)
            scored.append(logprob.detach())
            loss, statistics = policy_loss(
                logprob,
                old_logprob[part],
                advantages[part],
                ref,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                kl_weight=config.kl_weight,
                **self._correction(rollouts, part),
            )
            (loss * share).backward()
            parts.append((share, statistics))
        statistics = LossStatistics(
            kl=sum(w * s.kl for w, s in parts),
            clip_fraction=sum(w * s.clip_fraction for w, s in parts),
            ratio=sum(w * s.ratio for w, s in parts),
        )
        return statistics, compare(rollouts.logprob[rows], torch.cat(scored))

    def train_step(self) -> Metrics:
        """One step. Returns its metrics; raises TrainingError for a NaN reward or loss."""
        config = self.config
        generator = step_generator(config.seed, self.step)
        self.model.eval()
        rollouts, reward, starts = self.roll_out(generator)
        self._check_reward(reward, starts)
        begin = time.perf_counter()
        advantages = self.advantages(reward)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.step)
        minibatches = self.minibatches(self.kept(advantages), generator)
        old_logprob = self._old_logprob(rollouts, torch.cat(minibatches))
        statistics: list[LossStatistics] = []
        parities: list[Parity] = []
        norms: list[float] = []
        with span("update", sum(map(len, minibatches))):
            for rows in minibatches:
                self.optimizer.zero_grad(set_to_none=True)
                with span("update.minibatch", len(rows)):
                    seen, parity = self._minibatch(rows, rollouts, old_logprob, advantages)
                statistics.append(seen)
                parities.append(parity)
                if config.supervised_weight:
                    with span("update.supervised", config.supervised_clips):
                        (config.supervised_weight * self._supervised(generator)).backward()
                parameters = self.model.parameters()
                norm = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
                if not math.isfinite(norm):
                    raise TrainingError(
                        f"step {self.step}: the gradient must be finite, got norm {norm}; "
                        "state saved"
                    )
                with span("update.optimizer"):
                    self.optimizer.step()
                norms.append(norm)
        self.seconds["update"] += time.perf_counter() - begin
        self.step += 1
        n = len(statistics)
        groups = reward.frame.mean(1).view(-1, config.group_size)
        return {
            "step": self.step,
            "reward": float(reward.frame.mean()),
            "reward_group_std": float(groups.std(1).mean()),
            "kl": sum(s.kl for s in statistics) / n,
            "clip_fraction": sum(s.clip_fraction for s in statistics) / n,
            "ratio": sum(s.ratio for s in statistics) / n,
            # Before the first update: the same policy twice.
            "first_ratio": parities[0].ratio,
            "logprob_mismatch": parities[0].largest,
            "entropy": float(rollouts.entropy.mean()),
            "grad_norm": sum(norms) / n,
        }

    def run(
        self,
        out: Path,
        on_step: Callable[[Metrics], Metrics | None] | None = None,
        stop_after: int | None = None,
    ) -> None:
        """Train to ``config.steps``. ``on_step`` may add metrics (evaluations) to the curves.

        Raises InterruptedRun after Ctrl-C and TrainingError for a NaN; the state is on disk in both
        cases (of a failed step: as it was before it).
        """
        path, config = out / STATE, self.config
        last = config.steps if stop_after is None else min(config.steps, self.step + stop_after)
        with (
            interruptible() as asked,
            console.progress("post-training", config.steps, self.step) as bar,
        ):
            while self.step < last:
                before = self._snapshot()
                try:
                    with span("step", self.step):
                        metrics = self.train_step()
                except TrainingError:
                    self._restore(before)
                    self.save(path)
                    raise
                if on_step and (extra := on_step(metrics)):
                    metrics = {**metrics, **extra}
                self.curves.append(metrics)
                bar(self.step, f"reward {metrics['reward']:.3f} kl {metrics['kl']:.3f}")
                due = self.step % config.checkpoint_every == 0 or self.step == last
                if asked() or due:
                    self.save(path)
                if asked() and self.step < last:
                    raise InterruptedRun

    def _snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.optimizer.state_dict())

    def _restore(self, snapshot: tuple[dict[str, Any], dict[str, Any]]) -> None:
        self.model.load_state_dict(snapshot[0])
        self.optimizer.load_state_dict(snapshot[1])
