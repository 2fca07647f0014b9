// numbers.cuh for a test to call, an array at a time.
#include "numbers.cuh"

using namespace fxquant;

FXQUANT_API void half_to_float(const uint16_t* x, int64_t size, float* y) {
  for (int64_t i = 0; i < size; ++i) y[i] = to_float(Half{x[i]});
}

FXQUANT_API void float_to_half(const float* x, int64_t size, uint16_t* y) {
  for (int64_t i = 0; i < size; ++i) y[i] = from_float<Half>(x[i]).bits;
}

FXQUANT_API void bfloat16_to_float(const uint16_t* x, int64_t size, float* y) {
  for (int64_t i = 0; i < size; ++i) y[i] = to_float(BFloat16{x[i]});
}

FXQUANT_API void float_to_bfloat16(const float* x, int64_t size, uint16_t* y) {
  for (int64_t i = 0; i < size; ++i) y[i] = from_float<BFloat16>(x[i]).bits;
}

FXQUANT_API void activate(const float* x, int64_t size, int activation, float* y) {
  for (int64_t i = 0; i < size; ++i) y[i] = activated(x[i], activation);
}

// By both functions: the plain one and the one for many numbers.
FXQUANT_API void quantise(const float* x, int64_t size, const float* row, int bits, int8_t* plain,
                          int8_t* quick) {
  const Quantiser quantiser(row, 0, bits);
  for (int64_t i = 0; i < size; ++i) {
    plain[i] = quantised(x[i], row[0], row[1], bits);
    quick[i] = quantiser(x[i]);
  }
}
