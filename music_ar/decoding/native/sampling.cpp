#include "sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

namespace music_ar {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

template <class Condition>
static void rule_out(float* logits, int begin, int end, const Condition& condition) {
  for (int token = begin; token < end; ++token)
    if (condition(token)) logits[token] = NEVER;
}

static float log_sum_exp(const float* x, int size) {
  const float most = *std::max_element(x, x + size);
  if (most == NEVER) return most;
  float total = 0;
  for (int i = 0; i < size; ++i) total += std::exp(x[i] - most);
  return most + std::log(total);
}

// HistoryBias: see music_ar/decoding/history_bias.py for what the numbers mean.

constexpr int PITCH_CLASSES = 12;
constexpr float REGISTER_WEIGHT = 0.5f, PITCH_CLASS_PRIOR_NOTES = 48;

// Rows of bell curves; each row sums to 1.
template <int SIZE>
struct Smoothing {
  float weight[SIZE][SIZE];

  explicit Smoothing(double deviation) {
    for (int from = 0; from < SIZE; ++from) bell(weight[from], from, deviation, 1);
  }

  static void bell(float* row, double mean, double deviation, float factor) {
    double values[SIZE], total = 0;
    for (int i = 0; i < SIZE; ++i) total += values[i] = std::exp(-0.5 * std::pow((i - mean) / deviation, 2));
    for (int i = 0; i < SIZE; ++i) row[i] = factor * float(values[i] / total);
  }
};

// Counts, smoothed, plus a prior of `notes` notes.
template <int SIZE>
static std::array<float, SIZE> smoothed(const int32_t* counts, const Smoothing<SIZE>& smoothing,
                                        const std::array<float, SIZE>& prior) {
  std::array<float, SIZE> result{};
  for (int from = 0; from < SIZE; ++from)
    if (counts[from])
      for (int i = 0; i < SIZE; ++i) result[i] += float(counts[from]) * smoothing.weight[from][i];
  for (int i = 0; i < SIZE; ++i) result[i] += prior[i];
  return result;
}

template <int SIZE>
static std::array<float, SIZE> prior(float notes, double mean, double deviation) {
  std::array<float, SIZE> row;
  Smoothing<SIZE>::bell(row.data(), mean, deviation, notes);
  return row;
}

// Add strength * bias, keeping the total probability of the tokens.
static void bias_type(float* logits, const float* bias, int size, float strength) {
  const float before = log_sum_exp(logits, size);
  for (int i = 0; i < size; ++i) logits[i] += strength * bias[i];
  const float correction = before - log_sum_exp(logits, size);
  for (int i = 0; i < size; ++i) logits[i] += correction;
}

static void history_bias(float* logits, const Piece& piece, float strength) {
  static const Smoothing<PITCHES> near_pitches(4);
  static const Smoothing<VELOCITY_BINS> near_bins(3);
  static const auto pitch_prior = prior<PITCHES>(50, 64, 14);
  static const auto velocity_prior = prior<VELOCITY_BINS>(1000, 16.5 - 1, 4.8);  // bins are counted from 1
  if (strength == 0) return;
  float pitch_class[PITCH_CLASSES];
  std::fill(pitch_class, pitch_class + PITCH_CLASSES, PITCH_CLASS_PRIOR_NOTES / PITCH_CLASSES);
  for (int pitch = 0; pitch < PITCHES; ++pitch) pitch_class[pitch % PITCH_CLASSES] += float(piece.pitches_128[pitch]);
  for (float& each : pitch_class) each = std::log(each);
  auto bias = smoothed<PITCHES>(piece.pitches_128, near_pitches, pitch_prior);
  for (int pitch = 0; pitch < PITCHES; ++pitch)
    bias[pitch] = pitch_class[pitch % PITCH_CLASSES] + REGISTER_WEIGHT * std::log(bias[pitch]);
  bias_type(logits, bias.data(), PITCHES, strength);
  auto dynamics = smoothed<VELOCITY_BINS>(piece.velocities_32, near_bins, velocity_prior);
  for (float& each : dynamics) each = std::log(each);
  bias_type(logits + VELOCITY, dynamics.data(), VELOCITY_BINS, strength);
}

// Grammar: `grammar.playable_tokens`.
static void apply_grammar(float* logits, int V, const Piece& piece) {
  const int previous = piece.pending();
  const int32_t* held = piece.held_128;
  const bool unstarted = previous == -1, ended = previous == END, playing = !unstarted && !ended;
  const bool free = playing && !is_velocity(previous);
  const bool after_short_shift = previous >= TIME_SHIFT && previous < TIME_SHIFT + MAX_SHIFT_STEPS - 1;
  const bool may_strike = playing && piece.velocity > 0, may_release = free && !is_note_on(previous);
  const bool silent = std::all_of(held, held + PITCHES, [](int32_t count) { return count == 0; });
  rule_out(logits, 0, NOTE_OFF, [&](int token) { return !may_strike || held[token] > 0; });
  rule_out(logits, NOTE_OFF, TIME_SHIFT, [&](int token) { return !may_release || held[token - NOTE_OFF] <= 0; });
  rule_out(logits, TIME_SHIFT, VELOCITY, [&](int) { return !free || after_short_shift; });
  rule_out(logits, VELOCITY, PAD, [&](int token) { return !free || token - (VELOCITY - 1) == piece.velocity; });
  if (!ended) logits[PAD] = NEVER;
  if (!unstarted) logits[START] = NEVER;
  if (!is_note_off(previous) || !silent) logits[END] = NEVER;
  rule_out(logits, VOCABULARY_SIZE, V, [](int) { return true; });
}

// GapEnd.

static void allow_only(float* logits, int V, int token) {
  std::fill(logits, logits + V, NEVER);
  logits[token] = 0;
}

static void end_gap(float* logits, int V, const Piece& piece) {
  if (piece.gap_end < 0) return;
  if (piece.gap_over) {
    if (std::all_of(piece.held_128, piece.held_128 + PITCHES, [](int32_t count) { return count == 0; }))
      return allow_only(logits, V, END);
    return rule_out(logits, 0, V, [](int token) { return !is_shift(token) && !is_note_off(token); });
  }
  const int left = piece.gap_end - piece.time;
  if (left <= 0) return allow_only(logits, V, END_OF_GAP);
  if (left < MAX_SHIFT_STEPS) {
    float* to_the_end = logits + TIME_SHIFT + left - 1;
    *to_the_end = log_sum_exp(to_the_end, MAX_SHIFT_STEPS - left + 1);
    std::fill(to_the_end + 1, logits + VELOCITY, NEVER);
  }
  logits[END] = NEVER;
}

// SilenceLimit and StuckNotes.

constexpr int LONGEST_HOLD_STEPS = 800, LONGEST_SILENCE_STEPS = 300, FINGERS_STEPS = 200;

static int last_event_steps(const Piece& piece, int pitch) {
  return std::max(piece.keys_128[pitch], 0) / (2 * VELOCITY_SLOTS);
}

static void limit_silence(float* logits, const Piece& piece) {
  int last_event = piece.gap_begin, held = 0;
  for (int pitch = 0; pitch < PITCHES; ++pitch) {
    last_event = std::max(last_event, last_event_steps(piece, pitch));
    held += piece.held_128[pitch];
  }
  if (held == 0 && piece.time - last_event >= LONGEST_SILENCE_STEPS)
    rule_out(logits, TIME_SHIFT, VELOCITY, [](int) { return true; });
}

static void release_stuck_notes(float* logits, int V, const Piece& piece) {
  bool too_long[PITCHES], others[PITCHES], any_too_long = false, any_other = false;
  for (int pitch = 0; pitch < PITCHES; ++pitch) {
    const int age = piece.held_128[pitch] > 0 ? piece.time - last_event_steps(piece, pitch) : -1;
    too_long[pitch] = age >= LONGEST_HOLD_STEPS;
    others[pitch] = age >= FINGERS_STEPS && !too_long[pitch];
    any_too_long |= too_long[pitch];
    any_other |= others[pitch];
  }
  if (!any_too_long) return;
  const bool* due = any_other ? others : too_long;
  const auto is_due = [&](int token) {
    return is_note_off(token) && due[token - NOTE_OFF] && logits[token] > NEVER;
  };
  bool any_due = false;
  for (int token = NOTE_OFF; token < TIME_SHIFT; ++token) any_due |= is_due(token);
  if (any_due) rule_out(logits, 0, V, [&](int token) { return !is_due(token); });
}

// PitchRange.
static void limit_pitches(float* logits, int V, int lowest, int highest) {
  const auto outside = [&](int token) { return is_note_on(token) && (token < lowest || token > highest); };
  for (int token = 0; token < V; ++token)
    if (logits[token] > NEVER && !outside(token)) {
      rule_out(logits, 0, NOTE_OFF, outside);
      return;
    }
}

// TypeFilters.

struct Filters {
  float temperature, top_p, min_p;
  int top_k;
};

// The lowest logit that stays, of logits that are already divided by the temperature.
static float lowest_kept(float* falling, int count, const Filters& filters) {
  std::sort(falling, falling + count, std::greater<float>());
  const int most = filters.top_k == 0 ? count : std::min(count, filters.top_k);
  float mass[PITCHES], total = 0, before = 0;
  for (int i = 0; i < most; ++i) total += mass[i] = std::exp(falling[i] - falling[0]);
  const float least = falling[0] + std::log(filters.min_p);
  int kept = 0;
  for (; kept < most; before += mass[kept++]) {
    const bool in_top_p = before < filters.top_p * total || filters.top_p >= 1;
    if (!in_top_p || falling[kept] < least) break;
  }
  return falling[std::max(kept, 1) - 1];
}

static void filter_type(float* logits, int size, const Filters& filters) {
  float possible[PITCHES];
  int count = 0;
  for (int i = 0; i < size; ++i) {
    logits[i] /= std::max(filters.temperature, 1e-6f);
    if (logits[i] > NEVER) possible[count++] = logits[i];
  }
  if (count == 0) return;
  const float lowest = lowest_kept(possible, count, filters);
  rule_out(logits, 0, size, [&](int i) { return logits[i] < lowest; });
}

void process(float* logits, int V, const Piece& piece, const Options& options, int row) {
  history_bias(logits, piece, options.steadiness[row]);
  apply_grammar(logits, V, piece);
  end_gap(logits, V, piece);
  limit_silence(logits, piece);
  release_stuck_notes(logits, V, piece);
  limit_pitches(logits, V, options.lowest_pitch[row], options.highest_pitch[row]);
  const Filters filters{options.temperature[row], options.top_p[row], options.min_p[row], options.top_k[row]};
  const int starts[] = {0, NOTE_OFF, TIME_SHIFT, VELOCITY, PAD, V};
  for (int type = 0; type < 5; ++type) filter_type(logits + starts[type], starts[type + 1] - starts[type], filters);
}

// The draw. Threefry-2x32 with 20 rounds: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

struct Words {
  uint32_t first, second;
};

static uint32_t rotated(uint32_t x, int bits) { return x << bits | x >> (32 - bits); }

static Words threefry(Words key, Words x) {
  const uint32_t keys[3] = {key.first, key.second, key.first ^ key.second ^ 0x1BD11BDA};
  const int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  x.first += keys[0];
  x.second += keys[1];
  for (int round = 0; round < 5; ++round) {
    for (int bits : rotations[round % 2]) {
      x.first += x.second;
      x.second = rotated(x.second, bits) ^ x.first;
    }
    x.first += keys[(round + 1) % 3];
    x.second += keys[(round + 2) % 3] + uint32_t(round + 1);
  }
  return x;
}

// The number of place `index` in jax.random.gumbel(key).
static float gumbel(Words key, int index) {
  const Words bits = threefry(key, {0, uint32_t(index)});
  const uint32_t pattern = (bits.first ^ bits.second) >> 9 | 0x3F800000;  // of a float in 1..2
  float uniform;
  std::memcpy(&uniform, &pattern, sizeof uniform);
  uniform = std::max(uniform - 1, std::numeric_limits<float>::min());
  return -std::log(-std::log(uniform));
}

int draw(const float* logits, int V, const uint32_t key[2], int position) {
  const Words folded = threefry({key[0], key[1]}, {0, uint32_t(position)});
  int best = 0;
  float most = NEVER;
  for (int token = 0; token < V; ++token) {
    if (logits[token] == NEVER) continue;
    const float noisy = logits[token] + gumbel(folded, token);
    if (noisy > most) {
      most = noisy;
      best = token;
    }
  }
  return best;
}

}  // namespace music_ar
