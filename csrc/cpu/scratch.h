// Cache-line-aligned temporary memory, freed at the end of the scope.
#pragma once

#include <cstdlib>
#include <new>

#include "../common/types.h"

namespace gptj_q8 {

template <class T>
class Scratch {
 public:
  Q8_INLINE explicit Scratch(int64_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes > 0 ? bytes : 64));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Q8_INLINE ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Q8_INLINE T* data() const { return data_; }

 private:
  T* data_;
};

}  // namespace gptj_q8
