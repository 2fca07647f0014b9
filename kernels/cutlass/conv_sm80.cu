// Integer convolutions on tensor cores as implicit GEMM: x [batch][height][width][channels], weight
// [n][kernel_h][kernel_w][channels], mma.sync, for GPUs of capability 8.0 and above. FXQUANT_TYPES: 0
// s8 x s8, 2 s4 x s4.
//
// Reference: ../reference.py, conv2d.
#include "visitor_sm80.h"

#include "cutlass/conv/conv2d_problem_size.h"
#include "cutlass/conv/convolution.h"
#include "cutlass/conv/kernel/default_conv2d_fprop.h"
#include "cutlass/gemm/threadblock/threadblock_swizzle.h"

namespace fxquant {
namespace {

static_assert(kTypes != kS8S4, "a convolution's s4 weights are unpacked first");
namespace conv = cutlass::conv;
using NHWC = cutlass::layout::TensorNHWC;
constexpr int kVector = 128 / kXBits;  // channels of a 16-byte load

using Stock = typename conv::kernel::DefaultConv2dFprop<
    X, NHWC, Weight, NHWC, int32_t, NHWC, int32_t, cutlass::arch::OpClassTensorOp,
    cutlass::arch::Sm80, Tile, Warp, Instruction, Sums,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>, kStages,
    cutlass::arch::OpMultiplyAddSaturate, conv::IteratorAlgorithm::kOptimized,
    conv::StrideSupport::kStrided, kVector, kVector>::Kernel;

// CUTLASS 2.x has no convolution with a visitor: this is its implicit GEMM with `Ending` after it.
//
// Row m of the GEMM is pixel (image, y, x) of the output in that order, and column n an output
// channel, so that the output is the row-major matrix [m][n] of a linear: the iterator of x takes
// m / (P * Q), then m % (P * Q) / Q, for image and line, as `place` does.
struct Kernel {
  using Mma = typename Stock::Mma;
  using Swizzle = typename Stock::ThreadblockSwizzle;
  using Epilogue = Ending<typename Stock::Epilogue>;
  static constexpr int kThreadCount = Stock::kThreadCount;

  struct Params {
    conv::Conv2dProblemSize problem;
    typename Mma::IteratorA::Params x_params;
    typename Mma::IteratorB::Params weight_params;
    const X* x;
    const Weight* weight;
    cutlass::gemm::GemmCoord tiles;
    int swizzle;
    int steps, steps_per_channel;  // of the sum: all, and those that one tile of channels takes
    Finish finish;
  };

  union SharedStorage {
    typename Mma::SharedStorage main_loop;
    typename Epilogue::SharedStorage epilogue;
  };

  CUTLASS_DEVICE void operator()(const Params& p, SharedStorage& shared) const {
    const auto tile = Swizzle::get_tile_offset(p.swizzle);
    if (p.tiles.m() <= tile.m() || p.tiles.n() <= tile.n()) return;
    const int thread = threadIdx.x, lane = thread % 32;
    const int warp = cutlass::canonical_warp_idx_sync();  // uniform, to the compiler as well

    typename Mma::IteratorA x(p.x_params, p.problem, p.x, thread, {tile.m() * Tile::kM, 0});
    typename Mma::IteratorB weight(p.weight_params, p.problem, p.weight, thread,
                                   {0, tile.n() * Tile::kN});
    Mma mma(shared.main_loop, thread, warp, lane);
    typename Mma::FragmentC sums;
    sums.clear();
    mma(p.steps, sums, x, weight, sums, p.steps_per_channel);

    Epilogue epilogue(p.finish, shared.epilogue, thread, warp, lane);
    epilogue(sums, tile, 0, thread);  // the visitor knows the problem's shape
  }
};

// Of the padding only top and left count: how far windows reach beyond the bottom and the right is
// up to the output's size, and the iterators compare every tap with the image.
conv::Conv2dProblemSize problem_of(const Call& c) {
  return {c.batch,     c.height,     c.width,     c.channels,   int(c.n),
          c.kernel_h,  c.kernel_w,   c.out_height, c.out_width, c.pad_top,
          c.pad_left,  c.stride_h,   c.stride_w,  c.dilation_h, c.dilation_w,
          conv::Mode::kCrossCorrelation, /*split_k_slices=*/1, /*groups=*/1};
}

typename Kernel::Params params_of(const Call& c) {
  const auto problem = problem_of(c);
  constexpr auto kForward = conv::Operator::kFprop;
  constexpr auto kIterator = conv::IteratorAlgorithm::kOptimized;
  using Mma = typename Kernel::Mma;
  const auto x_layout = NHWC::packed({c.batch, c.height, c.width, c.channels});
  const auto weight_layout = NHWC::packed({int(c.n), c.kernel_h, c.kernel_w, c.channels});
  const auto tiles = Kernel::Swizzle::get_tiled_shape({int(c.m), int(c.n), int(c.k)},
                                                      {Tile::kM, Tile::kN, Tile::kK}, 1);
  return {problem,
          Mma::IteratorA::getParams(problem, x_layout),
          typename Mma::IteratorB::Params(problem, weight_layout),
          static_cast<const X*>(c.x),
          static_cast<const Weight*>(c.weight),
          tiles,
          Kernel::Swizzle::get_log_tile(tiles),
          conv::implicit_gemm_k_iterations(kForward, Tile::kK, problem, kIterator),
          conv::implicit_gemm_k_iterations_per_channel(kForward, problem, kIterator),
          finish_of(c)};
}

// Where a tensor of n images, lines and so on ends for CUTLASS, whose strides are int32.
bool is_addressable(const Call& c) {
  const int64_t image = int64_t(c.height) * c.width * c.channels;
  return image * c.batch <= INT32_MAX && c.k * c.n <= INT32_MAX;
}

bool windows_fit(const Call& c) {
  const auto below = [](int64_t corners, int64_t stride, int64_t taps, int64_t dilation) {
    return corners * stride + taps * dilation <= INT32_MAX;
  };
  return below(c.out_height, c.stride_h, c.kernel_h, c.dilation_h) &&
         below(c.out_width, c.stride_w, c.kernel_w, c.dilation_w);
}

Status can_run(const Call& c) {
  if (const Status status = checked(c, kXBits, kWeightBits)) return status;
  if (!is_image(c) || !is_addressable(c) || !windows_fit(c)) return kShape;
  const auto problem = problem_of(c);
  const bool possible =
      Kernel::Mma::IteratorA::can_implement(problem) == cutlass::Status::kSuccess &&
      Kernel::Mma::IteratorB::can_implement(problem) == cutlass::Status::kSuccess;
  if (!possible) return kShape;
  return fits(Kernel::Swizzle::get_grid_shape(params_of(c).tiles)) ? kOk : kShape;
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
  const dim3 grid = fxquant::Kernel::Swizzle::get_grid_shape(params.tiles);
  return fxquant::launch<fxquant::Kernel>(params, grid, stream);
}
