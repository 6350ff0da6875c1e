// The vocabulary, a model's sizes, and the state of a batch: the fields of `NativeState` in decoder.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace music_ar {

constexpr int PITCHES = 128, NOTE_OFF = 128, TIME_SHIFT = 256, MAX_SHIFT_STEPS = 100, VELOCITY = 356;
constexpr int VELOCITY_BINS = 32, PAD = 388, START = 389, END = 390, VOCABULARY_SIZE = 391;
constexpr int SEPARATOR = 391, MIDDLE = 392, END_OF_GAP = 393;  // of models that fill gaps
constexpr int DEFAULT_VELOCITY_BIN = 16;
constexpr int VELOCITY_SLOTS = 64;  // other * 64 + velocity bin
constexpr int LEVELS = 5;           // of n-gram retrieval

inline bool is_note_on(int token) { return token >= 0 && token < NOTE_OFF; }
inline bool is_note_off(int token) { return token >= NOTE_OFF && token < TIME_SHIFT; }
inline bool is_shift(int token) { return token >= TIME_SHIFT && token < VELOCITY; }
inline bool is_velocity(int token) { return token >= VELOCITY && token < PAD; }

// As `ModelConfig`; mirrored in library.py.
struct Config {
  int32_t context, width, layers, heads, kv_heads, head_size, hidden, conv_width, onsets, retrieval_notes, time_heads;
  int32_t rotary_size, wish_rows, vocabulary_size, exit_count;
  const float* rotary_rates;  // rotary_size / 2 numbers
  const int32_t* exits;       // numbers of self blocks after which the model predicts too, without the last
};

// Arrays with a row for each piece; mirrored in library.py.
struct State {
  int32_t rows, notes_kept, self_slots, cross_slots, layers;
  int32_t *age_B, *latents_B, *recent_BxL, *held_Bx128, *time_B, *velocity_B, *keys_Bx128;
  int32_t *note_count_B, *note_first_B, *note_BxC, *note_time_BxC;
  uint32_t* match_keys_BxWxC;
  int32_t *match_level_B, *match_number_B;
  int32_t *gap_begin_B, *gap_length_B, *gap_end_B;
  uint8_t* gap_over_B;
  int32_t *history_pitches_Bx128, *history_velocities_Bx32;
  char *cross_k, *cross_v, *self_k, *self_v;
  int32_t *prompt_end_B, *limit_B;
  uint32_t* key_Bx2;
  uint8_t* ended_B;
  float* tolerance_B;
  int32_t* layers_run_B;
  const float* wishes_BxD;
};

// One row of a `State`.
struct Piece {
  int conv_width, notes_kept, self_slots, cross_slots, layers;
  float tolerance;
  int32_t &age, &latents, &time, &velocity, &note_count, &note_first, &match_level, &match_number;
  int32_t &gap_begin, &gap_length, &gap_end, &prompt_end, &limit, &layers_run;
  uint8_t &gap_over, &ended;
  int32_t *recent_L, *held_128, *keys_128, *note_C, *note_time_C, *pitches_128, *velocities_32;
  uint32_t *match_keys_WxC, *key_2;
  char *cross_k, *cross_v, *self_k, *self_v;
  const float* wishes_D;  // added to the embedding of each token; null for a model that takes no wishes

  Piece(const State& s, const Config& config, int row, size_t cached_bytes, int value_stride)
      : conv_width(config.conv_width), notes_kept(s.notes_kept), self_slots(s.self_slots), cross_slots(s.cross_slots),
        layers(s.layers), tolerance(s.tolerance_B[row]), age(s.age_B[row]), latents(s.latents_B[row]),
        time(s.time_B[row]), velocity(s.velocity_B[row]), note_count(s.note_count_B[row]),
        note_first(s.note_first_B[row]), match_level(s.match_level_B[row]), match_number(s.match_number_B[row]),
        gap_begin(s.gap_begin_B[row]), gap_length(s.gap_length_B[row]), gap_end(s.gap_end_B[row]),
        prompt_end(s.prompt_end_B[row]), limit(s.limit_B[row]), layers_run(s.layers_run_B[row]),
        gap_over(s.gap_over_B[row]), ended(s.ended_B[row]),
        recent_L(s.recent_BxL + size_t(row) * conv_width), held_128(s.held_Bx128 + row * PITCHES),
        keys_128(s.keys_Bx128 + row * PITCHES), note_C(s.note_BxC + size_t(row) * notes_kept),
        note_time_C(s.note_time_BxC + size_t(row) * notes_kept), pitches_128(s.history_pitches_Bx128 + row * PITCHES),
        velocities_32(s.history_velocities_Bx32 + row * VELOCITY_BINS),
        match_keys_WxC(config.retrieval_notes ? s.match_keys_BxWxC + size_t(row) * LEVELS * notes_kept : nullptr),
        key_2(s.key_Bx2 + 2 * row),
        wishes_D(config.wish_rows ? s.wishes_BxD + size_t(row) * config.width : nullptr) {
    const size_t G = config.kv_heads, K = config.head_size;
    cross_k = s.cross_k + row * G * cross_slots * K * cached_bytes;
    cross_v = s.cross_v + row * G * cross_slots * value_stride * cached_bytes;
    self_k = s.self_k + row * layers * G * self_slots * K * cached_bytes;
    self_v = s.self_v + row * layers * G * self_slots * value_stride * cached_bytes;
  }

  int pending() const { return recent_L[conv_width - 1]; }
  bool done() const { return ended || time - prompt_end >= limit; }
};

}  // namespace music_ar
