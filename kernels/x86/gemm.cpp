// Integer linear layers and convolutions: u8 activations times s8 or s4 weights, summed in int32.
//
// Build: gemm.py does it, and calls this with raw pointers. Reference: ../reference.py (linear and
// conv2d). A linear layer is a convolution of one tap over an image of one line. Images are
// [B, H, W, C] in memory, activations uint8 (q + 128); everything is contiguous.
//
// Weights are packed into panels of kPanel output channels, [panel][group][kPanel][4], where a
// group is four input channels of one tap: a register holds four weights of each of kLanes output
// channels, and meets four activations of one output row in every lane. Four-bit weights keep two
// groups in the bytes of one. A convolution makes no im2col: it reads input pixels where they lie,
// and a pixel of zero points where a tap falls into the padding.
//
// Results do not depend on the number of threads: each output is computed by one thread.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "gemm_pack.h"
#include "gemm_tile.h"
#include "parallel.h"

namespace {

constexpr int64_t kCacheBytes = 640 << 10;  // of L2, for a chunk of rows and two panels of weights
constexpr int64_t kChunkTiles = 48;         // bounds the tables of a chunk
constexpr int64_t kBlockGroups = 1536;      // groups that are summed at a time: 192 KiB of a panel
constexpr int64_t kSerialBelow = 1 << 20;   // fewer products are not worth waking threads for

template <class T>
struct Buffer {  // not initialised, aligned to a cache line
  T* data;
  explicit Buffer(int64_t size)
      : data(static_cast<T*>(std::aligned_alloc(64, (ceil_div(size * sizeof(T), 64) + 1) * 64))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
};

// ---- a layer ---------------------------------------------------------------------------------

struct Geometry {  // gemm.py fills it, field by field
  int64_t batch, height, width, channels, outputs;
  int64_t kernel_height, kernel_width, stride_y, stride_x, top, left, dilation_y, dilation_x;
  int64_t out_height, out_width;
};

// Scale, bias and correction of every place of every panel.
struct Tables {
  int64_t places;  // panels * kPanel
  Buffer<float> scale, bias;
  Buffer<int32_t> start;  // what the zero point adds to every sum, negated

  Tables(const Panels& shape, int64_t batch, const float* x_step, const int32_t* sums,
         const float* weight_scale, const float* bias_, const float* channel_add)
      : places(shape.count() * kPanel),
        scale(places),
        bias(places * (channel_add ? batch : 1)),
        start(places) {
    const int32_t zero_point = int32_t(x_step[1]) + 128;
    for (int64_t i = 0; i < places; ++i) {
      const int64_t channel = shape.channel(i / kPanel, i % kPanel);
      scale.data[i] = channel < 0 ? 0.0f : x_step[0] * weight_scale[channel];
      start.data[i] = -zero_point * sums[i];
      for (int64_t b = 0; b < (channel_add ? batch : 1); ++b) {
        float at = channel < 0 || !bias_ ? 0.0f : bias_[channel];
        if (channel >= 0 && channel_add) at += channel_add[b * shape.outputs + channel];
        bias.data[b * places + i] = at;
      }
    }
  }
};

struct Layer {
  Geometry g;
  Panels panels;
  const uint8_t* x;      // [B, H, W, pixel_bytes]
  int64_t pixel_bytes;   // channels, a multiple of four
  const uint8_t* zeros;  // a pixel of zero points
  const uint8_t* weights;
  const Tables* tables;
  bool own_bias;  // each image of the batch has its own
  Ending ending;
  std::vector<Run> runs;
  std::vector<int64_t> blocks;  // the first run of each block of groups, and the end
  int64_t block_groups;

  int64_t rows() const { return g.batch * g.out_height * g.out_width; }
  int64_t tiles() const { return ceil_div(rows(), kRows); }

  // Cut the groups of a panel into blocks of about equal and even length.
  void cut() {
    const int64_t total = panels.groups(), in_tap = panels.tap_groups();
    block_groups = ceil_div(ceil_div(total, ceil_div(total, kBlockGroups)), 2) * 2;
    for (int64_t group = 0; group < total;) {
      if (group % block_groups == 0) blocks.push_back(runs.size());
      const int64_t offset = group % in_tap;
      const int64_t size = std::min(in_tap - offset, block_groups - group % block_groups);
      runs.push_back({group / in_tap, 4 * offset, size});
      group += size;
    }
    blocks.push_back(runs.size());
  }

  // Where tap (ky, kx) of output (oy, ox) of image b reads.
  const uint8_t* pixel(int64_t b, int64_t oy, int64_t ox, int64_t ky, int64_t kx) const {
    const int64_t y = oy * g.stride_y - g.top + ky * g.dilation_y;
    const int64_t x_ = ox * g.stride_x - g.left + kx * g.dilation_x;
    if (y < 0 || y >= g.height || x_ < 0 || x_ >= g.width) return zeros;
    return x + ((b * g.height + y) * g.width + x_) * pixel_bytes;
  }
};

// One thread's work on one chunk of rows at a time.
struct Worker {
  const Layer& layer;
  int64_t chunks, capacity;    // rows that the tables hold
  int64_t chunk = -1, first = 0, count = 0;
  Buffer<const uint8_t*> pixels;  // [tap][capacity]
  Buffer<const float*> biases;    // [capacity], of panel 0
  Buffer<int32_t> sums;           // [capacity][kPanel]
  Buffer<int8_t> unpacked;
  alignas(64) float tile[kRows * kPanel];

  Worker(const Layer& layer, int64_t chunks)
      : layer(layer),
        chunks(chunks),
        capacity(ceil_div(layer.tiles(), chunks) * kRows),
        pixels(layer.panels.taps * capacity),
        biases(capacity),
        sums(layer.blocks.size() > 2 ? capacity * kPanel : 0),
        unpacked(layer.panels.four_bit ? (layer.block_groups + 1) * kGroup : 0) {}

  // Fill the tables for another chunk.
  void locate(int64_t next) {
    const Geometry& g = layer.g;
    chunk = next;
    first = layer.tiles() * chunk / chunks * kRows;
    count = std::min(layer.tiles() * (chunk + 1) / chunks * kRows, layer.rows()) - first;
    const float* bias = layer.tables->bias.data;
    int64_t image = first / (g.out_height * g.out_width);
    int64_t oy = first / g.out_width % g.out_height, ox = first % g.out_width;
    for (int64_t r = 0; r < count; ++r) {
      const uint8_t** to = pixels.data + r;
      for (int64_t ky = 0; ky < g.kernel_height; ++ky)
        for (int64_t kx = 0; kx < g.kernel_width; ++kx, to += capacity)
          *to = layer.pixel(image, oy, ox, ky, kx);
      biases.data[r] = bias + (layer.own_bias ? image * layer.tables->places : 0);
      if (++ox < g.out_width) continue;
      ox = 0;
      if (++oy < g.out_height) continue;
      oy = 0;
      ++image;
    }
  }

  // A full panel of a simple layer is stored as it is computed, others go through tiles of floats.
  void run(int64_t panel) {
    const Ending& ending = layer.ending;
    const int64_t rest = ending.columns - column(panel);
    const auto direct = [&](auto store) { run<kWidth, true>(panel, store, store); };
    if (rest >= kPanel && with_direct_store(ending, direct)) return;
    with_store(ending.out_type, ending.step, ending.bits, [&](auto store) {
      if (!layer.panels.gated && rest <= kLanes) {
        run<1, false>(panel, StoreFloat32(), store);
      } else {
        run<kWidth, false>(panel, StoreFloat32(), store);
      }
    });
  }

  template <int width, bool direct, class Store, class Last>
  void run(int64_t panel, const Store& store, const Last& last) {
    const Panels& panels = layer.panels;
    const uint8_t* weights = layer.weights + panel * panels.bytes();
    const int64_t blocks = layer.blocks.size() - 1;
    Product p;
    p.pixel_stride = capacity;
    p.scale = layer.tables->scale.data + panel * kPanel;
    p.out_stride = direct ? layer.ending.columns : kPanel;
    look_ahead(panel, p);
    for (int64_t b = 0; b < blocks; ++b) {
      p.begin = layer.runs.data() + layer.blocks[b];
      p.end = layer.runs.data() + layer.blocks[b + 1];
      const int64_t group = b * layer.block_groups;
      const int64_t groups = std::min(layer.block_groups, panels.groups() - group);
      p.weights = unpacked_block(weights, group, groups);
      const bool first_block = b == 0, last_block = b + 1 == blocks;
      p.start_stride = first_block ? 0 : kPanel;
      for (int64_t r = 0; r < count; r += kRows, p.ahead += groups * p.ahead_step) {
        const int rows = int(std::min<int64_t>(kRows, count - r));
        const float* bias[kRows];
        for (int i = 0; i < rows; ++i) bias[i] = biases.data[r + i] + panel * kPanel;
        p.bias = bias;
        p.pixels = pixels.data + r;
        int32_t* partial = sums.data + r * kPanel;
        p.start = first_block ? layer.tables->start.data + panel * kPanel : partial;
        p.sums = last_block ? nullptr : partial;
        if constexpr (direct) {
          p.out = output<typename Store::Stored>(first + r, column(panel));
        } else {
          p.out = tile;
        }
        if (last_block && layer.ending.residual)
          fetch_residual(layer.ending, first + r, rows, column(panel));
        multiply_rows<width>(rows, p, store);
        if constexpr (!direct)
          if (last_block) finish(layer.ending, last, tile, first + r, rows, column(panel));
      }
    }
  }

  // The next panel comes into L2 while this one is multiplied.
  void look_ahead(int64_t panel, Product& p) const {
    const Panels& panels = layer.panels;
    const bool last = panel + 1 == panels.count();
    const int64_t steps = ceil_div(count, kRows) * panels.groups();
    p.ahead = layer.weights + (last ? panel : panel + 1) * panels.bytes();
    p.ahead_step = last ? 0 : ceil_div(panels.bytes(), steps);
  }

  template <class T>
  T* output(int64_t row, int64_t at) const {
    return static_cast<T*>(layer.ending.out) + row * layer.ending.columns + at;
  }

  int64_t column(int64_t panel) const { return panel * (layer.panels.gated ? kLanes : kPanel); }

  // Groups of a panel as bytes. Blocks are of even length: `group` is.
  const int8_t* unpacked_block(const uint8_t* weights, int64_t group, int64_t groups) {
    if (!layer.panels.four_bit) return reinterpret_cast<const int8_t*>(weights) + group * kGroup;
    unpack_nibbles(weights + group / 2 * kGroup, ceil_div(groups, 2), unpacked.data);
    return unpacked.data;
  }
};

// In how many chunks the rows are taken: small enough for L2, and enough to keep threads busy.
int64_t chunks_of(const Layer& layer, int threads) {
  const int64_t tiles = layer.tiles();
  const int64_t panel = std::min(layer.panels.groups(), kBlockGroups) * kGroup;
  const int64_t fit =
      std::max<int64_t>(1, (kCacheBytes - 2 * panel) / (kRows * layer.pixel_bytes));
  const int64_t needed = ceil_div(tiles, std::min(fit, kChunkTiles));
  const int64_t wanted = ceil_div(threads > 1 ? 4 * threads : 1, layer.panels.count());
  return std::min(std::max(needed, wanted), tiles);
}

void run_layer(const Layer& layer, int threads) {
  if (layer.rows() == 0) return;
  if (layer.rows() * layer.panels.groups() * 4 * layer.panels.outputs < kSerialBelow) threads = 1;
  const int64_t chunks = chunks_of(layer, threads), panels = layer.panels.count();
  share_freely(chunks * panels, threads, [&](auto claim) {
    Worker worker(layer, chunks);
    for (int64_t begin, end; claim(begin, end);) {
      for (int64_t task = begin; task < end; ++task) {
        if (task / panels != worker.chunk) worker.locate(task / panels);
        worker.run(task % panels);
      }
    }
  });
}

}  // namespace

// ---- the C ABI; gemm.py declares the same signatures -----------------------------------------

extern "C" {

int fxquant_abi_version() { return 2; }

// sizes[0]: bytes of the packed weight, sizes[1]: how many sums go with it.
void fxquant_gemm_sizes(int64_t outputs, int64_t channels, int64_t taps, int gated, int four_bit,
                        int64_t* sizes) {
  const Panels panels{outputs, channels, taps, gated != 0, four_bit != 0};
  sizes[0] = panels.count() * panels.bytes();
  sizes[1] = panels.count() * kPanel;
}

// weight [outputs, channels, taps], int8 or nibbles -> packed, and the sum of each channel.
void fxquant_gemm_pack(const void* weight, int64_t outputs, int64_t channels, int64_t taps,
                       int gated, int four_bit, uint8_t* packed, int32_t* sums, int threads) {
  const Panels panels{outputs, channels, taps, gated != 0, four_bit != 0};
  const auto pack = four_bit ? pack_panel<NibbleRow> : pack_panel<ByteRow>;
  share(panels.count(), threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      pack(panels, weight, p, packed + p * panels.bytes(), sums + p * kPanel);
  });
}

// x [B, H, W, C up to a multiple of four] -> out [B, OH, OW, N] (gated: N / 2). May be null: bias
// [N], channel_add [B, N], residual (as out), and for a float output out_step.
void fxquant_gemm_run(const Geometry* geometry, const uint8_t* x, const float* x_step,
                      const uint8_t* packed, int four_bit, const int32_t* sums,
                      const float* weight_scale, const float* bias, const float* channel_add,
                      int activation, const void* residual, int residual_type, void* out,
                      int out_type, const float* out_step, int out_bits, int threads) {
  const Geometry& g = *geometry;
  const bool gated = is_gated(activation);
  const Panels panels{g.outputs, g.channels, g.kernel_height * g.kernel_width, gated,
                      four_bit != 0};
  const int64_t pixel_bytes = 4 * panels.tap_groups();
  const std::vector<uint8_t> zeros(pixel_bytes, uint8_t(int32_t(x_step[1]) + 128));
  const Tables tables(panels, g.batch, x_step, sums, weight_scale, bias, channel_add);
  const Ending ending{activation, residual, residual_type, out, out_type, out_step, out_bits,
                      gated ? g.outputs / 2 : g.outputs};
  Layer layer{g, panels, x, pixel_bytes, zeros.data(), packed, &tables,
              channel_add != nullptr, ending, {}, {}, 0};
  layer.cut();
  run_layer(layer, threads);
}

}  // extern "C"
