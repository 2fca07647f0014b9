// Four-bit integers: two in a byte, low nibble first, two's complement (../int4.py).
//
// A packed weight is uint8 [n, ceil(k / 2)], its k nibbles in the order of the natural weight: for
// a convolution (channel, kernel row, kernel column). GEMMs want bytes, input channels innermost
// and padded with zeros. Called by weights.py with raw device pointers.
// Each function answers a Status; what it refuses it refuses before a launch.

#include "memory.cuh"

namespace fxquant {
namespace {

constexpr int kThreads = 256;
constexpr int kWide = 16;          // integers of a thread, where rows are aligned
constexpr int kTileBytes = 16384;  // of a packed convolution weight, in shared memory

__device__ inline int8_t signed_nibble(int byte, int64_t at) {
  const int nibble = (byte >> (4 * int(at & 1))) & 0xf;
  return int8_t((nibble ^ 8) - 8);
}

// One output channel's nibbles (c, tap) -> bytes (tap, c), `tile` channels of them per block. They
// go through shared memory: neighbours in one order are far apart in the other. A thread writes
// `wide` bytes at once; `tile` is even and a multiple of it.
template <int wide>
__global__ void __launch_bounds__(kThreads)
    unpack_taps(const uint8_t* __restrict__ packed, int channels, int taps, int tile, int columns,
                int8_t* __restrict__ out) {
  __shared__ uint8_t bytes[kTileBytes];
  const int first = blockIdx.x * tile;
  const int last = channels - first < tile ? channels : first + tile;  // real channels end here
  const int64_t row_bytes = (int64_t(channels) * taps + 1) / 2;
  const uint8_t* from = packed + blockIdx.y * row_bytes + int64_t(first) / 2 * taps;
  const int count = last > first ? ((last - first) * taps + 1) / 2 : 0;
  for (int i = threadIdx.x; i < count; i += kThreads) bytes[i] = from[i];
  __syncthreads();
  const int end = columns - first < tile ? columns : first + tile;
  const int across = (end - first) / wide;
  int8_t* to = out + int64_t(blockIdx.y) * taps * columns + first;
  for (int i = threadIdx.x; i < across * taps; i += kThreads) {
    const int tap = i / across, c = i % across * wide;
    int8_t values[wide];
    FXQUANT_UNROLL
    for (int j = 0; j < wide; ++j) {
      const int at = (c + j) * taps + tap;
      values[j] = first + c + j < last ? signed_nibble(bytes[at / 2], at) : int8_t(0);
    }
    write(to + int64_t(tap) * columns + c, values);
  }
}

// x [rows, k] in [-8, 7] -> out [rows, columns / 2], zero from k on.
template <int wide>
__global__ void __launch_bounds__(kThreads)
    pack_rows(const int8_t* __restrict__ x, int64_t items, int64_t k, int64_t columns,
              uint8_t* __restrict__ out) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= items) return;
  const int64_t row = item / (columns / wide), at = item % (columns / wide) * wide;
  const int8_t* from = x + row * k + at;
  int8_t values[wide] = {};
  if constexpr (wide == 2) {
    if (at < k) values[0] = from[0];
    if (at + 1 < k) values[1] = from[1];
  } else if (at < k) {  // k is a multiple of `wide`
    read(from, values);
  }
  uint8_t bytes[wide / 2];
  FXQUANT_UNROLL
  for (int j = 0; j < wide / 2; ++j)
    bytes[j] = uint8_t((values[2 * j] & 0xf) | ((values[2 * j + 1] & 0xf) << 4));
  write(out + (row * columns + at) / 2, bytes);
}

constexpr int64_t kMost = int64_t(1) << 31;

int blocks_for(int64_t items, dim3& grid) {
  if (ceil_div(items, kThreads) >= kMost) return kShape;
  grid = dim3(unsigned(ceil_div(items, kThreads)));
  return kOk;
}

}  // namespace
}  // namespace fxquant

using namespace fxquant;

FXQUANT_API int fxquant_abi_version() { return FXQUANT_ABI; }

// The CUDA runtime's words for this thread's last kLaunch.
FXQUANT_API const char* fxquant_last_error() { return last_error(); }

// A convolution's packed uint8 [n, ceil(channels * taps / 2)] -> int8 [n, taps, columns], taps =
// kernel_h * kernel_w, columns >= channels. kShape for more than 16384 taps.
FXQUANT_API int fxquant_unpack_conv(const void* packed, int64_t n, int64_t channels, int64_t taps,
                                    int64_t columns, void* out, void* stream) {
  if (n < 0 || n > 65535 || channels < 0 || columns < channels || columns >= kMost) return kShape;
  if (taps < 0 || taps > kTileBytes) return kShape;
  if (n * taps * columns == 0) return kOk;
  if (out == nullptr || packed == nullptr) return kShape;
  // 256 channels, fewer where their taps would not fit; an even number, so that tiles start bytes.
  const int64_t fit = 2 * int64_t(kTileBytes) / taps;
  const int tile = int(fit >= 256 ? 256 : fit >= 8 ? fit / 8 * 8 : 2);
  const bool wide = tile % 8 == 0 && columns % 8 == 0 && is_aligned(out, 8);
  const dim3 grid(unsigned(ceil_div(columns, tile)), unsigned(n));
  const uint8_t* from = static_cast<const uint8_t*>(packed);
  int8_t* to = static_cast<int8_t*>(out);
  if (wide) {
    FXQUANT_LAUNCH(unpack_taps<8>, grid, dim3(kThreads), stream, from, int(channels), int(taps),
                   tile, int(columns), to);
  } else {
    FXQUANT_LAUNCH(unpack_taps<1>, grid, dim3(kThreads), stream, from, int(channels), int(taps),
                   tile, int(columns), to);
  }
  return launched();
}

// int8 [rows, k] in [-8, 7] -> uint8 [rows, columns / 2], columns >= k and even.
FXQUANT_API int fxquant_pack_int4(const void* x, int64_t rows, int64_t k, int64_t columns,
                                  void* out, void* stream) {
  if (rows < 0 || k < 0 || columns < k || columns % 2) return kShape;
  if (rows * columns == 0) return kOk;
  if (out == nullptr || x == nullptr) return kShape;
  const int8_t* from = static_cast<const int8_t*>(x);
  uint8_t* to = static_cast<uint8_t*>(out);
  const bool wide = k % kWide == 0 && columns % kWide == 0 && is_aligned(x, kWide) &&
                    is_aligned(out, kWide / 2);
  const int64_t items = rows * columns / (wide ? kWide : 2);
  dim3 grid;
  if (const int status = blocks_for(items, grid)) return status;
  if (wide) {
    FXQUANT_LAUNCH(pack_rows<kWide>, grid, dim3(kThreads), stream, from, items, k, columns, to);
  } else {
    FXQUANT_LAUNCH(pack_rows<2>, grid, dim3(kThreads), stream, from, items, k, columns, to);
  }
  return launched();
}
