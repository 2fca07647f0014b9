// Registers of numbers from memory and back: float32 and bfloat16, and integers of results.
//
// Of a store, `lanes` makes the bits of a number in its lane, where those above the number's size
// may be anything; calling it writes kLanes numbers next to each other.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "vector.h"

namespace {

FXQUANT_INLINE Floats load_floats(const float* from) { return load_vector<Floats>(from); }
FXQUANT_INLINE Floats load_floats(const Bfloat16* from) {
  return as_floats(load_words(from) << 16);
}

// ---- stores ------------------------------------------------------------------------------------

struct StoreFloat32 {
  using Stored = float;
  FXQUANT_INLINE Ints lanes(Floats x) const { return as_ints(x); }
  FXQUANT_INLINE void operator()(float* to, Floats x) const { store_vector(to, x); }
};

struct StoreBfloat16 {
  using Stored = Bfloat16;
  FXQUANT_INLINE Ints lanes(Floats x) const { return bfloat16_bits(x); }
  FXQUANT_INLINE void operator()(Bfloat16* to, Floats x) const { store_bfloat16(to, x); }
};

// Quantised. `exact` divides by the scale, as the reference does, where its bits can be met
// (quantise, add, upsample); what follows other arithmetic is multiplied by the reciprocal.
template <bool exact>
struct StoreIntegers {
  using Stored = uint8_t;
  Floats scale, low, high;
  Ints shift;
  StoreIntegers(const float* step, int bits, int type)
      : scale(splat(exact ? step[0] : 1.0f / step[0])),
        low(splat(-std::ldexp(1.0f, bits - 1) - step[1])),
        high(splat(std::ldexp(1.0f, bits - 1) - 1.0f - step[1])),
        shift(splat(int32_t(step[1]) + (type == kUint8 ? 128 : 0))) {}
  FXQUANT_INLINE Ints lanes(Floats x) const {
    const Floats steps = exact ? x / scale : x * scale;
    return rounded(smaller(larger(steps, low), high)) + shift;  // a NaN becomes the lowest
  }
  FXQUANT_INLINE void operator()(uint8_t* to, Floats x) const { store_bytes(to, lanes(x)); }
};

using StoreInteger = StoreIntegers<false>;
using StoreExactInteger = StoreIntegers<true>;

// f(the store of an output's type).
template <class F>
void with_store(int type, const float* step, int bits, F f) {
  if (type == kFloat32) {
    f(StoreFloat32());
  } else if (type == kBfloat16) {
    f(StoreBfloat16());
  } else {
    f(StoreInteger(step, bits, type));
  }
}

// ---- rows of any length ------------------------------------------------------------------------

// The register of a row that starts at number i.
struct Whole {
  int64_t i;
  template <class T>
  FXQUANT_INLINE Floats operator()(const T* row) const {
    return load_floats(row + i);
  }
  FXQUANT_INLINE Floats only(Floats x) const { return x; }
  template <class Store>
  FXQUANT_INLINE void put(const Store& store, typename Store::Stored* row, Floats x) const {
    store(row + i, x);
  }
};

// What is left of a row, less than a register: zeros follow it, and stay unwritten.
struct Rest {
  int64_t i, count;
  template <class T>
  FXQUANT_INLINE Floats operator()(const T* row) const {
    T padded[kLanes] = {};
    std::memcpy(padded, row + i, count * sizeof *row);
    return load_floats(padded);
  }
  FXQUANT_INLINE Floats only(Floats x) const {
    float lanes[kLanes];
    store_vector(lanes, x);
    for (int64_t lane = count; lane < kLanes; ++lane) lanes[lane] = 0.0f;
    return load_vector<Floats>(lanes);
  }
  template <class Store>
  FXQUANT_INLINE void put(const Store& store, typename Store::Stored* row, Floats x) const {
    typename Store::Stored padded[kLanes];
    store(padded, x);
    std::memcpy(row + i, padded, count * sizeof *row);
  }
};

// f(at) for every register of a row of `size` numbers: at(row) loads one, at.put(store, row, x)
// writes one, at.only(x) makes zeros of lanes beyond the row.
template <class F>
FXQUANT_INLINE void by_registers(int64_t size, F f) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) f(Whole{i});
  if (i < size) f(Rest{i, size - i});
}

// row[i] = f(at) for the whole row. `store` by value: written bytes could alias a reference's.
template <class Store, class F>
FXQUANT_INLINE void fill(Store store, typename Store::Stored* row, int64_t size, F f) {
  by_registers(size, [=](auto at) { at.put(store, row, f(at)); });
}

}  // namespace
