// Tensor-core instructions on 16-bit and TF32 operands with float32 accumulation, and what brings
// the operands. The layouts of the fragments are those of PTX; lane t has r = t / 4 and q = t % 4.
#pragma once

#include "vector.cuh"

namespace effnet::cuda {

// Loads four 8 x 8 matrices of 16-bit elements from shared memory. Lane l gives the 16-byte row
// l % 8 of matrix l / 8; fragment[i] becomes the elements (r, 2q) and (r, 2q + 1) of matrix i, the
// first in the lower half. A row may as well be four float32: fragment[i] is then the element
// (r, q) of an 8 x 4 matrix.
EFFNET_DEVICE void load_matrices(uint32_t (&fragment)[4], const void* row) {
#if defined(EFFNET_CUDA_EMULATOR)
  cuda_emulator::ldmatrix_x4(fragment, row);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address));
#endif
}

// d += a * b, a 16 x 16, b 16 x 8:
//   a0 = (r, 2q..), a1 = (r + 8, 2q..), a2 = (r, 2q + 8..), a3 = (r + 8, 2q + 8..)
//   b0 = (2q.., r), b1 = (2q + 8.., r);  d = (r, 2q), (r, 2q + 1), (r + 8, 2q), (r + 8, 2q + 1)
template <class T>
EFFNET_DEVICE void multiply_matrices(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                     uint32_t a3, uint32_t b0, uint32_t b1) {
  constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;
#if defined(EFFNET_CUDA_EMULATOR)
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  cuda_emulator::mma_m16n8k16(d, a, b, kBfloat16);
#else
  if constexpr (kBfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
#endif
}

// x to the 11 bits of TF32's significand, to nearest. Infinities and NaN stay what they are.
EFFNET_DEVICE uint32_t round_to_tf32(float x) {
#if defined(EFFNET_CUDA_EMULATOR)
  return cuda_emulator::cvt_rna_tf32(x);
#else
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
#endif
}

// d += a * b of TF32 operands, a 16 x 8, b 8 x 8; what the words have beyond TF32 is ignored:
//   a0 = (r, q), a1 = (r + 8, q), a2 = (r, q + 4), a3 = (r + 8, q + 4);  b0 = (q, r), b1 = (q + 4,
//   r)
// The 16-bit fragments of 32 bytes of operands, word by word.
EFFNET_DEVICE void multiply_matrices_tf32(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
#if defined(EFFNET_CUDA_EMULATOR)
  cuda_emulator::mma_m16n8k8_tf32(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Copies kBytes (4, 8 or 16, to which both are aligned) from global to shared memory (bytes ==
// kBytes), or writes zeros there and does not touch `global` (bytes == 0), while the thread goes
// on: they are there for this thread after wait_for_copies().
template <int kBytes = 16>
EFFNET_DEVICE void copy_async(void* shared, const void* global, int bytes) {
#if defined(EFFNET_CUDA_EMULATOR)
  cuda_emulator::cp_async(shared, global, bytes, kBytes);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(address), "l"(global),
                 "r"(bytes), "n"(kBytes)
                 : "memory");
  }
#endif
}

// What copies of few bytes take for a place in shared memory: a word that the compiler does not
// compute anew for each of them.
#if defined(EFFNET_CUDA_EMULATOR)
using SharedAddress = char*;
#else
using SharedAddress = uint32_t;
#endif

EFFNET_DEVICE SharedAddress shared_address(void* shared) {
#if defined(EFFNET_CUDA_EMULATOR)
  return static_cast<char*>(shared);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#endif
}

// Copies 4 or 8 bytes, through the L1 cache, to `shared` + kOffset where `exists` is not zero.
template <int kBytes, int kOffset>
EFFNET_DEVICE void copy_async_if(int exists, SharedAddress shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8);
#if defined(EFFNET_CUDA_EMULATOR)
  if (exists != 0) cuda_emulator::cp_async(shared + kOffset, global, kBytes, kBytes);
#else
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "setp.ne.s32 exists, %0, 0;\n"
      "@exists cp.async.ca.shared.global [%1 + %3], [%2], %4;\n"
      "}" ::"r"(exists),
      "r"(shared), "l"(global), "n"(kOffset), "n"(kBytes)
      : "memory");
#endif
}

EFFNET_DEVICE void wait_for_copies() {
#if defined(EFFNET_CUDA_EMULATOR)
  cuda_emulator::cp_async_wait_all();
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Makes a group of the thread's copies since the last one (of none, where there are none), and
// waits until all but the last kPending groups are there.
EFFNET_DEVICE void commit_copies() {
#if defined(EFFNET_CUDA_EMULATOR)
  cuda_emulator::cp_async_commit_group();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int kPending>
EFFNET_DEVICE void wait_for_copy_groups() {
#if defined(EFFNET_CUDA_EMULATOR)
  cuda_emulator::cp_async_wait_group(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace effnet::cuda
