// The product of a tile of output rows with a panel of weights, and what follows it. See gemm.cpp.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "activations.h"
#include "gemm_pack.h"
#include "memory.h"
#include "numbers.h"
#include "vector.h"

namespace {

constexpr int kRows = kLanes == 16 ? 12 : 6;  // rows of a tile: as many sums as registers can hold

// Further activations (see activations.h): half the outputs times the GELU of the other half.
enum Gated { kGeglu = 4, kGegluTanh = 5 };

inline bool is_gated(int activation) { return activation >= kGeglu; }

// ---- the product of a tile -------------------------------------------------------------------

// Consecutive input channels of one tap, by groups.
struct Run {
  int64_t tap, offset, groups;  // offset: bytes from the start of a pixel
};

// What a tile multiplies, where its sums start, and where they go.
struct Product {
  const Run *begin, *end;
  const uint8_t* const* pixels;  // [tap][pixel_stride]: of the tile's first row and the next ones
  int64_t pixel_stride;
  const int8_t* weights;
  const int32_t* start;  // [row][start_stride]
  int64_t start_stride;
  int32_t* sums;  // [row][kPanel], or null: then `out` gets sum * scale + bias
  const float* scale;
  const float* const* bias;  // of each row
  void* out;                 // [row][out_stride]
  int64_t out_stride;
  const uint8_t* ahead;  // weights that will be needed next, brought into L2 on the way
  int64_t ahead_step;    // for each group
};

// A tile of the panel's first `width` registers.
template <int rows, int width, class Store>
void multiply(const Product& p, const Store& store) {
  Ints sum[rows][width];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < width; ++v)
      sum[r][v] = load_vector<Ints>(p.start + r * p.start_stride + v * kLanes);
  const int8_t* weights = p.weights;
  const uint8_t* ahead = p.ahead;
  const int64_t ahead_step = p.ahead_step;
  for (const Run* run = p.begin; run != p.end; ++run) {
    const uint8_t* pixel[rows];
    const int64_t size = 4 * run->groups;
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
      pixel[r] = p.pixels[run->tap * p.pixel_stride + r] + run->offset + size;
    for (int64_t i = -size; i < 0; i += 4) {
      Ints weight[width];
#pragma GCC unroll 2
      for (int v = 0; v < width; ++v) weight[v] = load_vector<Ints>(weights + 4 * kLanes * v);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const Ints x = splat_word(pixel[r] + i);
#pragma GCC unroll 2
        for (int v = 0; v < width; ++v) sum[r][v] = dot_bytes(sum[r][v], x, weight[v]);
      }
      weights += kGroup;
      __builtin_prefetch(ahead, 0, 2);
      ahead += ahead_step;
    }
  }
  if (int32_t* sums = p.sums) {
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < width; ++v)
        store_vector(sums + r * kPanel + v * kLanes, sum[r][v]);
    return;
  }
  using Stored = typename Store::Stored;
  Stored* out = static_cast<Stored*>(p.out);
  const int64_t out_stride = p.out_stride;
  const float* const* bias = p.bias;
#pragma GCC unroll 2
  for (int v = 0; v < width; ++v) {
    const Floats scale = load_vector<Floats>(p.scale + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const Floats shift = load_vector<Floats>(bias[r] + v * kLanes);
      store(out + r * out_stride + v * kLanes, to_floats(sum[r][v]) * scale + shift);
    }
  }
}

template <int width, class Store, int... rows>
void multiply_rows(int count, const Product& p, const Store& store,
                   std::integer_sequence<int, rows...>) {
  static constexpr void (*table[])(const Product&, const Store&) = {
      multiply<rows + 1, width, Store>...};
  table[count - 1](p, store);
}

template <int width, class Store>
void multiply_rows(int count, const Product& p, const Store& store) {
  multiply_rows<width>(count, p, store, std::make_integer_sequence<int, kRows>());
}

// ---- what follows the product ----------------------------------------------------------------

// The end of the layer, on tiles of floats: activate, add the residual, store.
struct Ending {
  int activation;
  const void* residual;  // [rows, columns] or null
  int residual_type;
  void* out;  // [rows, columns]
  int out_type;
  const float* step;
  int bits;
  int64_t columns;
};

template <int activation>
void activate_tile(float* tile, int rows) {
  fill(StoreFloat32(), tile, rows * kPanel,
       [=](auto at) { return activate<activation>(at(tile)); });
}

// The first half of every row becomes its product with the second half's GELU.
template <int activation>
void gate_tile(float* tile, int rows) {
  for (int r = 0; r < rows; ++r, tile += kPanel) {
    const Floats gate = load_floats(tile + kLanes);
    store_vector(tile, load_floats(tile) * activate<activation>(gate));
  }
}

void activate_tile(int activation, float* tile, int rows) {
  switch (activation) {
    case kSilu: return activate_tile<kSilu>(tile, rows);
    case kGelu: return activate_tile<kGelu>(tile, rows);
    case kGeluTanh: return activate_tile<kGeluTanh>(tile, rows);
    case kGeglu: return gate_tile<kGelu>(tile, rows);
    case kGegluTanh: return gate_tile<kGeluTanh>(tile, rows);
    default: return;
  }
}

template <class T>
void add_residual(const T* residual, int64_t stride, int width, float* tile, int rows) {
  for (int r = 0; r < rows; ++r, residual += stride, tile += kPanel)
    fill(StoreFloat32(), tile, width, [=](auto at) { return at(tile) + at(residual); });
}

// The residual of a tile comes into cache while the tile is multiplied.
void fetch_residual(const Ending& e, int64_t row, int rows, int64_t column) {
  const int64_t size = e.residual_type == kFloat32 ? 4 : 2, line = 64;
  const char* from = static_cast<const char*>(e.residual) + (row * e.columns + column) * size;
  const int64_t width = std::min<int64_t>(kPanel, e.columns - column) * size;
  for (int r = 0; r < rows; ++r, from += e.columns * size)
    for (int64_t i = 0; i < width; i += line) __builtin_prefetch(from + i);
}

// A tile's rows to out [.., stride]; a panel's padding is left out.
template <class Store>
void store_tile(const Store& store, const float* tile, int rows, int width,
                typename Store::Stored* to, int64_t stride) {
  for (int r = 0; r < rows; ++r, to += stride, tile += kPanel)
    fill(store, to, width, [=](auto at) { return at(tile); });
}

// Stores x + residual, which lies in memory like the outputs and is of their type.
template <class Store>
struct PlusResidual {
  using Stored = typename Store::Stored;
  const Stored *residual, *out;
  explicit PlusResidual(const Ending& e)
      : residual(static_cast<const Stored*>(e.residual)), out(static_cast<const Stored*>(e.out)) {}
  FXQUANT_INLINE void operator()(Stored* to, Floats x) const {
    Store()(to, x + load_floats(residual + (to - out)));
  }
};

// f(the store that ends the layer straight from its sums), and true, if there is one.
template <class F>
bool with_direct_store(const Ending& e, F f) {
  if (e.activation != kNone) return false;
  if (!e.residual) {
    with_store(e.out_type, e.step, e.bits, f);
  } else if (e.residual_type == kFloat32 && e.out_type == kFloat32) {
    f(PlusResidual<StoreFloat32>(e));
  } else if (e.residual_type == kBfloat16 && e.out_type == kBfloat16) {
    f(PlusResidual<StoreBfloat16>(e));
  } else {
    return false;
  }
  return true;
}

// The tile whose first output is at (row, column).
template <class Store>
void finish(const Ending& e, const Store& store, float* tile, int64_t row, int rows,
            int64_t column) {
  activate_tile(e.activation, tile, rows);
  const int panel = is_gated(e.activation) ? kLanes : kPanel;
  const int width = int(std::min<int64_t>(panel, e.columns - column));
  const int64_t at = row * e.columns + column;
  if (e.residual && e.residual_type == kFloat32)
    add_residual(static_cast<const float*>(e.residual) + at, e.columns, width, tile, rows);
  if (e.residual && e.residual_type == kBfloat16)
    add_residual(static_cast<const Bfloat16*>(e.residual) + at, e.columns, width, tile, rows);
  store_tile(store, tile, rows, width, static_cast<typename Store::Stored*>(e.out) + at, e.columns);
}

}  // namespace
