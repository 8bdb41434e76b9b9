// Sampling on the CPU: candidates are kept in memory of a fixed size and sorted only as far as
// needed. Rows are split over threads.
#include "core/threads.h"
#include "ops/engine.h"
#include "ops/sample_host.h"

namespace krait::cpu {
namespace {

// Candidates of one row.
class Candidates {
 public:
  explicit Candidates(SamplingCandidate* memory) : begin_(memory), end_(memory) {}

  // The k most likely, in no particular order.
  void keep_top_k(int top_k, std::span<const float> logits) {
    const size_t k = top_k <= 0 ? logits.size() : static_cast<size_t>(top_k);
    const bool selects = k < logits.size();
    // At most 2 k candidates are kept; when there are that many, the best k stay and the worst of
    // them is the bar for what comes. Ids ascend, so of equal logits those that are there already
    // win.
    float bar = -std::numeric_limits<float>::infinity();
    const auto shrink = [&] {
      SamplingCandidate* const kth = begin_ + (k - 1);
      std::nth_element(begin_, kth, end_, more_likely);
      bar = kth->logit;
      end_ = begin_ + k;
    };
    for (size_t i = 0; i < logits.size(); ++i) {
      if (!(logits[i] > bar)) continue;  // -infinity never enters
      *end_++ = {logits[i], static_cast<int32_t>(i)};
      if (selects && size() == 2 * k) shrink();
    }
    if (selects && size() > k) shrink();
  }

  void keep_top_p(float top_p, float max_logit) {
    if (top_p >= 1) return;
    const auto weight = [&](const SamplingCandidate& c) {
      return sampling_weight(c.logit, max_logit, kLog2E64);
    };
    uint64_t total = 0;
    for (const SamplingCandidate* c = begin_; c < end_; ++c) total += weight(*c);
    const uint64_t wanted = sampling_share(top_p, total);
    // Sorted is only as much as it takes: first the 64 most likely, then four times as many, and so
    // on.
    uint64_t sum = 0;
    for (size_t sorted = 0; sorted < size();) {
      const size_t next = std::min(size(), std::max<size_t>(64, 4 * sorted));
      if (next < size()) std::nth_element(begin_ + sorted, begin_ + next, end_, more_likely);
      std::sort(begin_ + sorted, begin_ + next, more_likely);
      for (; sorted < next; ++sorted) {
        if ((sum += weight(begin_[sorted])) < wanted) continue;
        end_ = begin_ + sorted + 1;
        return;
      }
    }
  }

  void keep_min_p(double log_min_p, float max_logit) {
    const double least = double{max_logit} + log_min_p;
    end_ = std::remove_if(begin_, end_, [=](auto& c) { return double{c.logit} < least; });
  }

  std::span<const SamplingCandidate> by_id() {
    std::sort(begin_, end_, [](auto& a, auto& b) { return a.id < b.id; });
    return {begin_, end_};
  }

 private:
  size_t size() const { return static_cast<size_t>(end_ - begin_); }

  SamplingCandidate *begin_, *end_;
};

}  // namespace

void sample_tokens(Context& ctx, const TokenSampling& op) {
  const int64_t rows = op.tokens.shape[0], vocab = op.logits.shape[1];
  const int64_t capacity = op.recent.shape[1];
  const int64_t parts = std::min<int64_t>(ctx.threads(), rows);
  const Arena::Scope scope(ctx.workspace());
  auto* const candidates = ctx.workspace().array<SamplingCandidate>(parts * vocab);
  auto* const repeated = ctx.workspace().array<int32_t>(parts * capacity);
  parallel_for(ctx.threads(), parts, [=, &op](int64_t part) {
    for (int64_t row = part; row < rows; row += parts)
      sample_row(op, row, repeated + part * capacity,
                 [=](SampledSequence& s, std::span<const float> logits, float max_logit) {
                   Candidates kept(candidates + part * vocab);
                   kept.keep_top_k(s.top_k, logits);
                   kept.keep_top_p(s.top_p, max_logit);
                   kept.keep_min_p(s.log_min_p, max_logit);
                   return draw(s, kept.by_id(), max_logit);
                 });
  });
}

}  // namespace krait::cpu
