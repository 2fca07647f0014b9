// Group norm of channels-last images [batch, length, channels]: moments of chunks of pixels, their
// merger into one scale and shift per channel, then y = (x - mean) * scale + shift.
//
// A block takes a chunk of pixels and a slab of whole groups. A thread keeps to its channels, so
// that their parameters stay in registers. All sizes follow from the shape alone and every sum has
// one order: results repeat bit by bit.
#pragma once

#include "memory.cuh"

namespace fxquant {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / 32;
constexpr int kMostChunks = 256;     // of one image
constexpr int kLeastLanePixels = 4;  // fewer would not pay for a thread's set-up
constexpr int kPixels = 2;           // that a thread normalises at once: their loads overlap

struct GroupPlan {
  int channels;
  int vector;           // channels of a thread
  int groups, width;    // a group too wide for a block is cut into `pieces` equal ones
  int pieces;
  int slab_groups, slabs;
  int columns, lanes;   // threads across a slab, and pixels a block takes at once
  int64_t length;
  int chunk, chunks;    // pixels of a chunk, chunks of an image

  // Workspace: moments [batch][chunks][groups], then mean, scale and shift [batch][channels].
  int64_t moments(int64_t batch) const { return batch * chunks * groups; }
  int64_t bytes(int64_t batch) const {
    return 16 * (moments(batch) + ceil_div(12 * batch * channels, 16));
  }
};

// The plan for `vector` channels per thread; false if slabs of groups cannot start aligned.
inline bool plan_groups(int64_t length, int channels, int groups, int vector, GroupPlan& plan) {
  const int capacity = kNormThreads * vector;
  plan = {};
  plan.channels = channels;
  plan.vector = vector;
  plan.pieces = 1;
  while (channels / groups % plan.pieces || channels / groups / plan.pieces > capacity)
    ++plan.pieces;
  plan.groups = groups * plan.pieces;
  plan.width = channels / plan.groups;
  // Among the coarser cuts the one that leaves the fewest threads idle.
  double best = 0.0;
  const int least = int(ceil_div(channels, capacity));
  for (int slabs = least; slabs <= plan.groups && (slabs <= 4 * least || best == 0.0); ++slabs) {
    const int slab_groups = int(ceil_div(plan.groups, slabs));
    const int wide = slab_groups * plan.width;
    if (wide > capacity || wide % vector) continue;
    const int columns = wide / vector, lanes = kNormThreads / columns;
    const int used = int(ceil_div(plan.groups, slab_groups));
    const double share = double(channels) / vector * lanes / (double(used) * kNormThreads);
    if (share <= best) continue;
    best = share;
    plan.slab_groups = slab_groups;
    plan.slabs = used;
    plan.columns = columns;
    plan.lanes = lanes;
  }
  if (best == 0.0) return false;
  const int64_t pixels = ceil_div(length, int64_t(plan.lanes) * kMostChunks);
  plan.length = length;
  plan.chunk = plan.lanes * int(pixels < kLeastLanePixels ? kLeastLanePixels : pixels);
  plan.chunks = int(ceil_div(length, plan.chunk));
  return true;
}

// `count` numbers with this mean and this sum of squared deviations from it.
template <class T>
struct Moments {
  T count, mean, square;
};

// Chan's merger; either may be empty.
template <class T>
__device__ inline Moments<T> merged(Moments<T> a, Moments<T> b) {
  if (b.count == 0) return a;
  const T count = a.count + b.count, share = b.count / count, apart = b.mean - a.mean;
  return {count, a.mean + apart * share, a.square + b.square + apart * apart * a.count * share};
}

template <class T>
__device__ inline Moments<T> merged_in_warp(Moments<T> m) {
  for (int lane = 16; lane > 0; lane /= 2) {
    const Moments<T> other = {__shfl_xor_sync(kFullWarp, m.count, lane),
                              __shfl_xor_sync(kFullWarp, m.mean, lane),
                              __shfl_xor_sync(kFullWarp, m.square, lane)};
    m = merged(m, other);
  }
  return m;
}

// Where a thread of the first and the last kernel works: at every lanes-th pixel of a chunk.
struct Patch {
  int first_group, groups;  // of the slab
  int column, lane, channel;
  int64_t pixel;            // the chunk's first, counted through the batch
  int pixels;               // of the chunk
  bool is_active;

  __device__ explicit Patch(const GroupPlan& p) {
    const int64_t start = int64_t(blockIdx.x) * p.chunk;
    first_group = blockIdx.y * p.slab_groups;
    groups = p.groups - first_group < p.slab_groups ? p.groups - first_group : p.slab_groups;
    column = threadIdx.x % p.columns;
    lane = threadIdx.x / p.columns;
    channel = first_group * p.width + column * p.vector;
    pixel = int64_t(blockIdx.z) * p.length + start;
    pixels = p.length - start < p.chunk ? int(p.length - start) : p.chunk;
    is_active = lane < p.lanes && column * p.vector < groups * p.width;
  }
};

// The moments of each group of a chunk. Everything in a group is measured from its first number: a
// mean far from 0 costs no accuracy, and Welford's sums forgive a first number that is itself off.
template <class In, int n>
__global__ void __launch_bounds__(kNormThreads)
    chunk_moments(const In* __restrict__ x, GroupPlan p, double2* __restrict__ moments) {
  __shared__ float means[kNormThreads * n];
  __shared__ float squares[kNormThreads * n];
  const Patch here(p);
  const In* chunk = x + here.pixel * p.channels;
  if (here.is_active) {
    float pivot[n], mean[n] = {}, square[n] = {};
    FXQUANT_UNROLL
    for (int j = 0; j < n; ++j)
      pivot[j] = to_float(chunk[(here.channel + j) / p.width * p.width]);
    float count = 0.0f;
    constexpr int kDepth = sizeof(In) == 2 ? 4 : 2;  // pixels at once: their loads overlap
    for (int i = here.lane; i < here.pixels; i += kDepth * p.lanes) {
      In v[kDepth][n];
      FXQUANT_UNROLL
      for (int k = 0; k < kDepth; ++k) {
        const int pixel = i + k * p.lanes;
        if (pixel < here.pixels)
          read(chunk + int64_t(pixel) * p.channels + here.channel, v[k]);
      }
      FXQUANT_UNROLL
      for (int k = 0; k < kDepth; ++k) {
        if (i + k * p.lanes >= here.pixels) break;
        count += 1.0f;
        const float share = fast_quotient(1.0f, count);
        FXQUANT_UNROLL
        for (int j = 0; j < n; ++j) {
          const float shifted = to_float(v[k][j]) - pivot[j], before = shifted - mean[j];
          mean[j] += before * share;
          square[j] += before * (shifted - mean[j]);
        }
      }
    }
    const int at = threadIdx.x * n;  // = (lane * columns + column) * n
    FXQUANT_UNROLL
    for (int j = 0; j < n; ++j) {
      means[at + j] = mean[j];
      squares[at + j] = square[j];
    }
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, slab_width = p.columns * n;
  for (int g = warp; g < here.groups; g += kNormWarps) {
    Moments<float> sum = {0.0f, 0.0f, 0.0f};
    for (int i = threadIdx.x % 32; i < p.lanes * p.width; i += 32) {
      const int lane = i / p.width, at = lane * slab_width + g * p.width + i % p.width;
      const int count = (here.pixels - lane + p.lanes - 1) / p.lanes;
      if (count > 0) sum = merged(sum, {float(count), means[at], squares[at]});
    }
    sum = merged_in_warp(sum);
    if (threadIdx.x % 32 == 0) {
      const int group = here.first_group + g;
      const double pivot = to_float(chunk[group * p.width]);
      moments[(int64_t(blockIdx.z) * p.chunks + blockIdx.x) * p.groups + group] = {pivot + sum.mean,
                                                                          sum.square};
    }
  }
}

// One warp per group of an image. `shift` also holds what float32 loses of the mean.
__global__ void __launch_bounds__(32)
    channel_coefficients(const double2* __restrict__ moments, GroupPlan p, Affine affine,
                         double eps, float* __restrict__ mean, float* __restrict__ scale,
                         float* __restrict__ shift) {
  Moments<double> sum = {0.0, 0.0, 0.0};
  for (int64_t i = threadIdx.x; i < int64_t(p.chunks) * p.pieces; i += 32) {
    const int64_t chunk = i / p.pieces, rest = p.length - chunk * p.chunk;
    const double2 m = moments[(int64_t(blockIdx.y) * p.chunks + chunk) * p.groups +
                              blockIdx.x * p.pieces + i % p.pieces];
    sum = merged(sum, {double((rest < p.chunk ? rest : p.chunk) * p.width), m.x, m.y});
  }
  sum = merged_in_warp(sum);
  const double inverse = 1.0 / sqrt(sum.square / sum.count + eps);
  const int width = p.width * p.pieces;
  for (int i = threadIdx.x; i < width; i += 32) {
    const int channel = blockIdx.x * width + i;
    const int64_t at = int64_t(blockIdx.y) * p.channels + channel;
    float weight[1], bias[1];
    affine.read(channel, weight, bias);
    const double by = inverse * weight[0];
    mean[at] = float(sum.mean);
    scale[at] = float(by);
    shift[at] = float(bias[0] - (sum.mean - double(float(sum.mean))) * by);
  }
}

// Three blocks per multiprocessor: with room for four the compiler spills.
template <class In, class Out, int n>
__global__ void __launch_bounds__(kNormThreads, 3)
    normalise(const In* __restrict__ x, GroupPlan p, const float* __restrict__ means,
              const float* __restrict__ scales, const float* __restrict__ shifts, bool has_silu,
              Out* __restrict__ out, const float* __restrict__ row, int index, int bits) {
  const Patch here(p);
  if (!here.is_active) return;
  const int64_t image = int64_t(blockIdx.z) * p.channels + here.channel;
  float mean[n], scale[n], shift[n];
  read_floats(means + image, mean);
  read_floats(scales + image, scale);
  read_floats(shifts + image, shift);
  const Finish<Out> finish(row, index, bits);
  const int64_t base = here.pixel * p.channels + here.channel;
  for (int i = here.lane; i < here.pixels; i += kPixels * p.lanes) {
    In v[kPixels][n];
    FXQUANT_UNROLL
    for (int k = 0; k < kPixels; ++k) {
      const int pixel = i + k * p.lanes;
      if (pixel < here.pixels) read(x + base + int64_t(pixel) * p.channels, v[k]);
    }
    FXQUANT_UNROLL
    for (int k = 0; k < kPixels; ++k) {
      const int pixel = i + k * p.lanes;
      if (pixel >= here.pixels) continue;
      Out items[n];
      FXQUANT_UNROLL
      for (int j = 0; j < n; ++j) {
        const float y = (to_float(v[k][j]) - mean[j]) * scale[j] + shift[j];
        items[j] = finish(has_silu ? activated<kSilu>(y) : y);
      }
      write(out + base + int64_t(pixel) * p.channels, items);
    }
  }
}

template <class In, class Out, int n>
int run_group_norm(const In* x, const GroupPlan& p, int64_t batch, Affine affine, double eps,
                   bool has_silu, Out* out, const float* row, int index, int bits, void* workspace,
                   void* stream) {
  double2* moments = static_cast<double2*>(workspace);
  float* means = reinterpret_cast<float*>(moments + p.moments(batch));
  float* scales = means + batch * p.channels;
  float* shifts = scales + batch * p.channels;
  const dim3 grid(unsigned(p.chunks), unsigned(p.slabs), unsigned(batch));
  FXQUANT_LAUNCH((chunk_moments<In, n>), grid, dim3(kNormThreads), stream, x, p, moments);
  FXQUANT_LAUNCH(channel_coefficients, dim3(unsigned(p.groups / p.pieces), unsigned(batch)),
                 dim3(32), stream, moments, p, affine, eps, means, scales, shifts);
  FXQUANT_LAUNCH((normalise<In, Out, n>), grid, dim3(kNormThreads), stream, x, p, means, scales,
                 shifts, has_silu, out, row, index, bits);
  return launched();
}

}  // namespace fxquant
