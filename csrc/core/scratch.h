// Work space of the op layer, aligned to cache lines: a vector load across two costs double.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace rlir {

class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(::operator new(static_cast<size_t>(bytes > 0 ? bytes : 1), kAlignment)) {}

  template <typename T = void>
  T* get() const {
    return static_cast<T*>(data_.get());
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(void* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<void, Delete> data_;
};

}  // namespace rlir
