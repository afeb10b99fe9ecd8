"""Embed trained models in the package, small: the world model as int8 rows, the others as bf16.

python tools/embed.py runs/pretrain
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from rlir.checkpoints import CONFIG, WEIGHTS, fingerprint, read_json, save_model
from rlir.models.load import EMBEDDED, load_idm, load_tokenizer, load_world_model

LOADERS = {
    "tokenizer": ("tokenizer", load_tokenizer),
    "world-model": ("world-model", load_world_model),
    "reward-idm": ("idm", load_idm),
    "judge-idm": ("idm", load_idm),
}
LIMIT = 16 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pretrained", type=Path, help="folder that `rlir pretrain all` wrote")
    arguments = parser.parse_args()
    total = 0
    for name, (kind, load) in LOADERS.items():
        source, to = arguments.pretrained / name, EMBEDDED / name
        model = load(source)
        info = read_json(source / CONFIG)["info"]
        shutil.rmtree(to, ignore_errors=True)
        dtype = torch.int8 if name == "world-model" else torch.bfloat16
        save_model(to, model, kind, model.config, dtype=dtype, info=info)
        size = (to / WEIGHTS).stat().st_size
        total += size
        last = json.dumps(info["history"][-1])
        count = sum(p.numel() for p in model.parameters())
        model = load(to)
        print(f"{name}: {fingerprint(model)}, {count / 1e6:.2f} M parameters, {size} bytes, {last}")
    print(f"{total / 2**20:.2f} MiB in all")
    if total > LIMIT:
        raise SystemExit(f"embed: the models must be at most {LIMIT} bytes in all, got {total}")


if __name__ == "__main__":
    main()
