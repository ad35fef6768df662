#include "team.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#endif

namespace effnet {
namespace {

// How often a helper looks for a step before it sleeps: about 100 microseconds, in which the next
// step of a call comes, and not the next call.
constexpr int kLooks = 1 << 11;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // as long as x86's
#endif
}

bool forked = false;

#if defined(__linux__)
// The processors that PyTorch's threads may run on, together. The calling thread's alone would not
// do: OpenMP may have bound it to one of them.
cpu_set_t processors(int64_t threads) {
  cpu_set_t all;
  CPU_ZERO(&all);
  std::mutex mutex;
  // In a child of fork() OpenMP would wait for threads that are not there.
  torch::stable::parallel_for(0, forked ? 1 : threads, 1, [&](int64_t, int64_t) {
    cpu_set_t own;
    CPU_ZERO(&own);
    if (sched_getaffinity(0, sizeof(own), &own) != 0) return;
    const std::lock_guard<std::mutex> lock(mutex);
    CPU_OR(&all, &all, &own);
  });
  return all;
}
#endif

// The helpers of this process. Never destroyed: they are asleep in it when the process ends.
class Helpers {
 public:
  static Helpers& instance() {
    static Helpers* const made = [] {
      // A child of fork() has none of its parent's threads; what they held does not matter there.
      pthread_atfork(nullptr, nullptr, [] {
        forked = true;
        new (memory) Helpers;
      });
      return new (memory) Helpers;
    }();
    return *made;
  }

  // Takes the helpers for a team of `threads`, and gives how many threads that has.
  int64_t take(int64_t threads) {
    if (threads < 2 || taken_.exchange(true)) return 1;
    if (present_ < threads - 1) hire(threads);
    const int64_t helpers = std::min(threads - 1, present_);
    if (helpers == 0) {
      taken_.store(false);
      return 1;
    }
    wanted_.store(helpers);
    return helpers + 1;
  }

  void give_back() { taken_.store(false); }

  void run(const Team::Step& step) {
    failure_ = nullptr;
    step_ = step;
    const int64_t pieces = ceil_div(step.count, step.chunk), threads = wanted_.load() + 1;
    for (int64_t i = 0; i < threads; ++i) {
      parts_[i].next.store(i * pieces / threads * step.chunk);
      parts_[i].end = std::min((i + 1) * pieces / threads * step.chunk, step.count);
    }
    open_.store(++steps_);
    if (sleeping_.load() > 0) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
      }
      wake_.notify_all();
    }
    {
      const Closing closing{*this};  // also where a piece fails: its context is the caller's
      work(0);
    }
    if (failure_ != nullptr) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  // As many helpers as the system has threads for.
  void hire(int64_t threads) {
    try {
#if defined(__linux__)
      const cpu_set_t where = processors(threads);
#endif
      // Nobody is at a step, and all look at the parts only then.
      parts_ = std::make_unique<Part[]>(threads);
      while (present_ < threads - 1) {
        std::thread helper([this, index = present_] { serve(index); });
#if defined(__linux__)
        if (CPU_COUNT(&where) > 0) {
          pthread_setaffinity_np(helper.native_handle(), sizeof(where), &where);
        }
#endif
        helper.detach();
        ++present_;
      }
    } catch (const std::exception&) {  // with those there are
    }
  }

  // Ends a step: nobody begins a piece any more, and those that did have ended.
  struct Closing {
    Helpers& helpers;
    ~Closing() {
      helpers.open_.store(0);
      for (int looks = 0; helpers.inside_.load() != 0; ++looks) {
        if (looks < kLooks) {
          pause();
        } else {
          std::this_thread::yield();
        }
      }
    }
  };

  // The pieces that nobody has begun of part `own`, then of those after it.
  void work(int64_t own) {
    const int64_t threads = wanted_.load() + 1;
    for (int64_t i = 0; i < threads; ++i) {
      Part& part = parts_[(own + i) % threads];
      for (int64_t begin; (begin = part.next.fetch_add(step_.chunk)) < part.end;) {
        step_.call(step_.context, begin, std::min(begin + step_.chunk, part.end));
      }
    }
  }

  // The number of the open step if a helper has not served it and is wanted in it, else 0.
  int64_t call_for(int64_t index, int64_t served) const {
    const int64_t step = open_.load();
    return step != served && index < wanted_.load() ? step : 0;
  }

  [[noreturn]] void serve(int64_t index) {
    int64_t served = 0;
    for (int looks = 0;;) {
      if (const int64_t step = call_for(index, served)) {
        // Inside from before the second look: a step that is still open then waits for us.
        inside_.fetch_add(1);
        if (open_.load() == step) {
          try {
            work(index + 1);
          } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex_);
            failure_ = std::current_exception();
          }
        }
        inside_.fetch_sub(1);
        served = step;
        looks = 0;
      } else if (++looks < kLooks) {
        pause();
      } else {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return call_for(index, served) != 0; });
        sleeping_.fetch_sub(1);
        looks = 0;
      }
    }
  }

  alignas(64) static unsigned char memory[];

  std::atomic<bool> taken_{false};
  // Whoever has taken the helpers changes these.
  int64_t present_ = 0, steps_ = 0;
  std::atomic<int64_t> wanted_{0};
  Team::Step step_{};
  std::exception_ptr failure_;
  std::mutex mutex_;
  std::condition_variable wake_;
  // Of the step, by thread.
  struct alignas(64) Part {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  std::unique_ptr<Part[]> parts_;
  // The number of the step that pieces can be begun of, or 0.
  alignas(64) std::atomic<int64_t> open_{0};
  std::atomic<int> sleeping_{0};
  alignas(64) std::atomic<int> inside_{0};
};

alignas(64) unsigned char Helpers::memory[sizeof(Helpers)];

}  // namespace

Team Team::of_pytorch_threads() {
  return Team(Helpers::instance().take(torch::stable::get_num_threads()));
}

Team::~Team() {
  if (threads_ > 1) Helpers::instance().give_back();
}

void Team::run(const Step& step) { Helpers::instance().run(step); }

}  // namespace effnet
