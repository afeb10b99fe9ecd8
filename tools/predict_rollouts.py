"""The table of predictions in docs/rollout.md: frames a second at a device's limits.

    python tools/predict_rollouts.py

MineWorld's shapes, one prompt of 8 frames, 16 rollouts of a frame each, from rlir.rollout.cost and
the devices' data sheets (bfloat16 without sparsity, memory), for the CPU from a measurement.
"""

from rlir.models.world_model import WorldModelConfig
from rlir.rollout import cost
from rlir.rollout.schedule import diagonal, sequential

SHAPES = {"300M": (1024, 4096, 16), "700M": (2048, 4096, 32), "1.2B": (2048, 8192, 32)}
DEVICES = {
    "2 cores of Zen 5": (850e9, 44e9),
    "A100, 80 GB": (312e12, 2.04e12),
    "H100, SXM": (989e12, 3.35e12),
}
CONTEXT, GROUP = 8, 16


def main() -> None:
    print("| model | device | prefill s | raster: frames/s | diagonal(2): frames/s | GiB |")
    print("|---|---|---:|---:|---:|---:|")
    for name, (hidden, mlp, heads) in SHAPES.items():
        config = WorldModelConfig(
            space="mineworld", codes=8192, rows=14, columns=24, frames=16, hidden=hidden,
            layers=20, heads=heads, kv_heads=4, mlp=mlp, stem_channels=0, slot_embeddings=False,
            action_vocabulary=70,
        )  # fmt: skip
        slots = CONTEXT * config.block + GROUP * (config.block + 128)
        memory = 2 * cost.layer_weights(config) + slots * cost.slot_bytes(config)
        for device, rates in DEVICES.items():
            prefill = cost.prefill(config, CONTEXT).seconds(*rates)
            rate = []
            for schedule in (sequential(), diagonal(2)):
                plan = schedule.plan(config.rows, config.columns)
                sizes = {"groups": 1, "group_size": GROUP, "context": CONTEXT}
                passes = cost.steps(config, plan, frame=CONTEXT, **sizes)
                rate.append(GROUP / cost.seconds_of(passes, *rates))
            print(
                f"| {name} | {device} | {prefill:.3g} | {rate[0]:.3g} | {rate[1]:.3g} "
                f"| {memory / 2**30:.2f} |"
            )


if __name__ == "__main__":
    main()
