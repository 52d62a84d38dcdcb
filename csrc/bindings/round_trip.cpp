// Operator that measures how near two threads are to each other. It is not part of any optimizer. Threads that share a
// cache hand work over four times as fast as threads on two parts of a processor, but share the bandwidth of one part.
// Virtual machines may move between the two within seconds, and do not tell.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <thread>

namespace fused_adaptive {
namespace {

constexpr int kTrips = 50, kBursts = 5;

// Waits until a number has this value. Yields after a while, since both threads may have one core.
void wait_for(const std::atomic<int>& number, int value) {
  for (int spins = 0; number.load(std::memory_order_acquire) != value; ++spins) {
    if (spins > 10000) std::this_thread::yield();
  }
}

// Returns the seconds that a cache line takes to a second thread of torch and back, the fastest of some bursts.
// Infinity if torch has only one thread.
double round_trip() {
  using Clock = std::chrono::steady_clock;
  alignas(128) std::atomic<int> number{0};
  double fastest = std::numeric_limits<double>::infinity();
  torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
    if (end - begin > 1) return;
    for (int burst = 0; burst < kBursts; ++burst) {
      const Clock::time_point started = Clock::now();
      for (int i = 2 * kTrips * burst; i < 2 * kTrips * (burst + 1); i += 2) {
        if (begin == 0) {
          number.store(i + 1, std::memory_order_release);
          wait_for(number, i + 2);
        } else {
          wait_for(number, i + 1);
          number.store(i + 2, std::memory_order_release);
        }
      }
      const double seconds = std::chrono::duration<double>(Clock::now() - started).count();
      if (begin == 0) fastest = std::min(fastest, seconds / kTrips);
    }
  });
  return fastest;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_adaptive, m) { m.def("round_trip() -> float"); }

STABLE_TORCH_LIBRARY_IMPL(fused_adaptive, CompositeExplicitAutograd, m) {
  m.impl("round_trip", TORCH_BOX(&round_trip));
}

}  // namespace fused_adaptive
