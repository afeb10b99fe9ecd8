"""Checkpoints on disk: model.safetensors beside config.json, written so that a crash loses nothing.

Every file is written under a temporary name, flushed to the disk and renamed. A checkpoint that
was good stays good whatever happens to the next one.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rlir.errors import InputError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that is either the old one or the whole new one."""
    write_parts(path, [data])


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """``write_bytes`` of one part after another, of which only one need be in memory."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys and an end of line."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; one clear line if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: must be readable JSON, got {error}") from None


def save_model(
    directory: Path,
    model: nn.Module,
    kind: str,
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    info: dict[str, Any] | None = None,
) -> None:
    """Write a model's parameters and the config that builds it.

    ``dtype`` int8 writes matrices as int8 rows with a scale each.

    ``info`` is free text for the model card (command, seed, figures).
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        value = value.detach()
        if dtype == torch.int8 and value.is_floating_point():
            tensors |= _quantize(name, value)
        else:
            kept = dtype if value.is_floating_point() else value.dtype
            tensors[name] = value.to(kept).contiguous()
    write_bytes(directory / WEIGHTS, save(tensors))
    described = {"kind": kind, "model": dataclasses.asdict(config), "info": info or {}}
    write_json(directory / CONFIG, described)


SCALE = ".scale"


def _quantize(name: str, value: Tensor) -> dict[str, Tensor]:
    """A matrix as int8 rows with a float32 scale each; a vector as bfloat16.

    ``value ~= int8 * scale``, scale = max |row| / 127: an error of at most 0.4% of a row's largest
    weight, at half the size of bfloat16.
    """
    if value.dim() < 2:
        return {name: value.to(torch.bfloat16).contiguous()}
    rows = value.float().flatten(1)
    scale = rows.abs().amax(1).clamp_min(1e-12) / 127
    whole = (rows / scale[:, None]).round().to(torch.int8).view(value.shape)
    return {name: whole.contiguous(), name + SCALE: scale}


def _dequantize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, value in tensors.items():
        scale = tensors.get(name + SCALE)
        if scale is not None:
            value = value.float() * scale.view(-1, *[1] * (value.dim() - 1))
        if not (name.endswith(SCALE) and name.removesuffix(SCALE) in tensors):
            out[name] = value
    return out


def read_config(directory: Path, kind: str) -> dict[str, Any]:
    """The ``model`` part of a checkpoint's config.json, checked to be of ``kind``."""
    path = directory / CONFIG
    if not path.exists():
        raise InputError(f"checkpoint: {directory} must hold {CONFIG}, found none")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("kind") != kind:
        found = config.get("kind") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"checkpoint: {directory} must be a {kind}, got {found!r}")
    model = config.get("model")
    if not isinstance(model, dict):
        raise InputError(f"checkpoint: {path} must hold the settings of a {kind}, found none")
    return model


def load_weights(directory: Path, model: nn.Module) -> None:
    """Fill a model with a checkpoint's weights; every name and shape must fit."""
    path = directory / WEIGHTS
    try:
        tensors = _dequantize(load_file(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"checkpoint: {path} must be readable, got {error}") from None
    wanted = model.state_dict()
    for name, value in wanted.items():
        if name not in tensors:
            raise InputError(f"checkpoint: {path} must hold {name}, found none")
        if tensors[name].shape != value.shape:
            raise InputError(
                f"checkpoint: {path}: {name} must have shape {tuple(value.shape)}, "
                f"got {tuple(tensors[name].shape)}"
            )
    if extra := sorted(set(tensors) - set(wanted)):
        raise InputError(f"checkpoint: {path} must hold no other tensors, got {extra[0]}")
    model.load_state_dict(tensors)


def fingerprint(model: nn.Module) -> str:
    """Twelve hex digits of a model's weights as bf16: what a checkpoint is, whatever its dtype."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if value.is_floating_point():
            value = value.detach().to(torch.bfloat16).view(torch.int16)
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state (tensors and plain values) with torch.save, atomically."""
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state. Only tensors and plain values are admitted."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"resume: {path} must be a readable state, got {first}") from None
    return state


def copy_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A detached copy of a state_dict."""
    return {name: value.detach().clone() for name, value in tensors.items()}


def free_bytes(path: Path) -> int:
    """Free space of the disk that holds ``path``."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
