"""What rolling out with int8 weights does to a world model's rollouts: time, reward, KL.

    python benchmarks/compare_int8.py DATA [--prompts 48] [--group-size 16]

DATA holds the recorded sets of a run of `rlir post-train doom-tiny` (OUT/data). The embedded model
continues prompts of DATA/test with its own weights and with int8 ones, from the same seeds; both
are scored by the reward's inverse dynamics model, and the int8 ones by the policy (k3, in nats a
token). The rewards' difference comes with its standard error over prompts.
"""

import argparse
import time
from pathlib import Path

import torch
from harness import emit, machine, table
from torch import Tensor

from rlir.data.clips import to_unit
from rlir.grpo.reward import InverseReward, draw
from rlir.models.load import load_models
from rlir.presets import DOOM_TINY
from rlir.pretrain.stages import open_set
from rlir.rollout.engine import RolloutEngine
from rlir.rollout.parity import compare, trajectory_logprob
from rlir.rollout.sampling import Sampling
from rlir.rollout.trajectories import prompts_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--group-size", type=int, default=16)
    options = parser.parse_args()
    where = machine()
    print("  ".join(f"{k} {v}" for k, v in where.items()))
    models, config = load_models(None, None, None), DOOM_TINY.grpo
    size = models.tokenizer.config
    clips = open_set(
        options.data / "test", models.world_model.config.space, size.height, size.width
    )
    starts = clips.pick(options.prompts, config.frames, seed=0)
    actions = clips.clip(clips.actions, starts, config.frames)[:, :-1]
    first = clips.clip(clips.frames, starts, 1)[:, 0]
    with torch.no_grad():
        codes = models.tokenizer.encode(to_unit(first))
    reward = InverseReward(models.reward_idm, config)
    commanded = actions.repeat_interleave(options.group_size, 0)
    rows, found = [], {}
    rewards: dict[str, Tensor] = {}
    for name in ("dtype", "int8"):
        engine = RolloutEngine(models.world_model, weights=name)
        begin = time.perf_counter()
        drawn = engine.rollout(
            prompts_of(codes, actions),
            group_size=options.group_size,
            sampling=Sampling(config.temperature),
            seed=1,
        )
        seconds = time.perf_counter() - begin
        frames = draw(models.tokenizer, drawn.codes)
        rewards[name] = reward(frames, commanded).frame.mean(1).view(options.prompts, -1).mean(1)
        with torch.no_grad():
            parity = compare(drawn.logprob, trajectory_logprob(models.world_model, drawn))
        found[name] = {
            "seconds": round(seconds, 3),
            "reward": round(float(rewards[name].mean()), 4),
            "kl": parity.kl,
            "largest": parity.largest,
        }
        row = found[name]
        rows.append((name, f"{seconds:.2f}", f"{row['reward']:.4f}", f"{parity.kl:.2e}"))
    change = rewards["int8"] - rewards["dtype"]
    error = float(change.std() / len(change) ** 0.5)
    print(table(("weights", "s", "reward", "KL to the policy, nats a token"), rows))
    print(f"reward, int8 - dtype: {float(change.mean()):+.4f} +- {error:.4f}")
    found["change"] = {"reward": round(float(change.mean()), 4), "error": round(error, 4)}
    emit("int8", {"machine": where, "results": found})


if __name__ == "__main__":
    main()
