// What drivers cut a call by, and its memory: sizes, scratch, and pages for what it writes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "../arguments.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace effnet {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t element_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return 8;
    case Dtype::float32:
      return 4;
    default:
      return 2;
  }
}

// Before the first write to a tensor: new memory then costs a fault every 2 MiB, not every 4 KiB.
// Only pages that lie in the tensor as a whole are asked for; it does nothing to memory in use.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  // Refused, it is slower and no worse.
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// Pieces of one piece of memory, each on its own cache lines.
class Pieces {
 public:
  int64_t add(int64_t bytes) {
    const int64_t offset = bytes_;
    bytes_ += ceil_div(bytes, kLine) * kLine;
    return offset;
  }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kLine = 64;
  int64_t bytes_ = 0;
};

inline void* at(void* memory, int64_t offset) { return static_cast<char*>(memory) + offset; }
inline const void* at(const void* memory, int64_t offset) {
  return static_cast<const char*>(memory) + offset;
}

class Memory {
 public:
  explicit Memory(size_t bytes) : data_(::operator new(bytes, std::align_val_t(64))) {}
  ~Memory() { ::operator delete(data_, std::align_val_t(64)); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
};

}  // namespace effnet
