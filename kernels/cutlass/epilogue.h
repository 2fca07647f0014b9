// The end of every integer GEMM and convolution: what an exact sum becomes, and where it goes.
// Device and host alike, so that tests run the same code on a CPU.
//
// Reference: ../reference.py (linear, conv2d, finish). Its float operations are done here in its
// order and rounded as there: results are bitwise its own, but for an activation's last bits.
//
// A run is V adjacent columns (output channels) of one row (a pixel, or a row of a linear):
//
//   const Columns<V> columns(finish, n);                  // serves every row of a thread
//   const Raw<V> residual = residual_of<V>(finish, m, n);  // asked for early, used late
//   const Run<float, V> y = values(finish, columns, place(finish, m), n, residual, sums);
//   store(finish, columns, m, n, y);
//
// n is a multiple of V; what of a run lies past the last column is neither read nor written.
#pragma once

#include <cstdint>
#include <cstring>

#include "../cuda/call.h"
#include "../cuda/numbers.cuh"

namespace fxquant {

// ---- what the host works out once per call ----

// Division of what is below 2^31 by a constant: a product and a shift.
struct Divider {
  uint32_t divisor, multiplier, shift;

  FXQUANT_HD uint32_t operator()(uint32_t n) const {
    return divisor == 1 ? n : uint32_t((uint64_t(n) * multiplier) >> 32) >> shift;
  }
};

// Exact: with 2^(bits-1) < divisor <= 2^bits, multiplier is 2^(31+bits) / divisor rounded up.
inline Divider divider(int64_t divisor) {
  uint32_t bits = 1;
  while ((int64_t(1) << bits) < divisor) ++bits;
  const uint64_t multiplier = ((uint64_t(1) << (31 + bits)) + divisor - 1) / divisor;
  return {uint32_t(divisor), uint32_t(multiplier), bits - 1};
}

// The image whose windows are a convolution's rows, in the order (image, y, x). A linear has none:
// pixels.divisor is 0.
struct Window {
  int32_t height, width, kernel_h, kernel_w, stride_h, stride_w;
  int32_t pad_top, pad_left, dilation_h, dilation_w;
  int32_t inner_h, inner_w;  // a window whose corner is in [0, inner) does not leave the image
  Divider pixels, columns;   // of an output image, and of a line of it
};

// Everything that the functions below need; a kernel's parameter.
struct Finish {
  Epilogue epilogue;
  Window window;
  int32_t m, n;  // rows and columns in all
  int32_t run;   // the longest run of columns that may be moved at once: 1, 2, 4, 8 or 16
};

inline int32_t inner(int32_t size, int32_t kernel, int32_t dilation) {
  const int32_t corners = size - (kernel - 1) * dilation;
  return corners > 0 ? corners : 0;
}

inline Window window_of(const Call& c) {
  Window w{};
  if (c.batch == 0) return w;
  w.height = c.height, w.width = c.width;
  w.kernel_h = c.kernel_h, w.kernel_w = c.kernel_w;
  w.stride_h = c.stride_h, w.stride_w = c.stride_w;
  w.pad_top = c.pad_top, w.pad_left = c.pad_left;
  w.dilation_h = c.dilation_h, w.dilation_w = c.dilation_w;
  w.inner_h = inner(c.height, c.kernel_h, c.dilation_h);
  w.inner_w = inner(c.width, c.kernel_w, c.dilation_w);
  w.pixels = divider(int64_t(c.out_height) * c.out_width);
  w.columns = divider(c.out_width);
  return w;
}

inline int size_of(int32_t type) {
  return type == kFloat32 ? 4 : type == kInt8 ? 1 : type == kNothing ? 0 : 2;
}

// Whether runs of `run` elements from `base` on can each be loaded at once.
inline bool moves(const void* base, int size, int run) {
  const int bytes = run * size < 16 ? run * size : 16;
  return bytes == 0 || reinterpret_cast<uintptr_t>(base) % bytes == 0;
}

inline Finish finish_of(const Call& c) {
  const Epilogue& e = c.epilogue;
  int run = 16;
  const auto all_move = [&] {
    return c.n % run == 0 && moves(e.weight_scale, 4, run) && moves(e.weight_sums, 4, run) &&
           moves(e.tap_sums, 4, run) && moves(e.bias, 4, run) && moves(e.channel_add, 4, run) &&
           moves(e.residual, size_of(e.residual_type), run) &&
           moves(e.out, size_of(e.out_type), run);
  };
  while (run > 1 && !all_move()) run /= 2;
  return {e, window_of(c), int32_t(c.m), int32_t(c.n), run};
}

// ---- moving runs ----

template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Run {
  T at[V];

  FXQUANT_HD T& operator[](int v) { return at[v]; }
  FXQUANT_HD const T& operator[](int v) const { return at[v]; }
};

template <int V, class T>
FXQUANT_HD Run<T, V> load_part(const T* from, int count) {
  Run<T, V> to;
  FXQUANT_UNROLL
  for (int v = 0; v < V; ++v) to[v] = v < count ? from[v] : T{};
  return to;
}

// The run at column n; `from` points to it.
template <int V, class T>
FXQUANT_HD Run<T, V> load(const Finish& f, const T* from, int n) {
  if (V <= f.run && n < f.n) return *reinterpret_cast<const Run<T, V>*>(from);
  return load_part<V>(from, f.n - n);
}

template <class T, int V>
FXQUANT_HD void save(const Finish& f, T* to, int n, const Run<T, V>& from) {
  if (V <= f.run) {
    *reinterpret_cast<Run<T, V>*>(to) = from;
  } else {
    FXQUANT_UNROLL
    for (int v = 0; v < V; ++v)
      if (n + v < f.n) to[v] = from[v];
  }
}

// ---- a run of columns, whatever the row ----

// The activations' zero point. The table comes from a file, and this is the only number in it that
// meets the sums: clamped to what an activation of 8 bits can have, it leaves them in int32.
FXQUANT_HD int32_t zero_point_of(const Epilogue& e) {
  const float zero_point = fmaxf(e.row[2 * e.x_index + 1], lowest_integer(8));
  return int32_t(fminf(zero_point, highest_integer(8)));
}

template <int V>
struct Columns {
  int32_t zero_point;     // of the activations
  Quantiser out;          // unused by a float output
  Run<float, V> scale;    // of a sum
  Run<float, V> bias;
  Run<int32_t, V> shift;  // the zero point times the column's weights

  FXQUANT_HD Columns(const Finish& f, int n)
      : zero_point(zero_point_of(f.epilogue)),
        out(f.epilogue.row, f.epilogue.out_index < 0 ? f.epilogue.x_index : f.epilogue.out_index,
            f.epilogue.out_index < 0 ? 8 : f.epilogue.out_bits),
        scale(load<V>(f, f.epilogue.weight_scale + n, n)),
        shift(load<V>(f, f.epilogue.weight_sums + n, n)) {
    const Epilogue& e = f.epilogue;
    const float x_scale = e.row[2 * e.x_index];
    if (e.bias) bias = load<V>(f, e.bias + n, n);
    FXQUANT_UNROLL
    for (int v = 0; v < V; ++v) {
      scale[v] = mul_rn(x_scale, scale[v]);
      shift[v] = int32_t(uint32_t(zero_point) * uint32_t(shift[v]));
      if (!e.bias) bias[v] = -0.0f;  // which leaves any float that it is added to as it is
    }
  }
};

// ---- a row ----

struct Place {
  int32_t image;
  int32_t y, x;  // the corner of its window
  bool inside;   // no tap of the window leaves the image
};

FXQUANT_HD Place place(const Finish& f, int m) {
  const Window& w = f.window;
  if (w.pixels.divisor == 0) return {0, 0, 0, true};
  const uint32_t image = w.pixels(m), pixel = m - image * w.pixels.divisor;
  const uint32_t line = w.columns(pixel), column = pixel - line * w.columns.divisor;
  const int32_t y = int32_t(line) * w.stride_h - w.pad_top;
  const int32_t x = int32_t(column) * w.stride_w - w.pad_left;
  // A negative corner is a large unsigned number.
  const bool inside = uint32_t(y) < uint32_t(w.inner_h) && uint32_t(x) < uint32_t(w.inner_w);
  return {int32_t(image), y, x, inside};
}

// Per column, the sum of the weights whose taps fall outside the image: kernels read a 0 there, where
// the reference has the zero point.
template <int V>
FXQUANT_HD Run<int32_t, V> outside(const Finish& f, const Place& at, int n) {
  const Window& w = f.window;
  const int32_t* taps = f.epilogue.tap_sums + n;
  Run<int32_t, V> sums{};
  for (int ky = 0; ky < w.kernel_h; ++ky) {
    const bool line_in = uint32_t(at.y + ky * w.dilation_h) < uint32_t(w.height);
    for (int kx = 0; kx < w.kernel_w; ++kx, taps += f.n) {
      if (line_in && uint32_t(at.x + kx * w.dilation_w) < uint32_t(w.width)) continue;
      const Run<int32_t, V> tap = load<V>(f, taps, n);
      FXQUANT_UNROLL
      for (int v = 0; v < V; ++v) sums[v] += tap[v];
    }
  }
  return sums;
}

// ---- a run of a row ----

// V values of the residual as they lie in memory. Loading and reading them are two steps, so that
// other work goes on while the data is on its way.
template <int V>
struct Raw {
  Run<uint32_t, V> words;

  FXQUANT_HD float value(int32_t type, int v) const {
    if (type == kFloat32) return bits_as<float>(words[v]);
    const uint16_t half = uint16_t(words[v / 2] >> (16 * (v % 2)));
    return type == kFloat16 ? to_float(Half{half}) : to_float(BFloat16{half});
  }
};

template <int V>
FXQUANT_HD Raw<V> residual_of(const Finish& f, int64_t m, int n) {
  const Epilogue& e = f.epilogue;
  const int64_t at = m * f.n + n;
  Raw<V> raw{};
  if (!e.residual) return raw;
  if (e.residual_type == kFloat32)
    return {load<V>(f, static_cast<const uint32_t*>(e.residual) + at, n)};
  const auto halves = load<V>(f, static_cast<const uint16_t*>(e.residual) + at, n);
  FXQUANT_UNROLL
  for (int v = 0; v < V; ++v) raw.words[v / 2] |= uint32_t(halves[v]) << (16 * (v % 2));
  return raw;
}

template <int activation, int V>
FXQUANT_HD void activate(Run<float, V>& y) {
  FXQUANT_UNROLL
  for (int v = 0; v < V; ++v) y[v] = activated<activation>(y[v]);
}

template <int V>
FXQUANT_HD void activate(Run<float, V>& y, int32_t activation) {
  if (activation == kSilu) return activate<kSilu>(y);
  if (activation == kGelu) return activate<kGelu>(y);
  if (activation == kGeluTanh) return activate<kGeluTanh>(y);
}

// The run's results before they are quantised or cast. `sums[v]` is the sum of column n + v; the
// integers wrap around on their way to a difference that fits.
template <int V, class Sums>
FXQUANT_HD Run<float, V> values(const Finish& f, const Columns<V>& c, const Place& at, int n,
                                const Raw<V>& residual, const Sums& sums) {
  const Epilogue& e = f.epilogue;
  Run<float, V> y;
  Run<int32_t, V> lost{};
  if (!at.inside) lost = outside<V>(f, at, n);
  FXQUANT_UNROLL
  for (int v = 0; v < V; ++v) {
    const uint32_t shift = uint32_t(c.shift[v]) - uint32_t(c.zero_point) * uint32_t(lost[v]);
    const float centred = float(int32_t(uint32_t(sums[v]) - shift));
    y[v] = add_rn(mul_rn(centred, c.scale[v]), c.bias[v]);
  }
  if (e.channel_add) {
    const auto add = load<V>(f, e.channel_add + int64_t(at.image) * f.n + n, n);
    FXQUANT_UNROLL
    for (int v = 0; v < V; ++v) y[v] = add_rn(y[v], add[v]);
  }
  activate(y, e.activation);
  if (e.residual)
    FXQUANT_UNROLL
    for (int v = 0; v < V; ++v) y[v] = add_rn(y[v], residual.value(e.residual_type, v));
  return y;
}

// Writes the run's results as the output's type.
template <int V>
FXQUANT_HD void store(const Finish& f, const Columns<V>& c, int64_t m, int n,
                      const Run<float, V>& y) {
  const Epilogue& e = f.epilogue;
  const int64_t at = m * f.n + n;
  if (e.out_index >= 0) {
    Run<int8_t, V> q;
    FXQUANT_UNROLL
    for (int v = 0; v < V; ++v) q[v] = c.out(y[v]);
    save(f, static_cast<int8_t*>(e.out) + at, n, q);
  } else if (e.out_type == kFloat32) {
    save(f, static_cast<float*>(e.out) + at, n, y);
  } else {
    Run<uint16_t, V> halves;
    FXQUANT_UNROLL
    for (int v = 0; v < V; ++v)
      halves[v] = e.out_type == kFloat16 ? from_float<Half>(y[v]).bits
                                         : from_float<BFloat16>(y[v]).bits;
    save(f, static_cast<uint16_t*>(e.out) + at, n, halves);
  }
}

}  // namespace fxquant
