// The table of an engine whose implementations all live in namespace `ns`: for the files that
// define an engine, nobody else.
#pragma once

#include "ops/engine.h"

// The rest: memory, synchronize and so on.
#define KRAIT_ENGINE_TABLE(ns, ...)                                                               \
  {                                                                                               \
    .name = #ns, __VA_ARGS__, .embedding_fwd = ns::embedding_fwd,                                 \
    .embedding_bwd = ns::embedding_bwd, .rms_norm_fwd = ns::rms_norm_fwd,                         \
    .rms_norm_bwd = ns::rms_norm_bwd, .linear_fwd = ns::linear_fwd, .linear_bwd = ns::linear_bwd, \
    .causal_conv1d_fwd = ns::causal_conv1d_fwd, .causal_conv1d_bwd = ns::causal_conv1d_bwd,       \
    .causal_conv1d_step = ns::causal_conv1d_step, .selective_scan_fwd = ns::selective_scan_fwd,   \
    .selective_scan_bwd = ns::selective_scan_bwd, .selective_scan_step = ns::selective_scan_step, \
    .cross_entropy_fwd = ns::cross_entropy_fwd, .cross_entropy_bwd = ns::cross_entropy_bwd,       \
    .adamw = ns::adamw, .global_norm = ns::global_norm, .fill_zero = ns::fill_zero,               \
    .copy_elements = ns::copy_elements, .round_elements = ns::round_elements,                     \
    .negative_exp = ns::negative_exp, .add_product = ns::add_product,                             \
    .sum_elements = ns::sum_elements, .clip_offsets = ns::clip_offsets,                           \
    .sample_tokens = ns::sample_tokens,                                                           \
  }
