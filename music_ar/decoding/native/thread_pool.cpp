#include "thread_pool.h"

#include <sched.h>

#include <thread>

namespace music_ar {

constexpr int ITEM_BITS = 20;
constexpr uint64_t ITEM_MASK = (uint64_t(1) << ITEM_BITS) - 1;
constexpr int PATIENCE = 2000;  // looks before a waiting thread lets others run: 20 to 100 microseconds

static uint64_t next_item(uint64_t loop) { return loop & ITEM_MASK; }

static uint64_t items_of(uint64_t loop) { return loop >> ITEM_BITS & ITEM_MASK; }

static void pause(int& looks) {
  if (++looks > PATIENCE) {
    sched_yield();
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

Threads::Threads(int count) : count_(count) {
  for (int thread = 1; thread < count; ++thread) std::thread([this, thread] { watch(thread); }).detach();
}

Threads::Awake::Awake(Threads& threads) : threads_(threads), one_call_at_a_time_(threads.call_) {
  if (threads.count_ == 1) return;
  std::lock_guard<std::mutex> lock(threads.sleep_);
  threads.awake_ = true;
  threads.wake_.notify_all();
}

Threads::Awake::~Awake() { threads_.awake_ = false; }

void Threads::run(int items, Work work, const void* context) {
  if (items <= 1 || count_ == 1) {
    for (int item = 0; item < items; ++item) work(context, item, 0);
    return;
  }
  work_ = work;
  context_ = context;
  done_.store(0, std::memory_order_relaxed);
  const uint64_t number = (loop_.load(std::memory_order_relaxed) >> 2 * ITEM_BITS) + 1;
  loop_.store(number << 2 * ITEM_BITS | uint64_t(items) << ITEM_BITS, std::memory_order_release);
  take_items(0);
  for (int looks = 0; done_.load(std::memory_order_acquire) < items;) pause(looks);
}

void Threads::take_items(int thread) {
  for (;;) {
    const uint64_t seen = loop_.load(std::memory_order_relaxed);
    if (next_item(seen) >= items_of(seen)) return;
    const uint64_t taken = loop_.fetch_add(1, std::memory_order_acq_rel);
    if (next_item(taken) >= items_of(taken)) return;
    work_(context_, int(next_item(taken)), thread);
    done_.fetch_add(1, std::memory_order_release);
  }
}

void Threads::watch(int thread) {
  for (int looks = 0;;) {
    if (!awake_) {
      std::unique_lock<std::mutex> lock(sleep_);
      wake_.wait(lock, [this] { return awake_.load(); });
      looks = 0;
    }
    const uint64_t seen = loop_.load(std::memory_order_relaxed);
    if (next_item(seen) < items_of(seen)) {
      take_items(thread);
      looks = 0;
    }
    pause(looks);
  }
}

}  // namespace music_ar
