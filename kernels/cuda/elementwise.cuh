// Integers of one number each: a source gives float32, a place says where the integer goes.
#pragma once

#include "memory.cuh"

namespace fxquant {

constexpr int kElementwiseThreads = 256;
constexpr int kItems = 2;  // vectors of a thread: their loads overlap

// Every source: n numbers of item i, which are those from i * n on.
template <int n, class In, int activation>
struct Activated {
  const In* __restrict__ x;

  FXQUANT_HD void operator()(uint32_t item, float (&y)[n]) const {
    read_floats(x + int64_t(item) * n, y);
    FXQUANT_UNROLL
    for (int j = 0; j < n; ++j) y[j] = activated<activation>(y[j]);
  }
};

template <int n, class A, class B>
struct Sum {
  const A* __restrict__ a;
  const B* __restrict__ b;

  FXQUANT_HD void operator()(uint32_t item, float (&y)[n]) const {
    float other[n];
    read_floats(a + int64_t(item) * n, y);
    read_floats(b + int64_t(item) * n, other);
    FXQUANT_UNROLL
    for (int j = 0; j < n; ++j) y[j] = add_rn(y[j], other[j]);
  }
};

// x [rows, 2 * width]: the first half of a row times the activated second. `columns` = width / n.
template <int n, class In, int activation>
struct Gated {
  const In* __restrict__ x;
  uint32_t columns;

  FXQUANT_HD void operator()(uint32_t item, float (&y)[n]) const {
    const uint32_t row = item / columns;
    const In* value = x + (int64_t(item) + int64_t(row) * columns) * n;
    float gate[n];
    read_floats(value, y);
    read_floats(value + int64_t(columns) * n, gate);
    FXQUANT_UNROLL
    for (int j = 0; j < n; ++j) y[j] = mul_rn(y[j], activated<activation>(gate[j]));
  }
};

// Rows of `columns` items, `stride` numbers apart.
template <int n>
struct Rows {
  int8_t* __restrict__ out;
  uint32_t columns;
  int64_t stride;

  FXQUANT_HD void operator()(uint32_t item, const int8_t (&q)[n]) const {
    const uint32_t row = item / columns, column = item - row * columns;
    write(out + row * stride + int64_t(column) * n, q);
  }
};

// Items of an image [rows, width, columns * n], each to factor * factor pixels.
template <int n>
struct Enlarged {
  int8_t* __restrict__ out;
  uint32_t columns, width, factor;

  FXQUANT_HD void operator()(uint32_t item, const int8_t (&q)[n]) const {
    const uint32_t pixel = item / columns, column = item - pixel * columns;
    const uint32_t row = pixel / width, x = pixel - row * width;
    const int64_t step = int64_t(columns) * n, line = step * width * factor;
    int8_t* to = out + row * line * factor + x * step * factor + int64_t(column) * n;
    for (uint32_t dy = 0; dy < factor; ++dy)
      for (uint32_t dx = 0; dx < factor; ++dx) write(to + dy * line + dx * step, q);
  }
};

template <int n, class Source, class Place>
__global__ void __launch_bounds__(kElementwiseThreads)
    elementwise(Source source, Place place, uint32_t items, const float* row, int index, int bits) {
  const uint32_t first = blockIdx.x * (kItems * kElementwiseThreads) + threadIdx.x;
  float y[kItems][n];
  FXQUANT_UNROLL
  for (int i = 0; i < kItems; ++i) {
    const uint32_t item = first + i * kElementwiseThreads;
    if (item < items) source(item, y[i]);
  }
  const Quantiser quantise(row, index, bits);  // its reads overlap those above
  FXQUANT_UNROLL
  for (int i = 0; i < kItems; ++i) {
    const uint32_t item = first + i * kElementwiseThreads;
    if (item >= items) continue;
    int8_t q[n];
    FXQUANT_UNROLL
    for (int j = 0; j < n; ++j) q[j] = quantise(y[i][j]);
    place(item, q);
  }
}

// The quantiser that an op ends in.
struct Step {
  const float* row;
  int index;
  int bits;

  bool is_valid() const {
    return row != nullptr && is_aligned(row, 4) && index >= 0 && bits >= 2 && bits <= 8;
  }
};

template <int n, class Source, class Place>
int run_elementwise(Source source, Place place, int64_t items, Step step, void* stream) {
  if (items >= int64_t(1) << 31) return kShape;
  const unsigned blocks = unsigned(ceil_div(items, kItems * kElementwiseThreads));
  FXQUANT_LAUNCH((elementwise<n, Source, Place>), dim3(blocks), dim3(kElementwiseThreads), stream,
                 source, place, uint32_t(items), step.row, step.index, step.bits);
  return launched();
}

// f(std::integral_constant<int, activation>()).
template <class F>
int with_activation(int activation, F f) {
  switch (activation) {
    case kNone: return f(std::integral_constant<int, kNone>());
    case kSilu: return f(std::integral_constant<int, kSilu>());
    case kGelu: return f(std::integral_constant<int, kGelu>());
    case kGeluTanh: return f(std::integral_constant<int, kGeluTanh>());
    default: return kShape;
  }
}

// f(std::integral_constant<int, n>()): eight numbers at once where everything is aligned.
template <class F>
int with_vector(bool is_wide, F f) {
  return is_wide ? f(std::integral_constant<int, kVector>()) : f(std::integral_constant<int, 1>());
}

}  // namespace fxquant
