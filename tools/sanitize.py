"""Run the tests of the native CPU ops under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tools/sanitize.py                 # the ops, the rollout engine and what they promise
    python tools/sanitize.py tests/ops/test_sample_tokens.py -k support

Builds the op library once more with the sanitizers in build/sanitize (the first time takes
minutes) and runs pytest with the sanitizers' library loaded ahead. The first finding ends the
process with a report. Leaks are not looked for: Python frees little at its end.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
TESTS = ["tests/ops", "tests/invariants", "tests/rollout"]
# As in the Makefile: a worker that a finding ends fails what it ran, and its report is printed.
WORKERS = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]


def built() -> Path:
    """The op library with sanitizers."""
    configure = ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DRLIR_CUDA=OFF"]
    configure += ["-DCMAKE_BUILD_TYPE=RelWithDebInfo", "-DRLIR_SANITIZE=address,undefined"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", BUILD, "--target", "rlir_ops"], check=True)
    return BUILD / "librlir_ops.so"


def runtime(name: str) -> str:
    """The compiler's library of that name."""
    compiler = os.environ.get("CXX", "c++")
    found = subprocess.run(
        [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
    )
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        sys.exit(f"sanitize: {compiler} must have {name}, found none: install its sanitizers")
    return str(path.resolve())


def main() -> None:
    bin_folder = Path(sys.executable).parent
    os.environ["PATH"] = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    library = built()
    # The C++ library goes with it: the sanitizer wraps its throw, which torch uses.
    ahead = [runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(ahead),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "RLIR_OPS_LIBRARY": str(library),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    arguments = sys.argv[1:] or [*WORKERS, *TESTS]
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
