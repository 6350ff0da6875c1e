// The recurrences over tokens, and what the model reads of them: see music_ar/features/ and tokens/grammar.py.
#pragma once

#include <vector>

#include "state.h"

namespace music_ar {

// What the model reads at one position.
struct Conditioning {
  int age, time;
  int place;  // time for rotary positions: `Place.time`
  std::vector<int32_t> recent_L;        // the last tokens, its own last
  int32_t keys_128[PITCHES];            // see `Keyboard.keys`
  std::vector<int32_t> onset_rows;      // of the keyboard's matrix, one for each known class
  std::vector<int32_t> retrieved_rows;  // of the retrieval matrix
  int gap_row;                          // of the gap's matrix, -1 outside of a gap's middle

  Conditioning(const Config& config, const Piece& piece);
};

constexpr int KEYBOARD_CHANNELS = 8;  // of each key

// The numeric features of a key, `keyboard.channels`: all zero if it was not touched.
void key_channels(int32_t key, int time, float channels[KEYBOARD_CHANNELS]);

// The state after one more token, which is then the pending one.
void advance(Piece& piece, int token);

}  // namespace music_ar
