// softmax(Q K^T * scale + mask) V without the score matrix, in bfloat16, float32 or int8 products.
//
// Reference: ../reference.py, `attention`. Called by attention.py with raw pointers.
//
// A task is a block of queries of one head: kQueries of them, one in each lane of kRegisters
// registers. Everything is kept transposed, so that softmax is the same arithmetic in every lane:
//
//   scores [keys, queries] = K Q^T    weights = 2^(scores - their maximum)    out^T = V^T weights
//
// Keys come in blocks that fit the first-level cache. The weights of a block are relative to the
// block's own maximum, the output to the largest so far: this costs one factor per block and keeps
// eight-bit weights accurate wherever the maximum is. Both products run in the same tile of
// registers: `Dot` says how many numbers of the summed dimension a lane holds (`kStep`) and how
// they are multiplied. A thread packs K and V of a head when it meets that head. Nothing depends on
// the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "attention_dot.h"
#include "attention_pack.h"
#include "memory.h"
#include "numbers.h"
#include "parallel.h"
#include "vector.h"

namespace {

// ---- one block of keys -------------------------------------------------------------------------

// sum[r][v] over i of lanes[i][v] times the word same[r * row + i * step].
template <class Dot, int kCount>
FXQUANT_INLINE void multiply(const Ints* lanes, const int32_t* same, int64_t row, int64_t step,
                             int64_t count, typename Dot::Sum (&sum)[kCount][kRegisters]) {
  for (int64_t i = 0; i < count; ++i) {
    Ints x[kRegisters];
#pragma GCC unroll 4
    for (int v = 0; v < kRegisters; ++v) x[v] = lanes[i * kRegisters + v];
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const Ints y = splat(same[r * row + i * step]);
#pragma GCC unroll 4
      for (int v = 0; v < kRegisters; ++v) sum[r][v] = Dot::dot(sum[r][v], x[v], y);
    }
  }
}

// f(first, count as a constant) for rows in steps of kRows, the last step smaller.
template <class F>
FXQUANT_INLINE void by_rows(int64_t rows, F f) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) f(r, std::integral_constant<int, kRows>());
  switch (rows - r) {
    case 1: return f(r, std::integral_constant<int, 1>());
    case 2: return f(r, std::integral_constant<int, 2>());
    case 3: return f(r, std::integral_constant<int, 3>());
    case 4: return f(r, std::integral_constant<int, 4>());
    case 5: return f(r, std::integral_constant<int, 5>());
  }
}

// Scores of the block in units of log 2, and their largest per query.
template <class Dot>
void score(const Scratch<Dot>& s, int64_t first, int64_t count, float factor, Floats* scores,
           Floats (&top)[kRegisters]) {
  for (int v = 0; v < kRegisters; ++v) top[v] = splat(kLowest);
  by_rows(count, [&](int64_t r, auto constant) {
    constexpr int kCount = decltype(constant)::value;
    typename Dot::Sum sum[kCount][kRegisters];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kRegisters; ++v) sum[i][v] = Dot::start(s.start[first + r + i]);
    multiply<Dot, kCount>(s.queries.data(), s.keys.data() + (first + r) * s.stride, s.stride, 1,
                          s.words, sum);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kRegisters; ++v) {
        const Floats x = Dot::floats(sum[i][v]) * splat(factor);
        scores[(r + i) * kRegisters + v] = x;
        top[v] = larger(top[v], x);
      }
  });
}

// The mask joins the scores; the largest is looked for again.
void add_mask(const Call& c, int64_t b, int64_t h, int64_t query, int64_t first, int64_t count,
              Floats* scores, Floats (&top)[kRegisters]) {
  for (int v = 0; v < kRegisters; ++v) top[v] = splat(kLowest);
  const float* mask = row<float>(c.mask, b, h, query) + first;
  const int64_t last = std::min<int64_t>(kQueries, c.queries - query) - 1;
  for (int64_t k = 0; k < count; ++k) {
    for (int v = 0; v < kRegisters; ++v) {
      Floats added;
      if (c.mask.token == 0) {
        added = splat(mask[k]);
      } else {
        for (int i = 0; i < kLanes; ++i)
          added[i] = mask[std::min<int64_t>(v * kLanes + i, last) * c.mask.token + k];
      }
      Floats& x = scores[k * kRegisters + v];
      x += added * splat(kLog2E);
      top[v] = larger(top[v], x);
    }
  }
}

// Scores become weights, in the lanes that the second product reads.
template <class Dot>
void weigh(const Floats* scores, int64_t count, const Floats (&top)[kRegisters], Ints* weights,
           Floats (&total)[kRegisters]) {
  constexpr int kStep = Dot::kStep;
  Floats offset[kRegisters], sum[kRegisters], rest[kRegisters] = {};
  for (int v = 0; v < kRegisters; ++v) {
    offset[v] = top[v] - splat(Dot::kLogOne);  // the largest weight is 1, or 255 of 8 bits
    sum[v] = Floats{};
  }
  auto weight = [&](int64_t k, int v) {
    return exp2_small<Dot::kDegree>(scores[k * kRegisters + v] - offset[v]);
  };
  int64_t k = 0;
  for (; k + kStep <= count; k += kStep, weights += kRegisters) {
#pragma GCC unroll 4
    for (int v = 0; v < kRegisters; ++v) {
      Floats p[kStep];
#pragma GCC unroll 4
      for (int j = 0; j < kStep; ++j) p[j] = weight(k + j, v);
      weights[v] = Dot::pack(p, sum[v], rest[v]);
    }
  }
  if (k < count) {
    for (int v = 0; v < kRegisters; ++v) {
      Floats p[kStep] = {};
      for (int j = 0; k + j < count; ++j) p[j] = weight(k + j, v);
      weights[v] = Dot::pack(p, sum[v], rest[v]);
    }
  }
  for (int v = 0; v < kRegisters; ++v) total[v] = sum[v];
}

// out = out * keep + V^T weights * take, per query.
template <class Dot>
void blend(Scratch<Dot>& s, int64_t channels, int64_t group, int64_t groups,
           const Floats (&keep)[kRegisters], const Floats (&take)[kRegisters]) {
  by_rows(channels, [&](int64_t r, auto constant) {
    constexpr int kCount = decltype(constant)::value;
    typename Dot::Sum sum[kCount][kRegisters] = {};
    multiply<Dot, kCount>(s.weights.data(), s.values.data() + group * channels + r, 1, channels,
                          groups, sum);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kRegisters; ++v) {
        Floats& out = s.out[(r + i) * kRegisters + v];
        out = out * keep[v] + Dot::floats(sum[i][v]) * take[v];
      }
  });
}

// ---- one block of queries ----------------------------------------------------------------------

// The lanes of s.out, divided by the sums of weights, as rows of the output tensor. Numbers of the
// same query share a lane where they are narrow, so that fewer words are moved one by one.
template <class Dot, class Store>
void write(const Call& c, Scratch<Dot>& s, int64_t b, int64_t h, int64_t first,
           const Floats (&top)[kRegisters], const Floats (&total)[kRegisters], const Store& store) {
  using Out = typename Store::Stored;
  constexpr int kSize = sizeof(Out), kTogether = 4 / kSize;
  const float factor = Dot::kStep == 4 ? c.v_step[0] : 1.0f;
  const float zero_point = Dot::kStep == 4 ? c.v_step[1] : 0.0f;
  for (int v = 0; v < kRegisters; ++v) {
    // A query whose keys are all masked has no weights to speak of, and gets zeros.
    const Ints any = top[v] > splat(kLowest);
    const Floats per = splat(factor) / total[v];
    const auto lanes = [&](int64_t d) {
      const Floats x = s.out[d * kRegisters + v] * per - splat(zero_point * factor);
      return store.lanes(as_floats(as_ints(x) & any));
    };
    for (int64_t d = 0; d < c.value_channels; d += kTogether) {
      Ints word = lanes(d);
      for (int j = 1; j < kTogether && d + j < c.value_channels; ++j) {
        const int32_t below = (1 << (8 * kSize * j)) - 1;
        word = (word & below) | (lanes(d + j) << (8 * kSize * j));
      }
      s.rows[d / kTogether * kRegisters + v] = word;
    }
  }
  const int32_t* from = reinterpret_cast<const int32_t*>(s.rows.data());
  const int64_t count = std::min<int64_t>(kQueries, c.queries - first);
  const int64_t whole = c.value_channels / kTogether, rest = c.value_channels % kTogether;
  for (int64_t i = 0; i < count; ++i) {
    Out* to = const_cast<Out*>(row<Out>(c.out, b, h, first + i));
    for (int64_t w = 0; w < whole; ++w)
      std::memcpy(to + w * kTogether, from + w * kQueries + i, 4);
    if (rest) std::memcpy(to + whole * kTogether, from + whole * kQueries + i, rest * kSize);
  }
}

template <class Dot, class Store>
void attend(const Call& c, Scratch<Dot>& s, int64_t b, int64_t h, int64_t query,
            const Store& store) {
  const float unit = Dot::kStep == 4 ? c.q_step[0] * c.k_step[0] : 1.0f;
  const float factor = c.scale * unit * kLog2E;
  pack_queries(c, b, h, query, s);
  std::fill(s.out.begin(), s.out.end(), Floats{});
  Floats top[kRegisters], total[kRegisters];
  for (int v = 0; v < kRegisters; ++v) {
    top[v] = splat(kLowest);
    total[v] = Floats{};
  }
  for (int64_t first = 0; first < c.keys; first += kKeys) {
    const int64_t count = std::min(kKeys, c.keys - first);
    Floats here[kRegisters], sum[kRegisters], keep[kRegisters], take[kRegisters];
    score(s, first, count, factor, s.scores.data(), here);
    if (c.mask.data) add_mask(c, b, h, query, first, count, s.scores.data(), here);
    weigh<Dot>(s.scores.data(), count, here, s.weights.data(), sum);
    for (int v = 0; v < kRegisters; ++v) {
      const Floats higher = larger(top[v], here[v]);
      keep[v] = exp2_small<5>(top[v] - higher);
      take[v] = exp2_small<5>(here[v] - higher);
      total[v] = total[v] * keep[v] + sum[v] * take[v];
      top[v] = higher;
    }
    blend(s, c.value_channels, first / Dot::kStep, ceil_div(count, Dot::kStep), keep, take);
  }
  write(c, s, b, h, query, top, total, store);
}

template <class Dot, class Store>
void run(const Call& c, const Store& store) {
  const int64_t blocks = ceil_div(c.queries, kQueries), tasks = c.batch * c.heads * blocks;
  share(tasks, c.threads, [&](int64_t begin, int64_t end) {
    Scratch<Dot> s(c);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / blocks, b = head / c.heads, h = head % c.heads;
      if (head != packed) {
        pack_keys(c, b, h, s);
        pack_values(c, b, h, s);
        packed = head;
      }
      attend(c, s, b, h, task % blocks * kQueries, store);
    }
  });
}

template <class Dot>
void with_output(const Call& c) {
  with_store(c.out_type, c.out_step, c.out_bits, [&](const auto& store) { run<Dot>(c, store); });
}

}  // namespace

extern "C" {

int fxquant_abi_version() { return 1; }

// in_type: of q, k and v.
void fxquant_attention(const Call* call) {
  switch (call->in_type) {
    case kFloat32: return with_output<Float32Dot>(*call);
    case kBfloat16: return with_output<Bfloat16Dot>(*call);
    default: return with_output<ByteDot>(*call);
  }
}

}  // extern "C"
