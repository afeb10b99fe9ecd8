"""decode_actions against eager PyTorch, in one process, by turns.

    python benchmarks/bench_decode_actions.py [--rounds 15] [--threads N]

VPT's heads, and the class vectors of the Doom models. The eager code is an argmax a head, with
exclusion of buttons as a matrix product. The limit is a copy of what is read and written.
"""

import argparse

import torch
from bench_inverse_reward import CODES, OPPONENTS
from harness import emit, interleave, machine, table
from torch import Tensor

from rlir.actions import DOOM, MINECRAFT_VPT
from rlir.ops import decode_actions

CENTRES = torch.tensor(MINECRAFT_VPT.tables.centres).view(2, 11)
DOOM_CENTRES = torch.tensor(DOOM.axes[0].centres()).float()


def eager_vpt(buttons: Tensor, camera: Tensor) -> tuple[Tensor, Tensor]:
    held = (buttons[..., 1] > buttons[..., 0]).float()
    counts = held * (held @ OPPONENTS.t() == 0)
    bins = camera.argmax(-1)
    degrees = torch.stack([CENTRES[0][bins[..., 0]], CENTRES[1][bins[..., 1]]], -1)
    return torch.cat([bins, (counts @ CODES).long()], -1), degrees


def eager_doom(keys: Tensor, camera: Tensor) -> tuple[Tensor, Tensor]:
    bins = camera.argmax(-1)
    read = [x.argmax(-1) for x in keys.split((3, 3, 2), -1)]
    return torch.stack([bins, *read], -1), DOOM_CENTRES[bins]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine()
    print("  ".join(f"{k} {v}" for k, v in where.items()))

    rows, results = [], []
    for name, b, t in (("vpt", 16, 15), ("vpt", 1024, 16), ("doom", 1024, 16)):
        g = torch.Generator().manual_seed(0)
        if name == "vpt":
            space, eager = MINECRAFT_VPT, eager_vpt
            keys = torch.randn(b, t, 20, 2, generator=g)
            camera = torch.randn(b, t, 2, 11, generator=g)
        else:
            space, eager = DOOM, eager_doom
            keys = torch.randn(b, t, 8, generator=g)
            camera = torch.randn(b, t, 11, generator=g)
        classes, degrees = decode_actions(keys, camera, space)
        moved = (keys.nbytes + camera.nbytes + classes.nbytes + degrees.nbytes) // 2
        source = torch.zeros(moved, dtype=torch.uint8)
        target = torch.empty_like(source)
        with torch.inference_mode():
            times = interleave(
                {
                    "rlir": lambda k=keys, c=camera, s=space: decode_actions(k, c, s),
                    "eager": lambda k=keys, c=camera, e=eager: e(k, c),
                    "copy": lambda s=source, t=target: t.copy_(s),
                },
                options.rounds,
            )
        for candidate, seconds in times.items():
            rows.append(
                (
                    f"{name} {b} x {t}  {candidate}",
                    f"{seconds * 1e6:.0f}",
                    f"{2 * moved / seconds / 1e9:.1f}",
                    f"{times['eager'] / seconds:.2f}",
                    f"{100 * times['copy'] / seconds:.0f}",
                )
            )
        results.append(
            {
                "heads": name,
                "trajectories": b,
                "frames": t,
                "microseconds": {k: round(v * 1e6, 1) for k, v in times.items()},
                "bytes": 2 * moved,
                "percent_of_limit": round(100 * times["copy"] / times["rlir"], 1),
                "speedup": round(times["eager"] / times["rlir"], 2),
                "same_as_eager": bool(classes.equal(eager(keys, camera)[0])),
            }
        )
    print(table(("heads, trajectories x frames", "us", "GB/s", "x eager", "% of limit"), rows))
    emit("decode_actions", {"machine": where, "results": results})


if __name__ == "__main__":
    main()
