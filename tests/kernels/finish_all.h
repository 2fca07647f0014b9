// epilogue.h by itself: what it makes of sums, in runs of V columns.
#pragma once

#include "epilogue.h"

namespace fxquant {

template <int V>
void finish_all(const Call& c, const int32_t* sums) {
  const Finish finish = finish_of(c);
  for (int n = 0; n < c.n; n += V) {
    const Columns<V> columns(finish, n);
    for (int m = 0; m < c.m; ++m) {
      int32_t run[V] = {};
      for (int v = 0; v < V && n + v < c.n; ++v) run[v] = sums[m * c.n + n + v];
      const auto residual = residual_of<V>(finish, m, n);
      const auto y = values(finish, columns, place(finish, m), n, residual, run);
      store(finish, columns, m, n, y);
    }
  }
}

}  // namespace fxquant
