// Runs CUDA kernels on the CPU, under AddressSanitizer.
//
// Blocks run one after another in a shuffled order, so that a block that relies on another one of
// its launch is found out. The threads of a block are fibers: each runs until it waits at
// __syncthreads or a warp operation or returns, upwards or downwards through its warp by chance, so
// that a missing barrier changes results. A warp's lanes wait for each other at a warp operation;
// by chance the warp then goes on at once or after all other warps have come that far. Before each
// block its shared memory is filled with NaN, and what lies beyond the size that the launch asked
// for is poisoned. A launch that a GPU would refuse returns the error; a barrier that not all
// threads of a block reach, or a warp operation that not all lanes reach, ends the process with a
// message.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <unordered_map>
#include <vector>

#if !defined(__x86_64__)
#error "The fiber switch is written for x86-64 only."
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// The limits of compute capability 9.0.
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kLanes = 32;
constexpr size_t kSharedDefault = 48 * 1024;
constexpr size_t kSharedMost = 227 * 1024;

namespace effnet::cuda {
// Declared by csrc/cuda/vector.cuh.
alignas(128) float4 dynamic_shared_memory[kSharedMost / sizeof(float4)];
}  // namespace effnet::cuda

// Saves the callee-saved registers and the stack pointer of the caller, and continues where `to`
// was saved.
extern "C" void cuda_emulator_switch(void** from, void* to);
asm(R"(
.text
.globl cuda_emulator_switch
.hidden cuda_emulator_switch
.type cuda_emulator_switch, @function
cuda_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulator_switch, .-cuda_emulator_switch
)");

namespace cuda_emulator {
namespace {

constexpr size_t kStackBytes = 512 * 1024;
constexpr unsigned kMostCopies = 256;

// Pointers first: nearly always the same literal.
bool equal(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool operator==(const Operation& a, const Operation& b) {
  return a.line == b.line && equal(a.name, b.name) && equal(a.file, b.file);
}

struct Fiber {
  char* stack = nullptr;
  void* stack_pointer = nullptr;
  uint3 thread{};
  bool finished = true;
  Operation operation{"", "", 0};  // what it waits at,
  bool with_warp = false;          // for its warp alone
  struct Copy {
    void* shared;
    uint64_t data[2];
    unsigned group;
    int size;
  } copies[kMostCopies];  // begun and not yet waited for, in order
  unsigned copy_count = 0;
  unsigned copy_group = 0;  // of the copies that are not yet committed
};

// What a lane brings to a warp operation.
struct Deposit {
  uint64_t bits;
  uint32_t row[4];
  float a[8], b[4];
};

// Lanes that went on write their next deposits while others still read the last ones: two of each
// make one wait per operation enough.
struct Warp {
  unsigned lanes;  // fewer than 32 in the last warp of some blocks
  bool running;    // lanes wait at a warp operation, not at the block's barrier
  unsigned parity;
  Deposit deposits[2][kLanes];
};

std::vector<Fiber> fibers;
Warp warps[kMaxThreads / kLanes];
Fiber* running = nullptr;
void* scheduler_stack_pointer = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
void (*kernel_body)(void*) = nullptr;
void* kernel_context = nullptr;
std::unordered_map<const void*, size_t> shared_limits;
std::mt19937 random_bits(1);

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "CUDA emulator: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, " (block %u)\n", blockIdx.x);
  va_end(arguments);
  std::abort();
}

[[noreturn]] void fail(const char* what, const Operation& a) {
  fail("%s: %s, %s:%d", what, a.name, a.file, a.line);
}

[[noreturn]] void fail(const char* what, const Operation& a, const Operation& b) {
  fail("%s: %s, %s:%d and %s, %s:%d", what, a.name, a.file, a.line, b.name, b.file, b.line);
}

// From a fiber to the scheduler, until the scheduler comes back.
void yield() {
  Fiber& fiber = *running;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, scheduler_stack, scheduler_stack_bytes);
  cuda_emulator_switch(&fiber.stack_pointer, scheduler_stack_pointer);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// From the scheduler to a fiber, until that waits or finishes.
void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.thread;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStackBytes);
  cuda_emulator_switch(&scheduler_stack_pointer, fiber.stack_pointer);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// A fiber lives as long as the process and runs one thread after another.
[[noreturn]] void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    kernel_body(kernel_context);
    running->finished = true;
    yield();
  }
}

void create(Fiber& fiber) {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for a thread's stack");
  fiber.stack = static_cast<char*>(memory);
  // What cuda_emulator_switch pops: six registers and the return address. fiber_main starts as if
  // it had been called: the stack is 8 bytes off a multiple of 16.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = top;
}

// Resumes the lanes of a warp until each waits or has returned.
void run_warp(unsigned w) {
  Warp& warp = warps[w];
  warp.parity ^= 1;
  Fiber* lanes = &fibers[w * kLanes];
  const bool downwards = random_bits() & 1;
  for (unsigned i = 0; i < warp.lanes; ++i) resume(lanes[downwards ? warp.lanes - 1 - i : i]);

  const Fiber* waiting = nullptr;
  for (unsigned i = 0; i < warp.lanes && waiting == nullptr; ++i) {
    if (!lanes[i].finished && lanes[i].with_warp) waiting = &lanes[i];
  }
  warp.running = waiting != nullptr;
  if (!warp.running) return;
  for (unsigned i = 0; i < warp.lanes; ++i) {
    if (lanes[i].finished) {
      fail("some lanes of a warp returned while others wait at a warp operation",
           waiting->operation);
    }
    if (!lanes[i].with_warp) {
      fail("some lanes of a warp wait at a barrier while others wait at a warp operation",
           lanes[i].operation, waiting->operation);
    }
    if (!(lanes[i].operation == waiting->operation)) {
      fail("lanes of a warp wait at different warp operations", waiting->operation,
           lanes[i].operation);
    }
  }
}

// Runs all warps until their threads wait at a barrier or have returned.
void run_to_barrier(unsigned number) {
  const uint32_t bits = random_bits();
  const bool downwards = bits & 1, in_turn = bits & 2;
  for (unsigned w = 0; w < number; ++w) warps[w].running = true;
  for (bool again = true; again;) {
    again = false;
    for (unsigned i = 0; i < number; ++i) {
      const unsigned w = downwards ? number - 1 - i : i;
      if (!warps[w].running) continue;
      do run_warp(w);
      while (warps[w].running && !in_turn);
      again |= warps[w].running;
    }
  }
}

void run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) {
    fibers[t].finished = false;
    fibers[t].thread = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
  }
  const unsigned number = (threads + kLanes - 1) / kLanes;
  for (unsigned w = 0; w < number; ++w) warps[w].lanes = std::min(kLanes, threads - w * kLanes);
  for (;;) {
    run_to_barrier(number);
    const Fiber* waiting = nullptr;
    unsigned finished = 0;
    for (unsigned t = 0; t < threads; ++t) {
      const Fiber& fiber = fibers[t];
      if (fiber.finished) {
        ++finished;
      } else if (waiting == nullptr) {
        waiting = &fiber;
      } else if (!(fiber.operation == waiting->operation)) {
        fail("threads of a block wait at different barriers", waiting->operation, fiber.operation);
      }
    }
    if (finished == threads) return;
    if (finished > 0) {
      fail("some threads of a block returned while others wait at a barrier", waiting->operation);
    }
  }
}

// The running thread's place in its block.
unsigned warp_index() { return (running - fibers.data()) / kLanes; }
unsigned lane_index() { return (running - fibers.data()) % kLanes; }

// Where the lanes of the running thread's warp put what they bring to the operation that comes.
Deposit* deposits() {
  Warp& warp = warps[warp_index()];
  return warp.deposits[warp.parity];
}

void wait(const Operation& operation, bool with_warp) {
  running->operation = operation;
  running->with_warp = with_warp;
  yield();
}

void check_mask(const Operation& operation, unsigned mask) {
  if (mask != 0xffffffff) fail("only full masks are supported", operation);
}

void check_full_warp(const Operation& operation) {
  if (warps[warp_index()].lanes != kLanes) fail("a warp of fewer than 32 lanes", operation);
}

float2 unpack(uint32_t pair, bool bfloat16) {
  const uint16_t low = pair & 0xffff, high = pair >> 16;
  return bfloat16 ? __bfloat1622float2({{low}, {high}}) : __half22float2({{low}, {high}});
}

// Registers of pairs of A: (row t / 4, k 2q and 2q + 1), where q = t % 4, then row t / 4 + 8, then
// both for k + 8. B: (k 2q and 2q + 1, n t / 4), then k + 8. D: (row t / 4, n 2q and 2q + 1), then
// row t / 4 + 8.
void mma(const Operation& operation, float (&d)[4], const uint32_t* a, const uint32_t* b,
         unsigned k, bool bfloat16) {
  check_full_warp(operation);
  const Deposit* all = deposits();
  const unsigned lane = lane_index();
  Deposit& own = deposits()[lane];
  for (unsigned i = 0; i < k / 4; ++i) {
    const float2 pair = unpack(a[i], bfloat16);
    own.a[2 * i] = pair.x;
    own.a[2 * i + 1] = pair.y;
  }
  for (unsigned i = 0; i < k / 8; ++i) {
    const float2 pair = unpack(b[i], bfloat16);
    own.b[2 * i] = pair.x;
    own.b[2 * i + 1] = pair.y;
  }
  wait(operation, true);
  for (unsigned i = 0; i < 4; ++i) {
    const Deposit* row = &all[lane / 4 * 4];
    const Deposit* column = &all[(lane % 4 * 2 + i % 2) * 4];
    for (unsigned j = 0; j < k; ++j) {
      const unsigned q = j % 8 / 2;
      d[i] += row[q].a[j / 8 * 4 + i / 2 * 2 + j % 2] * column[q].b[j / 8 * 2 + j % 2];
    }
  }
}

}  // namespace

cudaError_t set_shared_limit(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kSharedMost) return cudaErrorInvalidValue;
  shared_limits[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                   void (*body)(void*), void* context) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 ||
      grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const auto limit = shared_limits.find(kernel);
  const size_t allowed = std::max(kSharedDefault, limit == shared_limits.end() ? 0 : limit->second);
  if (shared_bytes > allowed) return cudaErrorInvalidValue;

  kernel_body = body;
  kernel_context = context;
  gridDim = grid;
  blockDim = block;
  while (fibers.size() < threads) create(fibers.emplace_back());

  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_bits);
  char* shared = reinterpret_cast<char*>(effnet::cuda::dynamic_shared_memory);
  ASAN_POISON_MEMORY_REGION(shared + shared_bytes, kSharedMost - shared_bytes);
  for (const uint64_t b : order) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    std::memset(shared, 0xff, shared_bytes);
    run_block(threads);
  }
  ASAN_UNPOISON_MEMORY_REGION(shared, kSharedMost);
  return cudaSuccess;
}

uint64_t shuffle_bits(const Operation& operation, unsigned mask, Shuffle shuffle, uint64_t bits,
                      unsigned operand, int width) {
  check_mask(operation, mask);
  if (width < 1 || width > static_cast<int>(kLanes) || (width & (width - 1)) != 0) {
    fail("the width is no power of two up to 32", operation);
  }
  const Deposit* all = deposits();
  const unsigned lane = lane_index();
  deposits()[lane].bits = bits;
  wait(operation, true);

  // As PTX's shfl.sync: five bits of the operand count, and a lane beyond the group of `width`
  // lanes stands for the own one.
  operand %= kLanes;
  const unsigned first = lane / width * width, last = first + width - 1;
  unsigned source = shuffle == Shuffle::index  ? first + operand % width
                    : shuffle == Shuffle::down ? lane + operand
                                               : lane ^ operand;
  if (source > last) source = lane;
  return source < warps[warp_index()].lanes ? all[source].bits : ~uint64_t{0};
}

void ldmatrix(const Operation& operation, uint32_t* r, unsigned matrices, bool transposed,
              const void* row) {
  check_full_warp(operation);
  const Deposit* all = deposits();
  const unsigned lane = lane_index();
  if (lane < 8 * matrices) {
    using Word __attribute__((may_alias)) = const uint32_t;
    const auto offset = reinterpret_cast<uintptr_t>(row) -
                        reinterpret_cast<uintptr_t>(effnet::cuda::dynamic_shared_memory);
    if (offset >= kSharedMost) fail("a row outside of shared memory", operation);
    if (offset % 16 != 0) fail("a row that is not aligned to 16 bytes", operation);
    // Loads that AddressSanitizer checks: the launch may have asked for less than there is.
    for (unsigned i = 0; i < 4; ++i) deposits()[lane].row[i] = static_cast<Word*>(row)[i];
  }
  wait(operation, true);

  const auto element = [&](unsigned matrix, unsigned i, unsigned j) {
    return all[matrix * 8 + i].row[j / 2] >> (j % 2 * 16) & 0xffff;
  };
  const unsigned i = lane / 4, j = lane % 4 * 2;
  for (unsigned m = 0; m < matrices; ++m) {
    r[m] = transposed ? element(m, j, i) | element(m, j + 1, i) << 16
                      : element(m, i, j) | element(m, i, j + 1) << 16;
  }
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16,
                  const char* file, int line) {
  const char* name = bfloat16 ? "mma_m16n8k16 of bfloat16" : "mma_m16n8k16 of float16";
  mma({name, file, line}, d, a, b, 16, bfloat16);
}

void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], bool bfloat16,
                 const char* file, int line) {
  const char* name = bfloat16 ? "mma_m16n8k8 of bfloat16" : "mma_m16n8k8 of float16";
  mma({name, file, line}, d, a, b, 8, bfloat16);
}

uint32_t cvt_rna_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  // Half a unit in the last of TF32's places, away from zero; an infinity or a NaN has no room.
  if (std::isfinite(x)) bits += 0x1000;
  return bits & ~uint32_t{0x1fff};
}

void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      const char* file, int line) {
  const Operation operation{"mma_m16n8k8 of TF32", file, line};
  check_full_warp(operation);
  const Deposit* all = deposits();
  const unsigned lane = lane_index();
  Deposit& own = deposits()[lane];
  const auto operand = [](uint32_t bits) { return __int_as_float(bits & ~uint32_t{0x1fff}); };
  for (unsigned i = 0; i < 4; ++i) own.a[i] = operand(a[i]);
  for (unsigned i = 0; i < 2; ++i) own.b[i] = operand(b[i]);
  wait(operation, true);
  for (unsigned i = 0; i < 4; ++i) {
    const Deposit* row = &all[lane / 4 * 4];
    const Deposit* column = &all[(lane % 4 * 2 + i % 2) * 4];
    double sum = d[i];
    for (unsigned k = 0; k < 8; ++k) {
      sum += double{row[k % 4].a[k / 4 * 2 + i / 2]} * column[k % 4].b[k / 4];
    }
    float rounded = static_cast<float>(sum);
    if (std::fabs(rounded) > std::fabs(sum)) rounded = std::nextafter(rounded, 0.f);
    d[i] = rounded;
  }
}

}  // namespace cuda_emulator

void __syncthreads(const char* file, int line) {
  cuda_emulator::wait({"__syncthreads", file, line}, false);
}

void __syncwarp(unsigned mask, const char* file, int line) {
  const cuda_emulator::Operation operation{"__syncwarp", file, line};
  cuda_emulator::check_mask(operation, mask);
  cuda_emulator::wait(operation, true);
}

namespace cuda_emulator {

void cp_async(void* shared, const void* global, int bytes, int size) {
  Fiber& fiber = *running;
  if (fiber.copy_count == kMostCopies) fail("too many asynchronous copies before a wait");
  if (reinterpret_cast<uintptr_t>(shared) % size != 0 ||
      reinterpret_cast<uintptr_t>(global) % size != 0) {
    fail("an asynchronous copy is not aligned to its bytes");
  }
  Fiber::Copy& copy = fiber.copies[fiber.copy_count++];
  copy = {shared, {}, fiber.copy_group, size};
  std::memcpy(copy.data, global, bytes);
  std::memset(shared, 0xff, size);
}

void cp_async_commit_group() { ++running->copy_group; }

void cp_async_wait_group(unsigned pending) {
  Fiber& fiber = *running;
  unsigned done = 0;
  // Committed, and before the last `pending` groups that are.
  while (done < fiber.copy_count && fiber.copies[done].group + pending < fiber.copy_group) {
    std::memcpy(fiber.copies[done].shared, fiber.copies[done].data, fiber.copies[done].size);
    ++done;
  }
  std::copy(fiber.copies + done, fiber.copies + fiber.copy_count, fiber.copies);
  fiber.copy_count -= done;
}

void cp_async_wait_all() {
  cp_async_commit_group();
  cp_async_wait_group(0);
}

}  // namespace cuda_emulator

// Few multiprocessors make launchers give a block much work, many make them cut the work small:
// tests ask for both. So it is with shared memory, of which some devices have 100 KB.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor) {
    const char* bytes = std::getenv("CUDA_EMULATOR_SHARED_BYTES");
    *value = bytes == nullptr ? kSharedMost + 1024 : std::atoi(bytes);
    return cudaSuccess;
  }
  const char* multiprocessors = std::getenv("CUDA_EMULATOR_MULTIPROCESSORS");
  *value = multiprocessors == nullptr ? 132 : std::atoi(multiprocessors);
  return cudaSuccess;
}
