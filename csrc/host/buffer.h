// Scratch of a CPU twin's worker: uninitialised, aligned to 64 bytes.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace kvc {

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(::operator new(n * sizeof(T), kAlignment))) {}
  T* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace kvc
