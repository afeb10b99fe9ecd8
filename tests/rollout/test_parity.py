"""The trainer's log-probabilities of a rollout are the engine's, bit for bit."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import instruction_set, instruction_sets_and_amx, needs_amx, threads
from testkit import WORLD_MODEL, rlir, same, stirred
from torch import Tensor

from rlir.actions.space import DOOM
from rlir.checkpoints import save_model
from rlir.errors import InputError
from rlir.models.load import EMBEDDED, load_world_model
from rlir.models.world_model import WorldModel, WorldModelConfig
from rlir.rollout.engine import RolloutEngine
from rlir.rollout.parity import compare, measure, token_logprob
from rlir.rollout.sampling import Sampling
from rlir.rollout.trajectories import prompts_of

DTYPES = (torch.bfloat16, torch.float32)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
SHAPES = {
    "tiny": WORLD_MODEL,
    "odd image": dataclasses.replace(WORLD_MODEL, rows=3, columns=5),
    "several blocks of keys": dataclasses.replace(WORLD_MODEL, rows=8, columns=7, frames=4),
    "heads of 96": dataclasses.replace(WORLD_MODEL, hidden=96, heads=1, kv_heads=1),
    "one key head": dataclasses.replace(WORLD_MODEL, hidden=48, heads=3, kv_heads=1),
    "no blocks": dataclasses.replace(WORLD_MODEL, stem_blocks=0),
}


def policy(config: WorldModelConfig = WORLD_MODEL, seed: int = 0) -> WorldModel:
    torch.manual_seed(seed)
    return stirred(WorldModel(config)).requires_grad_(True)


def drawn(
    model: WorldModel, dtype: torch.dtype, prompts: int, group_size: int, temperature: float = 0.85
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, action blocks and the engine's log-probabilities."""
    config, generator = model.config, torch.Generator().manual_seed(prompts)
    first = torch.randint(config.codes, (prompts, config.tokens), generator=generator)
    shape = (prompts, config.frames - 1)
    actions = torch.stack(
        [torch.randint(n, shape, generator=generator) for n in DOOM.factor_sizes], -1
    )
    out = RolloutEngine(model, dtype).rollout(
        prompts_of(first, actions),
        group_size=group_size,
        sampling=Sampling(temperature),
        seed=5,
    )
    return out.codes, out.actions, out.logprob


@dtypes
@pytest.mark.parametrize("isa", instruction_sets_and_amx())
@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit(shape: str, isa: str, dtype: torch.dtype) -> None:
    with instruction_set(isa):
        model = policy(SHAPES[shape])
        # Where tiles are emulated, an instruction takes its time.
        prompts, group_size = (1, 2) if isa == "amx" else (2, 3)
        codes, blocks, logprob = drawn(model, dtype, prompts, group_size)
        scored = token_logprob(model, codes, blocks, 0.85, dtype)
    assert scored.requires_grad
    assert same(scored, logprob)
    assert compare(logprob, scored).exact


@dtypes
def test_in_any_batch(dtype: torch.dtype) -> None:
    model = policy()
    codes, blocks, logprob = drawn(model, dtype, prompts=3, group_size=4)
    for rows in (slice(0, 1), slice(5, 12), slice(11, None)):
        scored = token_logprob(model, codes[rows], blocks[rows], 0.85, dtype)
        assert same(scored, logprob[rows])


@dtypes
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_at_any_temperature(dtype: torch.dtype, temperature: float) -> None:
    model = policy()
    codes, blocks, logprob = drawn(model, dtype, 2, 2, temperature)
    assert same(token_logprob(model, codes, blocks, temperature, dtype), logprob)


@needs_amx
def test_on_amx_in_any_batch_and_on_any_number_of_threads() -> None:
    """In bfloat16, with more heads than a tile has rows, and images of an odd size."""
    sizes = {"rows": 3, "columns": 5, "hidden": 128, "heads": 64, "kv_heads": 1, "layers": 1}
    model = policy(dataclasses.replace(WORLD_MODEL, **sizes))
    with instruction_set("avx512_bf16"):
        others = drawn(model, torch.bfloat16, 1, 3)
    with instruction_set("amx"):
        codes, blocks, logprob = drawn(model, torch.bfloat16, 1, 3)
        assert not same(logprob, others[2]), "tiles did run"
        assert same(token_logprob(model, codes[1:2], blocks[1:2], 0.85), logprob[1:2])
        with threads(3):
            assert same(drawn(model, torch.bfloat16, 1, 3)[2], logprob)
            assert same(token_logprob(model, codes, blocks, 0.85), logprob)


@needs_amx
def test_on_amx_of_a_layer_as_wide_as_the_embedded_models() -> None:
    """Beside the prompt one frame, which reaches into a second block of keys."""
    config = load_world_model(EMBEDDED / "world-model").config
    model = policy(dataclasses.replace(config, layers=1, frames=2))
    with instruction_set("amx"):
        codes, blocks, logprob = drawn(model, torch.bfloat16, 1, 2)
        assert same(token_logprob(model, codes, blocks, 0.85), logprob)


def test_of_the_embedded_model() -> None:
    model = load_world_model(EMBEDDED / "world-model")
    for dtype in DTYPES:
        found = measure(model, dtype, prompts=1, group_size=2, temperature=0.85)
        assert found.exact
        assert (found.tokens, found.largest, found.ratio, found.kl) == (2 * 4 * 64, 0.0, 1.0, 0.0)


def test_on_any_number_of_threads() -> None:
    program = (
        "import json, sys, torch\n"
        "sys.path[:0] = sys.argv[2:]\n"
        "import test_parity as t\n"
        "torch.set_num_threads(int(sys.argv[1]))\n"
        "from testkit import bytes_of\n"
        "import hashlib\n"
        "found = {}\n"
        "for dtype in t.DTYPES:\n"
        "    model = t.policy()\n"
        "    codes, blocks, logprob = t.drawn(model, dtype, 3, 5)\n"
        "    scored = t.token_logprob(model, codes, blocks, 0.85, dtype)\n"
        "    assert t.same(scored, logprob), dtype\n"
        "    found[str(dtype)] = hashlib.sha256(bytes_of(scored)).hexdigest()\n"
        "print(json.dumps(found))\n"
    )
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    seen = []
    for count in (1, 3):
        done = subprocess.run(
            [sys.executable, "-c", program, str(count), *folders],
            env={**os.environ, "OMP_NUM_THREADS": str(count)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        seen.append(json.loads(done.stdout))
    assert seen[0] == seen[1]


def test_another_policy_is_seen() -> None:
    model = policy()
    codes, blocks, logprob = drawn(model, torch.bfloat16, 2, 2)
    with torch.no_grad():
        model.lm_head.weight[0] *= 1.02
    found = compare(logprob, token_logprob(model, codes, blocks, 0.85))
    assert not found.exact
    assert found.largest > 0
    assert found.ratio != 1
    assert found.kl > 0
    assert compare(logprob[:0], logprob[:0]).exact, "nothing drawn, nothing amiss"


def test_refuses_what_cannot_be_measured() -> None:
    with pytest.raises(InputError, match=r"^parity: prompts, group_size and frames must be >= 1 "):
        measure(policy(), group_size=0)


def test_doctor_measures_a_checkpoint(tmp_path: Path) -> None:
    model = policy()
    save_model(tmp_path / "world-model", model, "world-model", model.config)
    for folder in (tmp_path, tmp_path / "world-model"):
        done = rlir("doctor", "--parity", folder)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[-1] == "no mismatch"
        assert lines[1].startswith("  bfloat16  raster    0 of ")
        assert lines[4].startswith("  float32   diagonal  0 of ")
    done = rlir("doctor", "--parity", tmp_path / "none")
    assert done.returncode == 2
    assert "must hold config.json, found none" in done.stderr
