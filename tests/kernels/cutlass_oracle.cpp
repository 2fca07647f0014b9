// gemm_sm80.cu or conv_sm80.cu on a CPU, for tests on machines without a GPU. Compiled by g++ with
// FXQUANT_SOURCE the file and FXQUANT_IS_CONV whether it is the convolution.
//
// fxquant_run plays the kernel itself, thread by thread: CUTLASS's iterators, shared memory layouts
// and epilogue and our visitor are the very code that a GPU gets. Only what PTX does is written anew
// here: ldmatrix, mma.sync, shuffles, barriers (PTX ISA, "Warp-level matrix instructions").
// fxquant_reference computes the sums with CUTLASS's reference for hosts, fxquant_finish what
// epilogue.h makes of them.

#include <ucontext.h>
#include <vector_types.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

// ---- threads: a block's run in turn, each up to its next barrier ----

namespace oracle {

constexpr size_t kStack = 256 << 10;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  // What a warp's other threads may see, of two collective operations in a row: a thread overwrites
  // the first when it starts the third, and then all have been through the second's barrier.
  uint32_t shown[2][8];
  int turn = 0;
};

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline const std::function<void()>* body;

}  // namespace oracle

inline uint3 threadIdx, blockIdx, blockDim, gridDim;

// Every thread of a block meets the same barriers in the same order, a warp's or the block's: one
// step of all threads serves for either.
inline void __syncthreads() {
  oracle::Thread& self = oracle::threads[threadIdx.x];
  swapcontext(&self.context, &oracle::scheduler);
}

// Never called: CUTLASS names them in what is not used here.
int __syncthreads_and(int);
void __syncwarp(unsigned mask = ~0u);

namespace oracle {

inline void start() {
  (*body)();
  threads[threadIdx.x].done = true;
  __syncthreads();
}

inline void run_block(unsigned count, const std::function<void()>& kernel) {
  threads = std::vector<Thread>(count);
  body = &kernel;
  for (Thread& thread : threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, start, 0);
  }
  while (!threads.back().done)
    for (threadIdx.x = 0; threadIdx.x < count; ++threadIdx.x)
      if (!threads[threadIdx.x].done) swapcontext(&scheduler, &threads[threadIdx.x].context);
}

inline int lane() { return int(threadIdx.x % 32); }

// Shows `words` to the warp; what lane l showed is then (*this)[l].
struct Exchange {
  int warp, turn;

  template <class... Words>
  explicit Exchange(Words... words) : warp(int(threadIdx.x / 32 * 32)) {
    Thread& self = threads[threadIdx.x];
    turn = self.turn ^= 1;
    const uint32_t all[] = {words...};
    std::copy(std::begin(all), std::end(all), self.shown[turn]);
    __syncthreads();
  }
  const uint32_t* operator[](int other) const { return threads[warp + other].shown[turn]; }
};

// ldmatrix.x{N}: lane l gets word l % 4 of row l / 4 of every 8x8 matrix of 16 bits; the addresses of
// matrix j's rows are those of lanes 8j to 8j + 7.
template <class Words>
void ldmatrix(Words& to, const void* row) {
  const auto address = reinterpret_cast<uintptr_t>(row);
  const Exchange rows{uint32_t(address), uint32_t(address >> 32)};
  for (int j = 0; j < int(to.size()); ++j) {
    const uint32_t* from = rows[8 * j + lane() / 4];
    const uintptr_t start = from[0] | uintptr_t(from[1]) << 32;
    memcpy(&to[j], reinterpret_cast<const char*>(start) + 4 * (lane() % 4), 4);
  }
}

template <int bits>
int32_t dot(uint32_t a, uint32_t b) {
  int32_t sum = 0;
  for (int shift = 32 - bits; shift >= 0; shift -= bits)
    sum += (int32_t(a << shift) >> (32 - bits)) * (int32_t(b << shift) >> (32 - bits));
  return sum;
}

// mma.sync.m16n8k32.s8 and m16n8k64.s4. In words: lane l has of A the rows l / 4 and l / 4 + 8 at
// word l % 4, then the same at word l % 4 + 4; of B the column l / 4 at those two words; of C and D
// the columns l % 4 * 2 and the next, of row l / 4 and then of row l / 4 + 8.
template <class D, class A, class B, class C>
void mma(D& d, const A& a, const B& b, const C& c) {
  constexpr int bits = 8 * int(sizeof(A)) / int(A::kElements);
  constexpr bool is_known = (bits == 8 || bits == 4) && sizeof(A) == 16 && sizeof(B) == 8;
  if constexpr (!is_known || !std::is_same_v<typename D::Element, int>) return abort();
  uint32_t words[6];
  memcpy(words, &a, 16);
  memcpy(words + 4, &b, 8);
  const Exchange all{words[0], words[1], words[2], words[3], words[4], words[5]};
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4, lower = i / 2, column = lane() % 4 * 2 + i % 2;
    int32_t sum = int32_t(c[i]);
    for (int word = 0; word < 4; ++word) {
      const uint32_t *left = all[row * 4 + word], *right = all[column * 4 + word];
      sum += dot<bits>(left[lower], right[4]) + dot<bits>(left[2 + lower], right[5]);
    }
    d[i] = typename D::Element(sum);
  }
}

}  // namespace oracle

inline uint32_t __shfl_up_sync(unsigned, uint32_t x, int delta) {
  const int from = oracle::lane() - delta;
  const oracle::Exchange all{x};
  return from < 0 ? x : all[from][0];
}

inline uint32_t __shfl_down_sync(unsigned, uint32_t x, int delta) {
  const int from = oracle::lane() + delta;
  const oracle::Exchange all{x};
  return from > 31 ? x : all[from][0];
}

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = x | uint64_t(y) << 32;
  uint32_t to = 0;
  for (int i = 0; i < 4; ++i)
    to |= uint32_t(bytes >> (8 * ((selector >> (4 * i)) & 7)) & 255) << (8 * i);
  return to;
}

// ---- CUTLASS, with the PTX of its device functions replaced ----

#define canonical_warp_idx_sync stock_canonical_warp_idx_sync
#include "cutlass/cutlass.h"
#undef canonical_warp_idx_sync
namespace cutlass {
inline int canonical_warp_idx_sync() { return int(threadIdx.x / 32); }
namespace arch {
inline int LaneId() { return oracle::lane(); }
inline int SmId() { return 0; }
}  // namespace arch
}  // namespace cutlass

// Where there is no PTX, CUTLASS's functions for single instructions do nothing but fail, in one of
// two ways; what they fail with is made to do their work, with their parameters.
#include "cutlass/functional.h"
#include "cutlass/gemm/gemm.h"
#undef CUTLASS_NOT_IMPLEMENTED
#define CUTLASS_NOT_IMPLEMENTED() abort()
#define __assert_fail(...) oracle::mma(d, a, b, c)
#include "cutlass/arch/mma.h"
#undef __assert_fail
#undef CUTLASS_NOT_IMPLEMENTED
#define CUTLASS_NOT_IMPLEMENTED() oracle::ldmatrix(D, ptr)
#include "cutlass/arch/memory_sm75.h"
#undef CUTLASS_NOT_IMPLEMENTED
#define CUTLASS_NOT_IMPLEMENTED() abort()

#include FXQUANT_SOURCE

#include "finish_all.h"

#include "cutlass/layout/matrix.h"
#include "cutlass/util/reference/host/convolution.h"
#include "cutlass/util/reference/host/gemm.h"

namespace fxquant {

template <class Kernel>
Status launch(const typename Kernel::Params& params, dim3 grid, void*) {
  auto shared = std::make_unique<typename Kernel::SharedStorage>();
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        memset(static_cast<void*>(shared.get()), 0x5a, sizeof(*shared));
        oracle::run_block(Kernel::kThreadCount, [&] { Kernel()(params, *shared); });
      }
  return kOk;
}

}  // namespace fxquant

extern "C" const char* cudaGetErrorString(cudaError_t) { return "there is no GPU"; }

// The sums of call->x and call->weight, [m][n].
FXQUANT_API void fxquant_reference(const fxquant::Call* call, int32_t* sums) {
  using namespace fxquant;
  const Call& c = *call;
  auto* x = static_cast<X*>(const_cast<void*>(c.x));
  auto* weight = static_cast<Weight*>(const_cast<void*>(c.weight));
#if FXQUANT_IS_CONV
  const auto layout = [](int n, int h, int w, int c) { return NHWC::packed({n, h, w, c}); };
  const cutlass::TensorRef<int32_t, NHWC> out(sums,
                                              layout(c.batch, c.out_height, c.out_width, c.n));
  cutlass::reference::host::Conv2dFprop<X, NHWC, Weight, NHWC, int32_t, NHWC, int32_t, int32_t>(
      problem_of(c), {x, layout(c.batch, c.height, c.width, c.channels)},
      {weight, layout(c.n, c.kernel_h, c.kernel_w, c.channels)}, out, out, 1, 0);
#else
  using cutlass::layout::ColumnMajor;
  using cutlass::layout::RowMajor;
  const cutlass::TensorRef<int32_t, RowMajor> out(sums, RowMajor(c.n));
  cutlass::reference::host::compute_gemm<X, RowMajor, Weight, ColumnMajor, int32_t, RowMajor,
                                         int32_t, int32_t>(
      {int(c.m), int(c.n), int(c.k)}, 1, {x, RowMajor(c.k)}, {weight, ColumnMajor(c.k)}, 0, out,
      out, 0);
#endif
}

// call->epilogue.out from the sums, in runs of `run` columns.
FXQUANT_API void fxquant_finish(const fxquant::Call* call, const int32_t* sums, int run) {
  switch (run) {
    case 1: return fxquant::finish_all<1>(*call, sums);
    case 2: return fxquant::finish_all<2>(*call, sums);
    case 4: return fxquant::finish_all<4>(*call, sums);
    default: return fxquant::finish_all<8>(*call, sums);
  }
}
