"""Checks of the CUDA kernels without a GPU: emulator, PTX interpreter, static budgets."""
