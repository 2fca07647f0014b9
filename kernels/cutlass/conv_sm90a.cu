// Integer 2-D convolutions on Hopper: x [batch][height][width][channels], weight
// [n][kernel_h][kernel_w][channels], both int8. TMA's im2col mode brings the windows, with zeros
// for what lies outside the image, wgmma multiplies them, FinishNode makes the results of the sums,
// and TMA stores those.
//
// Reference: ../reference.py, conv2d.
//
// No header here may include CUTLASS's gemm_universal_adapter.h: with its 2.x GemmUniversal in
// sight ConvUniversal is ambiguous.
#include "launch_sm90.h"

#include "cutlass/conv/collective/collective_builder.hpp"
#include "cutlass/conv/convnd_problem_shape.hpp"
#include "cutlass/conv/convolution.h"
#include "cutlass/conv/kernel/conv_universal.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

#ifndef FXQUANT_SCHEDULE
#define FXQUANT_SCHEDULE 2
#endif

namespace fxquant {
namespace {

static_assert(FXQUANT_SCHEDULE == 2, "CUTLASS has no persistent convolution for sm_90");

constexpr auto kForward = cutlass::conv::Operator::kFprop;
using NHWC = cutlass::layout::TensorNHWC;
using Tile = cute::Shape<cute::Int<FXQUANT_TILE_M>, cute::Int<FXQUANT_TILE_N>,
                         cute::Shape<cute::Int<FXQUANT_TILE_K>>>;
using End = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, Subtile<false>, int32_t,
    float, void, NHWC, kOutAlignment, Out, NHWC, kOutAlignment,
    cutlass::epilogue::TmaWarpSpecialized, FinishNode>::CollectiveOp;

// The kernel is not persistent. Where the sums leave room for it, two blocks share a
// multiprocessor, and one's epilogue overlaps the other's products. Operands and epilogue are a
// union in shared memory, so that beside the stages only the barriers need a place.
constexpr int kBlocks = FXQUANT_TILE_M * FXQUANT_TILE_N <= 64 * 128 ? 2 : 1;
constexpr int kStageBytes = (FXQUANT_TILE_M + FXQUANT_TILE_N) * FXQUANT_TILE_K;
constexpr int kStages = (227 * 1024 / kBlocks - 2048) / kStageBytes;
using Main = typename cutlass::conv::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, kForward, int8_t, NHWC, 16, int8_t, NHWC,
    16, int32_t, Tile, Cluster, cutlass::conv::collective::StageCount<kStages>,
    cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
using Problem = cutlass::conv::ConvProblemShape<kForward, Main::NumSpatialDimensions>;
struct Kernel : cutlass::conv::kernel::ConvUniversal<Problem, Main, End, void> {
  static constexpr uint32_t MinBlocksPerMultiprocessor = kBlocks;
};

// What is padded below or on the right, which the sizes imply. A window may also end short of the
// image, which is no padding.
int far_padding(int size, int out, int kernel, int stride, int dilation, int near) {
  return std::max(0, (out - 1) * stride + (kernel - 1) * dilation + 1 - size - near);
}

Problem problem_of(const Call& c) {
  return Problem(
      cutlass::conv::Mode::kCrossCorrelation, {c.batch, c.height, c.width, c.channels},
      {int(c.n), c.kernel_h, c.kernel_w, c.channels}, {c.pad_top, c.pad_left},
      {far_padding(c.height, c.out_height, c.kernel_h, c.stride_h, c.dilation_h, c.pad_top),
       far_padding(c.width, c.out_width, c.kernel_w, c.stride_w, c.dilation_w, c.pad_left)},
      {c.stride_h, c.stride_w}, {c.dilation_h, c.dilation_w}, 1);
}

typename Kernel::Arguments arguments_of(const Call& c) {
  const Problem problem = problem_of(c);
  // ((out_width, out_height, batch), n, 1)
  typename Kernel::StrideD out{};
  cute::get<0, 0>(out) = c.n;
  cute::get<0, 1>(out) = c.n * c.out_width;
  cute::get<0, 2>(out) = c.n * c.out_width * c.out_height;
  return {problem,
          {static_cast<const int8_t*>(c.x), static_cast<const int8_t*>(c.weight)},
          {finish_of(c), nullptr, {}, static_cast<Out*>(c.epilogue.out), out},
          hardware(c)};
}

// What cuTensorMapEncodeIm2col takes beside what can_implement checks, and that CUTLASS's idea of
// the output is the caller's.
bool is_window(const Call& c) {
  constexpr int kLongestStride = 8;
  if (c.stride_h > kLongestStride || c.stride_w > kLongestStride) return false;
  const auto out = problem_of(c).shape_C;
  return out[1] == c.out_height && out[2] == c.out_width;
}

Status can_run(const Call& c) {
  if (const Status status = checked_sm90(c)) return status;
  return is_image(c) && is_window(c) && Kernel::can_implement(arguments_of(c)) ? kOk : kShape;
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
