// What gemm_sm80.cu and conv_sm80.cu share: the tile, the epilogue as CUTLASS 2.x calls it, the
// launch.
#pragma once

// A warning of CUTLASS's conv3d_problem_size.h about what no kernel here calls.
#pragma nv_diag_suppress 20013, 20015

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/thread/linear_combination.h"
#include "cutlass/epilogue/threadblock/default_epilogue_tensor_op.h"  // before the visitor's
#include "cutlass/epilogue/threadblock/default_thread_map_tensor_op.h"
#include "cutlass/epilogue/threadblock/epilogue_with_visitor_callbacks.h"
#include "cutlass/gemm/gemm.h"
#include "cutlass/numeric_types.h"

#include "checks.h"
#include "epilogue.h"

// The build defines these; the defaults are for an s8 library. A warp makes FXQUANT_WARP_M x
// FXQUANT_WARP_N of a block's FXQUANT_TILE_M x FXQUANT_TILE_N results, FXQUANT_TILE_K products at a
// time, with FXQUANT_STAGES of them in shared memory.
#ifndef FXQUANT_TILE_M
#define FXQUANT_TILE_M 128
#define FXQUANT_TILE_N 128
#define FXQUANT_TILE_K 64
#define FXQUANT_WARP_M 64
#define FXQUANT_WARP_N 64
#define FXQUANT_STAGES 4
#endif
#ifndef FXQUANT_TYPES
#define FXQUANT_TYPES 0
#endif

namespace fxquant {

enum Types { kS8 = 0, kS8S4 = 1, kS4 = 2 };
constexpr Types kTypes = Types(FXQUANT_TYPES);

using X = std::conditional_t<kTypes == kS4, cutlass::int4b_t, int8_t>;
using Weight = std::conditional_t<kTypes == kS8, int8_t, cutlass::int4b_t>;
constexpr int kXBits = cutlass::sizeof_bits<X>::value;
constexpr int kWeightBits = cutlass::sizeof_bits<Weight>::value;

using Tile = cutlass::gemm::GemmShape<FXQUANT_TILE_M, FXQUANT_TILE_N, FXQUANT_TILE_K>;
using Warp = cutlass::gemm::GemmShape<FXQUANT_WARP_M, FXQUANT_WARP_N, FXQUANT_TILE_K>;
using Instruction = cutlass::gemm::GemmShape<16, 8, 256 / kXBits>;  // mma.sync m16n8k32, m16n8k64
constexpr int kStages = FXQUANT_STAGES;

// How finished sums are handed out: runs of kRun columns, as for an int32 output of 16-byte
// accesses. The runs of a warp's access are adjacent, whatever the type that is then stored.
constexpr int kRun = 4;
using Sums =
    cutlass::epilogue::thread::LinearCombination<int32_t, kRun, int32_t, float>;
using ThreadMap = typename cutlass::epilogue::threadblock::DefaultThreadMapTensorOp<
    Tile, Warp, 1, int32_t, kRun>::Type;

// The callbacks of CUTLASS's EpilogueWithVisitorCallbacks: it takes the sums of a tile through
// shared memory in steps of 8 rows per warp, and shows each thread its runs.
struct Visitor {
  using Arguments = Finish;
  using Params = Finish;
  struct SharedStorage {};

  template <class Problem>
  static Params to_underlying_arguments(const Problem&, const Arguments& finish, void*) {
    return finish;
  }

  const Finish* finish;

  CUTLASS_HOST_DEVICE Visitor(const Params& params, const SharedStorage&) : finish(&params) {}

  // Where a thread's runs lie is what CUTLASS's PredicatedTileIterator makes of the same ThreadMap:
  // initial_offset, plus Delta per row and column of an access, plus Shape::kRow rows a step (Count
  // has no groups or clusters to step over, which is asserted).
  struct Callbacks {
    static constexpr int kRows = ThreadMap::Iterations::kRow;
    static constexpr int kColumns = ThreadMap::Iterations::kColumn;
    static_assert(ThreadMap::Iterations::kGroup == 1 && ThreadMap::Iterations::kCluster == 1 &&
                  ThreadMap::Count::kGroup == 1 && ThreadMap::Count::kCluster == 1 &&
                  ThreadMap::Count::kColumn == 1 && ThreadMap::kElementsPerAccess == kRun);

    const Finish& finish;
    int first_row, first_column;
    Columns<kRun> columns[kColumns];
    Raw<kRun> residuals[kRows][kColumns];
    Place at;

    template <int... I>
    CUTLASS_HOST_DEVICE Callbacks(const Finish& finish_, int row, int column,
                                  std::integer_sequence<int, I...>)
        : finish(finish_),
          first_row(row),
          first_column(column),
          columns{Columns<kRun>(finish_, column + I * ThreadMap::Delta::kColumn)...} {}

    CUTLASS_HOST_DEVICE int row(int step, int i) const {
      return first_row + step * ThreadMap::Shape::kRow + i * ThreadMap::Delta::kRow;
    }
    CUTLASS_HOST_DEVICE int column(int i) const {
      return first_column + i * ThreadMap::Delta::kColumn;
    }
    CUTLASS_HOST_DEVICE bool exists(int m, int n) const { return m < finish.m && n < finish.n; }

    CUTLASS_HOST_DEVICE void begin_epilogue() {}

    // The residual's loads are on their way while the sums cross shared memory.
    CUTLASS_HOST_DEVICE void begin_step(int step) {
      if (!finish.epilogue.residual) return;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kRows; ++i) {
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < kColumns; ++j)
          if (exists(row(step, i), column(j)))
            residuals[i][j] = residual_of<kRun>(finish, row(step, i), column(j));
      }
    }

    CUTLASS_HOST_DEVICE void begin_row(int) {}

    CUTLASS_HOST_DEVICE void visit(int step, int i, int j, int,
                                   const cutlass::Array<int32_t, kRun>& sums) {
      const int m = row(step, i), n = column(j);
      if (!exists(m, n)) return;
      if (j == 0) at = place(finish, m);  // a row's first run exists if any does
      const auto y = values(finish, columns[j], at, n, residuals[i][j], sums);
      store(finish, columns[j], m, n, y);
    }

    CUTLASS_HOST_DEVICE void end_row(int) {}
    CUTLASS_HOST_DEVICE void end_step(int) {}
    CUTLASS_HOST_DEVICE void end_epilogue() {}
  };

  template <class Problem>
  CUTLASS_HOST_DEVICE Callbacks get_callbacks(cutlass::gemm::GemmCoord tile, int thread,
                                              const Problem&) const {
    const cutlass::MatrixCoord offset = ThreadMap::initial_offset(thread);
    return Callbacks(*finish, tile.m() * Tile::kM + offset.row(),
                     tile.n() * Tile::kN + offset.column(),
                     std::make_integer_sequence<int, Callbacks::kColumns>());
  }
};

// The epilogue of a kernel whose stock one is `Stock`. One copy of the visitor's code serves all
// steps.
template <class Stock>
struct Ending
    : cutlass::epilogue::threadblock::EpilogueWithVisitorCallbacks<Stock, Visitor, 1, false> {
  static_assert(std::is_same_v<typename Stock::OutputTileIterator::ThreadMap, ThreadMap>);
  using cutlass::epilogue::threadblock::EpilogueWithVisitorCallbacks<
      Stock, Visitor, 1, false>::EpilogueWithVisitorCallbacks;
};

inline thread_local cudaError_t last_error = cudaSuccess;

// Queues the kernel: no synchronisation, no allocation, so that a graph may capture it.
template <class Kernel>
Status launch(const typename Kernel::Params& params, dim3 grid, void* stream);

inline bool fits(dim3 grid) { return grid.y <= 65535 && grid.z <= 65535; }

#if defined(__CUDACC__)  // a test on a CPU has a launch of its own

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreadCount, 1)
    entry(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(16) char shared[];
  Kernel()(params, *reinterpret_cast<typename Kernel::SharedStorage*>(shared));
}

// What a block takes beyond 48 KiB has to be asked for, once per device.
template <class Kernel>
cudaError_t allow_shared_memory() {
  static std::atomic<uint64_t> allowed{0};
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if (allowed.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           int(sizeof(typename Kernel::SharedStorage)));
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

template <class Kernel>
Status launch(const typename Kernel::Params& params, dim3 grid, void* stream) {
  last_error = allow_shared_memory<Kernel>();
  if (last_error == cudaSuccess) {
    entry<Kernel><<<grid, Kernel::kThreadCount, sizeof(typename Kernel::SharedStorage),
                    static_cast<cudaStream_t>(stream)>>>(params);
    last_error = cudaGetLastError();
  }
  return last_error == cudaSuccess ? kOk : kLaunch;
}

#endif

}  // namespace fxquant

FXQUANT_API int fxquant_abi_version() { return FXQUANT_ABI; }
FXQUANT_API int64_t fxquant_workspace(const fxquant::Call*) { return 0; }
FXQUANT_API const char* fxquant_last_error() { return cudaGetErrorString(fxquant::last_error); }
