// Reading and writing several numbers at once, and what the host side of every library needs.
#pragma once

#include <type_traits>

#include "numbers.cuh"

// The one way a kernel is launched: tests that run kernels on a CPU define another.
#if !defined(FXQUANT_LAUNCH)
#define FXQUANT_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace fxquant {

constexpr int kVector = 8;  // numbers a thread takes at once: 16 bytes of 16-bit floats
constexpr unsigned kFullWarp = 0xffffffffu;

struct alignas(16) Words16 {
  uint32_t words[4];
};
struct alignas(8) Words8 {
  uint32_t words[2];
};

// The widest access that n items of T make: n is 1 or fills whole words of 8 or 16 bytes.
template <int n, class T>
using Words = std::conditional_t<n * sizeof(T) % 16 == 0, Words16, Words8>;

template <int n, class T>
FXQUANT_HD void read(const T* __restrict__ from, T (&items)[n]) {
  if constexpr (n == 1) {
    items[0] = *from;
  } else {
    using Wide = Words<n, T>;
    constexpr int kPieces = n * sizeof(T) / sizeof(Wide);
    Wide pieces[kPieces];
    FXQUANT_UNROLL
    for (int i = 0; i < kPieces; ++i) pieces[i] = reinterpret_cast<const Wide*>(from)[i];
    memcpy(items, pieces, sizeof(items));
  }
}

template <int n, class T>
FXQUANT_HD void write(T* __restrict__ to, const T (&items)[n]) {
  if constexpr (n == 1) {
    *to = items[0];
  } else {
    using Wide = Words<n, T>;
    constexpr int kPieces = n * sizeof(T) / sizeof(Wide);
    Wide pieces[kPieces];
    memcpy(pieces, items, sizeof(items));
    FXQUANT_UNROLL
    for (int i = 0; i < kPieces; ++i) reinterpret_cast<Wide*>(to)[i] = pieces[i];
  }
}

template <int n, class T>
FXQUANT_HD void read_floats(const T* __restrict__ from, float (&values)[n]) {
  T items[n];
  read(from, items);
  FXQUANT_UNROLL
  for (int j = 0; j < n; ++j) values[j] = to_float(items[j]);
}

// What turns float32 into an output: a quantiser, or a cast that takes the same arguments.
template <class Out>
struct Cast {
  FXQUANT_HD Cast(const float*, int, int) {}
  FXQUANT_HD Out operator()(float y) const { return from_float<Out>(y); }
};

template <class Out>
using Finish = std::conditional_t<std::is_same_v<Out, int8_t>, Quantiser, Cast<Out>>;

// Weights and biases of a norm, all of one type; a null one is ones or zeros.
struct Affine {
  const void* weight;
  const void* bias;
  int type;

  template <int n>
  FXQUANT_HD void read(int64_t at, float (&scale)[n], float (&shift)[n]) const {
    one(weight, at, 1.0f, scale);
    one(bias, at, 0.0f, shift);
  }

 private:
  template <int n>
  FXQUANT_HD void one(const void* from, int64_t at, float absent, float (&values)[n]) const {
    if (from == nullptr) {
      FXQUANT_UNROLL
      for (int j = 0; j < n; ++j) values[j] = absent;
    } else if (type == kFloat32) {
      read_floats(static_cast<const float*>(from) + at, values);
    } else if (type == kFloat16) {
      read_floats(static_cast<const Half*>(from) + at, values);
    } else {
      read_floats(static_cast<const BFloat16*>(from) + at, values);
    }
  }
};

// ---- the host ----

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % uintptr_t(bytes) == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t size_of(int type) {
  return type == kFloat32 ? 4 : type == kFloat16 || type == kBFloat16 ? 2 : type == kInt8 ? 1 : 0;
}

inline bool is_float(int type) { return size_of(type) > 1; }

template <class T>
struct Of {
  using type = T;
};

// f(Of<T>()) for the float type; kTypeMissing for any other.
template <class F>
int with_float(int type, F f) {
  switch (type) {
    case kFloat32: return f(Of<float>());
    case kFloat16: return f(Of<Half>());
    case kBFloat16: return f(Of<BFloat16>());
    default: return kTypeMissing;
  }
}

template <class F>
int with_output(int type, F f) {
  return type == kInt8 ? f(Of<int8_t>()) : with_float(type, f);
}

// What became of the launches just made. The error is kept for fxquant_last_error.
inline const char*& last_error() {
  static thread_local const char* words = "";
  return words;
}

inline int launched() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return kOk;
  last_error() = cudaGetErrorString(error);
  return kLaunch;
}

}  // namespace fxquant
