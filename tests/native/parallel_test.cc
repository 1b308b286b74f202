// A stress test of parallel.h by itself, for the sanitizers; see test_parallel.py.

#include "parallel.h"

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#define CHECK(condition)                                                      \
  if (!(condition)) {                                                         \
    std::fprintf(stderr, "line %d: %s does not hold\n", __LINE__, #condition); \
    std::exit(1);                                                             \
  }

namespace {

using attnlab::parallel_for;
using attnlab::worker_count;

// A queue and its threads, which finish what is queued before they leave.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    changed_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  template <class F>
  void Schedule(F&& task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.emplace_back(std::forward<F>(task));
    }
    changed_.notify_one();
  }
  int64_t num_threads() const { return static_cast<int64_t>(threads_.size()); }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return closed_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      auto task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      task = nullptr;
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool closed_ = false;
  std::vector<std::thread> threads_;
};

// What a pool does that cannot schedule: the task runs at once, in the caller.
struct Inline {
  template <class F>
  void Schedule(F&& task) {
    task();
  }
  int64_t num_threads() const { return 3; }
};

// Every unit runs once; slots are in range, and no two calls share one at a time. Plain
// memory throughout: the sanitizer sees what is not ordered.
template <class P>
void every_unit_once(P& pool, int64_t count) {
  const int64_t workers = worker_count(pool, count);
  CHECK(workers >= 1 && workers <= std::max<int64_t>(1, count));
  std::vector<int> ran(count, 0), scratch(workers, 0);
  std::vector<int64_t> sums(workers, 0);
  parallel_for(pool, count, [&](int64_t unit, int64_t slot) {
    CHECK(slot >= 0 && slot < workers);
    CHECK(++scratch[slot] == 1);
    ++ran[unit];
    sums[slot] += unit;
    --scratch[slot];
  });
  int64_t sum = 0;
  for (int64_t part : sums) sum += part;
  for (int once : ran) CHECK(once == 1);
  CHECK(sum == count * (count - 1) / 2);
}

void counts_and_pools() {
  for (int threads : {0, 1, 2, 4}) {
    Pool pool(threads);
    for (int64_t count : {0, 1, 2, 3, 7, 1000}) {
      for (int again = 0; again < 300; ++again) every_unit_once(pool, count);
    }
  }
  Inline pool;
  every_unit_once(pool, 100);
}

// No thread of the pool is free: the caller does it all, and returns. The helpers start
// when everything that the call owned is gone.
void busy_pool() {
  Pool pool(2);
  std::mutex gate;
  gate.lock();
  for (int i = 0; i < 2; ++i) {
    pool.Schedule([&] { std::lock_guard<std::mutex> wait(gate); });
  }
  for (int again = 0; again < 100; ++again) every_unit_once(pool, 20);
  gate.unlock();
}

// Calls from several threads at once, some of them threads of the pool.
void concurrent_calls() {
  Pool pool(3);
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int again = 0; again < 1000; ++again) every_unit_once(pool, 40);
    });
  }
  for (int i = 0; i < 1000; ++i) {
    pool.Schedule([&] { every_unit_once(pool, 40); });
  }
  for (auto& caller : callers) caller.join();
}

void nested_calls() {
  Pool pool(2);
  for (int again = 0; again < 200; ++again) {
    std::vector<int> ran(8, 0);
    parallel_for(pool, 8, [&](int64_t unit, int64_t) {
      every_unit_once(pool, 16);
      ++ran[unit];
    });
    for (int once : ran) CHECK(once == 1);
  }
}

// Each worker begins with units of its own, next to each other.
void each_has_a_range() {
  Pool pool(2);
  std::atomic<int> begun{0};
  std::vector<int64_t> first(2, -1);
  parallel_for(pool, 100, [&](int64_t unit, int64_t slot) {
    if (first[slot] >= 0) return;
    first[slot] = unit;
    // Until both have one.
    for (++begun; begun < 2;) std::this_thread::yield();
  });
  CHECK(first[0] == 0);
  CHECK(first[1] == 50);
}

// What units wrote is seen after the call.
void results_are_visible() {
  Pool pool(4);
  for (int again = 0; again < 5000; ++again) {
    std::vector<int64_t> squares(64);
    parallel_for(pool, 64, [&](int64_t unit, int64_t) { squares[unit] = unit * unit; });
    for (int64_t unit = 0; unit < 64; ++unit) CHECK(squares[unit] == unit * unit);
  }
}

}  // namespace

int main() {
  counts_and_pools();
  busy_pool();
  concurrent_calls();
  nested_calls();
  each_has_a_range();
  results_are_visible();
  std::puts("parallel_for holds");
}
