"""World models in Hugging Face's Llama layout, such as MineWorld's (arXiv 2504.08388).

MineWorld's transformer is a Llama over frame tokens and action tokens: a ``WorldModel`` without the
stem and the embeddings of slots. What differs is how matrices are cut. q, k and v are one matrix
here, gate and up are another, and the head has the rows of the visual codes alone; its other rows
are kept beside it and written back. docs/llama.md has the layout, what is refused and the memory.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlir.actions.space import action_space
from rlir.checkpoints import CONFIG, WEIGHTS, read_json, write_json
from rlir.errors import InputError
from rlir.models.llama_config import described, read_llama_config
from rlir.models.tensor_files import (
    DTYPES,
    Stored,
    read_safetensors,
    read_state_dict,
    write_safetensors,
)
from rlir.models.world_model import WorldModel, WorldModelConfig, rotary_table

GRID = "rlir.json"
"""Beside config.json: what a Llama's config does not say of a world model."""
MINEWORLD_GRID = {"rows": 14, "columns": 24, "codes": 8192, "space": "mineworld"}
"""What holds without that file: frames of 224 x 384 pixels."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_FREQUENCIES = re.compile(r".*\.rotary_emb\.inv_freq")
"""Old checkpoints hold the rotary frequencies too. They follow from the config."""


def load_llama(
    directory: Path,
    *,
    rows: int,
    columns: int,
    frames: int | None = None,
    space: str = "mineworld",
    codes: int = 8192,
) -> WorldModel:
    """The world model of a Hugging Face Llama folder: float32, frozen, in eval mode.

    Args:
        directory: holds config.json and model.safetensors, or shards and their index.
        rows, columns: of a frame's token grid.
        frames: of the longest clip; None: as many as max_position_embeddings holds.
        space: the action space, whose tokens have the ids from ``codes``.
        codes: the visual ids are 0 .. codes - 1.

    Raises:
        InputError: (a ValueError) what is another model, does not fit or cannot be read, in one
            line.
    """
    path = directory / CONFIG
    if not path.exists():
        raise InputError(f"llama: {directory} must hold {CONFIG}, found none")
    llama = read_llama_config(path)
    sizes = {**llama.decoder(), "rows": rows, "columns": columns, "space": space, "codes": codes}
    config = _world_model_config(path, sizes, frames, llama.vocabulary)
    if frames is None:
        config = dataclasses.replace(config, frames=_most_frames(config, llama.positions))
    if config.positions > llama.positions:
        raise InputError(
            f"llama: {path} must have max_position_embeddings of at least {config.positions} "
            f"({config.frames} frames), got {llama.positions}"
        )
    return _filled(directory, config, read_safetensors(directory), llama.tied, llama.text)


def _most_frames(config: WorldModelConfig, positions: int) -> int:
    return max(2, 1 + (positions - config.tokens) // config.block)


def load_llama_folder(directory: Path) -> WorldModel:
    """``load_llama`` with the sizes of rlir.json in the folder, or else MineWorld's."""
    path = directory / GRID
    given = read_json(path) if path.exists() else {}
    names = (*MINEWORLD_GRID, "frames")
    if not isinstance(given, dict) or set(given) - set(names):
        raise InputError(f"llama: {path} must hold {', '.join(names)} and no more, got {given}")
    for name, value in given.items():
        if name == "space":
            action_space(str(value))
        elif type(value) is not int or value < 1:
            raise InputError(f"llama: {path} must have a whole {name} from 1, got {value!r}")
    return load_llama(directory, **{**MINEWORLD_GRID, **given})


def is_hugging_face(directory: Path) -> bool:
    """Whether a folder is a Hugging Face checkpoint, of whatever model."""
    path = directory / CONFIG
    config = read_json(path) if path.exists() else None
    return isinstance(config, dict) and "model_type" in config and "kind" not in config


def load_mineworld(
    path: Path,
    *,
    rows: int = 14,
    columns: int = 24,
    frames: int = 16,
    space: str = "mineworld",
    codes: int = 8192,
    head_dim: int = 64,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-5,
) -> WorldModel:
    """The world model of one of MineWorld's own ``.ckpt``: float32, frozen, in eval mode.

    A torch zip file with a ``state_dict`` of names that begin with ``transformer.``; others are
    left out. The file does not say its sizes: the defaults are MineWorld's, the rest is read off
    the matrices. Nothing but tensors and plain values is unpickled; a file with more is refused.
    """
    stored = read_state_dict(path, "transformer.")

    def rows_of(name: str) -> int:
        found = stored.get(name)
        if found is None or len(found.shape) != 2:
            got = "none" if found is None else f"shape {found.shape}"
            raise InputError(f"llama: {path} must hold a matrix transformer.{name}, found {got}")
        return found.shape[0]

    vocabulary, hidden = rows_of(_EMBEDDING), stored[_EMBEDDING].shape[1]
    keys = rows_of("model.layers.0.self_attn.k_proj.weight")
    if head_dim < 1 or hidden % head_dim or keys % head_dim:
        raise InputError(
            f"llama: {path} must have heads of head_dim {head_dim}, got a hidden size of {hidden} "
            f"and {keys} rows of keys"
        )
    sizes = {
        "hidden": hidden,
        "layers": len({x[1] for x in map(_LAYER.match, stored) if x}),
        "heads": hidden // head_dim,
        "kv_heads": keys // head_dim,
        "mlp": rows_of("model.layers.0.mlp.gate_proj.weight"),
        "rows": rows,
        "columns": columns,
        "space": space,
        "codes": codes,
        "rope_theta": rope_theta,
        "norm_eps": norm_eps,
    }
    config = _world_model_config(path, sizes, frames, vocabulary)
    return _filled(path, config, stored, False, None)


def _world_model_config(
    path: Path, sizes: dict[str, Any], frames: int | None, vocabulary: int
) -> WorldModelConfig:
    """The config of a Llama, or an InputError that names the file."""
    codes, space = sizes["codes"], sizes["space"]
    least = codes + action_space(space).vocabulary
    if vocabulary < least:
        raise InputError(
            f"llama: {path} must have a vocabulary of at least {least}, {codes} codes and the "
            f"tokens of {space}, got {vocabulary}"
        )
    plain: dict[str, Any] = {"stem_channels": 0, "stem_blocks": 0, "slot_embeddings": False}
    frames = 2 if frames is None else frames
    try:
        return WorldModelConfig(
            **sizes, **plain, frames=frames, action_vocabulary=vocabulary - codes
        )
    except InputError as error:
        raise InputError(f"llama: {path} must be a world model's decoder: {error}") from None


@dataclass(frozen=True)
class _Part:
    """Rows ``start`` .. ``start + rows`` of one of the world model's tensors."""

    tensor: str
    start: int
    rows: int


@dataclass(frozen=True)
class _Matrix:
    """A Llama's tensor: its rows are those of the parts, one after another."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[_Part, ...]


def _layout(config: WorldModelConfig) -> Iterator[_Matrix]:
    """All tensors of a Llama."""
    d, kv, mlp = config.hidden, config.kv_heads * config.hidden // config.heads, config.mlp

    def cut(tensor: str, rows: dict[str, int], *columns: int) -> Iterator[_Matrix]:
        """One of our tensors as several of a Llama's, which have so many rows."""
        start = 0
        for name, count in rows.items():
            part = _Part(tensor + ".weight", start, count)
            yield _Matrix(f"model.{name}.weight", (count, *columns), (part,))
            start += count

    yield from cut("embed_tokens", {"embed_tokens": config.vocabulary}, d)
    for i in range(config.layers):
        layer = f"layers.{i}."
        attention, gated = layer + "self_attn.", layer + "mlp."
        for norm in (layer + "input_layernorm", layer + "post_attention_layernorm"):
            yield from cut(norm, {norm: d})
        qkv = {attention + "q_proj": d, attention + "k_proj": kv, attention + "v_proj": kv}
        yield from cut(attention + "qkv_proj", qkv, d)
        yield from cut(attention + "o_proj", {attention + "o_proj": d}, d)
        yield from cut(
            layer + "gate_up_proj", {gated + "gate_proj": mlp, gated + "up_proj": mlp}, d
        )
        yield from cut(layer + "down_proj", {gated + "down_proj": d}, mlp)
    yield from cut("norm", {"norm": d})
    others = config.vocabulary - config.codes
    parts = (_Part("lm_head.weight", 0, config.codes), _Part("action_head", 0, others))
    yield _Matrix(_HEAD, (config.vocabulary, d), parts)


def _filled(
    path: Path,
    config: WorldModelConfig,
    stored: dict[str, Stored],
    tied: bool,
    text: dict[str, Any] | None,
) -> WorldModel:
    """The model with the file's weights. Every name and shape must fit before any is read."""
    if tied:
        stored = _untied(path, stored)
    names = set()
    for matrix in _layout(config):
        found = stored.get(matrix.name)
        if found is None:
            raise InputError(f"llama: {path} must hold {matrix.name}, found none")
        if found.shape != matrix.shape:
            raise InputError(
                f"llama: {path}: {matrix.name} must have shape {matrix.shape}, got {found.shape}"
            )
        names.add(matrix.name)
    if extra := sorted(x for x in set(stored) - names if not _FREQUENCIES.fullmatch(x)):
        raise InputError(f"llama: {path} must hold no other tensors, got {extra[0]}")
    with torch.device("meta"):  # without memory and random numbers
        model = WorldModel(config)
    model = model.float().to_empty(device="cpu").eval().requires_grad_(False)
    model.rotary = rotary_table(config)
    state = model.state_dict()
    for matrix in _layout(config):
        value = stored[matrix.name].read()
        for part, rows in zip(
            matrix.parts, value.split([x.rows for x in matrix.parts]), strict=True
        ):
            state[part.tensor].narrow(0, part.start, part.rows).copy_(rows)
    model.origin = {"config": text, "dtypes": {name: stored[name].dtype for name in names}}
    return model


def _untied(path: Path, stored: dict[str, Stored]) -> dict[str, Stored]:
    """With the head that is the embedding table."""
    table, head = stored.get(_EMBEDDING), stored.get(_HEAD)
    if table is not None and head is not None and not torch.equal(table.read(), head.read()):
        raise InputError(f"llama: {path}: {_HEAD} must be {_EMBEDDING} (tied), got other values")
    return stored if table is None else {**stored, _HEAD: table}


def save_llama(model: WorldModel, directory: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a folder that ``load_llama``, ``load_world_model`` and transformers read.

    Args:
        model: without stem and slot embeddings.
        dtype: of the weights: float32, bfloat16 or float16. None: of each what it was in the file
            that the model was loaded from (unchanged weights keep their bits), else float32.
    """
    if model.stem is not None or model.embed_slots is not None:
        raise InputError(
            "llama: a model must have no stem and no slot embeddings, got one that has"
        )
    if dtype is not None and dtype not in DTYPES.values():
        raise InputError(f"llama: dtype must be float32, bfloat16 or float16, got {dtype}")
    config, state, origin = model.config, model.state_dict(), model.origin or {}
    dtypes = origin.get("dtypes", {})
    layout = {matrix.name: matrix for matrix in _layout(config)}
    tensors = {
        name: (matrix.shape, dtype or dtypes.get(name, torch.float32))
        for name, matrix in layout.items()
    }

    def make(name: str) -> Tensor:
        matrix = layout[name]
        parts = [
            state[x.tensor].narrow(0, x.start, x.rows)
            # A head that was never a Llama's has no rows for actions.
            if x.tensor in state
            else torch.zeros(x.rows, *matrix.shape[1:])
            for x in matrix.parts
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / WEIGHTS, tensors, make)
    write_json(directory / GRID, {x: getattr(config, x) for x in (*MINEWORLD_GRID, "frames")})
    text = origin.get("config") or described(config, tensors[_EMBEDDING][1])
    if dtype is not None:
        key = "dtype" if "dtype" in text else "torch_dtype"
        text = {**text, key: str(dtype).removeprefix("torch.")}
    write_json(directory / CONFIG, {**text, "tie_word_embeddings": False})
