// Integer linear layers on tensor cores: x [m][k] times weight [n][k], mma.sync, for GPUs of
// capability 8.0 and above. FXQUANT_TYPES: 0 s8 x s8, 1 s8 x s4 (weights widened in registers), 2
// s4 x s4 (no tensor core of 9.0 does it: emulated there, and slow). A convolution of one tap, without
// stride or padding, is a linear as well: its image says which rows share a channel_add.
//
// Reference: ../reference.py, linear.
#include "visitor_sm80.h"

#include "cutlass/gemm/kernel/default_gemm_universal.h"
#include "cutlass/gemm/kernel/gemm_universal_with_visitor.h"
#include "cutlass/gemm/threadblock/threadblock_swizzle.h"

namespace fxquant {
namespace {

// Low nibble first is both the packing of weights and that of int4b_t; [n][k] is column-major k x n.
using Stock = typename cutlass::gemm::kernel::DefaultGemmUniversal<
    X, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 128 / kXBits,
    Weight, cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, 128 / kWeightBits,
    int32_t, cutlass::layout::RowMajor, int32_t, cutlass::arch::OpClassTensorOp,
    cutlass::arch::Sm80, Tile, Warp, Instruction, Sums,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, kStages,
    std::conditional_t<kTypes == kS8S4, cutlass::arch::OpMultiplyAddMixedInputUpcast,
                       cutlass::arch::OpMultiplyAddSaturate>>::GemmKernel;

using Kernel = cutlass::gemm::kernel::GemmWithEpilogueVisitor<
    typename Stock::Mma, Ending<typename Stock::Epilogue>, typename Stock::ThreadblockSwizzle>;

typename Kernel::Params params_of(const Call& c) {
  const typename Kernel::Arguments arguments(
      cutlass::gemm::GemmUniversalMode::kGemm, {int(c.m), int(c.n), int(c.k)}, 1, finish_of(c), c.x,
      c.weight, nullptr, nullptr, 0, 0, 0, 0, c.k, c.k, c.n, c.n);
  return typename Kernel::Params(arguments, 0, 0);  // no choice depends on the device
}

Status can_run(const Call& c) {
  if (const Status status = checked(c, kXBits, kWeightBits)) return status;
  if (!is_linear(c)) return kShape;
  // n is rounded up: CUTLASS asks it of the int32 output that there is not.
  const cutlass::gemm::GemmCoord problem{int(c.m), int((c.n + kRun - 1) / kRun * kRun), int(c.k)};
  if (Kernel::can_implement(problem) != cutlass::Status::kSuccess) return kShape;
  return fits(params_of(c).get_grid_dims()) ? kOk : kShape;
}

}  // namespace
}  // namespace fxquant

FXQUANT_API int fxquant_shared_memory() {
  return int(sizeof(typename fxquant::Kernel::SharedStorage));
}

FXQUANT_API int fxquant_can_run(const fxquant::Call* call) { return fxquant::can_run(*call); }

FXQUANT_API int fxquant_run(const fxquant::Call* call, void* stream) {
  if (const int status = fxquant::can_run(*call)) return status;
  if (!fxquant::is_complete(*call)) return fxquant::kAlignment;
  const auto params = fxquant::params_of(*call);
  return fxquant::launch<fxquant::Kernel>(params, params.get_grid_dims(), stream);
}
