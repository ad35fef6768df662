// Runs CUDA kernels on the CPU, under AddressSanitizer.
//
// Blocks run one after another in a shuffled order, so that a block that relies on another one of
// its launch is found out. The threads of a block are fibers: each runs until it waits at
// __syncthreads or returns, upwards or downwards through the block by chance, so that a missing
// barrier changes results. Before each block its shared memory is filled with NaN, and what lies
// beyond the size that the launch asked for is poisoned. A launch that a GPU would refuse returns
// the error; a barrier that not all threads of a block reach ends the process with a message.
#include <cuda_runtime.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

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

// A call of __syncthreads in the source; the compiler may have made several of it.
struct Barrier {
  const char* file = "";
  int line = 0;
  bool operator==(const Barrier& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
};

struct Fiber {
  char* stack = nullptr;
  void* stack_pointer = nullptr;
  uint3 thread{};
  bool finished = true;
  Barrier barrier;  // the one it waits at
};

std::vector<Fiber> fibers;
Fiber* running = nullptr;
void* scheduler_stack_pointer = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
void (*kernel_body)(void*) = nullptr;
void* kernel_context = nullptr;
std::unordered_map<const void*, size_t> shared_limits;
std::mt19937 random_bits(1);

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulator: %s (block %u)\n", what, blockIdx.x);
  std::abort();
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

void run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) {
    fibers[t].finished = false;
    fibers[t].thread = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
  }
  for (;;) {
    const bool downwards = random_bits() & 1;
    unsigned waiting = 0;
    Barrier barrier;
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[downwards ? threads - 1 - i : i];
      resume(fiber);
      if (fiber.finished) continue;
      if (waiting > 0 && !(fiber.barrier == barrier)) {
        fail("threads of a block wait at different barriers");
      }
      barrier = fiber.barrier;
      ++waiting;
    }
    if (waiting == 0) return;
    if (waiting < threads) fail("some threads of a block returned while others wait at a barrier");
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

}  // namespace cuda_emulator

void __syncthreads(const char* file, int line) {
  cuda_emulator::running->barrier = {file, line};
  cuda_emulator::yield();
}

// Few multiprocessors make launchers give a block much work, many make them cut the work small:
// tests ask for both.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const char* multiprocessors = std::getenv("CUDA_EMULATOR_MULTIPROCESSORS");
  *value = multiprocessors == nullptr ? 132 : std::atoi(multiprocessors);
  return cudaSuccess;
}
