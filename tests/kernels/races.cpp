// The kernels on plain threads, called by two threads at once: a program for ThreadSanitizer, which
// cannot follow OpenMP. test_sanitizers.py compiles it once with each kernel's source as KERNEL.
//
// Exits with 1 if a result depends on the number of threads.

#include KERNEL

#include <cstdio>
#include <functional>
#include <random>
#include <thread>
#include <vector>

namespace {

using Result = std::vector<float>;

std::mt19937 random_bits(0);

template <class T>
std::vector<T> random(int64_t size, float low, float high) {
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<T> made(size);
  for (T& x : made) x = T(uniform(random_bits));
  return made;
}

const float kStep[] = {0.05f, 3.0f};

}  // namespace

#if defined(ATTENTION)

Result attention(int threads) {
  constexpr int64_t batch = 2, heads = 3, queries = 150, keys = 410, channels = 40;
  static const auto q = random<float>(batch * queries * heads * channels, -1, 1);
  static const auto k = random<float>(batch * keys * heads * channels, -1, 1);
  Result out(batch * queries * heads * channels);
  const auto tokens = [](const float* data, int64_t count) {
    return Tensor{data, count * heads * channels, channels, heads * channels};
  };
  const Call call{tokens(q.data(), queries), tokens(k.data(), keys), tokens(k.data(), keys),
                  Tensor{nullptr, 0, 0, 0}, tokens(out.data(), queries),
                  batch, heads, queries, keys, channels, channels, 0.2f,
                  nullptr, nullptr, nullptr, nullptr, kFloat32, kFloat32, 8, threads};
  fxquant_attention(&call);
  return out;
}

Result integer_attention(int threads) {
  constexpr int64_t tokens = 300, channels = 24;
  static const auto x = random<uint8_t>(tokens * channels, 0, 255);
  Result out(tokens * channels);
  const Tensor in{x.data(), 0, 0, channels};
  const Call call{in, in, in, Tensor{nullptr, 0, 0, 0}, Tensor{out.data(), 0, 0, channels},
                  1, 1, tokens, tokens, channels, channels, 0.2f,
                  kStep, kStep, kStep, nullptr, kUint8, kFloat32, 8, threads};
  fxquant_attention(&call);
  return out;
}

const std::vector<std::function<Result(int)>> kernels = {attention, integer_attention};

#elif defined(GEMM)

Result layer(int threads, int four_bit, int activation) {
  constexpr int64_t side = 40, channels = 68, outputs = 96, taps = 9;
  static const auto x = random<uint8_t>(2 * side * side * channels, 0, 255);
  static const auto weights = random<int8_t>(outputs * channels * taps, -128, 127);
  static const auto scale = random<float>(outputs, 0.001f, 0.01f);
  static const auto added = random<float>(2 * outputs, -1, 1);
  const int gated = activation >= 4;
  int64_t sizes[2];
  fxquant_gemm_sizes(outputs, channels, taps, gated, four_bit, sizes);
  std::vector<uint8_t> packed(sizes[0]);
  std::vector<int32_t> sums(sizes[1]);
  fxquant_gemm_pack(weights.data(), outputs, channels, taps, gated, four_bit, packed.data(),
                    sums.data(), threads);
  const Geometry g{2, side, side, channels, outputs, 3, 3, 1, 1, 1, 1, 1, 1, side, side};
  Result out(2 * side * side * outputs / (gated ? 2 : 1));
  fxquant_gemm_run(&g, x.data(), kStep, packed.data(), four_bit, sums.data(), scale.data(),
                   nullptr, gated ? nullptr : added.data(), activation, nullptr, 0, out.data(),
                   kFloat32, nullptr, 8, threads);
  return out;
}

const std::vector<std::function<Result(int)>> kernels = {
    [](int threads) { return layer(threads, 0, kSilu); },
    [](int threads) { return layer(threads, 1, kNone); },
    [](int threads) { return layer(threads, 0, 4); },
};

#else

Result normalise(int threads) {
  constexpr int64_t batch = 2, length = 1500, channels = 96;
  static const auto x = random<float>(batch * length * channels, -3, 3);
  Result out(x.size());
  fxquant_group_norm(x.data(), kFloat32, batch, length, channels, 8, nullptr, nullptr, 1e-5, kSilu,
                     out.data(), kFloat32, nullptr, 8, threads);
  return out;
}

Result quantize_all(int threads) {
  constexpr int64_t rows = 400, width = 320;
  static const auto x = random<float>(2 * rows * width, -3, 3);
  std::vector<uint8_t> out(8 * rows * width);
  uint8_t* to = out.data();
  fxquant_quantize(x.data(), kFloat32, rows, width, to, kUint8, width, kStep, 8, kGelu, threads);
  fxquant_add(x.data(), kFloat32, x.data(), kFloat32, rows * width, to + rows * width, kUint8,
              kStep, 8, threads);
  fxquant_geglu(x.data(), kFloat32, rows, width, to + 2 * rows * width, kUint8, kStep, 8, kGelu,
                threads);
  fxquant_layer_norm(x.data(), kFloat32, rows, width, nullptr, nullptr, 1e-5,
                     to + 3 * rows * width, kUint8, kStep, 8, threads);
  fxquant_upsample(x.data(), kFloat32, rows, 10, width / 10, 2, to + 4 * rows * width, kUint8,
                   kStep, 8, threads);
  return Result(out.begin(), out.end());
}

const std::vector<std::function<Result(int)>> kernels = {normalise, quantize_all};

#endif

int main() {
  for (size_t i = 0; i < kernels.size(); ++i) {
    const Result expected = kernels[i](1);
    Result a, b;
    std::thread other([&] { a = kernels[i](3); });
    b = kernels[i](4);
    other.join();
    if (a != expected || b != expected) {
      std::printf("kernel %zu: the result depends on the number of threads\n", i);
      return 1;
    }
  }
  return 0;
}
