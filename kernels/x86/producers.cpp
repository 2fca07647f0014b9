// The ops that make quantised activations, each in one pass over memory (group norm: about two).
//
// Build: c++ -O3 -march=native -fopenmp -shared -fPIC producers.cpp   (producers.py does it)
// Reference: ../reference.py, op by op. Called by producers.py with raw pointers; images are
// [B, spatial, C] in memory, everything is contiguous. Inputs are float32 or bfloat16, outputs
// uint8 (q + 128), int8 (q), or for the norms also float32 and bfloat16.
//
// Results do not depend on the number of threads: each output is computed by one thread, and sums
// are made over chunks whose size follows from the shape alone, then added in order.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "activations.h"
#include "memory.h"
#include "norms.h"
#include "numbers.h"
#include "parallel.h"

namespace {

constexpr int64_t kBlock = 8192;             // elements that one task of a flat loop handles
constexpr int64_t kSerialBelow = 4 * kBlock;  // smaller work is not worth waking threads for

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
void with_activation(int activation, F f) {
  switch (activation) {
    case kSilu: return f(std::integral_constant<int, kSilu>());
    case kGelu: return f(std::integral_constant<int, kGelu>());
    case kGeluTanh: return f(std::integral_constant<int, kGeluTanh>());
    default: return f(std::integral_constant<int, kNone>());
  }
}

// How many threads are worth waking for `work`, in elements.
inline int worth(int64_t work, int threads) { return work < kSerialBelow ? 1 : threads; }

// f(i) for every i, on as many threads as the `work` is worth.
template <class F>
void parallel(int64_t tasks, int64_t work, int threads, F f) {
  share(tasks, worth(work, threads), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i);
  });
}

}  // namespace

// ---- the C ABI; producers.py declares the same signatures ------------------------------------

extern "C" {

int fxquant_abi_version() { return 1; }

// x [rows, columns] -> out [rows, out_stride], the first `columns` of each row.
void fxquant_quantize(const void* x, int x_type, int64_t rows, int64_t columns, uint8_t* out,
                      int out_type, int64_t out_stride, const float* step, int bits,
                      int activation, int threads) {
  const int64_t blocks = ceil_div(columns, kBlock);
  with_input(x, x_type, [&](auto* p) {
    with_activation(activation, [&](auto kind) {
      constexpr int applied = decltype(kind)::value;
      const StoreIntegers<applied == kNone> store(step, bits, out_type);
      // Short rows are taken several at a time, long ones block by block.
      const int64_t group = std::max<int64_t>(1, kBlock / std::max<int64_t>(columns, 1));
      parallel(ceil_div(rows, group) * blocks, rows * columns, threads, [&](int64_t task) {
        const int64_t begin = task % blocks * kBlock, end = std::min(begin + kBlock, columns);
        const int64_t first = task / blocks * group, last = std::min(first + group, rows);
        for (int64_t r = first; r < last; ++r) {
          const auto* in = p + r * columns + begin;
          fill(store, out + r * out_stride + begin, end - begin,
               [=](auto at) { return activate<applied>(at(in)); });
        }
      });
    });
  });
}

// a + b, both [size].
void fxquant_add(const void* a, int a_type, const void* b, int b_type, int64_t size, uint8_t* out,
                 int out_type, const float* step, int bits, int threads) {
  const StoreExactInteger store(step, bits, out_type);
  with_input(a, a_type, [&](auto* pa) {
    with_input(b, b_type, [&](auto* pb) {
      parallel(ceil_div(size, kBlock), size, threads, [&](int64_t task) {
        const int64_t first = task * kBlock;
        const auto *va = pa + first, *vb = pb + first;
        fill(store, out + first, std::min(kBlock, size - first),
             [=](auto at) { return at(va) + at(vb); });
      });
    });
  });
}

// x [rows, 2 * width] -> out [rows, width]: value * gelu(gate).
void fxquant_geglu(const void* x, int x_type, int64_t rows, int64_t width, uint8_t* out,
                   int out_type, const float* step, int bits, int activation, int threads) {
  const StoreInteger store(step, bits, out_type);
  with_input(x, x_type, [&](auto* p) {
    with_activation(activation, [&](auto kind) {
      parallel(rows, rows * width, threads, [&](int64_t r) {
        const auto *value = p + 2 * r * width, *gate = value + width;
        fill(store, out + r * width, width,
             [=](auto at) { return at(value) * activate<decltype(kind)::value>(at(gate)); });
      });
    });
  });
}

// x [rows, width, channels] -> out [rows * factor, width * factor, channels], nearest.
void fxquant_upsample(const void* x, int x_type, int64_t rows, int64_t width, int64_t channels,
                      int64_t factor, uint8_t* out, int out_type, const float* step, int bits,
                      int threads) {
  const StoreExactInteger store(step, bits, out_type);
  const int64_t out_row = width * factor * channels;
  with_input(x, x_type, [&](auto* p) {
    parallel(rows, rows * out_row, threads, [&](int64_t r) {
      uint8_t* line = out + r * factor * out_row;
      for (int64_t w = 0; w < width; ++w) {
        const auto* in = p + (r * width + w) * channels;
        uint8_t* pixel = line + w * factor * channels;
        fill(store, pixel, channels, [=](auto at) { return at(in); });
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
    with_store(out_type, step, bits, [&](const auto& store) {
      using Stored = typename std::decay_t<decltype(store)>::Stored;
      auto run = [&](auto kind) {
        group_norm<decltype(kind)::value>(p, batch, length, channels, groups, weight, bias, eps,
                                          store, static_cast<Stored*>(out),
                                          worth(batch * length * channels, threads));
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
    with_store(out_type, step, bits, [&](const auto& store) {
      using Stored = typename std::decay_t<decltype(store)>::Stored;
      parallel(ceil_div(rows, kTogether), rows * width, threads, [&](int64_t task) {
        decltype(p) in[kTogether];
        Stored* to[kTogether];
        for (int64_t r = 0; r < kTogether; ++r) {
          const int64_t at = std::min(task * kTogether + r, rows - 1) * width;
          in[r] = p + at;
          to[r] = static_cast<Stored*>(out) + at;
        }
        layer_norm_rows(in, width, scale, shift, eps, store, to);
      });
    });
  });
}

}  // extern "C"
