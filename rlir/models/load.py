"""Load checkpoints as models, and check that they belong together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rlir.checkpoints import CONFIG, fingerprint, load_weights, read_config, read_json
from rlir.errors import InputError
from rlir.models.idm import InverseDynamics, InverseDynamicsConfig
from rlir.models.llama import is_hugging_face, load_llama_folder
from rlir.models.tokenizer import Tokenizer, TokenizerConfig
from rlir.models.world_model import WorldModel, WorldModelConfig

EMBEDDED = Path(__file__).parent.parent / "embedded" / "doom-tiny"


def _build(directory: Path, kind: str, config_class: Any, model_class: Any) -> Any:
    values = {
        k: tuple(v) if isinstance(v, list) else v for k, v in read_config(directory, kind).items()
    }
    try:
        model: nn.Module = model_class(config_class(**values))
    except Exception as error:  # whatever a config makes torch say
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"checkpoint: {directory} must have a {kind}'s config, got {reason}"
        ) from None
    load_weights(directory, model)
    return model.eval().requires_grad_(False)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, frozen, in eval mode."""
    model: Tokenizer = _build(directory, "tokenizer", TokenizerConfig, Tokenizer)
    return model


def load_idm(directory: Path) -> InverseDynamics:
    """The inverse dynamics model of a checkpoint, frozen, in eval mode."""
    model: InverseDynamics = _build(directory, "idm", InverseDynamicsConfig, InverseDynamics)
    return model


def load_world_model(directory: Path) -> WorldModel:
    """The world model of a checkpoint or of a Hugging Face Llama folder, frozen, in eval mode."""
    if is_hugging_face(directory):
        return load_llama_folder(directory)
    model: WorldModel = _build(directory, "world-model", WorldModelConfig, WorldModel)
    return model


def check_tokenizer(directory: Path, model: WorldModel, tokenizer: Tokenizer) -> None:
    """A world model speaks the codes of the tokenizer that it was trained with, and no other's."""
    ours, theirs = model.config, tokenizer.config
    grid = (theirs.rows, theirs.columns, theirs.codes)
    if (ours.rows, ours.columns, ours.codes) != grid:
        raise InputError(
            f"world model: {directory} must fit the tokenizer's grid and codes {grid}, "
            f"got {(ours.rows, ours.columns, ours.codes)}"
        )
    wanted = (read_json(directory / CONFIG).get("info") or {}).get("tokenizer")
    if wanted is not None and wanted != (found := fingerprint(tokenizer)):
        raise InputError(
            f"world model: {directory} must come with the tokenizer {wanted} that it was trained "
            f"with, got {found}"
        )


@dataclass(frozen=True)
class Models:
    """What post-training and evaluation work with."""

    world_model: WorldModel
    tokenizer: Tokenizer
    reward_idm: InverseDynamics
    judge_idm: InverseDynamics


def load_models(base: Path | None, idm: Path | None, judge: Path | None) -> Models:
    """Checkpoints by directory; None is the embedded Doom model's.

    ``base`` holds ``tokenizer/`` and ``world-model/``.
    """
    base = base or EMBEDDED
    tokenizer = load_tokenizer(base / "tokenizer")
    world_model = load_world_model(base / "world-model")
    check_tokenizer(base / "world-model", world_model, tokenizer)
    reward_idm = load_idm(idm or EMBEDDED / "reward-idm")
    judge_idm = load_idm(judge or EMBEDDED / "judge-idm")
    if fingerprint(reward_idm) == fingerprint(judge_idm):
        raise InputError("judge: must be another model than the reward IDM, got the same weights")
    sizes = {(m.config.height, m.config.width) for m in (tokenizer, reward_idm, judge_idm)}
    if len(sizes) > 1:
        raise InputError(f"models: frames must have one size, got {sorted(sizes)}")
    if len(spaces := {m.config.space for m in (world_model, reward_idm, judge_idm)}) > 1:
        raise InputError(f"models: action spaces must be one, got {sorted(spaces)}")
    return Models(world_model, tokenizer, reward_idm, judge_idm)
