// Shares units of work between the calling thread and a pool.

#ifndef ATTNLAB_PARALLEL_H_
#define ATTNLAB_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <type_traits>

namespace attnlab {
namespace parallel_internal {

// What the caller and its helpers share. A helper may start when the call is long over:
// it then finds no unit, and never touches `run`, which lives in the caller's frame.
template <class F>
struct Job {
  // Units next to each other read the same keys, which a worker then packs once: each
  // has a range of its own, and helps the others when that is done.
  struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  Job(F* run, int64_t count, int64_t workers)
      : run(run), workers(workers), ranges(new Range[workers]), left(count) {
    for (int64_t i = 0; i < workers; ++i) {
      ranges[i].next = i * count / workers;
      ranges[i].end = (i + 1) * count / workers;
    }
  }

  void work(int64_t slot) {
    int64_t done = 0;
    for (int64_t i = 0; i < workers; ++i) {
      Range& range = ranges[(slot + i) % workers];
      for (int64_t unit; (unit = range.next.fetch_add(1, std::memory_order_relaxed)) <
                         range.end;
           ++done) {
        (*run)(unit, slot);
      }
    }
    if (done > 0 && left.fetch_sub(done, std::memory_order_acq_rel) == done) {
      { std::lock_guard<std::mutex> lock(mutex); }
      finished.notify_one();
    }
  }

  bool over() const { return left.load(std::memory_order_acquire) == 0; }

  void wait() {
    // The last units mostly end together: a sleep would cost more than they do.
    for (int i = 0; i < 1000; ++i) {
      if (over()) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [this] { return over(); });
  }

  F* const run;
  const int64_t workers;
  const std::unique_ptr<Range[]> ranges;
  std::atomic<int64_t> left;
  std::mutex mutex;
  std::condition_variable finished;
};

}  // namespace parallel_internal

// How many workers parallel_for uses: slots are 0, ..., worker_count - 1.
template <class Pool>
int64_t worker_count(const Pool& pool, int64_t count) {
  return std::max<int64_t>(1, std::min<int64_t>(count, pool.num_threads()));
}

// Calls run(unit, slot) for each unit in 0, ..., count - 1, and returns when all are
// done. No two calls at the same time have the same slot, which so can index scratch.
//
// The calling thread (slot 0) takes units itself, and waits only for units that others
// have begun, never for a helper that has not started: it cannot deadlock from within a
// thread of the pool, in concurrent calls, or nested. `run` must not throw.
//
// `Pool` has `Schedule(task)` and `num_threads()`, as xla::ffi::ThreadPool has.
template <class Pool, class F>
void parallel_for(Pool& pool, int64_t count, F&& run) {
  using Run = std::remove_reference_t<F>;
  const int64_t workers = worker_count(pool, count);
  if (workers == 1) {
    for (int64_t unit = 0; unit < count; ++unit) run(unit, int64_t{0});
    return;
  }
  auto job = std::make_shared<parallel_internal::Job<Run>>(&run, count, workers);
  for (int64_t slot = 1; slot < workers; ++slot) {
    pool.Schedule([job, slot] { job->work(slot); });
  }
  job->work(0);
  job->wait();
}

}  // namespace attnlab

#endif  // ATTNLAB_PARALLEL_H_
