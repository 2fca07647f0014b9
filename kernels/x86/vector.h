// One register of numbers, in the compiler's vector extensions: the same source serves SSE2, AVX2
// and AVX512, and only the dot products are written per instruction set.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

#define FXQUANT_INLINE inline __attribute__((always_inline))

template <class V, class T>
FXQUANT_INLINE V load_vector(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
FXQUANT_INLINE void store_vector(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

FXQUANT_INLINE Ints splat(int32_t x) { return x - Ints{}; }
FXQUANT_INLINE Floats splat(float x) { return x - Floats{}; }

// Four bytes of memory in every lane.
FXQUANT_INLINE Ints splat_word(const void* from) {
  int32_t x;
  std::memcpy(&x, from, 4);
  return splat(x);
}

// kLanes unsigned numbers of two bytes. A conversion of vectors would be made in halves.
FXQUANT_INLINE Ints load_words(const void* from) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Ints>(_mm512_cvtepu16_epi32(load_vector<__m256i>(from)));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_cvtepu16_epi32(load_vector<__m128i>(from)));
#else
  typedef uint16_t Narrow __attribute__((vector_size(2 * kLanes)));
  return __builtin_convertvector(load_vector<Narrow>(from), Ints);
#endif
}

FXQUANT_INLINE Ints as_ints(Floats x) { return reinterpret_cast<Ints>(x); }
FXQUANT_INLINE Floats as_floats(Ints x) { return reinterpret_cast<Floats>(x); }
FXQUANT_INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

FXQUANT_INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Floats>(_mm512_max_ps(a, b));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_max_ps(a, b));
#else
  return reinterpret_cast<Floats>(_mm_max_ps(a, b));
#endif
}

// To the nearest integer, halves to even.
FXQUANT_INLINE Ints rounded(Floats x) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Ints>(_mm512_cvtps_epi32(x));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_cvtps_epi32(x));
#else
  return reinterpret_cast<Ints>(_mm_cvtps_epi32(x));
#endif
}

// sum + the four products of unsigned bytes (of `a`) and signed bytes (of `b`) of each lane, exact.
FXQUANT_INLINE Ints dot_bytes(Ints sum, Ints a, Ints b) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVXVNNI__) && defined(__AVX2__) && !defined(__AVX512BW__)
  return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  // Without VNNI: even and odd bytes widened to 16 bits, since the byte product saturates.
  typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));
  typedef uint16_t Words __attribute__((vector_size(4 * kLanes)));
  const Shorts a_even = reinterpret_cast<Shorts>(a & 0x00ff00ff);
  const Shorts a_odd = reinterpret_cast<Shorts>(reinterpret_cast<Words>(a) >> 8);
  const Shorts b_even = reinterpret_cast<Shorts>(reinterpret_cast<Words>(b) << 8) >> 8;
  const Shorts b_odd = reinterpret_cast<Shorts>(b) >> 8;
#if defined(__AVX512BW__)
  return sum + reinterpret_cast<Ints>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a_even),
                                                        reinterpret_cast<__m512i>(b_even))) +
         reinterpret_cast<Ints>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a_odd),
                                                  reinterpret_cast<__m512i>(b_odd)));
#elif defined(__AVX2__)
  return sum + reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a_even),
                                                        reinterpret_cast<__m256i>(b_even))) +
         reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a_odd),
                                                  reinterpret_cast<__m256i>(b_odd)));
#else
  return sum + reinterpret_cast<Ints>(_mm_madd_epi16(reinterpret_cast<__m128i>(a_even),
                                                     reinterpret_cast<__m128i>(b_even))) +
         reinterpret_cast<Ints>(_mm_madd_epi16(reinterpret_cast<__m128i>(a_odd),
                                               reinterpret_cast<__m128i>(b_odd)));
#endif
#endif
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define FXQUANT_BF16_DOT 1
// sum + the two products of bfloat16 numbers of each lane.
FXQUANT_INLINE Floats dot_bfloat16(Floats sum, Ints a, Ints b) {
  return reinterpret_cast<Floats>(
      _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}
#else
#define FXQUANT_BF16_DOT 0
#endif

FXQUANT_INLINE Floats smaller(Floats a, Floats b) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Floats>(_mm512_min_ps(a, b));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_min_ps(a, b));
#else
  return reinterpret_cast<Floats>(_mm_min_ps(a, b));
#endif
}

// The lowest byte of each lane.
FXQUANT_INLINE void store_bytes(void* to, Ints x) {
  typedef uint8_t Narrow __attribute__((vector_size(kLanes)));
  store_vector(to, __builtin_convertvector(x, Narrow));
}

// Rounded to bfloat16, halves to even.
FXQUANT_INLINE Ints bfloat16_bits(Floats x) {
  const Ints bits = as_ints(x);
  const Ints kept = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Ints finite = x == x;
  return (kept & finite) | (~finite & 0x7fc0);
}

FXQUANT_INLINE void store_bfloat16(void* to, Floats x) {
#if FXQUANT_BF16_DOT
  store_vector(to, _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
  typedef uint16_t Narrow __attribute__((vector_size(2 * kLanes)));
  store_vector(to, __builtin_convertvector(bfloat16_bits(x), Narrow));
#endif
}

}  // namespace
