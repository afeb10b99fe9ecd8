# Ops with a CUDA kernel, for the CUDA library and for the emulator: csrc/cuda/<op>.cu and
# csrc/ops/<op>_cuda.cpp each.
set(RLIR_CUDA_OPS decode_actions flow_sde_step group_advantage inverse_reward
                  sample_tokens)
