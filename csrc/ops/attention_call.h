// What the CPU dispatch of the attention ops shares: tensors as a kernel's queries and keys, and
// tasks of unequal size.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>
#include <vector>

#include "core/cpu_isa.h"
#include "core/scratch.h"
#include "cpu/video_attention.h"

namespace rlir {

inline float log2_scale(double scale) { return static_cast<float>(scale * 0x1.71547652b82fep+0); }

// A tensor [B, T, H, D] as a kernel wants it. To ask a tensor for these takes long beside a task of
// a decoding step, so calls of many tasks ask once.
struct HeadRows {
  HeadRows(const torch::stable::Tensor& x)  // NOLINT: a tensor is one wherever rows are wanted
      : data(static_cast<char*>(x.mutable_data_ptr())),
        bytes(x.scalar_type() == torch::headeronly::ScalarType::BFloat16 ? 2 : 4),
        stride{x.stride(0), x.stride(1), x.stride(2)} {}

  // Element [b, token, head, 0].
  void* at(int64_t b, int64_t token, int64_t head) const {
    return data + (b * stride[0] + token * stride[1] + head * stride[2]) * bytes;
  }

  char* data;
  int64_t bytes, stride[3];
};

inline void* at(const torch::stable::Tensor& x, int64_t b, int64_t token, int64_t head) {
  return HeadRows(x).at(b, token, head);
}

// Rows first .. first + members - 1 of q, and of each `tokens` tokens and `heads` heads from `head`
// on.
inline cpu::Queries queries_of(const HeadRows& q, int64_t first, int64_t head, int64_t members,
                               int64_t tokens, int64_t heads) {
  return {q.at(first, 0, head),
          members,
          tokens,
          heads,
          {q.stride[0], q.stride[1], q.stride[2]},
          nullptr};
}

inline cpu::KeySource one_segment(const HeadRows& k, const HeadRows& v, int64_t b, int64_t head,
                                  int64_t count) {
  cpu::KeySource s{};
  s.k[0] = k.at(b, 0, head);
  s.v[0] = v.at(b, 0, head);
  s.k_stride[0] = k.stride[1];
  s.v_stride[0] = v.stride[1];
  s.count[0] = count;
  return s;
}

// The slots of `first`, then those of `second`.
inline cpu::KeySource two_segments(const cpu::KeySource& first, const cpu::KeySource& second) {
  cpu::KeySource s = first;
  s.k[1] = second.k[0];
  s.v[1] = second.v[0];
  s.k_stride[1] = second.k_stride[0];
  s.v_stride[1] = second.v_stride[0];
  s.count[1] = second.count[0];
  return s;
}

// Into how many shares the queries of a (row, key head) are cut for the sums of dk and dv: some
// eight tasks in all, whatever the threads.
inline int64_t shares_for(int64_t units) {
  return units < 1 || units >= 8 ? 1 : (7 + units) / units;
}

// How many of the panels of each of `units` go over their keys together: more share more work, as
// long as each thread has tasks to choose from.
inline int64_t panels_together(int64_t panels, int64_t units, int64_t threads) {
  int64_t together = cpu::kPanelsTogether;
  while (together > 1 && units * ((panels + together - 1) / together) < 2 * threads) together /= 2;
  return together;
}

inline int64_t all_threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// Calls run(task, scratch) for each task, on all threads, one task after the other as they come
// free. Which thread takes which changes nothing: tasks write to places of their own.
template <typename Run>
void for_tasks(int64_t tasks, int64_t scratch_bytes, const Run& run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    const Scratch scratch(scratch_bytes);
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) run(task, scratch.get());
  });
}

inline int64_t blocks_of(int64_t slots) { return (slots + cpu::kKeyBlock - 1) / cpu::kKeyBlock; }

// The blocks from the first to the last one that any of the queries sees: [first, second).
inline std::pair<int64_t, int64_t> blocks_seen(const Reach* reach, int64_t queries) {
  int64_t low = INT64_MAX, high = 0;
  for (int64_t i = 0; i < queries; ++i) {
    if (reach[i].low >= reach[i].high) continue;
    low = std::min(low, reach[i].low / cpu::kKeyBlock);
    high = std::max(high, blocks_of(reach[i].high));
  }
  return {std::min(low, high), high};
}

// Keys and values of units (a row's or a group's key head), packed where `panels` of queries, that
// read each of a unit's `blocks`, are enough; some units after others, so that what is packed stays
// small beside what is asked for.
class Packing {
 public:
  Packing(int64_t units, int64_t panels, int64_t blocks, const cpu::AttentionSizes& sizes)
      : units_(units),
        panels_(panels),
        blocks_(blocks),
        block_(sizes.packed),
        packs_(panels >= kPanelsThatPack && blocks > 0) {}

  // Of a unit.
  int64_t bytes() const { return blocks_ * block_; }
  int64_t together(int64_t units) const {
    return packs_ ? 2 : panels_together(panels_, units, all_threads());
  }

  // Calls run(first, units, packed) for all units; packed is null, or room for those units.
  template <typename Run>
  void each(const Run& run) const {
    if (!packs_) return run(int64_t{0}, units_, static_cast<char*>(nullptr));
    const int64_t some = std::min(units_, std::max(all_threads(), kPackedBytes / bytes()));
    const Scratch packed(some * bytes());
    for (int64_t first = 0; first < units_; first += some) {
      run(first, std::min(some, units_ - first), packed.get<char>());
    }
  }

  // Packs units from `first` on; source(unit, index) is the call that has block number `index` of
  // the unit, and which block of its keys that is: below 0 if no query sees it.
  template <typename Source>
  void pack(int64_t first, int64_t units, char* packed, const Source& source) const {
    if (packed == nullptr) return;
    const auto kernel = RLIR_CPU_KERNEL_AMX(pack_keys);
    for_tasks(units * blocks_, 0, [&](int64_t task, void*) {
      const auto [a, block] = source(first + task / blocks_, task % blocks_);
      if (block < 0 || block * cpu::kKeyBlock >= a.keys.count[0] + a.keys.count[1]) return;
      kernel(a, block, block + 1, packed + task * block_);
    });
  }

 private:
  static constexpr int64_t kPanelsThatPack = 8, kPackedBytes = int64_t{32} << 20;
  int64_t units_, panels_, blocks_, block_;
  bool packs_;
};

}  // namespace rlir
