// Work cut into tasks for XLA's threads.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

// Run task(0) .. task(count - 1) on XLA's threads and on this one. No wait is for a task that has
// not started, so nothing can lock up, even when every other thread is busy or waits for us.
static void run(xla::ffi::ThreadPool& pool, int64_t count,
                const std::function<void(int64_t)>& task) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable all;
  };
  auto shared = std::make_shared<Shared>();  // a thread may come when everything is over
  auto work = [shared, count, &task] {
    int64_t mine = 0;
    for (int64_t i; (i = shared->next++) < count; mine++) task(i);
    if (!mine) return;
    std::lock_guard<std::mutex> lock(shared->mutex);
    if ((shared->done += mine) == count) shared->all.notify_one();
  };
  int64_t others = std::min(count, pool.num_threads()) - 1;
  for (int64_t i = 0; i < others; i++) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all.wait(lock, [&] { return shared->done == count; });
}
