// Divides units of work between the calling thread and a thread pool.

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

// State that the caller and its helpers share. A helper may start after the call has
// returned: it then finds no units, and does not use `run`, which is no longer valid.
template <class F>
struct Job {
  // Each worker has a range of consecutive units: these often read the same keys, which
  // it then packs once. A worker that has finished its range steals from the others.
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
    // Spins first: the last units mostly end together, and sleeping would take longer.
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

// The number of workers of parallel_for; their slots are 0, ..., worker_count - 1.
template <class Pool>
int64_t worker_count(const Pool& pool, int64_t count) {
  return std::max<int64_t>(1, std::min<int64_t>(count, pool.num_threads()));
}

// Calls run(unit, slot) for each unit in 0, ..., count - 1, and returns when all are
// done. No two concurrent calls have the same slot, so it can index scratch memory.
//
// The calling thread (slot 0) runs units itself, and waits only for units that others
// have begun, never for a helper that has not started. So nested calls, concurrent
// calls and calls from a thread of the pool cannot deadlock. `run` must not throw.
//
// `Pool` needs `Schedule(task)` and `num_threads()`, which xla::ffi::ThreadPool has.
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
