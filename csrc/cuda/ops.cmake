# Ops with a CUDA kernel, for the CUDA library and for the emulator: csrc/cuda/<op>.cu and
# csrc/ops/<op>_cuda.cpp each.
set(RLIR_CUDA_OPS decode_actions flow_sde_step group_advantage group_attention
                  group_decode_attention inverse_reward policy_loss rotary rotary_append
                  sample_tokens selected_logprob video_attention)
# Further such pairs of files, a part of an op each.
set(RLIR_CUDA_PARTS selected_logprob_backward video_attention_backward)
set(RLIR_CUDA_FILES ${RLIR_CUDA_OPS} ${RLIR_CUDA_PARTS})
# Whose kernels one's host code calls as well.
set(RLIR_CUDA_NEEDS_selected_logprob sample_tokens)
set(RLIR_CUDA_NEEDS_selected_logprob_backward selected_logprob)
set(RLIR_CUDA_NEEDS_group_attention video_attention video_attention_backward)
set(RLIR_CUDA_NEEDS_group_decode_attention video_attention)
