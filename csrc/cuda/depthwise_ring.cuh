// What a thread keeps in shared memory for itself: no other thread reads it, so it needs no
// barrier. Element i of a thread's array lies kThreads elements behind element i - 1, which keeps
// the threads of a warp on different banks.
#pragma once

#include "depthwise_strip.cuh"
#include "mma.cuh"

namespace effnet::cuda {

// Copies a vector from global to this thread's shared memory while it goes on, or writes zeros
// there and does not touch `global` where it does not exist: there for this thread after
// wait_for_copies(). Fewer than four bytes are waited for at once: they cannot be copied so.
template <class T, int L>
EFFNET_DEVICE void copy_ahead(Vector<T, L>* shared, const T* global, bool exists) {
  constexpr int kBytes = sizeof(Vector<T, L>);
  if constexpr (kBytes < 4) {
    Vector<T, L> raw{};
    if (exists) raw = load_vector<L>(global);
    *shared = raw;
  } else {
    copy_async<kBytes>(shared, global, exists ? kBytes : 0);
  }
}

// A row of kColumns vectors, `stride` elements apart; of those not in the mask `columns`, zeros.
template <int kColumns, int kThreads, class T, int L>
EFFNET_DEVICE void copy_row_ahead(Vector<T, L>* shared, const T* global, int stride,
                                  uint32_t columns) {
  if (columns == (1u << kColumns) - 1) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      copy_ahead<T, L>(shared + i * kThreads, global, true);
      global += stride;
    }
    return;
  }
  const int exist = opaque(columns);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    copy_ahead<T, L>(shared + i * kThreads, global, exist >> i & 1);
    global += stride;
  }
}

}  // namespace effnet::cuda
