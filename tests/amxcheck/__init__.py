"""AMX kernels on machines without AMX: tile instructions in a handler of SIGILL."""
