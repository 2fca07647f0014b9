// What the producers do to one number: load, activate, round, store. Every function vectorises.

#pragma once

#include <cmath>
#include <cstdint>

namespace {

enum Type { kFloat32 = 0, kBfloat16 = 1, kUint8 = 2, kInt8 = 3 };
enum Activation { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3 };

struct Bfloat16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(Bfloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

// ---- functions of one number; every one vectorises -------------------------------------------

// exp(x) to 2e-7 relative for x in [-87, 88], clamped outside: Cephes' polynomial.
inline float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float n = rintf(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float mantissa = (p * r) * r + r + 1.0f;
  return mantissa * __builtin_bit_cast(float, uint32_t(int32_t(n) + 127) << 23);
}

// erf(x) to 3e-7 absolute: a rational function on [-4, 4] (the coefficients are Eigen's).
inline float error_function(float x) {
  x = x > 4.0f ? 4.0f : x;
  x = x < -4.0f ? -4.0f : x;
  const float s = x * x;
  float p = -2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}

inline float logistic_times(float x, float u) { return x / (1.0f + exponential(-u)); }

template <int activation>
inline float activate(float x) {
  if constexpr (activation == kSilu) return logistic_times(x, x);
  if constexpr (activation == kGelu) return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
  // 0.5 * (1 + tanh(u)) is the logistic function of 2u.
  if constexpr (activation == kGeluTanh)
    return logistic_times(x, 1.59576912f * (x + 0.044715f * (x * x * x)));
  return x;
}

// ---- where results go ------------------------------------------------------------------------

struct ToInteger {
  uint8_t* out;
  float scale, zero_point, low, high;
  uint8_t flip;

  ToInteger(void* out, const float* step, int bits, int type)
      : out(static_cast<uint8_t*>(out)),
        scale(step[0]),
        zero_point(step[1]),
        low(-std::ldexp(1.0f, bits - 1)),
        high(std::ldexp(1.0f, bits - 1) - 1.0f),
        flip(type == kInt8 ? 128 : 0) {}

  inline void operator()(int64_t i, float x) const {
    float q = rintf(x / scale) + zero_point;
    q = q > low ? q : low;  // a NaN becomes the lowest integer
    q = q < high ? q : high;
    out[i] = uint8_t(int32_t(q) + 128) ^ flip;
  }
};

struct ToFloat32 {
  float* out;
  inline void operator()(int64_t i, float x) const { out[i] = x; }
};

struct ToBfloat16 {
  Bfloat16* out;
  inline void operator()(int64_t i, float x) const {
    const uint32_t u = __builtin_bit_cast(uint32_t, x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    out[i].bits = uint16_t(x == x ? rounded : 0x7fc0u);
  }
};

// put(at + i, f(i)) for i in [0, size). By value, `put` and `f` too: a byte that is written through
// a reference could alias them, and the loop would not vectorise.
template <class Out, class F>
inline void fill(Out put, int64_t at, int64_t size, F f) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) put(at + i, f(i));
}

}  // namespace
