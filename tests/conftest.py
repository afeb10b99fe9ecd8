"""Fixtures of all tests. Torch has one thread here; tests that need more ask for them."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from testkit import IDMS, SIZE, TOKENIZER, WORLD_MODEL, rlir, stirred, write_recording

from rlir.actions.space import DOOM
from rlir.data.clips import Clips, open_clips
from rlir.models.idm import InverseDynamics
from rlir.models.tokenizer import Tokenizer
from rlir.models.world_model import WorldModel

torch.set_num_threads(1)
settings.register_profile("rlir", deadline=None)  # tests never time
settings.load_profile("rlir")


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three synthetic episodes of 12, 20 and 9 frames. Not to be written to."""
    directory = tmp_path_factory.mktemp("recorded")
    for i, frames in enumerate((12, 20, 9)):
        write_recording(directory, f"episode-{i}", frames, seed=i, map_name=f"m{i % 2}")
    return directory


@pytest.fixture(scope="session")
def clips(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Clips:
    """Those episodes, decoded at the tiny models' size."""
    directory = tmp_path_factory.mktemp("clips") / "data"
    shutil.copytree(recorded, directory)
    return open_clips(directory, DOOM, *SIZE)


@pytest.fixture
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(TOKENIZER).eval().requires_grad_(False)


@pytest.fixture
def world_model() -> WorldModel:
    """A tiny world model in which every part matters."""
    torch.manual_seed(0)
    return stirred(WorldModel(WORLD_MODEL)).eval()


@pytest.fixture(params=IDMS)
def idm(request: pytest.FixtureRequest) -> InverseDynamics:
    """A tiny inverse dynamics model of each architecture."""
    torch.manual_seed(0)
    return InverseDynamics(IDMS[request.param]).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def smoke_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``pretrain all`` leaves: recorded VizDoom and the four models. Not to be written to."""
    out = tmp_path_factory.mktemp("smoke") / "base"
    done = rlir("pretrain", "all", "--preset", "doom-smoke", "--out", out, "--threads", 1)
    assert done.returncode == 0, done.stderr
    return out
