// A register of results on its way to memory: float32, bfloat16 or integers.
//
// `lanes` makes the bits of a number in its lane, where those above the number's size may be
// anything; calling a store writes kLanes numbers next to each other.

#pragma once

#include <cmath>
#include <cstdint>

#include "numbers.h"
#include "vector.h"

namespace {

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

// As ToInteger of numbers.h, but by the reciprocal of the scale.
struct StoreInteger {
  using Stored = uint8_t;
  Floats inverse, low, high;
  Ints shift;
  StoreInteger(const float* step, int bits, int type)
      : inverse(splat(1.0f / step[0])),
        low(splat(-std::ldexp(1.0f, bits - 1) - step[1])),
        high(splat(std::ldexp(1.0f, bits - 1) - 1.0f - step[1])),
        shift(splat(int32_t(step[1]) + (type == kUint8 ? 128 : 0))) {}
  FXQUANT_INLINE Ints lanes(Floats x) const {
    const Floats clamped = smaller(larger(x * inverse, low), high);  // a NaN becomes the lowest
    return rounded(clamped) + shift;
  }
  FXQUANT_INLINE void operator()(uint8_t* to, Floats x) const { store_bytes(to, lanes(x)); }
};

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

}  // namespace
