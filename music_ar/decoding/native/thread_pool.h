// A pool of threads that shares out the items of one loop after another.
//
// A decoding step has about fifty loops of 5 to 50 microseconds, so waking threads for each would cost more than the
// work. Instead, threads watch for the next loop as long as a call is running, and sleep between calls. They take items
// as they become free: a thread that the system has taken off its core holds up the others by one item at most, and if
// it has none, not at all. Who computes an item never changes its result.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace music_ar {

class Threads {
 public:
  // Threads, including the caller's. They are never joined: the pool lives as long as the process.
  explicit Threads(int count);

  int count() const { return count_; }

  // Call work(item, thread) for each item below `items`; returns when all are done.
  template <class Work>
  void each(int items, const Work& work) {
    run(items, [](const void* context, int item, int thread) { (*static_cast<const Work*>(context))(item, thread); },
        &work);
  }

  // Threads are awake while one of these exists.
  class Awake {
   public:
    explicit Awake(Threads& threads);
    ~Awake();

   private:
    Threads& threads_;
    std::lock_guard<std::mutex> one_call_at_a_time_;
  };

 private:
  using Work = void (*)(const void* context, int item, int thread);

  void run(int items, Work work, const void* context);
  void take_items(int thread);
  void watch(int thread);

  const int count_;
  // The current loop in one word, so that a thread which was late cannot take an item of a loop that has ended:
  // its number (24 bits), its items (20) and the next item (20).
  std::atomic<uint64_t> loop_{0};
  std::atomic<int> done_{0};
  Work work_ = nullptr;
  const void* context_ = nullptr;

  std::atomic<bool> awake_{false};
  std::mutex call_, sleep_;
  std::condition_variable wake_;
};

}  // namespace music_ar
