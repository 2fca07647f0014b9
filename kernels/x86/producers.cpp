// The ops that make quantised activations, each in one pass over memory (group norm: two).
//
// Build: c++ -O3 -march=native -fopenmp -shared -fPIC producers.cpp   (producers.py does it)
// Reference: ../reference.py, op by op. Called by producers.py with raw pointers; images are
// [B, spatial, C] in memory, everything is contiguous. Inputs are float32 or bfloat16, outputs
// uint8 (q + 128), int8 (q), or for the norms also float32 and bfloat16.
//
// Results do not depend on the number of threads: each output is computed by one thread, and sums
// are made over chunks whose size follows from the shape alone, then added in order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "numbers.h"
#include "parallel.h"

namespace {

constexpr int64_t kBlock = 8192;             // elements that one task of a flat loop handles
constexpr int64_t kSerialBelow = 4 * kBlock;  // smaller work is not worth waking threads for
constexpr int64_t kChunk = 16384;            // elements of a group norm's chunk: fits L1 or L2
constexpr int64_t kChunkRows = 256;          // bounds the length of a float32 sum

// ---- run-time values to compile-time ones ----------------------------------------------------

template <class F>
void with_input(const void* x, int type, F f) {
  if (type == kFloat32) {
    f(static_cast<const float*>(x));
  } else {
    f(static_cast<const Bfloat16*>(x));
  }
}

template <class F>
void with_output(void* out, int type, const float* step, int bits, F f) {
  if (type == kFloat32) {
    f(ToFloat32{static_cast<float*>(out)});
  } else if (type == kBfloat16) {
    f(ToBfloat16{static_cast<Bfloat16*>(out)});
  } else {
    f(ToInteger(out, step, bits, type));
  }
}

template <class F>
void with_activation(int activation, F f) {
  switch (activation) {
    case kSilu: return f(std::integral_constant<int, kSilu>());
    case kGelu: return f(std::integral_constant<int, kGelu>());
    case kGeluTanh: return f(std::integral_constant<int, kGeluTanh>());
    default: return f(std::integral_constant<int, kNone>());
  }
}

// f(i) for every i, on `threads` threads unless the `work` (in elements) is small.
template <class F>
void parallel(int64_t tasks, int64_t work, int threads, F f) {
  share(tasks, work < kSerialBelow ? 1 : threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i);
  });
}

// ---- group norm ------------------------------------------------------------------------------

// sum[c] += the sum over rows of x[row, c].
template <class In>
void add_rows(const In* __restrict x, int64_t rows, int64_t channels, float* __restrict sum) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const In* __restrict p = x + r * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c)
      sum[c] += (load(p[c]) + load(p[c + channels])) +
                (load(p[c + 2 * channels]) + load(p[c + 3 * channels]));
  }
  for (; r < rows; ++r) {
    const In* __restrict p = x + r * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) sum[c] += load(p[c]);
  }
}

// sum[c] and square[c] += the sums over rows of d and d * d, d = x[row, c] - pivot[c].
template <class In>
void add_deviations(const In* __restrict x, int64_t rows, int64_t channels,
                    const float* __restrict pivot, float* __restrict sum,
                    float* __restrict square) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const In* __restrict p = x + r * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float d0 = load(p[c]) - pivot[c];
      const float d1 = load(p[c + channels]) - pivot[c];
      const float d2 = load(p[c + 2 * channels]) - pivot[c];
      const float d3 = load(p[c + 3 * channels]) - pivot[c];
      sum[c] += (d0 + d1) + (d2 + d3);
      square[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
  }
  for (; r < rows; ++r) {
    const In* __restrict p = x + r * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float d = load(p[c]) - pivot[c];
      sum[c] += d;
      square[c] += d * d;
    }
  }
}

struct Moments {
  double mean, square;  // of one group in one chunk; square: summed squared deviations
};

// The moments of each group of one chunk [rows, channels]. Two sweeps over cached data: the second
// measures from the first one's mean, so that a large mean costs no accuracy.
template <class In>
void chunk_moments(const In* x, int64_t rows, int64_t channels, int64_t groups, Moments* moments) {
  const int64_t width = channels / groups;
  const double count = double(rows) * double(width);
  std::vector<float> scratch(4 * channels, 0.0f);
  float* total = scratch.data();
  float* pivot = total + channels;
  float* sum = pivot + channels;
  float* square = sum + channels;
  add_rows(x, rows, channels, total);
  for (int64_t g = 0; g < groups; ++g) {
    double t = 0.0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) t += total[c];
    std::fill(pivot + g * width, pivot + (g + 1) * width, float(t / count));
  }
  add_deviations(x, rows, channels, pivot, sum, square);
  for (int64_t g = 0; g < groups; ++g) {
    double d = 0.0, dd = 0.0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      d += sum[c];
      dd += square[c];
    }
    moments[g] = {pivot[g * width] + d / count, dd - d * d / count};
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

template <int activation, class In, class Out>
void normalize_rows(const In* __restrict x, int64_t first, int64_t rows, int64_t channels,
                    Coefficients k, Out put) {
  const float* __restrict mean = k.mean;
  const float* __restrict scale = k.scale;
  const float* __restrict shift = k.shift;
  for (int64_t r = first; r < first + rows; ++r) {
    const In* in = x + r * channels;
    fill(put, r * channels, channels, [=](int64_t c) {
      return activate<activation>((load(in[c]) - mean[c]) * scale[c] + shift[c]);
    });
  }
}

template <int activation, class In, class Out>
void group_norm(const In* x, int64_t batch, int64_t length, int64_t channels, int64_t groups,
                const float* weight, const float* bias, double eps, Out put, int threads) {
  const Chunks chunks(length, channels);
  const int64_t tasks = batch * chunks.count, work = batch * length * channels;
  std::vector<Moments> moments(tasks * groups);
  std::vector<float> scratch(3 * batch * channels);
  auto of = [&](int64_t b) {
    float* p = scratch.data() + 3 * b * channels;
    return Coefficients{p, p + channels, p + 2 * channels};
  };
  auto row_of = [&](int64_t task) {
    return task / chunks.count * length + task % chunks.count * chunks.rows;
  };
  parallel(tasks, work, threads, [&](int64_t t) {
    chunk_moments(x + row_of(t) * channels, chunks.rows_of(t % chunks.count), channels, groups,
                  moments.data() + t * groups);
  });
  parallel(batch, work, threads, [&](int64_t b) {
    coefficients(moments.data() + b * chunks.count * groups, chunks, channels, groups, weight,
                 bias, eps, of(b));
  });
  parallel(tasks, work, threads, [&](int64_t t) {
    normalize_rows<activation>(x, row_of(t), chunks.rows_of(t % chunks.count), channels,
                               of(t / chunks.count), put);
  });
}

// ---- layer norm ------------------------------------------------------------------------------

template <class In, class Out>
void layer_norm_row(const In* __restrict x, int64_t width, const float* __restrict weight,
                    const float* __restrict bias, double eps, int64_t at, Out put) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < width; ++i) total += load(x[i]);
  const float pivot = total / float(width);
  float sum = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : sum, square)
  for (int64_t i = 0; i < width; ++i) {
    const float d = load(x[i]) - pivot;
    sum += d;
    square += d * d;
  }
  const float rest = sum / float(width);  // what the pivot lacks to be the mean
  const double variance = double(square) / width - double(rest) * rest;
  const float inverse = float(1.0 / std::sqrt(std::max(variance, 0.0) + eps));
  fill(put, at, width, [=](int64_t i) {
    return ((load(x[i]) - pivot) - rest) * inverse * weight[i] + bias[i];
  });
}

}  // namespace

// ---- the C ABI; producers.py declares the same signatures ------------------------------------

extern "C" {

int fxquant_abi_version() { return 1; }

// x [rows, columns] -> out [rows, out_stride], the first `columns` of each row.
void fxquant_quantize(const void* x, int x_type, int64_t rows, int64_t columns, void* out,
                      int out_type, int64_t out_stride, const float* step, int bits,
                      int activation, int threads) {
  const int64_t blocks = ceil_div(columns, kBlock);
  const ToInteger put(out, step, bits, out_type);
  with_input(x, x_type, [&](auto* p) {
    with_activation(activation, [&](auto kind) {
      // Short rows are taken several at a time, long ones block by block.
      const int64_t group = std::max<int64_t>(1, kBlock / std::max<int64_t>(columns, 1));
      parallel(ceil_div(rows, group) * blocks, rows * columns, threads, [&](int64_t task) {
        const int64_t begin = task % blocks * kBlock, end = std::min(begin + kBlock, columns);
        const int64_t first = task / blocks * group, last = std::min(first + group, rows);
        for (int64_t r = first; r < last; ++r) {
          const auto* in = p + r * columns + begin;
          fill(put, r * out_stride + begin, end - begin,
               [=](int64_t i) { return activate<decltype(kind)::value>(load(in[i])); });
        }
      });
    });
  });
}

// a + b, both [size].
void fxquant_add(const void* a, int a_type, const void* b, int b_type, int64_t size, void* out,
                 int out_type, const float* step, int bits, int threads) {
  const ToInteger put(out, step, bits, out_type);
  with_input(a, a_type, [&](auto* pa) {
    with_input(b, b_type, [&](auto* pb) {
      parallel(ceil_div(size, kBlock), size, threads, [&](int64_t task) {
        const int64_t at = task * kBlock;
        const auto *va = pa + at, *vb = pb + at;
        fill(put, at, std::min(kBlock, size - at),
             [=](int64_t i) { return load(va[i]) + load(vb[i]); });
      });
    });
  });
}

// x [rows, 2 * width] -> out [rows, width]: value * gelu(gate).
void fxquant_geglu(const void* x, int x_type, int64_t rows, int64_t width, void* out,
                   int out_type, const float* step, int bits, int activation, int threads) {
  const ToInteger put(out, step, bits, out_type);
  with_input(x, x_type, [&](auto* p) {
    with_activation(activation, [&](auto kind) {
      parallel(rows, rows * width, threads, [&](int64_t r) {
        const auto *value = p + 2 * r * width, *gate = value + width;
        fill(put, r * width, width, [=](int64_t i) {
          return load(value[i]) * activate<decltype(kind)::value>(load(gate[i]));
        });
      });
    });
  });
}

// x [rows, width, channels] -> out [rows * factor, width * factor, channels], nearest.
void fxquant_upsample(const void* x, int x_type, int64_t rows, int64_t width, int64_t channels,
                      int64_t factor, void* out, int out_type, const float* step, int bits,
                      int threads) {
  const ToInteger put(out, step, bits, out_type);
  const int64_t out_row = width * factor * channels;
  with_input(x, x_type, [&](auto* p) {
    parallel(rows, rows * out_row, threads, [&](int64_t r) {
      uint8_t* line = static_cast<uint8_t*>(out) + r * factor * out_row;
      for (int64_t w = 0; w < width; ++w) {
        const auto* in = p + (r * width + w) * channels;
        const int64_t at = r * factor * out_row + w * factor * channels;
        fill(put, at, channels, [=](int64_t c) { return load(in[c]); });
        uint8_t* pixel = line + w * factor * channels;
        for (int64_t f = 1; f < factor; ++f) std::memcpy(pixel + f * channels, pixel, channels);
      }
      for (int64_t f = 1; f < factor; ++f) std::memcpy(line + f * out_row, line, out_row);
    });
  });
}

// x [batch, length, channels]; weight and bias [channels] or null; activation none or silu.
void fxquant_group_norm(const void* x, int x_type, int64_t batch, int64_t length,
                        int64_t channels, int64_t groups, const float* weight, const float* bias,
                        double eps, int activation, void* out, int out_type, const float* step,
                        int bits, int threads) {
  with_input(x, x_type, [&](auto* p) {
    with_output(out, out_type, step, bits, [&](auto put) {
      auto run = [&](auto kind) {
        group_norm<decltype(kind)::value>(p, batch, length, channels, groups, weight, bias, eps,
                                          put, threads);
      };
      if (activation == kSilu) {
        run(std::integral_constant<int, kSilu>());
      } else {
        run(std::integral_constant<int, kNone>());
      }
    });
  });
}

// x [rows, width]; weight and bias [width] or null.
void fxquant_layer_norm(const void* x, int x_type, int64_t rows, int64_t width,
                        const float* weight, const float* bias, double eps, void* out,
                        int out_type, const float* step, int bits, int threads) {
  const std::vector<float> ones(weight ? 0 : width, 1.0f), zeros(bias ? 0 : width, 0.0f);
  const float* scale = weight ? weight : ones.data();
  const float* shift = bias ? bias : zeros.data();
  with_input(x, x_type, [&](auto* p) {
    with_output(out, out_type, step, bits, [&](auto put) {
      parallel(rows, rows * width, threads, [&](int64_t r) {
        layer_norm_row(p + r * width, width, scale, shift, eps, r * width, put);
      });
    });
  });
}

}  // extern "C"
