// The frame of a call of a CUDA kernel from the op layer: device, stream, tensors to pointers,
// error codes to messages. A file that uses it is compiled twice more for tests (RLIR_EMU): there
// the same op runs on CPU tensors through the emulator, which learns from in(), out() and in_out()
// what a kernel may touch. Needs no header of CUDA and links against a torch built without it.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "core/check.h"

namespace rlir {

#if defined(RLIR_EMU)
namespace emu {
void add_buffer(const void* p, size_t bytes, const char* name, bool writable, bool written);
void forget_buffers();
}  // namespace emu
#endif
namespace cuda {
const char* error_text(int code);
}

class CudaCall {
 public:
  // Current device and stream become those of `tensor`.
  CudaCall(const char* op, const torch::stable::Tensor& tensor);
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;
#if defined(RLIR_EMU)
  ~CudaCall() { emu::forget_buffers(); }
#endif

  void* stream() const { return stream_; }

  // Pointers that kernels only read, only write, or read and write. `name` is what findings say.
  const void* in(const torch::stable::Tensor& tensor, const char* name) {
    note(tensor, name, false, true);
    return tensor.const_data_ptr();
  }
  void* out(torch::stable::Tensor& tensor, const char* name) {
    note(tensor, name, true, false);
    return tensor.mutable_data_ptr();
  }
  void* in_out(torch::stable::Tensor& tensor, const char* name) {
    note(tensor, name, true, true);
    return tensor.mutable_data_ptr();
  }

  // `code` is what the launcher of a kernel returned.
  void check(int code) const {
    RLIR_CHECK(code == 0, op_, ": the CUDA kernel must start, got: ", cuda::error_text(code));
  }

 private:
  void note(const torch::stable::Tensor& tensor, const char* name, bool writable, bool written);

  const char* op_;
  void* stream_ = nullptr;
#if !defined(RLIR_EMU)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

#if defined(RLIR_EMU)

inline CudaCall::CudaCall(const char* op, const torch::stable::Tensor&) : op_(op) {}

inline void CudaCall::note(const torch::stable::Tensor& tensor, const char* name, bool writable,
                           bool written) {
  if (tensor.numel() == 0) return;
  int64_t last = 0;  // of the elements that the strides reach; torch has no negative ones
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  emu::add_buffer(tensor.const_data_ptr(), (last + 1) * tensor.element_size(), name, writable,
                  written);
}

#else

inline CudaCall::CudaCall(const char* op, const torch::stable::Tensor& tensor)
    : op_(op), guard_(tensor.get_device_index()) {
  stream_ = torch::stable::accelerator::getCurrentStream(tensor.get_device_index()).nativeHandle();
}

inline void CudaCall::note(const torch::stable::Tensor&, const char*, bool, bool) {}

#endif

}  // namespace rlir

// RLIR_CUDA_OP(name, schema, function): registers the CUDA kernel of an op; in the emulator an op
// of the same schema in a library of its own.
#if defined(RLIR_EMU)
#define RLIR_CUDA_OP(name, schema, function)                    \
  STABLE_TORCH_LIBRARY_FRAGMENT(RLIR_EMU, m) { m.def(schema); } \
  STABLE_TORCH_LIBRARY_IMPL(RLIR_EMU, CPU, m) { m.impl(name, TORCH_BOX(function)); }
#else
#define RLIR_CUDA_OP(name, schema, function) \
  STABLE_TORCH_LIBRARY_IMPL(rlir, CUDA, m) { m.impl(name, TORCH_BOX(function)); }
#endif
