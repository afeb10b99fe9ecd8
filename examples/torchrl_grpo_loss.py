"""The objective of torchrl's ``GRPOLoss`` as a function of tensors.

    python examples/torchrl_grpo_loss.py [--steps 30]

torchrl keeps advantages as [B, T, 1] and names its results ``loss_objective``, ``clip_fraction``,
``ESS``, ``loss_kl_to_ref``: so does this. A bandit with completions of unequal length is trained.
"""

import argparse

import torch

from rlir.integrations.torchrl import grpo_loss
from rlir.ops import group_advantage

PROMPTS, GROUP, T, V = 4, 16, 8, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    table = torch.zeros(PROMPTS, T, V, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.1)
    reference = torch.distributions.Categorical(logits=table.detach().repeat_interleave(GROUP, 0))
    for step in range(options.steps):
        policy = torch.distributions.Categorical(logits=table.repeat_interleave(GROUP, 0))
        actions = policy.sample()
        sampled = policy.log_prob(actions).detach()
        mask = torch.arange(T) < torch.randint(2, T + 1, (PROMPTS * GROUP, 1))
        reward = ((actions < V // 4) * mask).sum(1) / mask.sum(1)
        advantage = group_advantage(reward, group_size=GROUP)[:, None, None].expand(-1, T, 1)
        for _ in range(2):
            policy = torch.distributions.Categorical(logits=table.repeat_interleave(GROUP, 0))
            found = grpo_loss(
                policy.log_prob(actions),
                sampled,
                advantage,
                mask,
                clip_epsilon=(0.2, 0.28),
                kl_to_ref_coeff=0.01,
                ref_log_prob=reference.log_prob(actions),
            )
            optimizer.zero_grad()
            (found["loss_objective"] + found["loss_kl_to_ref"]).backward()
            optimizer.step()
        if step % 5 == 0 or step == options.steps - 1:
            print(
                f"step {step:3d}  reward {float(reward.mean()):.3f}  "
                f"ESS {float(found['ESS']):.3f}  clipped {float(found['clip_fraction']):.3f}"
            )


if __name__ == "__main__":
    main()
