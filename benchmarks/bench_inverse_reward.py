"""inverse_reward against eager PyTorch, in one process, by turns.

    python benchmarks/bench_inverse_reward.py [--rounds 15] [--threads N]

VPT's heads: 20 two-way buttons and 2 x 11 camera bins a frame, read as MineWorld's nine factors.
The eager code keeps its tables between calls and does only what is needed. The limit is reading the
logits and commands and writing the matches at the speed of a copy.
"""

import argparse

import torch
from harness import emit, interleave, machine, table
from torch import Tensor

from rlir.actions import MINECRAFT, MINECRAFT_VPT
from rlir.ops import inverse_reward, inverse_reward_reference

TABLES = MINECRAFT_VPT.tables
STARTS = [sum(TABLES.group_sizes[:g]) for g in range(len(TABLES.group_sizes))]
OPPONENTS = torch.tensor([[o >> i & 1 for i in range(20)] for o in TABLES.button_opponents])
OPPONENTS = OPPONENTS.float()
# [buttons, groups]: the class a button that counts gives its group.
CODES = torch.tensor(
    [
        [p - s if s < p < s + n else 0 for s, n in zip(STARTS, TABLES.group_sizes, strict=True)]
        for p in TABLES.button_classes
    ]
).float()
BINS = torch.tensor(TABLES.command_classes[:21])


def eager(buttons: Tensor, camera: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """The same in eager PyTorch: exclusion and classes as two small matrix products."""
    held = (buttons[..., 1] > buttons[..., 0]).float()
    counts = held * (held @ OPPONENTS.t() == 0)
    read = torch.cat([camera.argmax(-1), (counts @ CODES).long()], -1)
    wanted = torch.cat([BINS[actions[..., :2]], actions[..., 2:]], -1)
    wanted[..., 8] = wanted[..., 8] * (wanted[..., 8] != 2)  # no button for pickItem
    finite = buttons.isfinite().flatten(-2).all(-1) & camera.isfinite().flatten(-2).all(-1)
    matches = (read == wanted).float()
    return matches.mean(-1).where(finite, torch.nan).mean(-1), matches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine()
    print("  ".join(f"{k} {v}" for k, v in where.items()))

    rows, results = [], []
    for b, t, dtype in (
        (16, 15, torch.float32),
        (1024, 16, torch.float32),
        (1024, 16, torch.bfloat16),
    ):
        g = torch.Generator().manual_seed(0)
        buttons = torch.randn(b, t, 20, 2, generator=g).to(dtype)
        camera = torch.randn(b, t, 2, 11, generator=g).to(dtype)
        sizes = MINECRAFT.factor_sizes
        actions = torch.stack([torch.randint(n, (b, t), generator=g) for n in sizes], -1)
        moved = (buttons.nbytes + camera.nbytes + actions.nbytes + 4 * actions.numel()) // 2
        source = torch.zeros(moved, dtype=torch.uint8)
        target = torch.empty_like(source)
        args = (buttons, camera, actions)
        with torch.inference_mode():
            times = interleave(
                {
                    "rlir": lambda a=args: inverse_reward(*a, MINECRAFT_VPT),
                    "eager": lambda a=args: eager(*a),
                    "copy": lambda s=source, t=target: t.copy_(s),
                },
                options.rounds,
            )
            wrong = (inverse_reward(*args, MINECRAFT_VPT)[0] - eager(*args)[0]).abs().max()
            reference = inverse_reward_reference(*args, MINECRAFT_VPT)[1]
            same = bool(inverse_reward(*args, MINECRAFT_VPT)[1].equal(reference))
        kind = str(dtype).removeprefix("torch.")
        for name, seconds in times.items():
            rows.append(
                (
                    f"{b} x {t} {kind}  {name}",
                    f"{seconds * 1e6:.0f}",
                    f"{2 * moved / seconds / 1e9:.1f}",
                    f"{times['eager'] / seconds:.2f}",
                    f"{100 * times['copy'] / seconds:.0f}",
                )
            )
        results.append(
            {
                "trajectories": b,
                "frames": t,
                "dtype": kind,
                "microseconds": {k: round(v * 1e6, 1) for k, v in times.items()},
                "bytes": 2 * moved,
                "percent_of_limit": round(100 * times["copy"] / times["rlir"], 1),
                "speedup": round(times["eager"] / times["rlir"], 2),
                "largest_difference_from_eager": float(wrong),
                "matches_equal_reference": same,
            }
        )
    print(table(("trajectories x frames", "us", "GB/s", "x eager", "% of limit"), rows))
    emit("inverse_reward", {"machine": where, "results": results})


if __name__ == "__main__":
    main()
