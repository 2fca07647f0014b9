// gemm_sm90a.cu or conv_sm90a.cu (FXQUANT_SOURCE) on the host, for tests on machines without a GPU.
//
// fxquant_visit gives FinishNode every subtile of every tile, thread by thread, in the partition
// that CUTLASS's collective makes of them. fxquant_run is the library's own: the driver and the
// runtime that it meets are the ones below, which keep count and refuse what they are told to.
#include <cuda_runtime.h>

#define call_cuTensorMapEncodeTiled stock_call_cuTensorMapEncodeTiled
#define call_cuTensorMapEncodeIm2col stock_call_cuTensorMapEncodeIm2col
#include "cutlass/cuda_host_adapter.hpp"
#undef call_cuTensorMapEncodeTiled
#undef call_cuTensorMapEncodeIm2col

namespace played {

int described = 0, launched = 0;  // descriptors asked for and kernels launched, so far
int refused = -1;                 // the descriptor that is refused

inline CUresult describe() {
  return described++ == refused ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

template <class... Arguments>
cudaError_t set_attribute(Arguments...) {
  return cudaSuccess;
}

template <class... Arguments>
cudaError_t launch(Arguments...) {
  ++launched;
  return cudaSuccess;
}

}  // namespace played

namespace cutlass {

template <class... Arguments>
CUresult call_cuTensorMapEncodeTiled(Arguments...) {
  return played::describe();
}

template <class... Arguments>
CUresult call_cuTensorMapEncodeIm2col(Arguments...) {
  return played::describe();
}

}  // namespace cutlass

#define cudaFuncSetAttribute played::set_attribute
#define cudaLaunchKernelExC played::launch
#include FXQUANT_SOURCE
#undef cudaFuncSetAttribute
#undef cudaLaunchKernelExC

#include "finish_all.h"

namespace fxquant {
namespace {

using namespace cute;

// The values of one thread of one tile go through `visit` as in the collective's store: its
// partition of sums and coordinates (sm90_epilogue_tma_warpspecialized.hpp). How many were written.
int64_t visit_thread(const Finish& finish, const int32_t* sums, int tile_m, int tile_n,
                     int thread) {
  const int m = finish.m, n = finish.n;
  typename Kernel::TiledMma mma;
  const auto subtile = typename End::EpilogueTile{};
  const auto block = take<0, 2>(typename End::CtaTileMNK{});
  const auto tile =
      local_tile(make_identity_tensor(make_shape(m, n)), block, make_coord(tile_m, tile_n));
  const auto in_sums = mma.get_slice(thread).partition_C(tile);
  auto fragment = partition_fragment_C(mma, block);
  for (int i = 0; i < int(size(fragment)); ++i) {
    const int row = get<0>(in_sums(i)), column = get<1>(in_sums(i));
    constexpr int kGarbage = 123456789;  // what is multiplied past the edges counts for nothing
    fragment(i) = row < m && column < n ? sums[int64_t(row) * n + column] : kGarbage;
  }

  const auto copies = make_tiled_copy_S(Copy_Atom<typename End::CopyOpR2S, Out>{},
                                        make_tiled_copy_C_atom(typename End::CopyAtomC{}, mma));
  const auto own = copies.get_slice(thread);
  const auto where = own.partition_S(flat_divide(tile, subtile));
  auto coordinates = make_coord_tensor(where.layout());
  const auto residue = make_coord(m, n) - where(_0{});
  using Node = FinishNode::Callbacks<decltype(coordinates)>;
  Node node(
      coordinates, finish, finish.m - int(get<0>(residue)), finish.n - int(get<1>(residue)));

  constexpr int kValues = End::DispatchPolicy::FragmentSize;
  const auto retiled = own.retile_S(fragment);
  const auto runs = recast<cutlass::Array<int32_t, kValues>>(retiled);
  const auto mma_m = size<0>(block) / size<1>(retiled);
  const auto mma_n = size<1>(block) / size<2>(retiled);
  static_assert(size<0>(subtile) == mma_m && size<1>(subtile) <= mma_n);
  Out* out = static_cast<Out*>(finish.epilogue.out);
  int64_t written = 0;
  for (int sub_n = 0; sub_n < int(size<4>(where)); ++sub_n)
    for (int sub_m = 0; sub_m < int(size<3>(where)); ++sub_m) {
      const auto of_mma = runs(_, sub_m, sub_n * size<1>(subtile) / mma_n);
      const auto run = of_mma(sub_n % (mma_n / size<1>(subtile)));
      const auto results = node.visit(run, 0, sub_m, sub_n);
      const auto at = where(_, _, _, sub_m, sub_n);
      for (int i = 0; i < kValues; ++i) {
        const int row = get<0>(at(i)), column = get<1>(at(i));
        if (row < m && column < n) out[int64_t(row) * n + column] = results[i], ++written;
      }
    }
  return written;
}

int64_t visit(const Call& c, const int32_t* sums) {
  const Finish finish = finish_of(c);
  const auto block = typename End::CtaTileMNK{};
  int64_t written = 0;
  for (int m = 0; m * size<0>(block) < c.m; ++m)
    for (int n = 0; n * size<1>(block) < c.n; ++n)
      for (int thread = 0; thread < size(typename Kernel::TiledMma{}); ++thread)
        written += visit_thread(finish, sums, m, n, thread);
  return written;
}

}  // namespace
}  // namespace fxquant

// call->epilogue.out from the sums; how many values were written.
FXQUANT_API int64_t fxquant_visit(const fxquant::Call* call, const int32_t* sums) {
  return fxquant::visit(*call, sums);
}

// The same by epilogue.h.
FXQUANT_API void fxquant_finish(const fxquant::Call* call, const int32_t* sums) {
  fxquant::finish_all<2>(*call, sums);
}

// fxquant_run with descriptor `refused` (below 0: none) refused by the driver. Sets how many
// descriptors were asked for and how many kernels were launched.
FXQUANT_API int fxquant_run_refusing(const fxquant::Call* call, int refused, int* counts) {
  played::described = played::launched = 0;
  played::refused = refused;
  const int status = fxquant_run(call, nullptr);
  counts[0] = played::described, counts[1] = played::launched;
  return status;
}
