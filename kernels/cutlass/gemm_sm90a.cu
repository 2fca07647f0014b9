// Integer linear layers on Hopper: x [m][k] times weight [n][k], both int8. TMA brings the tiles,
// wgmma multiplies them, FinishNode makes the results of the sums, and TMA stores those. A
// convolution of one tap, without stride or padding, is a linear as well: its image says which rows
// share a channel_add.
//
// Reference: ../reference.py, linear.
#include "launch_sm90.h"

#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

#ifndef FXQUANT_SCHEDULE
#define FXQUANT_SCHEDULE 0
#endif

namespace fxquant {
namespace {

static_assert(FXQUANT_SCHEDULE == 0 || FXQUANT_SCHEDULE == 1, "cooperative or pingpong");
constexpr bool kPingpong = FXQUANT_SCHEDULE == 1;
using MainSchedule = std::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                        cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
using EndSchedule = std::conditional_t<kPingpong, cutlass::epilogue::TmaWarpSpecialized,
                                       cutlass::epilogue::TmaWarpSpecializedCooperative>;

using RowMajor = cutlass::layout::RowMajor;
using Tile = cute::Shape<cute::Int<FXQUANT_TILE_M>, cute::Int<FXQUANT_TILE_N>,
                         cute::Int<FXQUANT_TILE_K>>;
using End = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, Subtile<!kPingpong>,
    int32_t, float, void, RowMajor, kOutAlignment, Out, RowMajor, kOutAlignment, EndSchedule,
    FinishNode>::CollectiveOp;
// [n][k] is column-major k x n.
using Main = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, RowMajor, 16, int8_t,
    cutlass::layout::ColumnMajor, 16, int32_t, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename End::SharedStorage))>,
    MainSchedule>::CollectiveOp;
using Kernel =
    cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Main, End, void>;

typename Kernel::Arguments arguments_of(const Call& c) {
  const int m = int(c.m), n = int(c.n), k = int(c.k);
  const auto x = cutlass::make_cute_packed_stride(Kernel::StrideA{}, {m, k, 1});
  const auto weight = cutlass::make_cute_packed_stride(Kernel::StrideB{}, {n, k, 1});
  const auto out = cutlass::make_cute_packed_stride(Kernel::StrideD{}, {m, n, 1});
  return {cutlass::gemm::GemmUniversalMode::kGemm,
          {m, n, k, 1},
          {static_cast<const int8_t*>(c.x), x, static_cast<const int8_t*>(c.weight), weight},
          {finish_of(c), nullptr, {}, static_cast<Out*>(c.epilogue.out), out},
          hardware(c)};
}

Status can_run(const Call& c) {
  if (const Status status = checked_sm90(c)) return status;
  return is_linear(c) && Kernel::can_implement(arguments_of(c)) ? kOk : kShape;
}

}  // namespace
}  // namespace fxquant

FXQUANT_API int fxquant_shared_memory() { return fxquant::Kernel::SharedStorageSize; }

FXQUANT_API int fxquant_can_run(const fxquant::Call* call) { return fxquant::can_run(*call); }

FXQUANT_API int fxquant_run(const fxquant::Call* call, void* stream) {
  if (const int status = fxquant::can_run(*call)) return status;
  if (!fxquant::is_complete(*call)) return fxquant::kAlignment;
  return fxquant::launch<fxquant::Kernel>(fxquant::arguments_of(*call), stream);
}
