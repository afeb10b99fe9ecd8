"""What is installed and what works here: versions, processor, backends, and why others do not."""

import importlib
import os
import platform
import sys
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import product
from pathlib import Path

import torch

from rlir import console

PACKAGES = (
    "numpy",
    "scipy",
    "scikit-learn",
    "scikit-image",
    "safetensors",
    "av",
    "vizdoom",
    "vector-quantize-pytorch",
    "tyro",
    "rich",
    "tensorboard",
)


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    section: str
    name: str
    value: str
    works: bool = True
    """False for what is not available; the value then says why."""
    required: bool = False
    """Whether rlir cannot do its work without it."""


def report() -> list[Row]:
    """Everything ``rlir doctor`` prints, in order."""
    return [*_versions(), *_processor(), *_backends(), *_video()]


def run() -> int:
    """Print the report. Returns 0, or 1 if something that rlir needs is not available."""
    rows = report()
    width = max(len(row.name) for row in rows)
    section = ""
    for row in rows:
        if row.section != section:
            console.out(f"\n{row.section}" if section else row.section)
            section = row.section
        console.out(f"  {row.name:<{width}}  {row.value}")
    broken = [row.name for row in rows if row.required and not row.works]
    console.out("")
    console.out(f"not working: {', '.join(broken)}" if broken else "ready")
    return 1 if broken else 0


def run_parity(checkpoint: Path) -> int:
    """Print the mismatch between rollouts and training. Returns 0 if there is none, else 1."""
    from rlir.models.load import EMBEDDED, load_world_model
    from rlir.rollout.parity import measure
    from rlir.rollout.schedule import diagonal, sequential

    folder = EMBEDDED if str(checkpoint) == "embedded" else checkpoint
    inner = folder / "world-model"
    model = load_world_model(inner if inner.is_dir() else folder).requires_grad_(True)
    if torch.cuda.is_available():
        model = model.cuda()
    exact = True
    console.out("log-probabilities of rollouts: the trainer's (teacher-forced) beside the engine's")
    kinds = product((torch.bfloat16, torch.float32), (sequential(), diagonal(2)))
    for dtype, schedule in kinds:
        found = measure(model, dtype, schedule=schedule)
        exact = exact and found.exact
        name = str(dtype).removeprefix("torch.")
        kind = "diagonal" if schedule.window else "raster"
        console.out(
            f"  {name:<9} {kind:<9} {found.differ} of {found.tokens} tokens differ, by at most "
            f"{found.largest:.3g} nats; ratio {found.ratio:.9g}, KL {found.kl:.3g}"
        )
    console.out("no mismatch" if exact else "mismatch")
    return 0 if exact else 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> list[Row]:
    section = "versions"
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    rows = [
        Row(section, "rlir", _version("rlir") or "not installed (imported from its source)"),
        Row(section, "python", f"{platform.python_version()} on {system}"),
        Row(section, "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
    ]
    for package in PACKAGES:
        found = _version(package)
        text = found or f"not installed: pip install {package}"
        rows.append(Row(section, package, text, works=found is not None, required=True))
    return rows


def _processor() -> list[Row]:
    section = "processor"
    cores = len(os.sched_getaffinity(0))
    omp = os.environ.get("OMP_NUM_THREADS", "not set")
    rows = [
        Row(section, "model", _cpu_model()),
        Row(
            section,
            "threads",
            f"{torch.get_num_threads()} used by torch, {cores} cores, OMP_NUM_THREADS {omp}",
        ),
    ]
    try:
        from rlir import _build_info
    except ImportError as error:
        missing = f"unknown: {_reason(error)}"
        return [*rows, Row(section, "isa", missing, works=False)]
    used = _build_info.used_cpu_isa()
    cap = os.environ.get("RLIR_CPU_ISA")
    capped = f" (RLIR_CPU_ISA={cap})" if cap else ""
    compiled = ", ".join(_build_info.cpu_isas)
    return [
        *rows,
        Row(section, "isa detected", _build_info.detected_cpu_isa()),
        Row(section, "isa used", f"{used}{capped}"),
        Row(section, "isa compiled", f"{compiled} by {_build_info.compiler}"),
        Row(section, "features", _build_info.cpu_features() or "none known"),
    ]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _backends() -> list[Row]:
    section = "backends"
    reference = Row(section, "reference", "yes: plain PyTorch, on every device")
    return [reference, _cpu(section), *_cuda(section), *_optional(section), *_attention(section)]


def _cpu(section: str) -> Row:
    try:
        from rlir import _library

        if _library.FORCE_REFERENCE:
            text = "no: RLIR_FORCE_REFERENCE is set, ops run their reference"
            return Row(section, "cpu", text, works=False)
        from rlir import _build_info
    except (ImportError, ValueError) as error:
        return Row(section, "cpu", f"no: {_reason(error)}", works=False, required=True)
    built = f"built with torch {_build_info.torch_version}"
    return Row(section, "cpu", f"yes: {_build_info.used_cpu_isa()} kernels, {built}")


def _cuda(section: str) -> list[Row]:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        device = Row(section, "cuda device", f"yes: {', '.join(names)}")
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
        device = Row(section, "cuda device", f"no: {reason}", works=False)
    else:
        reason = "no NVIDIA driver or no GPU that torch can use"
        device = Row(section, "cuda device", f"no: {reason}", works=False)
    return [device, _cuda_kernels(section)]


def _cuda_kernels(section: str) -> Row:
    name = "cuda kernels"
    try:
        from rlir import _build_info, _library
    except (ImportError, ValueError) as error:
        return Row(section, name, f"no: {_reason(error)}", works=False)
    archs = ", ".join(_build_info.cuda_archs)
    if not archs:
        text = "no: none were built, for want of nvcc; CUDA tensors use the reference"
        return Row(section, name, text, works=False)
    if _library.CUDA is None:
        why = "RLIR_FORCE_REFERENCE is set" if _library.FORCE_REFERENCE else "torch sees no GPU"
        return Row(section, name, f"no: built for {archs}, not loaded: {why}", works=False)
    return Row(section, name, f"yes: {archs}")


def _optional(section: str) -> list[Row]:
    how = "pip install 'rlir[gpu]' on a machine with a CUDA torch"
    rows = []
    for name, module in (("flash-attn", "flash_attn"), ("xformers", "xformers")):
        row = _package(section, name, module, how)
        if row.works:
            try:
                from rlir.ops._attention_backends import problem_of

                problem = problem_of(name)
            except (ImportError, ValueError) as error:  # the native library: it has a row
                problem = _reason(error)
            if problem is not None:
                row = Row(section, name, f"no: {name} {problem}", works=False)
        serves = "video_attention's plain causal masks in bfloat16 on CUDA"
        text = f"{row.value}; {'serves' if row.works else 'would serve'} {serves}"
        rows.append(replace(row, value=text))
    return [
        *rows,
        _package(section, "nvtx", "nvtx", "pip install nvtx, for ranges in Nsight Systems"),
    ]


def _attention(section: str) -> list[Row]:
    """What computes a plain causal mask in bfloat16, on the CPU and on CUDA."""
    try:
        from rlir import _library
        from rlir.ops import _attention_backends as attention
        from rlir.ops import causal
    except (ImportError, ValueError) as error:
        names = ("attention on cpu", "attention on cuda")
        return [Row(section, name, f"unknown: {_reason(error)}", works=False) for name in names]
    chosen = attention.chosen()
    built = {"cpu": _library.PATH is not None, "cuda": _library.CUDA is not None}
    rows = []
    for device, kernels in built.items():
        name = f"attention on {device}"
        if device == "cuda" and not torch.cuda.is_available():
            text = f"no: torch sees no GPU; {chosen!r} is chosen"
            rows.append(Row(section, name, text, works=False))
            continue
        libraries = attention.libraries_on(torch.device(device)) if device == "cuda" else ()
        used = attention.decide(
            *(chosen, libraries),
            kernels=kernels,
            device=device,
            dtype=torch.bfloat16,
            head_size=64,
            mask=causal(),
            plain=True,
            gradients=True,
            lse=False,
        )
        text = {"rlir": "rlir's kernels", "reference": "the plain PyTorch reference"}.get(
            used, used
        )
        how = f" ({chosen!r} is chosen; rlir.ops.attention_backend)" if device == "cuda" else ""
        rows.append(Row(section, name, f"{text}{how}"))
    return rows


def _package(section: str, name: str, module: str, how: str, required: bool = False) -> Row:
    found = _version(name)
    if found is None:
        return Row(section, name, f"no: not installed ({how})", works=False, required=required)
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken install can raise anything
        text = f"no: {found} does not import: {_reason(error)}"
        return Row(section, name, text, works=False, required=required)
    return Row(section, name, f"yes: {found}", required=required)


def _video() -> list[Row]:
    section = "games and video"
    rows = [_package(section, "vizdoom", "vizdoom", "pip install vizdoom", required=True)]
    try:
        import av
    except Exception as error:  # a broken install can raise anything
        return [*rows, Row(section, "libx264", f"no: PyAV: {_reason(error)}", False, True)]
    here = "libx264" in av.codecs_available
    text = f"yes: in PyAV {av.__version__}" if here else "no: this PyAV is built without it"
    return [*rows, Row(section, "libx264", text, works=here, required=True)]


def _reason(error: BaseException) -> str:
    text = str(error).splitlines()
    return text[0] if text else type(error).__name__


if __name__ == "__main__":
    sys.exit(run())
