// A loop shared out among threads: OpenMP, or std::thread where SPT_FAST_STD_THREADS is defined.
//
// The second form exists for ThreadSanitizer, which takes the barriers of an OpenMP runtime that
// was not built for it for data races. No exception may leave the loop's body.
#pragma once

#include <algorithm>
#include <cfenv>
#include <cstdint>
#ifdef SPT_FAST_STD_THREADS
#include <atomic>
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace spt_fast {

// Floats as the standard has them while it lives. A program may have subnormal numbers flushed to
// zero on some of its threads: results would depend on which tasks these take.
class StandardFloats {
 public:
  StandardFloats() {
    std::fegetenv(&callers_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~StandardFloats() { std::fesetenv(&callers_); }
  StandardFloats(const StandardFloats&) = delete;
  StandardFloats& operator=(const StandardFloats&) = delete;

 private:
  std::fenv_t callers_;
};

// As many threads as asked for, but no more than there are tasks.
inline int useful_threads(int num_threads, int64_t tasks) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(num_threads, tasks)));
}

// fn(task, thread) for each task, in no order; threads are numbered from 0 to useful_threads() - 1.
template <class Fn>
void parallel_for(int num_threads, int64_t tasks, const Fn& fn) {
  const int threads = useful_threads(num_threads, tasks);
#if defined(SPT_FAST_STD_THREADS)
  std::atomic<int64_t> next{0};
  const auto work = [&](int thread) {
    const StandardFloats standard;
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) fn(task, thread);
  };
  std::vector<std::thread> team;
  for (int thread = 1; thread < threads; ++thread) team.emplace_back(work, thread);
  work(0);
  for (std::thread& member : team) member.join();
#elif defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    const StandardFloats standard;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) fn(task, omp_get_thread_num());
  }
#else
  static_cast<void>(threads);
  const StandardFloats standard;
  for (int64_t task = 0; task < tasks; ++task) fn(task, 0);
#endif
}

}  // namespace spt_fast
