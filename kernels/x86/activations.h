// Functions of a register of numbers: exponentials, and the activations built on them.

#pragma once

#include <limits>

#include "numbers.h"
#include "vector.h"

namespace {

// 2^r for r in [0, 1]: minimax polynomials, relative error 7e-5 (kDegree 3) or 8e-8 (5).
template <int kDegree>
FXQUANT_INLINE Floats exp2_of_fraction(Floats r) {
  if constexpr (kDegree == 3) {
    Floats p = splat(7.802452058e-02f);
    p = p * r + splat(2.260671584e-01f);
    p = p * r + splat(6.958335395e-01f);
    return p * r + splat(9.999252186e-01f);
  } else {
    Floats p = splat(1.877576652e-03f);
    p = p * r + splat(8.989340148e-03f);
    p = p * r + splat(5.582631801e-02f);
    p = p * r + splat(2.401536171e-01f);
    p = p * r + splat(6.931530732e-01f);
    return p * r + splat(9.999999251e-01f);
  }
}

// 2^x for x < 127; below -126 it may be anything from 0 to 2^-126.
template <int kDegree>
FXQUANT_INLINE Floats exp2_small(Floats x) {
#if defined(__AVX512DQ__)
  const Floats r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  return _mm512_scalef_ps(exp2_of_fraction<kDegree>(r), x);     // times 2^floor(x)
#else
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the low bits of x + kMagic are an integer
  x = larger(x, splat(-126.0f));
  const Floats shifted = (x - splat(0.5f)) + splat(kMagic);  // floor(x), or at a tie one less
  const Floats p = exp2_of_fraction<kDegree>(x - (shifted - splat(kMagic)));
  return as_floats(as_ints(p) + (as_ints(shifted) << 23));
#endif
}

// erf(x) to 3e-7 absolute: a rational function on [-4, 4] (the coefficients are Eigen's).
FXQUANT_INLINE Floats error_function(Floats x) {
  x = smaller(larger(x, splat(-4.0f)), splat(4.0f));
  const Floats s = x * x;
  Floats p = splat(-2.72614225801306e-10f);
  p = p * s + splat(2.77068142495902e-08f);
  p = p * s + splat(-2.10102402082508e-06f);
  p = p * s + splat(-5.69250639462346e-05f);
  p = p * s + splat(-7.34990630326855e-04f);
  p = p * s + splat(-2.95459980854025e-03f);
  p = p * s + splat(-1.60960333262415e-02f);
  Floats q = splat(-1.45660718464996e-05f);
  q = q * s + splat(-2.13374055278905e-04f);
  q = q * s + splat(-1.68282697438203e-03f);
  q = q * s + splat(-7.37332916720468e-03f);
  q = q * s + splat(-1.42647390514189e-02f);
  return x * p / q;
}

// 2^x, infinite for x of 128 and more, without AVX512 above 126.
FXQUANT_INLINE Floats exp2_any(Floats x) {
#if defined(__AVX512DQ__)
  return exp2_small<5>(x);
#else
  constexpr float kLargest = 126.0f;
  const Floats power = exp2_small<5>(smaller(x, splat(kLargest)));
  return x > splat(kLargest) ? splat(std::numeric_limits<float>::infinity()) : power;
#endif
}

// x / (1 + exp(-u)), where u is of x's sign.
FXQUANT_INLINE Floats logistic_times(Floats x, Floats u) {
  return x / (splat(1.0f) + exp2_any(u * splat(-1.44269504f)));
}

template <int activation>
FXQUANT_INLINE Floats activate(Floats x) {
  if constexpr (activation == kSilu) return logistic_times(x, x);
  if constexpr (activation == kGelu)
    return splat(0.5f) * x * (splat(1.0f) + error_function(x * splat(0.70710678f)));
  // 0.5 * (1 + tanh(u)) is the logistic function of 2u.
  if constexpr (activation == kGeluTanh)
    return logistic_times(x, splat(1.59576912f) * (x + splat(0.044715f) * (x * x * x)));
  return x;
}

}  // namespace
