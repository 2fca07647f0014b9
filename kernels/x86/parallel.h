// Work shared between threads: OpenMP's pool, which is torch's own where both find one libgomp, or
// plain threads for ThreadSanitizer, which cannot see into OpenMP's (-DFXQUANT_PLAIN_THREADS).

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(FXQUANT_PLAIN_THREADS)
#include <thread>
#include <vector>
#endif

namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(first, last) for consecutive shares of [0, tasks), at most one a thread. Exceptions end the
// process, as they would in OpenMP.
template <class F>
void share(int64_t tasks, int threads, F f) {
  const int64_t shares = std::min<int64_t>(tasks, std::max(threads, 1));
  const auto part = [&](int64_t i) { f(tasks * i / shares, tasks * (i + 1) / shares); };
  if (shares == 0) return;
  if (shares == 1) return part(0);
#if defined(FXQUANT_PLAIN_THREADS)
  std::vector<std::thread> running;
  for (int64_t i = 0; i < shares; ++i) running.emplace_back(part, i);
  for (std::thread& thread : running) thread.join();
#else
#pragma omp parallel for num_threads(int(shares)) schedule(static, 1)
  for (int64_t i = 0; i < shares; ++i) part(i);
#endif
}

// f(claim) on every thread, where claim(begin, end) takes consecutive tasks while there are any:
// first many, then few, so that threads that start late or are slowed down end with the others.
template <class F>
void share_freely(int64_t tasks, int threads, F f) {
  const int64_t shares = std::min<int64_t>(tasks, std::max(threads, 1));
  std::atomic<int64_t> next = 0;
  const auto claim = [&](int64_t& begin, int64_t& end) {
    begin = next;
    do {
      end = begin + std::max<int64_t>(1, (tasks - begin) / shares);
    } while (begin < tasks && !next.compare_exchange_weak(begin, end));
    return begin < tasks;
  };
  share(shares, threads, [&](int64_t, int64_t) { f(claim); });
}

}  // namespace
