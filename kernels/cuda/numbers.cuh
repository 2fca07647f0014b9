// What a GPU kernel does to one number: load, activate, round, store. Device and host alike, so
// that tests run the same code on a CPU. Integers must come out as the reference's: what decides
// them is never contracted into an FMA by the compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "call.h"

#if defined(__CUDACC__)
#define FXQUANT_HD __host__ __device__ __forceinline__
#else
#define FXQUANT_HD inline
#endif

// Loops whose arrays must stay in registers. A host compiler does not know the pragma.
#if defined(__CUDA_ARCH__)
#define FXQUANT_UNROLL _Pragma("unroll")
#else
#define FXQUANT_UNROLL
#endif

namespace fxquant {

template <class To, class From>
FXQUANT_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- arithmetic that is rounded once per operation ----

FXQUANT_HD float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FXQUANT_HD float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

FXQUANT_HD float div_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// To about two ulp; 0 where b is above 2^126.
FXQUANT_HD float fast_quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// ---- 16-bit floats, as their bits: the layout of __half and __nv_bfloat16 ----

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

FXQUANT_HD float to_float(float x) { return x; }

FXQUANT_HD float to_float(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

FXQUANT_HD float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | (rest << 13));
  // A subnormal is its integer times 2^-24, which float32 holds exactly.
  const float size = rest < 0x400u ? float(rest) * 0x1p-24f
                                   : bits_as<float>((rest << 13) + 0x38000000u);
  return bits_as<float>(bits_as<uint32_t>(size) | sign);
#endif
}

// from_float<T>: round half to even; float16 overflows to infinity; NaN stays NaN.
template <class T>
FXQUANT_HD T from_float(float x);

template <>
FXQUANT_HD float from_float<float>(float x) {
  return x;
}

template <>
FXQUANT_HD BFloat16 from_float<BFloat16>(float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {uint16_t(x == x ? rounded : 0x7fc0u)};
}

template <>
FXQUANT_HD Half from_float<Half>(float x) {
#if defined(__CUDA_ARCH__)
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t u = bits_as<uint32_t>(x), size = u & 0x7fffffffu;
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  if (size > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (size >= 0x47800000u) return {uint16_t(sign | 0x7c00u)};
  if (size < 0x38800000u) {
    // The ulp of 0.5 is float16's smallest subnormal: the sum rounds to a multiple of it.
    const float sum = bits_as<float>(size) + 0.5f;
    return {uint16_t(sign | (bits_as<uint32_t>(sum) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13))};
#endif
}

// ---- activations: within a few ulp of float32 torch, NaN and infinities included ----

FXQUANT_HD float logistic_times(float x, float u) { return fast_quotient(x, 1.0f + expf(-u)); }

template <int activation>
FXQUANT_HD float activated(float x) {
  if constexpr (activation == kSilu) return logistic_times(x, x);
  if constexpr (activation == kGelu) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  // 0.5 * (1 + tanh(u)) is the logistic function of 2u.
  if constexpr (activation == kGeluTanh)
    return logistic_times(x, 1.59576912f * (x + 0.044715f * (x * x * x)));
  return x;
}

FXQUANT_HD float activated(float x, int activation) {
  switch (activation) {
    case kSilu: return activated<kSilu>(x);
    case kGelu: return activated<kGelu>(x);
    case kGeluTanh: return activated<kGeluTanh>(x);
    default: return x;
  }
}

// ---- integers ----

FXQUANT_HD float lowest_integer(int bits) { return -float(1 << (bits - 1)); }
FXQUANT_HD float highest_integer(int bits) { return float((1 << (bits - 1)) - 1); }

// round(y / scale) + zero_point, clamped to `bits` bits; a NaN becomes the lowest integer.
FXQUANT_HD int8_t quantised(float y, float scale, float zero_point, int bits) {
  float q = add_rn(rintf(div_rn(y, scale)), zero_point);
  q = fmaxf(q, lowest_integer(bits));  // of a NaN and a number the number
  return int8_t(int32_t(fminf(q, highest_integer(bits))));
}

// `quantised` for many numbers and one quantiser whose zero point is an integer: the same results
// in half the instructions.
//
// The quotient is a product with the rounded reciprocal, corrected twice by its exact remainder:
// the second correction rounds correctly (Markstein) while nothing underflows, hence the bounds on
// the scale. Below |q| = 0.25 and above 2^20 the last bits do not matter to the result.
struct Quantiser {
  float scale, zero_point, low, high, reciprocal;  // reciprocal: 0 for a scale out of bounds

  // `row` [n][2], its quantiser `index`.
  FXQUANT_HD Quantiser(const float* row, int index, int bits)
      : scale(row[2 * index]),
        zero_point(row[2 * index + 1]),
        low(lowest_integer(bits)),
        high(highest_integer(bits)),
        reciprocal(scale >= 0x1p-90f && scale <= 0x1p90f ? div_rn(1.0f, scale) : 0.0f) {}

  FXQUANT_HD int8_t operator()(float y) const {
    constexpr float kInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const float q = add_rn(add_rn(quotient(y), kInteger), -kInteger);
    const float clamped = fminf(fmaxf(add_rn(q, zero_point), low), high);
    return int8_t(uint8_t(bits_as<uint32_t>(add_rn(clamped, kInteger))));
  }

 private:
  FXQUANT_HD float quotient(float y) const {
    if (reciprocal == 0.0f) return div_rn(y, scale);
    const float q = mul_rn(y, reciprocal);
    float better = fmaf(fmaf(-q, scale, y), reciprocal, q);
    better = fmaf(fmaf(-better, scale, y), reciprocal, better);
    return fabsf(q) < 0x1p20f ? better : q;
  }
};

}  // namespace fxquant
