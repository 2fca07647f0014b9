// Enough of CUDA for a C++ compiler to make kernels of a .cu file that run on a CPU: the same source,
// included after this. What is checked beyond the results:
//  - a barrier or shuffle that some thread of the block or warp never reaches ends the program;
//  - the threads of a block take turns in an order that fxquant_test_order chooses: results that
//    change with it show a missing barrier.
//
// Each thread of a block is a fiber (ucontext); blocks follow one another. One launch at a time.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) double2 {
  double x, y;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr size_t kStack = 64 << 10;
constexpr unsigned kWarp = 32;

// Where threads wait for one another. Everyone who comes waits until all are there.
struct Meeting {
  unsigned arrived = 0, left = 0;
  uint64_t generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  const Meeting* waits = nullptr;
  uint64_t since = 0;
  bool is_done = false;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current, threads;
inline Meeting block;
inline Meeting warps[32];
inline char slots[32][kWarp][16];
inline const std::function<void()>* body;
inline int order = 0;
inline cudaError_t error = cudaSuccess;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "cuda_on_cpu: %s (block %u %u %u)\n", why, blockIdx.x, blockIdx.y,
               blockIdx.z);
  std::abort();
}

inline void wait_at(Meeting& meeting, unsigned needed) {
  if (++meeting.arrived == needed) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  Fiber& me = fibers[current];
  me.waits = &meeting;
  me.since = meeting.generation;
  swapcontext(&me.context, &scheduler);
}

inline void start() {
  (*body)();
  fibers[current].is_done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

inline unsigned turn(unsigned i) {
  if (order == 1) return threads - 1 - i;
  if (order == 2) return i * 1021 % threads;  // a prime, and `threads` a multiple of 32
  return i;
}

inline void prepare(Fiber& fiber, unsigned i) {
  fiber.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
  fiber.waits = nullptr;
  fiber.is_done = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, start, 0);
}

inline void run_block() {
  block = Meeting();
  for (Meeting& warp : warps) warp = Meeting();
  for (unsigned i = 0; i < threads; ++i) prepare(fibers[i], i);
  for (unsigned left = threads; left > 0;) {
    bool has_moved = false;
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[turn(i)];
      if (fiber.is_done || (fiber.waits && fiber.waits->generation == fiber.since)) continue;
      current = turn(i);
      threadIdx = fiber.thread;
      fiber.waits = nullptr;
      has_moved = true;
      swapcontext(&scheduler, &fiber.context);
      if (fiber.is_done) --left;
    }
    if (!has_moved) fail("threads wait at a barrier or shuffle that others have passed or missed");
  }
  if (block.arrived) fail("a barrier was left half full");
}

template <class... Wanted, class... Given>
void launch(void (*kernel)(Wanted...), dim3 grid, dim3 size, Given... given) {
  threads = size.x * size.y * size.z;
  const bool is_valid = grid.x && grid.y && grid.z && grid.y < 65536 && grid.z < 65536 &&
                        grid.x < 1u << 31 && threads && threads <= 1024 && threads % kWarp == 0;
  if (!is_valid) {
    error = cudaErrorInvalidConfiguration;
    return;
  }
  while (fibers.size() < threads) fibers.emplace_back();
  const std::function<void()> call = [&] { kernel(given...); };
  body = &call;
  blockDim = size;
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block();
      }
}

}  // namespace cuda_on_cpu

#define FXQUANT_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), cuda_on_cpu::launch(kernel, grid, block, __VA_ARGS__))

inline void __syncthreads() { cuda_on_cpu::wait_at(cuda_on_cpu::block, cuda_on_cpu::threads); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  using namespace cuda_on_cpu;
  static_assert(sizeof(T) <= 16, "as wide as a slot");
  if (mask != 0xffffffffu) fail("a shuffle of less than a warp");
  const unsigned warp = current / kWarp, lane = current % kWarp;
  std::memcpy(slots[warp][lane], &value, sizeof(T));
  wait_at(warps[warp], kWarp);
  T other;
  std::memcpy(&other, slots[warp][lane ^ unsigned(distance)], sizeof(T));
  wait_at(warps[warp], kWarp);  // all have read
  return other;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t last = cuda_on_cpu::error;
  cuda_on_cpu::error = cudaSuccess;
  return last;
}

inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

// The next launch fails.
extern "C" __attribute__((visibility("default"))) void fxquant_test_fail() {
  cuda_on_cpu::error = cudaErrorInvalidConfiguration;
}

// 0: threads take turns forwards, 1: backwards, 2: in strides.
extern "C" __attribute__((visibility("default"))) void fxquant_test_order(int order) {
  cuda_on_cpu::order = order;
}
