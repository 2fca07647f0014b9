// Layer norm: a team of threads per token, whose numbers stay in registers between the sums.
#pragma once

#include "memory.cuh"

namespace fxquant {

constexpr int kTeamNumbers = 16;     // in a thread's registers
constexpr int kTeamMost = 512;       // threads of a team
constexpr int kTeamBlock = 256;      // threads of a block, unless one team is larger
constexpr int kTeamWarps = kTeamMost / 32;
constexpr int64_t kWidthInRegisters = int64_t(kTeamNumbers) * kTeamMost;

// a and b summed over a team of blockDim.x threads, in one order. `shared` holds 2 * kTeamWarps and
// is used once per kernel.
__device__ inline float2 team_sum(float a, float b, float* shared) {
  for (int lane = 16; lane > 0; lane /= 2) {
    a += __shfl_xor_sync(kFullWarp, a, lane);
    b += __shfl_xor_sync(kFullWarp, b, lane);
  }
  const int warps = blockDim.x / 32;
  if (warps == 1) return {a, b};
  float* mine = shared + 2 * threadIdx.y * warps;
  if (threadIdx.x % 32 == 0) {
    mine[2 * (threadIdx.x / 32)] = a;
    mine[2 * (threadIdx.x / 32) + 1] = b;
  }
  __syncthreads();
  float2 sum = {0.0f, 0.0f};
  for (int w = 0; w < warps; ++w) {
    sum.x += mine[2 * w];
    sum.y += mine[2 * w + 1];
  }
  return sum;
}

// y = ((x - pivot) - rest) * inverse. The pivot is the mean but for the rounding of a long sum;
// deviations from it are small, so that their own mean, the rest, is as good as exact.
struct Standard {
  float pivot, rest, inverse;

  __device__ Standard(float pivot, float2 sums, int64_t width, float eps) : pivot(pivot) {
    rest = sums.x / float(width);
    const float variance = sums.y / float(width) - rest * rest;
    inverse = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + eps);
  }

  __device__ float operator()(float x) const { return ((x - pivot) - rest) * inverse; }
};

// x [rows, width]; block: (team, tokens).
template <class In, class Out, int n>
__global__ void __launch_bounds__(kTeamMost)
    layer_norm_in_registers(const In* __restrict__ x, int64_t rows, int width, Affine affine,
                            float eps, Out* __restrict__ out, const float* __restrict__ row,
                            int index, int bits) {
  constexpr int kPieces = kTeamNumbers / n;
  __shared__ float first[2 * kTeamWarps], second[2 * kTeamWarps];
  const int64_t token = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  // Threads past the last token repeat it and write nothing: the whole block meets at the sums.
  const In* from = x + (token < rows ? token : rows - 1) * width;
  float v[kPieces][n], total = 0.0f;
  FXQUANT_UNROLL
  for (int i = 0; i < kPieces; ++i) {
    const int at = int(i * blockDim.x + threadIdx.x) * n;
    if (at < width) read_floats(from + at, v[i]);
  }
  const Finish<Out> finish(row, index, bits);
  FXQUANT_UNROLL
  for (int i = 0; i < kPieces; ++i) {
    if (int(i * blockDim.x + threadIdx.x) * n >= width) continue;
    FXQUANT_UNROLL
    for (int j = 0; j < n; ++j) total += v[i][j];
  }
  const float pivot = team_sum(total, 0.0f, first).x / float(width);
  float sum = 0.0f, square = 0.0f;
  FXQUANT_UNROLL
  for (int i = 0; i < kPieces; ++i) {
    if (int(i * blockDim.x + threadIdx.x) * n >= width) continue;
    FXQUANT_UNROLL
    for (int j = 0; j < n; ++j) {
      const float d = v[i][j] - pivot;
      sum += d;
      square += d * d;
    }
  }
  const Standard standard(pivot, team_sum(sum, square, second), width, eps);
  if (token >= rows) return;
  FXQUANT_UNROLL
  for (int i = 0; i < kPieces; ++i) {
    const int at = int(i * blockDim.x + threadIdx.x) * n;
    if (at >= width) continue;
    float weight[n], bias[n];
    affine.read(at, weight, bias);
    Out items[n];
    FXQUANT_UNROLL
    for (int j = 0; j < n; ++j) items[j] = finish(standard(v[i][j]) * weight[j] + bias[j]);
    write(out + token * width + at, items);
  }
}

// The same for a width that no team's registers hold: x is read three times.
template <class In, class Out>
__global__ void __launch_bounds__(kTeamMost)
    layer_norm_of_any_width(const In* __restrict__ x, int64_t width, Affine affine, float eps,
                            Out* __restrict__ out, const float* __restrict__ row, int index,
                            int bits) {
  __shared__ float first[2 * kTeamWarps], second[2 * kTeamWarps];
  const In* from = x + int64_t(blockIdx.x) * width;
  float total = 0.0f;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) total += to_float(from[i]);
  const float pivot = team_sum(total, 0.0f, first).x / float(width);
  float sum = 0.0f, square = 0.0f;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    const float d = to_float(from[i]) - pivot;
    sum += d;
    square += d * d;
  }
  const Standard standard(pivot, team_sum(sum, square, second), width, eps);
  const Finish<Out> finish(row, index, bits);
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    float weight[1], bias[1];
    affine.read(i, weight, bias);
    out[blockIdx.x * width + i] = finish(standard(to_float(from[i])) * weight[0] + bias[0]);
  }
}

template <class In, class Out>
int run_layer_norm(const In* x, int64_t rows, int64_t width, Affine affine, float eps, Out* out,
                   const float* row, int index, int bits, bool is_wide, void* stream) {
  if (width > kWidthInRegisters) {
    FXQUANT_LAUNCH((layer_norm_of_any_width<In, Out>), dim3(unsigned(rows)), dim3(kTeamMost),
                   stream, x, width, affine, eps, out, row, index, bits);
    return launched();
  }
  const int team = 32 * int(ceil_div(width, 32 * kTeamNumbers));
  const int tokens = team < kTeamBlock ? kTeamBlock / team : 1;
  const dim3 grid(unsigned(ceil_div(rows, tokens))), block(team, tokens);
  if (is_wide) {
    FXQUANT_LAUNCH((layer_norm_in_registers<In, Out, kVector>), grid, block, stream, x, rows,
                   int(width), affine, eps, out, row, index, bits);
  } else {
    FXQUANT_LAUNCH((layer_norm_in_registers<In, Out, 1>), grid, block, stream, x, rows, int(width),
                   affine, eps, out, row, index, bits);
  }
  return launched();
}

}  // namespace fxquant
