// Threads that go through the phases of a decoder's step together (ops/decoder_step.h).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "core/scratch.h"

namespace rlir {

// Tasks of a thread, next to each other. It takes them from the front, others, when they are done
// with theirs, from the back: so what follows a task in memory is what the thread asks for next.
class Share {
 public:
  void set(int64_t begin, int64_t end) { ends_ = pack(begin, end); }
  bool empty() const {
    const uint64_t now = ends_;
    return now >> 32 >= (now & 0xffffffff);
  }
  // A task, or -1.
  int64_t front() {
    return take([](uint64_t begin, uint64_t end) { return pack(begin + 1, end); },
                [](uint64_t begin, uint64_t) { return begin; });
  }
  int64_t back() {
    return take([](uint64_t begin, uint64_t end) { return pack(begin, end - 1); },
                [](uint64_t, uint64_t end) { return end - 1; });
  }

 private:
  static uint64_t pack(uint64_t begin, uint64_t end) { return begin << 32 | end; }
  template <typename Left, typename Taken>
  int64_t take(const Left& left, const Taken& taken) {
    uint64_t now = ends_;
    for (;;) {
      const uint64_t begin = now >> 32, end = now & 0xffffffff;
      if (begin >= end) return -1;
      if (ends_.compare_exchange_weak(now, left(begin, end))) {
        return static_cast<int64_t>(taken(begin, end));
      }
    }
  }

  alignas(64) std::atomic<uint64_t> ends_{0};
};

// Threads that share the tasks of a phase, or one.
class Team {
 public:
  Team(bool parallel, int64_t scratch_bytes)
      : threads_(parallel ? static_cast<int64_t>(torch::stable::get_num_threads()) : 1),
        bytes_((scratch_bytes + 63) / 64 * 64),
        scratch_(threads_ * bytes_),
        shares_(threads_) {}

  int64_t threads() const { return threads_; }

  // The first of a thread's share of `tasks`.
  int64_t first(int64_t tasks, int64_t thread) const { return tasks * thread / threads_; }

  // Calls run(begin, end, last of, scratch) until all tasks are done, each thread on a share of its
  // own; `last of` is the thread if these are the last of its share, otherwise -1.
  template <typename Run>
  void split(int64_t tasks, const Run& run) const {
    if (tasks <= 0) return;
    if (threads_ == 1) return run(int64_t{0}, tasks, int64_t{0}, scratch_.get<char>());
    for (int64_t t = 0; t < threads_; ++t) shares_[t].set(first(tasks, t), first(tasks, t + 1));
    torch::stable::parallel_for(0, threads_, 1, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        char* scratch = scratch_.get<char>() + t * bytes_;
        for (int64_t i; (i = shares_[t].front()) >= 0;) {
          run(i, i + 1, shares_[t].empty() ? t : -1, scratch);
        }
        for (int64_t other = 1; other < threads_; ++other) {
          Share& share = shares_[(t + other) % threads_];
          for (int64_t i; (i = share.back()) >= 0;) run(i, i + 1, int64_t{-1}, scratch);
        }
      }
    });
  }

  // The same, but tasks go to whoever is free, about `shares` times a thread.
  template <typename Run>
  void each(int64_t tasks, int64_t shares, const Run& run) const {
    if (tasks <= 0) return;
    if (threads_ == 1 || tasks == 1) return run(int64_t{0}, tasks, scratch_.get<char>());
    const int64_t share = std::max<int64_t>(1, tasks / (threads_ * shares));
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads_, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        for (int64_t i; (i = next.fetch_add(share)) < tasks;) {
          run(i, std::min(i + share, tasks), scratch_.get<char>() + t * bytes_);
        }
      }
    });
  }

 private:
  int64_t threads_, bytes_;
  Scratch scratch_;
  mutable std::vector<Share> shares_;  // of the phase that runs
};

}  // namespace rlir
