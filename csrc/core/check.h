// RLIR_CHECK(condition, "op: what must hold, got ", value): one clear line for the caller.
// STD_TORCH_CHECK would put function, file and line before it. Becomes RuntimeError in Python.
#pragma once

#include <sstream>
#include <stdexcept>

namespace rlir {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream line;
  (line << ... << parts);
  throw std::runtime_error(line.str());
}

}  // namespace rlir

#define RLIR_CHECK(condition, ...) \
  do {                             \
    if (!(condition)) [[unlikely]] \
      ::rlir::fail(__VA_ARGS__);   \
  } while (false)
