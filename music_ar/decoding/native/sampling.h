// From logits to a token: the logit processors of music_ar/decoding/processors.py, and the draw.
#pragma once

#include "state.h"

namespace music_ar {

// `SamplingOptions`, with an entry for each row; mirrored in library.py.
struct Options {
  const float* temperature;
  const int32_t* top_k;
  const float *top_p, *min_p, *steadiness;
  const int32_t *lowest_pitch, *highest_pitch;
};

// Apply the chain of processors in place; -inf for tokens that must not be drawn. V is the size of the vocabulary.
void process(float* logits_V, int V, const Piece& piece, const Options& options, int row);

// The token that jax.random.categorical draws with the key fold_in(key, position).
int draw(const float* logits_V, int V, const uint32_t key[2], int position);

}  // namespace music_ar
