// Three ways to multiply in attention: float32, bfloat16 and bytes. See attention.cpp.
//
// Each says what tensors hold (`In`), how many numbers of the summed dimension a lane takes
// (`kStep`), how lanes are multiplied and summed, and how weights become lanes.

#pragma once

#include <cstdint>

#include "activations.h"
#include "numbers.h"
#include "vector.h"

namespace {

// What is multiplied as floats: sums start at zero, and the largest weight is 1.
struct FloatDot {
  using Sum = Floats;
  static FXQUANT_INLINE Floats start(int32_t) { return Floats{}; }
  static FXQUANT_INLINE Floats floats(Floats sum) { return sum; }
  static constexpr float kLogOne = 0.0f;  // log 2 of the largest weight
};

struct Float32Dot : FloatDot {
  using In = float;
  static constexpr int kStep = 1;
  static constexpr int kDegree = 5;
  static FXQUANT_INLINE Floats dot(Floats sum, Ints lanes, Ints same) {
    return sum + as_floats(lanes) * as_floats(same);
  }
  static uint32_t bits(float x) { return __builtin_bit_cast(uint32_t, x); }
  // The lanes that the weights of kStep keys make, and what these add to the sum of weights.
  static FXQUANT_INLINE Ints pack(const Floats* p, Floats& sum, Floats&) {
    sum += p[0];
    return as_ints(p[0]);
  }
};

#if FXQUANT_BF16_DOT
struct Bfloat16Dot : FloatDot {
  using In = Bfloat16;
  static constexpr int kStep = 2;
  static constexpr int kDegree = 3;
  static FXQUANT_INLINE Floats dot(Floats sum, Ints lanes, Ints same) {
    return dot_bfloat16(sum, lanes, same);
  }
  static uint32_t bits(Bfloat16 x) { return x.bits; }
  static FXQUANT_INLINE Ints pack(const Floats* p, Floats& sum, Floats&) {
    sum += p[0] + p[1];
    const Ints low = as_ints(p[0]) + splat(0x8000), high = as_ints(p[1]) + splat(0x8000);
    return ((low >> 16) & 0xffff) | (high & splat(int32_t(0xffff0000)));
  }
};
#else  // no instruction for their products: they are widened
struct Bfloat16Dot : Float32Dot {
  using In = Bfloat16;
  static constexpr int kDegree = 3;
  static uint32_t bits(Bfloat16 x) { return uint32_t(x.bits) << 16; }
};
#endif

// uint8 tensors (q + 128): Q and the weights are unsigned in the products, K and V signed.
struct ByteDot {
  using In = uint8_t;
  using Sum = Ints;
  static constexpr int kStep = 4;
  static constexpr int kDegree = 3;
  static FXQUANT_INLINE Ints dot(Ints sum, Ints lanes, Ints same) {
    return dot_bytes(sum, lanes, same);
  }
  static FXQUANT_INLINE Ints start(int32_t x) { return splat(x); }
  static FXQUANT_INLINE Floats floats(Ints sum) { return to_floats(sum); }
  // What rounding took from a weight, the next key's gets: the many small weights of a long tail
  // keep their sum, and neighbouring keys are alike.
  static FXQUANT_INLINE Ints pack(const Floats* p, Floats& sum, Floats& rest) {
    Ints q[kStep];
    for (int j = 0; j < kStep; ++j) {
      const Floats wanted = p[j] + rest;
      q[j] = rounded(wanted);
      rest = wanted - to_floats(q[j]);
    }
    sum += to_floats((q[0] + q[1]) + (q[2] + q[3]));
    return (q[0] | (q[1] << 8)) | ((q[2] << 16) | (q[3] << 24));
  }
  static constexpr float kLogOne = 7.98868469f;  // 254: one may come on top
};

}  // namespace
