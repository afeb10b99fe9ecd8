// Texts of error codes; here because host files see no header of CUDA.
#include "cuda/portable.cuh"

namespace rlir::cuda {

const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace rlir::cuda
