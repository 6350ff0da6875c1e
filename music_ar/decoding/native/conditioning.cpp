#include "conditioning.h"

#include <algorithm>
#include <cmath>

namespace music_ar {

// Classes.

constexpr int INTERVAL_CLASSES = 48, VELOCITY_CLASSES = VELOCITY_BINS + 1, DISTANCE_CLASSES = 16, RETRIEVED_NOTES = 4;

static int interval_class(int steps) {
  static const std::vector<int> classes = [] {
    std::vector<int> table(1024);  // the last class begins before that
    for (size_t s = 0; s < table.size(); ++s) table[s] = int(std::floor(6 * std::log2(1 + float(s) / 3) + 1e-3f));
    return table;
  }();
  return std::min(classes[std::clamp(steps, 0, 1023)], INTERVAL_CLASSES - 1);
}

static int distance_class(int distance) {
  return std::min(int(std::floor(std::log2(float(std::max(distance, 1))) + 1e-3f)), DISTANCE_CLASSES - 1);
}

// `notes.note_categories` of L notes, whose rows begin at `first`.
static void add_note_rows(std::vector<int32_t>& rows, int first, int L, int i, int note, int interval, bool timed) {
  const int velocities = first + L * PITCHES, intervals = velocities + L * VELOCITY_CLASSES;
  rows.push_back(first + i * PITCHES + note / VELOCITY_SLOTS);
  rows.push_back(velocities + i * VELOCITY_CLASSES + note % VELOCITY_SLOTS);
  if (timed) rows.push_back(intervals + i * INTERVAL_CLASSES + interval_class(interval));
}

static int modulo(int number, int size) { return ((number % size) + size) % size; }

static int note_at(const Piece& piece, int number) { return piece.note_C[modulo(number, piece.notes_kept)]; }

static int time_at(const Piece& piece, int number) { return piece.note_time_C[modulo(number, piece.notes_kept)]; }

static void add_onset_rows(std::vector<int32_t>& rows, const Piece& piece, int L) {
  const int newest = piece.note_count - 1, known = std::min(L, piece.note_count - piece.note_first);
  if (known == 0) return;
  rows.push_back(interval_class(piece.time - time_at(piece, newest)));
  for (int i = 0; i < known; ++i) {
    const bool timed = i + 1 < known;
    const int interval = timed ? time_at(piece, newest - i) - time_at(piece, newest - i - 1) : 0;
    add_note_rows(rows, INTERVAL_CLASSES, L, i, note_at(piece, newest - i), interval, timed);
  }
}

constexpr bool BY_INTERVAL[LEVELS] = {false, false, false, true, false};

// See `retrieval._following` and `retrieval.categories`.
static void add_retrieved_rows(std::vector<int32_t>& rows, const Piece& piece) {
  if (piece.match_level < 0) return;
  const int newest = piece.note_count - 1, distance = newest - piece.match_number;
  rows.push_back(piece.match_level);
  rows.push_back(LEVELS + distance_class(distance));
  const int here = note_at(piece, newest) / VELOCITY_SLOTS, there = note_at(piece, piece.match_number) / VELOCITY_SLOTS;
  const int moved = BY_INTERVAL[piece.match_level] ? here - there : 0;
  for (int i = 0; i < RETRIEVED_NOTES; ++i) {
    const int number = piece.match_number + 1 + i % std::max(distance, 1);
    const int note = note_at(piece, number) + moved * VELOCITY_SLOTS;
    if (note < 0 || note / VELOCITY_SLOTS >= PITCHES) continue;
    const int interval = time_at(piece, number) - time_at(piece, number - 1);
    add_note_rows(rows, LEVELS + DISTANCE_CLASSES, RETRIEVED_NOTES, i, note, interval, true);
  }
}

// See `gap.categories`.
static int gap_row_of(const Piece& piece) {
  constexpr int TIME_CLASSES = 72;
  if (piece.gap_end < 0) return -1;
  if (piece.gap_over) return TIME_CLASSES;
  const float steps = float(std::max(piece.gap_end - piece.time, 0));
  return std::min(int(std::floor(6 * std::log2(1 + steps / 3) + 1e-3f)), TIME_CLASSES - 1);
}

Conditioning::Conditioning(const Config& config, const Piece& piece)
    : age(piece.age), time(piece.time), place(piece.time), recent_L(piece.recent_L, piece.recent_L + piece.conv_width),
      gap_row(gap_row_of(piece)) {
  std::copy(piece.keys_128, piece.keys_128 + PITCHES, keys_128);
  if (config.onsets) add_onset_rows(onset_rows, piece, config.onsets);
  if (config.retrieval_notes) add_retrieved_rows(retrieved_rows, piece);
}

void key_channels(int32_t key, int time, float channels[KEYBOARD_CHANNELS]) {
  std::fill(channels, channels + KEYBOARD_CHANNELS, 0.0f);
  if (key < 0) return;
  const float age = float(time - key / (2 * VELOCITY_SLOTS));
  if (key / VELOCITY_SLOTS % 2) {  // down
    channels[0] = 1;
    channels[1] = float(key % VELOCITY_SLOTS) / VELOCITY_BINS;
    for (int i = 0; i < 4; ++i) channels[2 + i] = std::exp(-age / float(8 << 2 * i));
  } else {
    channels[6] = std::exp(-age / 32);
    channels[7] = std::exp(-age / 256);
  }
}

// n-gram retrieval: see music_ar/features/retrieval.py.

enum class By { ORDER, SET, INTERVAL };
struct Level {
  By by;
  int notes;
};
constexpr Level LEVEL[LEVELS] = {{By::ORDER, 12}, {By::ORDER, 6}, {By::SET, 12}, {By::INTERVAL, 9}, {By::ORDER, 4}};
constexpr int LEAST_CAPACITY = 12;
constexpr uint32_t HASH_BASE = 0x9E3779B1;

static uint32_t mixed(uint32_t pitch) {
  uint32_t x = (pitch + 1) * HASH_BASE;
  x = (x ^ (x >> 15)) * 0x85EBCA77u;
  return x ^ (x >> 13);
}

// Hash of the last notes, equal for passages that match.
static uint32_t hash(const Level& level, const uint32_t pitches[LEAST_CAPACITY]) {
  uint32_t sum = 0, power = 1;
  const int terms = level.by == By::INTERVAL ? level.notes - 1 : level.notes;
  for (int i = 0; i < terms; ++i, power *= HASH_BASE) {
    if (level.by == By::SET) sum += mixed(pitches[i]);
    if (level.by == By::ORDER) sum += (pitches[i] + 1) * power;
    if (level.by == By::INTERVAL) sum += (pitches[i] - pitches[i + 1] + 128) * power;
  }
  return sum;
}

// The last of these slots whose key is equal, -1 if there is none. Blocks of 64 are compared by vectors.
static int last_equal(const uint32_t* keys, uint32_t key, int begin, int end) {
  while (end > begin) {
    const int start = std::max(begin, end - 64);
    uint32_t equal = 0;
    for (int i = start; i < end; ++i) equal |= uint32_t(keys[i] == key);
    if (equal)
      for (int i = end - 1; i >= start; --i)
        if (keys[i] == key) return i;
    end = start;
  }
  return -1;
}

// The nearest earlier note with the same key as the newest, -1 if none is left in the buffer.
static int nearest_with_key(const uint32_t* keys_C, uint32_t key, int newest, int capacity) {
  const int slot = newest % capacity, lap = newest - slot;
  const int found = last_equal(keys_C, key, 0, slot);
  if (found >= 0) return lap + found;
  if (lap == 0) return -1;
  const int before = last_equal(keys_C, key, slot + 1, capacity);
  return before >= 0 ? lap - capacity + before : -1;
}

static void find_match(Piece& piece) {
  const int newest = piece.note_count - 1, capacity = piece.notes_kept;
  uint32_t pitches[LEAST_CAPACITY];
  for (int i = 0; i < LEAST_CAPACITY; ++i) pitches[i] = note_at(piece, newest - i) / VELOCITY_SLOTS;
  piece.match_level = piece.match_number = -1;
  for (int w = 0; w < LEVELS; ++w) {
    uint32_t* keys_C = piece.match_keys_WxC + size_t(w) * capacity;
    const uint32_t key = keys_C[newest % capacity] = hash(LEVEL[w], pitches);
    if (piece.match_level >= 0) continue;
    const int number = nearest_with_key(keys_C, key, newest, capacity), least = LEVEL[w].by == By::SET ? LEVEL[w].notes : 1;
    if (number >= LEVEL[w].notes - 1 && newest - number >= least) {
      piece.match_level = w;
      piece.match_number = number;
    }
  }
}

// The recurrences.

static void strike(Piece& piece, int pitch) {
  ++piece.held_128[pitch];
  const int bin = piece.velocity > 0 ? piece.velocity : DEFAULT_VELOCITY_BIN;
  ++piece.pitches_128[pitch];
  ++piece.velocities_32[bin - 1];
  if (piece.notes_kept == 0) return;
  const int slot = piece.note_count++ % piece.notes_kept;
  piece.note_C[slot] = pitch * VELOCITY_SLOTS + piece.velocity;
  piece.note_time_C[slot] = piece.time;
  if (piece.match_keys_WxC) find_match(piece);
}

// At a separator a new timeline begins: see music_ar/features/keyboard.py.
static void begin_timeline(Piece& piece) {
  piece.gap_begin = ++piece.time;
  piece.velocity = 0;
  piece.note_first = piece.note_count;
  std::fill_n(piece.held_128, PITCHES, 0);
  std::fill_n(piece.keys_128, PITCHES, -1);
}

// See music_ar/features/gap.py.
static void mark_end_of_gap(Piece& piece) {
  if (piece.gap_end >= 0)
    piece.gap_over = 1;
  else if (piece.gap_length < 0)
    piece.gap_length = piece.time;
}

void advance(Piece& piece, int token) {
  if (piece.ended) token = PAD;
  ++piece.age;
  std::copy(piece.recent_L + 1, piece.recent_L + piece.conv_width, piece.recent_L);
  piece.recent_L[piece.conv_width - 1] = token;
  if (is_shift(token)) piece.time += token - (TIME_SHIFT - 1);
  if (is_velocity(token)) piece.velocity = token - (VELOCITY - 1);
  if (is_note_on(token)) {
    int32_t& key = piece.keys_128[token];
    key = std::max(key, (2 * piece.time + 1) * VELOCITY_SLOTS + piece.velocity);
    strike(piece, token);
  }
  if (is_note_off(token)) {
    const int pitch = token - NOTE_OFF;
    piece.keys_128[pitch] = std::max(piece.keys_128[pitch], 2 * piece.time * VELOCITY_SLOTS);
    if (piece.held_128[pitch] > 0) --piece.held_128[pitch];
  }
  if (token == SEPARATOR) begin_timeline(piece);
  if (token == END_OF_GAP) mark_end_of_gap(piece);
  if (token == MIDDLE && piece.gap_end < 0) piece.gap_end = piece.time + std::max(piece.gap_length, 0);
  if (token == END) piece.ended = 1;
}

}  // namespace music_ar
