"""An interpreter of the PTX that nvcc emits, in numpy: slow, exact, and it raises on what it does
not know. It covers what the emulator cannot: inline PTX, ``__CUDA_ARCH__`` paths, nvcc's code.

    module = parse(text)
    run(module["kernel"], grid=(2,), block=(128,), arguments=[array, 3], outputs=[array])
"""

from cudacheck.ptxsim.machine import Machine, run
from cudacheck.ptxsim.parser import Kernel, PtxError, parse

__all__ = ["Kernel", "Machine", "PtxError", "parse", "run"]
