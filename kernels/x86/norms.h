// Group norm and layer norm, which producers.cpp quantises: mean and variance in float32 sums that
// lose nothing to large means, in an order that does not depend on the number of threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "activations.h"
#include "memory.h"
#include "numbers.h"
#include "parallel.h"
#include "vector.h"

namespace {

constexpr int64_t kChunk = 16384;            // elements of a group norm's chunk: fits L1 or L2
constexpr int64_t kChunkRows = 256;          // bounds the length of a float32 sum

// Norms measure from a pivot near the mean, so that large means cost no accuracy: the mean of at
// most so many rows of an image, or numbers of a row. However far from the others these are, they
// are a share of the whole: the squares grow by no more than its reciprocal, and lose as much
// accuracy.
constexpr int64_t kSampled = 64;

// What is read next comes into cache while this is computed: from memory a layer norm takes two
// thirds of the time. Beyond the last row nothing happens.
FXQUANT_INLINE void fetch(const void* next) { __builtin_prefetch(next); }

// ---- group norm ------------------------------------------------------------------------------

// The mean of each channel's group over some rows of an image [length, channels]: one of every
// stretch of rows, scattered within it, since rows at equal distances may all be of one border.
template <class In>
void sample_means(const In* x, int64_t length, int64_t channels, int64_t groups, float* means) {
  const int64_t most = std::clamp(length / 32, int64_t(8), kSampled);  // a thread's share is more
  const int64_t rows = std::min(length, most), width = channels / groups;
  std::fill(means, means + channels, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = r * length / rows, next = (r + 1) * length / rows;
    const In* row = x + (first + r * 37 % (next - first)) * channels;
    fill(StoreFloat32(), means, channels, [=](auto at) { return at(means) + at(row); });
  }
  for (int64_t first = 0; first < channels; first += width) {
    const double total = std::accumulate(means + first, means + first + width, 0.0);
    std::fill(means + first, means + first + width, float(total / double(rows * width)));
  }
}

// sum[c] and square[c] += the sums over rows of d and d * d, d = x[row, c] - pivot[c].
template <int rows, class In>
void add_deviations(const In* x, int64_t channels, const float* pivot, float* sum, float* square) {
  by_registers(channels, [=](auto at) {
    const Floats from = at(pivot);
    Floats d[rows], s = {}, q = {};
    for (int r = 0; r < rows; ++r) fetch(x + (rows + r) * channels + at.i);
    for (int r = 0; r < rows; ++r) d[r] = at(x + r * channels) - from;
    for (int r = 0; r < rows; ++r) {
      s += d[r];
      q += d[r] * d[r];
    }
    at.put(StoreFloat32(), sum, at(sum) + s);
    at.put(StoreFloat32(), square, at(square) + q);
  });
}

struct Moments {
  double mean, square;  // of one group in one chunk; square: summed squared deviations
};

// The moments of each group of one chunk [rows, channels].
template <class In>
void chunk_moments(const In* x, int64_t rows, int64_t channels, int64_t groups,
                   const float* pivot, Moments* moments) {
  const int64_t width = channels / groups;
  const double count = double(rows) * double(width);
  std::vector<float> scratch(2 * channels, 0.0f);
  float *sum = scratch.data(), *square = sum + channels;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    add_deviations<4>(x + r * channels, channels, pivot, sum, square);
  for (; r < rows; ++r) add_deviations<1>(x + r * channels, channels, pivot, sum, square);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * width, last = first + width;
    const double d = std::accumulate(sum + first, sum + last, 0.0);
    const double dd = std::accumulate(square + first, square + last, 0.0);
    moments[g] = {pivot[first] + d / count, dd - d * d / count};
  }
}

struct Chunks {
  int64_t length, rows, count;  // positions of an image, positions of a chunk, chunks of an image

  Chunks(int64_t length, int64_t channels)
      : length(length),
        rows(std::clamp(kChunk / channels, int64_t(1), kChunkRows)),
        count(ceil_div(length, rows)) {}

  int64_t rows_of(int64_t chunk) const { return std::min(rows, length - chunk * rows); }
};

// y = (x - mean) * scale + shift per channel; shift also holds what float32 loses of the mean.
struct Coefficients {
  float *mean, *scale, *shift;
};

void coefficients(const Moments* moments, const Chunks& chunks, int64_t channels, int64_t groups,
                  const float* weight, const float* bias, double eps, Coefficients out) {
  const int64_t width = channels / groups;
  const double total = double(chunks.length) * double(width);
  for (int64_t g = 0; g < groups; ++g) {
    double mean = 0.0, square = 0.0;
    for (int64_t k = 0; k < chunks.count; ++k)
      mean += moments[k * groups + g].mean * (double(chunks.rows_of(k) * width) / total);
    for (int64_t k = 0; k < chunks.count; ++k) {
      const Moments& m = moments[k * groups + g];
      square += m.square + double(chunks.rows_of(k) * width) * (m.mean - mean) * (m.mean - mean);
    }
    const double inverse = 1.0 / std::sqrt(square / total + eps);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const double scale = weight ? inverse * weight[c] : inverse;
      out.mean[c] = float(mean);
      out.scale[c] = float(scale);
      out.shift[c] = float((bias ? bias[c] : 0.0) - (mean - double(float(mean))) * scale);
    }
  }
}

template <int activation, class In, class Store>
void normalize_rows(const In* x, int64_t rows, int64_t channels, Coefficients k,
                    const Store& store, typename Store::Stored* out) {
  for (int64_t r = 0; r < rows; ++r, x += channels, out += channels)
    fill(store, out, channels, [=](auto at) {
      return activate<activation>((at(x) - at(k.mean)) * at(k.scale) + at(k.shift));
    });
}

// f(b, first, last) for consecutive chunks of image b, on one thread.
template <class F>
void by_images(int64_t batch, const Chunks& chunks, int threads, F f) {
  const int64_t count = chunks.count;
  share(batch * count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin / count; b * count < end; ++b)
      f(b, std::max(begin - b * count, int64_t(0)), std::min(end - b * count, count));
  });
}

// What a thread needs of an image besides its own chunks it makes itself: for some threads to an
// image that is little, and none need be woken for it.
template <int activation, class In, class Store>
void group_norm(const In* x, int64_t batch, int64_t length, int64_t channels, int64_t groups,
                const float* weight, const float* bias, double eps, const Store& store,
                typename Store::Stored* out, int threads) {
  const Chunks chunks(length, channels);
  std::vector<Moments> moments(batch * chunks.count * groups);
  by_images(batch, chunks, threads, [&](int64_t b, int64_t first, int64_t last) {
    const In* image = x + b * length * channels;
    std::vector<float> pivot(channels);
    sample_means(image, length, channels, groups, pivot.data());
    for (int64_t k = first; k < last; ++k)
      chunk_moments(image + k * chunks.rows * channels, chunks.rows_of(k), channels, groups,
                    pivot.data(), moments.data() + (b * chunks.count + k) * groups);
  });
  by_images(batch, chunks, threads, [&](int64_t b, int64_t first, int64_t last) {
    std::vector<float> scratch(3 * channels);
    const Coefficients k{scratch.data(), scratch.data() + channels, scratch.data() + 2 * channels};
    coefficients(moments.data() + b * chunks.count * groups, chunks, channels, groups, weight,
                 bias, eps, k);
    const int64_t row = first * chunks.rows, rows = std::min(last * chunks.rows, length) - row;
    const int64_t at = (b * length + row) * channels;
    normalize_rows<activation>(x + at, rows, channels, k, store, out + at);
  });
}

// ---- layer norm ------------------------------------------------------------------------------

constexpr int kTogether = 4;  // rows that are summed at the same time: a sum is a chain of adds

// The sum of the lanes.
inline float total(Floats x) {
  typedef float Four __attribute__((vector_size(16)));
  float lanes[kLanes];
  store_vector(lanes, x);
  Four sum = {};
  for (int lane = 0; lane < kLanes; lane += 4) sum += load_vector<Four>(lanes + lane);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// kTogether rows of x; the last ones may be the same. `eps` is float64's, as the variance.
template <class In, class Store>
void layer_norm_rows(const In* const (&x)[kTogether], int64_t width, const float* weight,
                     const float* bias, double eps, Store store,
                     typename Store::Stored* const (&out)[kTogether]) {
  Floats sum[kTogether] = {}, square[kTogether] = {}, pivot[kTogether];
  const int64_t sampled = std::min(width, kSampled);
  by_registers(sampled, [&](auto at) {
    for (int r = 0; r < kTogether; ++r) sum[r] += at(x[r]);
  });
  for (int r = 0; r < kTogether; ++r) {
    pivot[r] = splat(total(sum[r]) / float(sampled));
    sum[r] = Floats{};
  }
  by_registers(width, [&](auto at) {
    for (int r = 0; r < kTogether; ++r) {
      const Floats d = at.only(at(x[r]) - pivot[r]);
      sum[r] += d;
      square[r] += d * d;
    }
  });
  Floats scale[kTogether], shift[kTogether];
  for (int r = 0; r < kTogether; ++r) {
    const float mean = total(sum[r]) / float(width);  // what the pivot lacks to be the mean
    const double variance = double(total(square[r])) / width - double(mean) * mean;
    const double inverse = 1.0 / std::sqrt(std::max(variance, 0.0) + eps);
    scale[r] = splat(float(inverse));
    shift[r] = splat(float(-mean * inverse));
  }
  by_registers(width, [&](auto at) {
    const Floats w = at(weight), b = at(bias);
    for (int r = 0; r < kTogether; ++r) fetch(x[r] + kTogether * width + at.i);
    for (int r = 0; r < kTogether; ++r)
      at.put(store, out[r], ((at(x[r]) - pivot[r]) * scale[r] + shift[r]) * w + b);
  });
}

}  // namespace
