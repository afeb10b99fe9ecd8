"""rlir's ``PolicyLoss`` and ``log_probs_from_logits`` as OpenRLHF's actor uses its own.

    python examples/openrlhf_policy_loss.py [--steps 30]

In OpenRLHF itself, before the actor is made:

    openrlhf.trainer.ray.ppo_actor.PolicyLoss = rlir.integrations.openrlhf.PolicyLoss

Here a bandit is trained whose rollouts come from an engine of lower precision than the trainer's:
the correction drops the tokens on which the two disagree.
"""

import argparse

import torch

from rlir.integrations.openrlhf import PolicyLoss, log_probs_from_logits
from rlir.ops import group_advantage

PROMPTS, GROUP, T, V = 4, 16, 8, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    table = torch.zeros(PROMPTS, T, V, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.1)
    actor_loss = PolicyLoss(
        clip_eps_low=0.2,
        clip_eps_high=0.28,
        dual_clip=3.0,
        is_correction_level="token",
        is_correction_threshold=(0.9, 1.1),
    )
    mask = torch.ones(PROMPTS * GROUP, T)
    for step in range(options.steps):
        with torch.no_grad():
            logits = table.repeat_interleave(GROUP, 0)
            engine = (4 * logits).round() / 4  # what a coarse number format does
            actions = torch.distributions.Categorical(logits=engine).sample()
            rollout = log_probs_from_logits(engine, actions)
            old = log_probs_from_logits(logits, actions)
            reward = (actions < V // 4).float().mean(1)
            advantages = group_advantage(reward, group_size=GROUP)[:, None].expand_as(old)
        for _ in range(2):
            logprob = log_probs_from_logits(table.repeat_interleave(GROUP, 0), actions)
            loss, clipped, kl, mismatch, filtered = actor_loss(
                logprob, old, advantages, action_mask=mask, rollout_log_probs=rollout
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % 5 == 0 or step == options.steps - 1:
            print(
                f"step {step:3d}  reward {float(reward.mean()):.3f}  clipped {float(clipped):.3f}  "
                f"kl {float(kl):.4f}  mismatch {float(mismatch):+.4f}  "
                f"filtered {float(filtered):.3f}"
            )


if __name__ == "__main__":
    main()
