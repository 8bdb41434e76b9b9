#include <vector>

#include "ops/engine.h"
#include "ops/sample_host.h"

namespace krait::reference {
namespace {

int32_t choose(SampledSequence& s, std::span<const float> logits, float max_logit) {
  std::vector<SamplingCandidate> kept;  // most likely first
  for (size_t i = 0; i < logits.size(); ++i)
    if (logits[i] > -std::numeric_limits<float>::infinity())
      kept.push_back({logits[i], static_cast<int32_t>(i)});
  std::sort(kept.begin(), kept.end(), more_likely);
  // top-k
  if (s.top_k > 0) kept.resize(std::min(kept.size(), static_cast<size_t>(s.top_k)));
  // top-p
  if (s.top_p < 1) {
    const auto weight = [&](const SamplingCandidate& c) {
      return sampling_weight(c.logit, max_logit, kLog2E64);
    };
    uint64_t total = 0;
    for (const SamplingCandidate& c : kept) total += weight(c);
    const uint64_t wanted = sampling_share(s.top_p, total);
    size_t count = 1;
    for (uint64_t sum = weight(kept[0]); sum < wanted; ++count) sum += weight(kept[count]);
    kept.resize(count);
  }
  // min-p
  std::erase_if(kept, [&](const SamplingCandidate& c) {
    return double{c.logit} < double{max_logit} + s.log_min_p;
  });
  // temperature
  std::sort(kept.begin(), kept.end(), [](auto& a, auto& b) { return a.id < b.id; });
  return draw(s, kept, max_logit);
}

}  // namespace

void sample_tokens(Context&, const TokenSampling& op) {
  std::vector<int32_t> repeated(static_cast<size_t>(op.recent.shape[1]));
  for (int64_t row = 0; row < op.tokens.shape[0]; ++row)
    sample_row(op, row, repeated.data(), choose);
}

}  // namespace krait::reference
