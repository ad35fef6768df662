// The threads that a call's steps are divided among.
//
// A parallel region of OpenMP ends with a barrier, at which all threads wait for one that the
// system has put aside, even where it has nothing left to do, and a network has a hundred steps. A
// team divides a step as it is done: a thread takes the next piece of its own part, then of
// another's who is late, and the step ends when its pieces have. The calling thread alone would do,
// its helpers come when they can. A thread's part is the same in every step: what it wrote in one
// is in its cache in the next, if both count what they do in the same order.
//
// After a region OpenMP's threads look for the next one, on the processors that the helpers want:
// a call is divided among the one kind or the other, and not among both.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "memory.h"

namespace effnet {

class Team {
 public:
  // The calling thread and the helpers, which no other team has then: as many as PyTorch is set to
  // use, none where another thread's team has them.
  static Team of_pytorch_threads();
  // One thread.
  static Team alone() { return Team(1); }
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int64_t threads() const { return threads_; }

  // body(begin, end) on pieces of [0, count), each of `chunk` but for the last. Not from a body.
  template <class Body>
  void divide(int64_t count, int64_t chunk, const Body& body) {
    if (threads_ > 1 && count > chunk) {
      run({[](const void* context, int64_t begin, int64_t end) {
             (*static_cast<const Body*>(context))(begin, end);
           },
           &body, count, chunk});
    } else if (count > 0) {
      body(int64_t{0}, count);
    }
  }

  // The same, in pieces of `least` or more, small enough to even out what threads differ in.
  template <class Body>
  void share(int64_t count, int64_t least, const Body& body) {
    divide(count, std::max<int64_t>(least, count / (4 * threads_)), body);
  }

  struct Step {
    void (*call)(const void* context, int64_t begin, int64_t end);
    const void* context;
    int64_t count, chunk;
  };

 private:
  explicit Team(int64_t threads) : threads_(threads) {}
  static void run(const Step&);

  const int64_t threads_;
};

}  // namespace effnet
