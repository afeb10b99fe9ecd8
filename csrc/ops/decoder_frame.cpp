// rlir::_decoder_frame: the next frame of rollouts, all steps of it, sampling included.
// Stream and slots: rlir/models/world_model.py; schedules: rlir/rollout/schedule.py.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>

#include "cpu/sample_tokens.h"
#include "ops/attention_mask.h"
#include "ops/decoder_step.h"

namespace rlir {
namespace {

constexpr int64_t kUnit = 8;    // rollouts that no two threads share: a tile of every build
constexpr int64_t kChunk = 16;  // rollouts that go through the layers together

// A row of `rollouts`.
struct Rollout {
  int64_t prompt, sequence;  // of the caches
  int64_t context;           // slots of the prompt
  int64_t slot, position;    // where this frame's action block begins
  int64_t pending;           // the frame before's last token, not fed yet; -1: none
};
constexpr int64_t kRolloutNumbers = 6;

// A token that is fed, as in rlir/rollout/schedule.py.
struct Feed {
  int64_t step, slot, place, stands_in, predicts;
};
constexpr int64_t kFeedNumbers = 5;

struct Frame {
  const Policy& policy;
  DecoderCaches caches;
  AttentionMask mask;
  bool raster;
  int64_t slots;  // of an image
  const Rollout* rollouts;
  int64_t feeds;
  const Feed* feed;
  const int64_t *blocks, *stand_ins, *row_ids;  // [n][A], [n][rows], [n]
  const float* stem;                            // [n][S][D], or null
  int64_t* codes;                               // [n][S], drawn here
  float *logprob, *entropy;                     // [n][S]
  uint8_t* support;                             // [n][S][bytes], or null
  int64_t support_bytes, grid_rows;
  cpu::SampleTokens sampling;
};

// Most rows of a step of a rollout.
int64_t rows_a_step(const Frame& f) {
  int64_t most = f.policy.action() + 1, step = -1, rows = 0;
  for (int64_t i = 0; i < f.feeds; ++i) {
    rows = f.feed[i].step == step ? rows + 1 : 1;
    step = f.feed[i].step;
    most = std::max(most, rows);
  }
  return most;
}

// Rollouts first .. first + n - 1 of a frame, step by step.
class FrameChunk {
 public:
  FrameChunk(const Frame& f, int64_t first, int64_t n, bool parallel)
      : f_(f),
        p_(f.policy),
        first_(first),
        n_(n),
        w_(p_, n * rows_a_step(f)),
        team_(parallel, std::max(Workspace::task_bytes(p_, n * rows_a_step(f)),
                                 RLIR_CPU_KERNEL(sample_tokens_scratch)(p_.decoder.codes))) {
    int64_t most = n;
    for (int64_t i = 0, rows = 0, step = -1; i < f.feeds; ++i) {
      rows = f.feed[i].step == step ? rows + 1 : 1;
      step = f.feed[i].step;
      most = std::max(most, rows * n);
    }
    logits_.emplace(most * p_.decoder.codes * 4);
  }

  // Returns a rollout without a distribution, or -1.
  int64_t run() {
    for (int64_t i = 0; i < n_; ++i) begin_frame(f_.rollouts[first_ + i]);
    begin_step();
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t r = first_ + i, a = p_.action();
      const Rollout& rollout = f_.rollouts[r];
      begin_member(r);
      if (rollout.pending >= 0) {
        row(r, rollout.slot - 1, rollout.position - 1, p_.block - 1, rollout.pending, -1);
      }
      for (int64_t j = 0; j < a; ++j) {
        row(r, rollout.slot + j, rollout.position + j, j, p_.decoder.codes + f_.blocks[r * a + j],
            j + 1 == a ? 0 : -1);
      }
    }
    int64_t bad = finish_step();
    for (int64_t begin = 0, end; begin < f_.feeds && bad < 0; begin = end) {
      for (end = begin; end < f_.feeds && f_.feed[end].step == f_.feed[begin].step;) ++end;
      begin_step();
      for (int64_t i = 0; i < n_; ++i) {
        const int64_t r = first_ + i, a = p_.action();
        const Rollout& rollout = f_.rollouts[r];
        begin_member(r);
        for (int64_t j = begin; j < end; ++j) {
          const Feed& feed = f_.feed[j];
          const int64_t token = feed.stands_in
                                    ? f_.stand_ins[r * f_.grid_rows + feed.place / columns()]
                                    : f_.codes[r * p_.image + feed.place];
          row(r, rollout.slot + a + feed.slot, rollout.position + a + feed.place, a + feed.place,
              token, feed.predicts);
        }
      }
      bad = finish_step();
    }
    return bad;
  }

 private:
  // A row whose hidden state predicts a place of a rollout's image.
  struct Draw {
    int64_t row, rollout, place;
  };

  int64_t columns() const { return p_.image / f_.grid_rows; }
  int64_t base(const Rollout& r) const { return r.context / cpu::kKeyBlock * cpu::kKeyBlock; }

  void begin_frame(const Rollout& r) {
    const int64_t capacity = f_.caches.own.capacity;
    if (r.pending < 0 && r.context % 2 == 1) {
      RLIR_CPU_KERNEL_AMX(decoder_place)
      (p_.decoder, f_.caches.prompts, r.prompt, r.context - 1, f_.caches.own, r.sequence,
       (r.context - 1 - base(r)) % capacity);
    }
    // A slot that is fed after one of its pair, or never, is read with it.
    const int64_t from = r.pending >= 0 ? r.slot - 1 : r.slot;
    RLIR_CPU_KERNEL_AMX(decoder_clear)
    (p_.decoder, f_.caches.own, r.sequence, (from - base(r)) % capacity,
     r.slot + p_.action() + f_.slots - from);
  }

  void begin_step() {
    step_.clear();
    draws_.clear();
  }

  void begin_member(int64_t r) {
    const Rollout& rollout = f_.rollouts[r];
    const int64_t start = base(rollout);
    step_.members.push_back({step_.count(), 0, rollout.prompt, rollout.sequence, start,
                             (rollout.context - start) / 2 * 2, nullptr, nullptr, 0,
                             rollout.sequence});
  }

  void row(int64_t r, int64_t slot, int64_t position, int64_t embed, int64_t token,
           int64_t predicts) {
    const Rollout& rollout = f_.rollouts[r];
    const int64_t at = step_.count();
    const float* stem = predicts < 0 || f_.stem == nullptr
                            ? nullptr
                            : f_.stem + (r * p_.image + predicts) * p_.decoder.hidden;
    p_.embed(token, embed, stem, w_.x() + at * w_.sizes.x);
    Reach reach = reach_of(f_.mask, slot, INT64_MAX);
    if (f_.raster) reach.own = kNoOwn;  // all before it was fed before
    step_.rows.push_back(
        {position, rollout.sequence, (slot - base(rollout)) % f_.caches.own.capacity});
    step_.reach.push_back(reach);
    ++step_.members.back().count;
    if (predicts >= 0) draws_.push_back({at, r, predicts});
  }

  int64_t finish_step() {
    step_.finish(f_.mask);
    for (size_t i = 0; i < step_.members.size(); ++i) {
      cpu::DecoderMember& member = step_.members[i];
      if (i + 1 < step_.members.size()) member.next = step_.members[i + 1].sequence;
      GroupRun* run = step_.runs.empty() ? nullptr : &step_.runs.back();
      if (run != nullptr && run->prompt == member.prompt && run->tokens == member.count) {
        ++run->members;
      } else {
        step_.runs.push_back({member.prompt, member.base / cpu::kKeyBlock, static_cast<int64_t>(i),
                              1, member.count});
      }
    }
    run_step(p_, f_.caches, f_.mask, step_, w_, team_);
    return draws_.empty() ? -1 : draw();
  }

  int64_t draw() {
    const cpu::Decoder& m = p_.decoder;
    const int64_t count = static_cast<int64_t>(draws_.size());
    for (int64_t i = 0; i < count; ++i) {  // rows ascend: none is overwritten before it is read
      std::copy_n(w_.x() + draws_[i].row * w_.sizes.x, w_.sizes.x, w_.x() + i * w_.sizes.x);
    }
    RLIR_CPU_KERNEL_AMX(decoder_norm)(m, m.last, w_.x(), 0, count, w_.h());
    float* logits = logits_->get<float>();
    split_product(p_, cpu::DecoderProduct::kHead, team_, cpu::DecoderProduct::kQkv, 0,
                  [&](int64_t begin, int64_t end, const void* next, char* scratch) {
                    RLIR_CPU_KERNEL_AMX(decoder_multiply)
                    (m, cpu::DecoderProduct::kHead, 0, w_.h(), count, begin, end, next, logits,
                     scratch);
                  });
    std::atomic<int64_t> bad{-1};
    team_.each(count, 2, [&](int64_t begin, int64_t end, char* scratch) {
      for (int64_t i = begin; i < end; ++i) {
        const Draw& d = draws_[i];
        const int64_t at = d.rollout * p_.image + d.place;
        cpu::SampleTokens sampling = f_.sampling;
        sampling.logits = logits + i * m.codes;
        sampling.row_ids = f_.row_ids + d.rollout;
        sampling.offset =
            static_cast<uint32_t>(f_.rollouts[d.rollout].position + p_.action() + d.place);
        sampling.token = f_.codes + at;
        sampling.logprob = f_.logprob + at;
        sampling.entropy = f_.entropy + at;
        if (f_.support != nullptr) sampling.support = f_.support + at * f_.support_bytes;
        if (RLIR_CPU_KERNEL(sample_tokens)(sampling, 0, 1, scratch) >= 0) bad = d.rollout;
      }
    });
    return bad;
  }

  const Frame& f_;
  const Policy& p_;
  int64_t first_, n_;
  Workspace w_;
  Team team_;
  std::optional<Scratch> logits_;
  StepRows step_;
  std::vector<Draw> draws_;
};

void check_rollouts(const Frame& f, int64_t n) {
  const Policy& p = f.policy;
  const int64_t span = p.action() + f.slots;
  for (int64_t i = 0; i < n; ++i) {
    const Rollout& r = f.rollouts[i];
    RLIR_CHECK(r.prompt >= 0 && r.prompt < f.caches.prompts.sequences && r.sequence >= 0 &&
                   r.sequence < f.caches.own.sequences && r.pending < p.decoder.codes,
               "decoder: rollout ", i, " must have caches and a code, got ", r.prompt, ", ",
               r.sequence, " and ", r.pending);
    RLIR_CHECK(r.context > 0 && r.context <= f.caches.prompts.capacity && r.slot >= r.context &&
                   r.position > 0 && r.position + p.block <= p.decoder.positions,
               "decoder: rollout ", i, " must go on after its prompt within the rotary table, got ",
               r.context, ", ", r.slot, " and ", r.position);
    const int64_t base = r.context / cpu::kKeyBlock * cpu::kKeyBlock;
    const Reach last = reach_of(f.mask, r.slot - 1, INT64_MAX);
    RLIR_CHECK(r.slot + span - std::max(base, last.low) <= f.caches.own.capacity,
               "decoder: a rollout's cache must hold what it sees, ",
               r.slot + span - std::max(base, last.low), " slots, got ", f.caches.own.capacity);
  }
}

void decoder_frame_cpu(const std::vector<Tensor>& weights, const std::vector<int64_t>& sizes,
                       double eps, const Tensor& prompt_k, const Tensor& prompt_v,
                       const Tensor& tail_k, const Tensor& tail_v, const Tensor& k, const Tensor& v,
                       const Tensor& rollouts, const Tensor& feeds, int64_t grid_rows,
                       int64_t image_slots, std::vector<int64_t> mask_numbers, const Tensor& blocks,
                       const Tensor& stand_ins, const std::optional<Tensor>& stem,
                       const Tensor& row_ids, const Tensor& codes, const Tensor& logprob,
                       const Tensor& entropy, const std::optional<Tensor>& support, int64_t seed,
                       double temperature, std::optional<int64_t> top_k,
                       std::optional<double> top_p, std::optional<double> min_p, bool parallel) {
  const Policy p = policy_of(weights, sizes, eps);
  const int64_t n = rollouts.dim() == 2 ? rollouts.size(0) : 0, s = p.image, a = p.action();
  RLIR_CHECK(temperature >= 0 && std::isfinite(static_cast<float>(temperature)),
             "decoder: temperature must be finite and >= 0, got ", temperature);
  if (n == 0) return;
  Frame f{.policy = p,
          .caches = {rows_of(p, prompt_k, prompt_v), cache_of("the tails", p, tail_k, tail_v),
                     cache_of("the rollouts' cache", p, k, v)},
          .mask = attention_mask("decoder", "diagonal", mask_numbers),
          .raster = false,
          .slots = image_slots,
          .rollouts =
              reinterpret_cast<const Rollout*>(integers("rollouts", rollouts, n * kRolloutNumbers)),
          .feeds = feeds.numel() / kFeedNumbers,
          .feed = nullptr,
          .blocks = integers("blocks", blocks, n * a),
          .stand_ins = integers("stand-ins", stand_ins, n * grid_rows),
          .row_ids = integers("row_ids", row_ids, n),
          .stem = stem.has_value() ? floats("stem", *stem, n * s * p.decoder.hidden) : nullptr,
          .codes = nullptr,
          .logprob = nullptr,
          .entropy = nullptr,
          .support = nullptr,
          .support_bytes = (p.decoder.codes + 7) / 8,
          .grid_rows = grid_rows,
          .sampling = {}};
  f.feed = reinterpret_cast<const Feed*>(integers("feeds", feeds, f.feeds * kFeedNumbers));
  RLIR_CHECK(grid_rows > 0 && s % grid_rows == 0 && f.mask.image == image_slots,
             "decoder: the schedule must be of this grid, got ", grid_rows, " rows and ",
             image_slots, " slots");
  f.raster = f.mask.ahead == f.mask.columns;
  for (int64_t i = 0; i < f.feeds; ++i) {
    const Feed& feed = f.feed[i];
    RLIR_CHECK(feed.slot >= 0 && feed.slot < image_slots && feed.place >= 0 && feed.place < s &&
                   feed.predicts < s,
               "decoder: feed ", i, " must be within the image, got slot ", feed.slot);
  }
  integers("codes", codes, n * s);
  floats("logprob", logprob, n * s);
  floats("entropy", entropy, n * s);
  f.codes = codes.mutable_data_ptr<int64_t>();
  f.logprob = logprob.mutable_data_ptr<float>();
  f.entropy = entropy.mutable_data_ptr<float>();
  if (support.has_value()) {
    RLIR_CHECK(support->is_cpu() && support->is_contiguous() &&
                   support->scalar_type() == ScalarType::Byte &&
                   support->numel() == n * s * f.support_bytes,
               "decoder: support must be uint8 [n, S, ceil(codes / 8)], got ", support->numel());
    f.support = support->mutable_data_ptr<uint8_t>();
  }
  check_below("blocks", f.blocks, n * a, p.vocabulary - p.decoder.codes);
  check_below("stand-ins", f.stand_ins, n * grid_rows, p.decoder.codes);
  check_rollouts(f, n);
  cpu::SampleTokens& sampling = f.sampling;
  sampling.dtype = Dtype::kFloat32;
  sampling.row_stride = sampling.tokens = sampling.high = p.decoder.codes;
  sampling.token_stride = sampling.row_id_stride = 1;
  sampling.temperature = temperature > 0 ? static_cast<float>(temperature) : 1.0f;
  sampling.greedy = temperature == 0;
  sampling.top_k = top_k.value_or(0);
  sampling.top_p = top_p.value_or(1.0);
  sampling.min_p = min_p.value_or(0.0);
  sampling.key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};

  std::atomic<int64_t> bad{n};
  const auto chunk = [&](int64_t first, int64_t count, bool on_all_threads) {
    const int64_t row = FrameChunk(f, first, count, on_all_threads).run();
    for (int64_t now = bad; row >= 0 && row < now && !bad.compare_exchange_weak(now, row);) {
    }
  };
  if (parallel) {
    chunk(0, n, true);
  } else {
    torch::stable::parallel_for(0, (n + kUnit - 1) / kUnit, 1, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(end * kUnit, n);
      for (int64_t first = begin * kUnit; first < last; first += kChunk) {
        chunk(first, std::min(kChunk, last - first), false);
      }
    });
  }
  RLIR_CHECK(bad == n, "rollout: logits must be finite, got otherwise in rollout ", bad.load());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def(
      "_decoder_frame(Tensor[] weights, int[] sizes, float eps, Tensor prompt_k, Tensor prompt_v, "
      "Tensor tail_k, Tensor tail_v, Tensor(a!) k, Tensor(b!) v, Tensor rollouts, Tensor feeds, "
      "int grid_rows, int image_slots, int[] mask_numbers, Tensor blocks, Tensor stand_ins, "
      "Tensor? stem, Tensor row_ids, Tensor(c!) codes, Tensor(d!) logprob, Tensor(e!) entropy, "
      "Tensor(f!)? support, int seed, float temperature, int? top_k, float? top_p, float? min_p, "
      "bool parallel) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) { m.impl("_decoder_frame", TORCH_BOX(&decoder_frame_cpu)); }

}  // namespace rlir
