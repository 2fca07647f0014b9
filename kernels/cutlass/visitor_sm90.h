// What gemm_sm90a.cu and conv_sm90a.cu do with their sums: the only node of CUTLASS's visitor tree.
// For the host too, so that a test can visit a tile without a GPU.
#pragma once

#include "descriptors_sm90.h"  // before what makes descriptors

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/numeric_types.h"

#include "epilogue.h"

// The build defines these. A cluster of FXQUANT_CLUSTER_M x FXQUANT_CLUSTER_N blocks shares its
// loads. Schedule: 0 two consumer warp groups on one tile, 1 each on its own, 2 one consumer in a
// kernel that is not persistent, which is all that CUTLASS has for a convolution.
#ifndef FXQUANT_TILE_M
#define FXQUANT_TILE_M 128
#define FXQUANT_TILE_N 128
#define FXQUANT_TILE_K 128
#endif
#ifndef FXQUANT_CLUSTER_M
#define FXQUANT_CLUSTER_M 1
#define FXQUANT_CLUSTER_N 1
#endif
#ifndef FXQUANT_OUT
#define FXQUANT_OUT 2
#endif
#ifndef FXQUANT_TYPES
#define FXQUANT_TYPES 0
#endif

#if FXQUANT_TYPES != 0
#error "this family multiplies s8 by s8 only: unpack s4 weights first"
#endif

namespace fxquant {

static_assert(FXQUANT_OUT == kFloat16 || FXQUANT_OUT == kBFloat16 || FXQUANT_OUT == kInt8,
              "this family writes float16, bfloat16 or int8");
using Out = std::conditional_t<
    FXQUANT_OUT == kInt8, int8_t,
    std::conditional_t<FXQUANT_OUT == kFloat16, cutlass::half_t, cutlass::bfloat16_t>>;
constexpr int kOutAlignment = 16 / int(sizeof(Out));  // TMA moves rows of whole 16 bytes

// What the epilogue does at a time: 16 values a thread. CUTLASS's own choice is twice that for int8
// and costs registers that a consumer of 128 x 128 sums does not have.
template <bool kCooperative>
using Subtile = cute::Shape<cute::Int<kCooperative ? 128 : 64>, cute::_32>;

using Cluster =
    cute::Shape<cute::Int<FXQUANT_CLUSTER_M>, cute::Int<FXQUANT_CLUSTER_N>, cute::_1>;

// Two adjacent columns' values, zero where `inside` is false. `index` is even and so is n: the pair
// is aligned, and either both columns are inside or neither.
template <class T>
FXQUANT_HD T pair_at(const void* base, int64_t index, bool inside) {
  if (!inside) return T{};
  const T* pair = static_cast<const T*>(base) + (index >> 1);
#if defined(__CUDA_ARCH__)
  return __ldg(pair);
#else
  return *pair;
#endif
}

template <class T>
FXQUANT_HD float2 widened(uint32_t two) {
  return {to_float(T{uint16_t(two)}), to_float(T{uint16_t(two >> 16)})};
}

FXQUANT_HD int8_t stored(float y, const Quantiser& quantiser, int8_t) { return quantiser(y); }
FXQUANT_HD cutlass::half_t stored(float y, const Quantiser&, cutlass::half_t) {
  return cutlass::half_t::bitcast(from_float<Half>(y).bits);
}
FXQUANT_HD cutlass::bfloat16_t stored(float y, const Quantiser&, cutlass::bfloat16_t) {
  return cutlass::bfloat16_t::bitcast(from_float<BFloat16>(y).bits);
}

// Rounds each sum, unlike +.
FXQUANT_HD float2 sum_rn(float2 a, float2 b) { return {add_rn(a.x, b.x), add_rn(a.y, b.y)}; }

// What a thread owns of one subtile: two rows, eight apart, of kPairs pairs of columns, each pair
// eight columns from the last. It asks for the epilogue's operands; rows and columns beyond the
// problem are never read.
template <int kPairs>
struct Patch {
  const Finish& finish;
  int row, column;  // of the first value

  FXQUANT_HD bool inside(int r) const { return row + 8 * r < finish.m; }
  FXQUANT_HD bool has(int pair) const { return column + 8 * pair < finish.n; }

  // From [n].
  template <class T>
  FXQUANT_HD T in_columns(const void* base, int pair) const {
    return pair_at<T>(base, column + 8 * pair, has(pair));
  }

  // From line `line` of [lines][n].
  template <class T>
  FXQUANT_HD T in_line(const void* base, int line, int r, int pair) const {
    const int64_t at = int64_t(line) * finish.n + column + 8 * pair;
    return pair_at<T>(base, at, inside(r) && has(pair));
  }

  template <class T>
  FXQUANT_HD float2 residual_at(int r, int pair) const {
    const void* base = finish.epilogue.residual;
    if constexpr (std::is_same_v<T, float>) {
      return in_line<float2>(base, row + 8 * r, r, pair);
    } else {
      return widened<T>(in_line<uint32_t>(base, row + 8 * r, r, pair));
    }
  }

  template <class T>
  FXQUANT_HD void read_residual(float2 (&values)[2][kPairs]) const {
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < 2; ++r) {
      CUTLASS_PRAGMA_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) values[r][pair] = residual_at<T>(r, pair);
    }
  }

  // Taps outside the image met TMA's zeros, where the reference has the zero point: this adds what
  // they lack to the sums of one row. epilogue.h's `outside`, for all the row's columns at once.
  FXQUANT_HD void add_outside(const Place& at, int r, int zero, int2 (&sums)[kPairs]) const {
    const Window& w = finish.window;
    int tap = 0;
    for (int ky = 0; ky < w.kernel_h; ++ky) {
      const bool line_in = uint32_t(at.y + ky * w.dilation_h) < uint32_t(w.height);
      for (int kx = 0; kx < w.kernel_w; ++kx, ++tap) {
        if (line_in && uint32_t(at.x + kx * w.dilation_w) < uint32_t(w.width)) continue;
        CUTLASS_PRAGMA_UNROLL
        for (int pair = 0; pair < kPairs; ++pair) {
          const int2 weights = in_line<int2>(finish.epilogue.tap_sums, tap, r, pair);
          sums[pair].x += zero * weights.x;
          sums[pair].y += zero * weights.y;
        }
      }
    }
  }
};

// One branch for all the values, and not one for each.
template <int kPairs>
FXQUANT_HD void activate(float2 (&y)[2][kPairs], int activation) {
  const auto all = [&](auto function) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2 * kPairs; ++i) {
      float2& two = y[i / kPairs][i % kPairs];
      two = {function(two.x), function(two.y)};
    }
  };
  if (activation == kSilu) all([](float x) { return activated<kSilu>(x); });
  if (activation == kGelu) all([](float x) { return activated<kGelu>(x); });
  if (activation == kGeluTanh) all([](float x) { return activated<kGeluTanh>(x); });
}

// The epilogue as a node of a visitor tree. It returns the stored type itself: the collective then
// copies the fragment to shared memory as it is, while floats would become the accumulator's int32
// first, ElementCompute being void for a node like this.
struct FinishNode {
  struct SharedStorage {};
  using Arguments = Finish;
  using Params = Finish;

  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& finish, void*) {
    return finish;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  const Finish* finish = nullptr;

  FXQUANT_HD FinishNode() {}
  FXQUANT_HD FinishNode(const Params& params, const SharedStorage&) : finish(&params) {}
  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      const cutlass::epilogue::fusion::detail::ProducerLoadArgs<Args...>&) {
    return cutlass::epilogue::fusion::EmptyProducerLoadCallbacks{};
  }

  // One thread's part of one tile. `Coordinates` maps (value, copy in m, copy in n, subtile in m,
  // subtile in n) to (row, column) relative to the thread's first value.
  template <class Coordinates>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    Coordinates coordinates;
    const Finish& finish;
    int first_row, first_column;
    float x_scale;
    int x_zero;
    Quantiser quantiser;  // unused by a float output

    FXQUANT_HD Callbacks(Coordinates coordinates_, const Finish& finish_, int first_row_,
                         int first_column_)
        : coordinates(coordinates_),
          finish(finish_),
          first_row(first_row_),
          first_column(first_column_),
          x_scale(finish_.epilogue.row[2 * finish_.epilogue.x_index]),
          x_zero(zero_point_of(finish_.epilogue)),
          quantiser(finish_.epilogue.row, std::max(finish_.epilogue.out_index, 0),
                    finish_.epilogue.out_bits) {}

    template <int kValues>
    FXQUANT_HD cutlass::Array<Out, kValues> visit(
        const cutlass::Array<int32_t, kValues>& sums, int, int subtile_m, int subtile_n) {
      static_assert(is_patch<kValues>(std::make_integer_sequence<int, kValues>{}));
      constexpr int kPairs = kValues / 4;
      const Epilogue& epilogue = finish.epilogue;
      const auto start = coordinates(0, 0, 0, subtile_m, subtile_n);
      const Patch<kPairs> patch{finish, first_row + int(cute::get<0>(start)),
                                first_column + int(cute::get<1>(start))};

      // -0 leaves any float that it is added to as it is.
      constexpr float2 kAbsent = {-0.0f, -0.0f};
      float2 residual[2][kPairs];
      if (!epilogue.residual) {
        for (auto& line : residual)
          for (float2& two : line) two = kAbsent;
      } else if (epilogue.residual_type == kFloat32) {
        patch.template read_residual<float>(residual);
      } else if (epilogue.residual_type == kFloat16) {
        patch.template read_residual<Half>(residual);
      } else {
        patch.template read_residual<BFloat16>(residual);
      }

      int2 whole[2][kPairs];  // sums, as if no window left its image
      int image[2];
      CUTLASS_PRAGMA_UNROLL
      for (int r = 0; r < 2; ++r) {
        CUTLASS_PRAGMA_UNROLL
        for (int pair = 0; pair < kPairs; ++pair)
          whole[r][pair] = {sums[4 * pair + 2 * r], sums[4 * pair + 2 * r + 1]};
        const Place at = place(finish, patch.row + 8 * r);
        if (!at.inside && epilogue.tap_sums && patch.inside(r))
          patch.add_outside(at, r, x_zero, whole[r]);
        image[r] = at.image;
      }

      float2 y[2][kPairs];
      CUTLASS_PRAGMA_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) {
        const float2 weight = patch.template in_columns<float2>(epilogue.weight_scale, pair);
        const float2 scale = {mul_rn(x_scale, weight.x), mul_rn(x_scale, weight.y)};
        const int2 total = patch.template in_columns<int2>(epilogue.weight_sums, pair);
        const float2 bias =
            epilogue.bias ? patch.template in_columns<float2>(epilogue.bias, pair) : kAbsent;
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int2 sum = whole[r][pair];
          const float2 scaled = {mul_rn(float(sum.x - x_zero * total.x), scale.x),
                                 mul_rn(float(sum.y - x_zero * total.y), scale.y)};
          const float2 add =
              epilogue.channel_add
                  ? patch.template in_line<float2>(epilogue.channel_add, image[r], r, pair)
                  : kAbsent;
          y[r][pair] = sum_rn(sum_rn(scaled, bias), add);
        }
      }
      activate(y, epilogue.activation);

      cutlass::Array<Out, kValues> out;
      const auto store = [&] {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2 * kPairs; ++i) {
          const float2 two = sum_rn(y[i % 2][i / 2], residual[i % 2][i / 2]);
          out[2 * i] = stored(two.x, quantiser, Out{});
          out[2 * i + 1] = stored(two.y, quantiser, Out{});
        }
      };
      // The quantiser asks the same of every value: asked here, it is asked once.
      if (FXQUANT_OUT == kInt8 && quantiser.reciprocal == 0.0f) {
        store();
      } else {
        store();
      }
      return out;
    }

   private:
    // Whether the kValues values of a subtile are a Patch, in the order (row, column), (row,
    // column + 1), (row + 8, column), (row + 8, column + 1), then the next pair of columns.
    // The coordinates are compile-time integers: this is proved and not assumed.
    template <int kValues, int... kIndex>
    static constexpr bool is_patch(std::integer_sequence<int, kIndex...>) {
      return kValues % 4 == 0 && decltype(cute::size(std::declval<First>()))::value == kValues &&
             (... && (part<kIndex, 0>() == kIndex / 2 % 2 * 8)) &&
             (... && (part<kIndex, 1>() == kIndex / 4 * 8 + kIndex % 2));
    }
    using First = decltype(std::declval<Coordinates>()(cute::_, cute::_, cute::_, cute::_0{},
                                                       cute::_0{}));
    template <int kIndex, int kMode>
    static constexpr int part() {
      using Coordinate = decltype(std::declval<First>()(cute::Int<kIndex>{}));
      return std::decay_t<decltype(cute::get<kMode>(std::declval<Coordinate>()))>::value;
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...>& args) {
    // The residue is the problem's (m, n) less the thread's first coordinate. m is one number for a
    // convolution too: get_linearized_problem_shape_MNKL multiplies (out_width, out_height, batch),
    // the first fastest, so that a row is (image * out_height + y) * out_width + x.
    using Coordinates = std::decay_t<decltype(args.tCcD)>;
    return Callbacks<Coordinates>(args.tCcD, *finish,
                                  finish->m - int(cute::get<0>(args.residue_tCcD)),
                                  finish->n - int(cute::get<1>(args.residue_tCcD)));
  }
};

}  // namespace fxquant
