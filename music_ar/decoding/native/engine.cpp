// The interface that library.py calls. Arguments are checked there; nothing here throws except for want of memory.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>

#include "model.h"
#include "sampling.h"

namespace music_ar {

// The pool of the process. An old one is left alone when the number changes: its threads sleep.
static Threads*& pool() {
  static Threads* threads = new Threads(1);
  return threads;
}

static std::vector<Piece> pieces_of(const Model& model, const State& state) {
  std::vector<Piece> pieces;
  for (int row = 0; row < state.rows; ++row)
    pieces.emplace_back(state, model.config(), row, model.kernels().cached_bytes, model.value_stride());
  return pieces;
}

// The pending token of a piece. Its window of latents slides: it sees the last n.
static Position pending_position(const Model& model, const Piece& piece) {
  return {&piece, Conditioning(model.config(), piece), std::max(0, piece.age - piece.latents + 1)};
}

// Logits of the token after the pending one, for some rows of a batch, of which so many neighbors leave early together.
static void step(Model& model, Threads& threads, const std::vector<Piece>& pieces, const std::vector<int>& rows,
                 float* logits_RxV, int together = 1) {
  for (size_t first = 0; first < rows.size(); first += Model::MOST_POSITIONS) {
    std::vector<Position> positions;
    for (size_t i = first; i < std::min(rows.size(), first + Model::MOST_POSITIONS); ++i)
      positions.push_back(pending_position(model, pieces[rows[i]]));
    model.forward(threads, positions, logits_RxV + first * model.vocabulary(), together);
  }
}

struct Layout {
  int separator, begin;  // position of the first separator, and time at which the middle begins; 0 without a gap
};

// Where the part after a gap ends in a prompt, and where that part begins in time: see `gap.scan_each`.
static Layout layout_of(const int32_t* tokens, int count) {
  const int separator = int(std::find(tokens, tokens + count, SEPARATOR) - tokens);
  int time = 0;
  for (int t = 0; t < count; ++t) {
    if (is_shift(tokens[t])) time += tokens[t] - (TIME_SHIFT - 1);
    if (tokens[t] == SEPARATOR) ++time;
    if (tokens[t] == MIDDLE) return {std::min(separator, t), time};
  }
  return {0, 0};
}

// Go through all tokens of a prompt but the last, which is left pending. The last n latents are computed as in training:
// each sees those from the first of them up to itself.
static void prefill(Model& model, Threads& threads, Piece& piece, const int32_t* tokens, int count) {
  const int first_latent = std::max(0, count - 1 - piece.latents);
  const Layout layout = layout_of(tokens, count);
  const int first_input = std::max(0, first_latent - model.config().context + 1);
  std::vector<Position> positions;
  for (int age = 0; age < count; ++age) {
    advance(piece, tokens[age]);
    if (age < first_input || age == count - 1) continue;
    positions.push_back({&piece, Conditioning(model.config(), piece), age < first_latent ? -1 : first_latent});
    if (age < layout.separator) positions.back().conditioning.place += layout.begin;
    if (int(positions.size()) < Model::MOST_POSITIONS && age < count - 2) continue;
    model.forward(threads, positions, nullptr);
    positions.clear();
  }
}

struct Drawn {
  int32_t token;
  float nats;
};

// Of a pair, the logits without wishes follow those with them.
static Drawn draw_one(const Model& model, const Piece& piece, const Options& options, int row, const float* logits_V) {
  const int V = model.vocabulary();
  const float total = model.kernels().log_sum_exp(logits_V, V);
  std::vector<float> processed(logits_V, logits_V + V);
  for (int token = 0; options.guidance && token < V; ++token) {
    const float without = logits_V[V + token];
    processed[token] = without + options.guidance[row] * (logits_V[token] - without);
  }
  process(processed.data(), V, piece, options, row);
  const int token = draw(processed.data(), V, piece.key_2, piece.age + 1);
  return {token, total - logits_V[token]};
}

static void decode(Model& model, Threads& threads, const State& state, const Options& options, int length,
                   int32_t* tokens_BxT, float* nats_BxT) {
  std::vector<Piece> pieces = pieces_of(model, state);
  const size_t V = model.vocabulary();
  std::vector<float> logits_RxV(state.rows * V);
  std::fill_n(tokens_BxT, size_t(state.rows) * length, PAD);
  std::fill_n(nats_BxT, size_t(state.rows) * length, 0.0f);
  const int together = options.guidance ? 2 : 1;  // rows of a piece: both of a pair are done at the same time
  for (int t = 0; t < length; ++t) {
    std::vector<int> rows;
    for (int row = 0; row < state.rows; ++row)
      if (!pieces[row].done()) rows.push_back(row);
    if (rows.empty()) return;
    step(model, threads, pieces, rows, logits_RxV.data(), together);
    threads.each(int(rows.size()) / together, [&](int i, int) {
      const int first = rows[i * together];
      const float* logits_V = logits_RxV.data() + i * together * V;
      const Drawn drawn = draw_one(model, pieces[first], options, first, logits_V);
      for (int row = first; row < first + together; ++row) {
        tokens_BxT[size_t(row) * length + t] = drawn.token;
        nats_BxT[size_t(row) * length + t] = drawn.nats;
        advance(pieces[row], drawn.token);
      }
    });
  }
}

static void teacher_force(Model& model, Threads& threads, const State& state, const int32_t* tokens_BxT, int length,
                          float* logits_BxTxV) {
  std::vector<Piece> pieces = pieces_of(model, state);
  const size_t V = model.vocabulary();
  std::vector<float> logits_RxV(state.rows * V);
  for (int t = 0; t < length; ++t) {
    std::vector<int> rows;
    for (int row = 0; row < state.rows; ++row)
      if (!pieces[row].ended) rows.push_back(row);
    step(model, threads, pieces, rows, logits_RxV.data());
    for (size_t i = 0; i < rows.size(); ++i) {
      const size_t place = size_t(rows[i]) * length + t;
      std::copy_n(logits_RxV.data() + i * V, V, logits_BxTxV + place * V);
      advance(pieces[rows[i]], tokens_BxT[place]);
    }
  }
}

// Seconds of the fastest of some passes.
static double bare_products_s(Model& model, Threads& threads, int rows, int layers, int passes) {
  double least = INFINITY;
  for (int pass = 0; pass < passes; ++pass) {
    const auto began = std::chrono::steady_clock::now();
    model.bare_products(threads, rows, layers);
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  }
  return least;
}

}  // namespace music_ar

using namespace music_ar;

extern "C" {

const char* music_ar_path(const Model* model) { return model->kernels().name; }

int music_ar_cached_bytes(const Model* model) { return int(model->kernels().cached_bytes); }

int music_ar_threads() { return pool()->count(); }

void music_ar_set_threads(int count) {
  if (count != pool()->count()) pool() = new Threads(count);
}

Model* music_ar_open(const Config* config, const Tensor* tensors, int count) {
  return new Model(*config, std::vector<Tensor>(tensors, tensors + count));
}

void music_ar_close(Model* model) { delete model; }

void music_ar_prefill(Model* model, const State* state, int row, const int32_t* tokens, int count) {
  Threads::Awake awake(*pool());
  prefill(*model, *pool(), pieces_of(*model, *state)[row], tokens, count);
}

void music_ar_decode(Model* model, const State* state, const Options* options, int length, int32_t* tokens_BxT,
                     float* nats_BxT) {
  Threads::Awake awake(*pool());
  decode(*model, *pool(), *state, *options, length, tokens_BxT, nats_BxT);
}

void music_ar_teacher_force(Model* model, const State* state, const int32_t* tokens_BxT, int length,
                            float* logits_BxTxV) {
  Threads::Awake awake(*pool());
  teacher_force(*model, *pool(), *state, tokens_BxT, length, logits_BxTxV);
}

double music_ar_bare_products_s(Model* model, int rows, int layers, int passes) {
  Threads::Awake awake(*pool());
  return bare_products_s(*model, *pool(), rows, layers, passes);
}

// For tests: the logit processors and the draw by themselves.
void music_ar_process(Model* model, const State* state, const Options* options, float* logits_BxV) {
  std::vector<Piece> pieces = pieces_of(*model, *state);
  for (int row = 0; row < state->rows; ++row)
    process(logits_BxV + size_t(row) * model->vocabulary(), model->vocabulary(), pieces[row], *options, row);
}

int music_ar_draw(const float* logits_V, const uint32_t* key_2, int position) {
  return draw(logits_V, VOCABULARY_SIZE, key_2, position);
}

}
