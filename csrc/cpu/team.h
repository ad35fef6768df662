// PyTorch's threads as a team for the whole of a call. A parallel region of OpenMP for every step
// would end with a barrier, at which all threads wait for one that the system has put aside, even
// where it has nothing left to do. A team has one region; its steps are divided as they are done,
// and a step ends when its work has.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#include "memory.h"

namespace effnet {

class Team {
 public:
  // body(team) on the calling thread (or one of PyTorch's), with as many others as PyTorch would
  // use to help it. Called by one of PyTorch's threads, the team is that thread alone.
  template <class Body>
  static void run(const Body& body) {
    const int64_t threads = torch::stable::get_num_threads();
    if (threads < 2) {
      Team alone;
      body(alone);
      return;
    }
    Team team;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      if (begin > 0) {
        team.help();
        return;
      }
      // Whoever has a part of the range can help.
      team.threads_ = ceil_div(threads, end - begin);
      const Dismissal dismissal{team};
      body(team);
    });
  }

  // One thread.
  Team() = default;
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int64_t threads() const { return threads_; }

  // body(begin, end) on pieces of [0, count), each of `chunk` but for the last. Not from a body.
  template <class Body>
  void divide(int64_t count, int64_t chunk, const Body& body) {
    if (threads_ == 1 || count <= chunk) {
      if (count > 0) body(int64_t{0}, count);
      return;
    }
    open_.store(false);
    while (inside_.load() != 0) pause();
    call_ = [](const void* context, int64_t begin, int64_t end) {
      (*static_cast<const Body*>(context))(begin, end);
    };
    context_ = &body;
    count_ = count;
    chunk_ = chunk;
    next_.store(0);
    open_.store(true);
    work();
    open_.store(false);
    // Others may be at their last pieces.
    for (int turns = 0; inside_.load() != 0; ++turns) wait(turns);
  }

  // The same, in pieces of `least` or more, small enough to even out what threads differ in.
  template <class Body>
  void share(int64_t count, int64_t least, const Body& body) {
    divide(count, std::max<int64_t>(least, count / (4 * threads_)), body);
  }

 private:
  // Lets the others go, whatever happens.
  struct Dismissal {
    Team& team;
    ~Dismissal() { team.dismissed_.store(true); }
  };
  // A helper counts as inside from before it looks whether there is work until it is through.
  struct Inside {
    explicit Inside(Team& team) : team(team) { team.inside_.fetch_add(1); }
    ~Inside() { team.inside_.fetch_sub(1); }
    Team& team;
  };

  void work() {
    for (;;) {
      const int64_t begin = next_.fetch_add(chunk_);
      if (begin >= count_) return;
      call_(context_, begin, std::min(begin + chunk_, count_));
    }
  }

  void help() {
    for (int turns = 0; !dismissed_.load(); ++turns) {
      if (open_.load(std::memory_order_relaxed)) {
        const Inside inside(*this);
        if (open_.load()) {
          work();
          turns = 0;
        }
      }
      wait(turns);
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  // Steps follow each other in microseconds; a core that others want is left to them for longer.
  static void wait(int turns) {
    if (turns < 1 << 10) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }

  int64_t threads_ = 1;
  void (*call_)(const void*, int64_t, int64_t) = nullptr;
  const void* context_ = nullptr;
  int64_t count_ = 0, chunk_ = 1;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<bool> open_{false};
  std::atomic<bool> dismissed_{false};
  alignas(64) std::atomic<int> inside_{0};
};

}  // namespace effnet
