"""rlir's loss, advantages and log-probabilities in the places where verl calls its own.

    python examples/verl_policy_loss.py [--steps 30]

In verl itself the loss is registered under a name, which ``actor.policy_loss.loss_mode`` picks:

    from verl.trainer.ppo.core_algos import register_policy_loss
    register_policy_loss("rlir")(rlir.integrations.verl.policy_loss)

Here the same functions train a bandit of T tokens, with verl's arguments and nothing of verl.
"""

import argparse
from types import SimpleNamespace
from typing import Any

import torch

from rlir.integrations import verl

PROMPTS, GROUP, T, V, H = 4, 16, 8, 20, 12


class ActorConfig(SimpleNamespace):
    """As much of verl's as the loss reads."""

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = ActorConfig(
        clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, global_batch_info={}
    )
    hidden = torch.randn(PROMPTS, T, H).repeat_interleave(GROUP, 0)  # of a frozen body
    head = torch.zeros(V, H, requires_grad=True)
    optimizer = torch.optim.Adam([head], lr=0.05)
    index = [f"prompt {i // GROUP}" for i in range(PROMPTS * GROUP)]
    mask = torch.ones(PROMPTS * GROUP, T)
    fused = verl.FusedLinearForPPO()
    for step in range(options.steps):
        with torch.no_grad():
            logits = hidden @ head.t()
            responses = torch.distributions.Categorical(logits=logits).sample()
            old = verl.logprobs_from_logits(logits, responses)
            rewards = (responses < V // 4).float() / T  # the first quarter of the words is good
            advantages, _ = verl.compute_grpo_outcome_advantage(rewards, mask, index)
        for _ in range(2):
            logprob, entropy = fused(hidden, head, responses)
            loss, metrics = verl.policy_loss(
                old, logprob, advantages, mask, loss_agg_mode="token-mean", config=config
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % 5 == 0 or step == options.steps - 1:
            print(
                f"step {step:3d}  reward {float(rewards.sum(1).mean()):.3f}  "
                f"entropy {float(entropy.mean()):.3f}  clipped {metrics['actor/pg_clipfrac']:.3f}"
            )


if __name__ == "__main__":
    main()
