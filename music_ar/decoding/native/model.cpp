#include "model.h"

#include <algorithm>
#include <cmath>

namespace music_ar {

static std::vector<float> vector_of(const std::map<std::string, Tensor>& tensors, const std::string& name) {
  const Tensor& tensor = tensors.at(name);
  std::vector<float> values(padded(tensor.outputs));  // zero beyond
  std::copy(tensor.values, tensor.values + tensor.outputs, values.begin());
  return values;
}

// A small float matrix, [I, O padded].
static std::vector<float> rows_of(const Tensor& tensor) {
  const int stride = padded(tensor.outputs);
  std::vector<float> rows(size_t(tensor.inputs) * stride);
  for (int i = 0; i < tensor.inputs; ++i)
    for (int o = 0; o < tensor.outputs; ++o)
      rows[size_t(i) * stride + o] = tensor.numbers_IxO[size_t(i) * tensor.outputs + o] * tensor.values[o];
  return rows;
}

Matrix Model::matrix(const Named& tensors, const std::vector<std::string>& names) const {
  Matrix result;
  int outputs = 0;
  for (const std::string& name : names) outputs += tensors.at(name).outputs;
  result.inputs = tensors.at(names[0]).inputs;
  result.outputs = padded(outputs);
  result.packed.resize(size_t(padded(result.inputs)) * result.outputs);
  result.scale_O.resize(result.outputs);
  outputs = 0;
  for (const std::string& name : names) {
    const Tensor& tensor = tensors.at(name);
    kernels_.pack(result, tensor.numbers_IxO, outputs, tensor.outputs);
    std::copy_n(tensor.values, tensor.outputs, result.scale_O.begin() + outputs);
    outputs += tensor.outputs;
  }
  return result;
}

Model::Block Model::block(const Named& tensors, const std::string& name, bool cross) const {
  std::vector<std::string> inputs = {name + ".query.kernel"};
  if (!cross) inputs.insert(inputs.end(), {name + ".key.kernel", name + ".value.kernel"});
  return {vector_of(tensors, name + ".attention_norm.scale"),
          vector_of(tensors, name + ".query_norm.scale"),
          vector_of(tensors, name + ".key_norm.scale"),
          vector_of(tensors, name + ".feed_forward_norm.scale"),
          matrix(tensors, inputs),
          matrix(tensors, {name + ".output.kernel"}),
          matrix(tensors, {name + ".expand.kernel"}),
          matrix(tensors, {name + ".contract.kernel"})};
}

Model::Model(const Config& config, const std::vector<Tensor>& tensors)
    : config_(config), kernels_(chosen_kernels()), width_(padded(config.width)),
      heads_width_(padded(config.heads * config.head_size)),
      projected_width_(padded((config.heads + 2 * config.kv_heads) * config.head_size)),
      value_stride_((config.head_size + HEAD_PADDING - 1) / HEAD_PADDING * HEAD_PADDING),
      angle_stride_(2 * config.rotary_size),
      rotary_rates_(config.rotary_rates, config.rotary_rates + config.rotary_size / 2),
      rounded_(MOST_POSITIONS, std::max({config.width, config.hidden, config.heads * config.head_size})) {
  Named named;
  for (const Tensor& tensor : tensors) named[tensor.name] = tensor;
  const auto bag = [&](const std::string& name) {
    const Tensor& tensor = named.at(name);
    std::vector<int8_t> rows(size_t(tensor.inputs) * width_);
    for (int i = 0; i < tensor.inputs; ++i)
      std::copy_n(tensor.numbers_IxO + size_t(i) * config.width, config.width, rows.begin() + size_t(i) * width_);
    return EmbeddingBag{rows, vector_of(named, name)};
  };
  embedding_VxD_ = rows_of(named.at("embedding"));
  std::fill_n(embedding_VxD_.begin() + size_t(PAD) * width_, width_, 0.0f);
  if (config.conv_width > 1) taps_LxD_ = rows_of(named.at("conv"));
  if (config.onsets) keyboard_ = bag("keyboard.kernel");
  if (config.retrieval_notes) retrieval_ = bag("retrieval.kernel");
  if (config.vocabulary_size > VOCABULARY_SIZE) gap_ = bag("gap.kernel");
  context_norm_ = vector_of(named, "context_norm.scale");
  final_norm_ = vector_of(named, "final_norm.scale");
  latent_ = matrix(named, {"latent.kernel"});
  cross_keys_values_ = matrix(named, {"cross.key.kernel", "cross.value.kernel"});
  cross_ = block(named, "cross", true);
  for (int layer = 0; layer < config.layers; ++layer)
    blocks_.push_back(block(named, "blocks." + std::to_string(layer), false));
  for (int i = 0; i < config.exit_count; ++i) {
    const Tensor& kernel = named.at("exit_costs.kernel");
    ExitCost cost{final_norm_, named.at("exit_costs.bias").values[i]};
    for (int d = 0; d < config.width; ++d)
      cost.kernel_D[d] *= kernel.numbers_IxO[size_t(d) * kernel.outputs + i] * kernel.values[i];
    exit_costs_[config.exits[i]] = cost;
  }
  head_ = matrix(named, {"head.kernel"});
  head_.bias_O = vector_of(named, "head.bias");

  const size_t T = MOST_POSITIONS;
  angles_.resize(T * angle_stride_);
  embedded_.resize(T * width_);
  x_.resize(T * width_);
  left_.resize(T * width_);
  projected_.resize(T * projected_width_);
  queries_.resize(T * config.heads * value_stride_);
  attended_.resize(T * heads_width_);
  hidden_.resize(T * padded(config.hidden));
  logits_.resize(T * head_.outputs);
}

// Inputs.

constexpr float NEGLIGIBLE = 1e-6f;  // a feature below that, as long after a release, is taken as zero

void Model::embed(const Conditioning& conditioning, float* x_D) const {
  const int L = config_.conv_width;
  const auto row = [&](int back) { return embedding_VxD_.data() + size_t(conditioning.recent_L[L - 1 - back]) * width_; };
  std::copy_n(row(0), width_, x_D);
  for (int back = 0; L > 1 && back < L; ++back) {
    const float *token = row(back), *taps = taps_LxD_.data() + size_t(back) * width_;
    for (int d = 0; d < width_; ++d) x_D[d] += token[d] * taps[d];
  }
  if (config_.onsets) add_keyboard(conditioning, x_D);
  if (config_.retrieval_notes) add_retrieved(conditioning, x_D);
  if (conditioning.gap_row >= 0) add_gap(conditioning, x_D);
  if (conditioning.wishes_D)
    for (int d = 0; d < config_.width; ++d) x_D[d] += conditioning.wishes_D[d];
}

void Model::add_keyboard(const Conditioning& conditioning, float* x_D) const {
  std::vector<float> sums(width_);
  const auto add = [&](int row, float weight) {
    kernels_.add_row(sums.data(), keyboard_.rows_CxD.data() + size_t(row) * width_, weight, width_);
  };
  for (int pitch = 0; pitch < PITCHES; ++pitch) {
    float channels[KEYBOARD_CHANNELS];
    key_channels(conditioning.keys_128[pitch], conditioning.time, channels);
    for (int channel = 0; channel < KEYBOARD_CHANNELS; ++channel)
      if (channels[channel] > NEGLIGIBLE) add(channel * PITCHES + pitch, channels[channel]);
  }
  for (int row : conditioning.onset_rows) add(KEYBOARD_CHANNELS * PITCHES + row, 1);
  for (int d = 0; d < width_; ++d) x_D[d] += sums[d] * keyboard_.scale_D[d];
}

void Model::add_retrieved(const Conditioning& conditioning, float* x_D) const {
  std::vector<float> sums(width_);
  for (int row : conditioning.retrieved_rows)
    kernels_.add_row(sums.data(), retrieval_.rows_CxD.data() + size_t(row) * width_, 1, width_);
  for (int d = 0; d < width_; ++d) x_D[d] += sums[d] * retrieval_.scale_D[d];
}

void Model::add_gap(const Conditioning& conditioning, float* x_D) const {
  const int8_t* row = gap_.rows_CxD.data() + size_t(conditioning.gap_row) * width_;
  for (int d = 0; d < width_; ++d) x_D[d] += float(row[d]) * gap_.scale_D[d];
}

// Cosines and sines of R = rotary_size / 2 channel pairs, by position in tokens and then in time: [2, 2, R].
void Model::find_angles(const Conditioning& conditioning, float* angles) const {
  const int positions[2] = {conditioning.age, conditioning.place}, R = config_.rotary_size / 2;
  for (int way = 0; way < 2; ++way)
    for (int r = 0; r < R; ++r) {
      const float angle = float(positions[way]) * rotary_rates_[r];
      angles[2 * R * way + r] = std::cos(angle);
      angles[2 * R * way + R + r] = std::sin(angle);
    }
}

// Products. Every output is computed by one thread, in one order.

constexpr int FEW_ROWS = 4;  // whose small loops are not worth sharing

template <class Work>
static void each_row(Threads& threads, int rows, const Work& work) {
  if (rows >= FEW_ROWS) return threads.each(rows, [&](int row, int) { work(row); });
  for (int row = 0; row < rows; ++row) work(row);
}

void Model::quantize(Threads& threads, const float* x, int stride, const float* norm, int inputs, int rows) {
  each_row(threads, rows,
           [&](int row) { kernels_.quantize(x + size_t(row) * stride, norm, inputs, rounded_, row); });
}

// The outputs from the block of the first one on.
void Model::multiply(Threads& threads, const Matrix& matrix, int rows, Then then, float* y, int stride, int first) {
  const int skipped = first / PADDING, blocks = matrix.outputs / PADDING - skipped;
  const int parts = std::min(blocks, threads.count() == 1 ? 1 : 2 * threads.count());
  threads.each(parts, [&](int part, int) {
    const int begin = skipped + blocks * part / parts, end = skipped + blocks * (part + 1) / parts;
    kernels_.product(matrix, rounded_, rows, begin * PADDING, end * PADDING, then, y, stride);
  });
}

// Attention.

// Which of a position's angles the last `by_time` of so many heads use.
static int way_of(int head, int heads, int by_time) { return head >= heads - by_time ? 1 : 0; }

void Model::rotate_queries(const Block& block, int latent, const float* angles) {
  const int H = config_.heads, K = config_.head_size, R = config_.rotary_size / 2;
  const float factor = 1 / std::sqrt(float(K));
  for (int h = 0; h < H; ++h) {
    const float* turn = angles + 2 * R * way_of(h, H, H / config_.kv_heads * config_.time_heads);
    kernels_.rotate(projected_.data() + size_t(latent) * projected_width_ + h * K, block.query_norm.data(), turn,
                    turn + R, R, K, factor, queries_.data() + (size_t(latent) * H + h) * value_stride_);
  }
}

void Model::write(const Block& block, const Position& position, const float* kv, const float* angles, int layer) const {
  const int G = config_.kv_heads, K = config_.head_size, R = config_.rotary_size / 2;
  const Piece& piece = *position.piece;
  const int slots = layer == CROSS ? piece.cross_slots : piece.self_slots, slot = position.conditioning.age % slots;
  for (int g = 0; g < G; ++g) {
    const size_t cache = size_t(layer == CROSS ? g : layer * G + g) * slots * kernels_.cached_bytes;
    const float* turn = angles + 2 * R * way_of(g, G, config_.time_heads);
    float key_K[MOST_HEAD_SIZE];
    kernels_.rotate(kv + g * K, block.key_norm.data(), turn, turn + R, R, K, 1, key_K);
    kernels_.write_key((layer == CROSS ? piece.cross_k : piece.self_k) + cache * K, slot, key_K, K);
    kernels_.write_value((layer == CROSS ? piece.cross_v : piece.self_v) + cache * value_stride_, slot,
                         kv + (G + g) * K, K, value_stride_);
  }
}

void Model::attend_head(const Position& position, int latent, int g, int layer, float* scores) {
  const int G = config_.kv_heads, K = config_.head_size, H = config_.heads, age = position.conditioning.age;
  const Piece& piece = *position.piece;
  const bool cross = layer == CROSS;
  const int slots = cross ? piece.cross_slots : piece.self_slots;
  const int first = cross ? std::max(0, age - config_.context + 1) : position.first_latent;
  const size_t cache = size_t(cross ? g : layer * G + g) * slots * kernels_.cached_bytes;
  Attention attention;
  attention.heads = H / G;
  attention.size = K;
  attention.stride = value_stride_;
  attention.q_HxK = queries_.data() + (size_t(latent) * H + g * (H / G)) * value_stride_;
  attention.keys = (cross ? piece.cross_k : piece.self_k) + cache * K;
  attention.values = (cross ? piece.cross_v : piece.self_v) + cache * value_stride_;
  attention.slots = slots;
  attention.first = first % slots;
  attention.count = age - first + 1;
  attention.out_HxK = attended_.data() + size_t(latent) * heads_width_ + g * (H / G) * K;
  attention.scores = scores;
  kernels_.attend(attention);
}

void Model::attend(Threads& threads, const Latents& latents, int layer) {
  const Piece& piece = *latents[0].position->piece;
  const int G = config_.kv_heads;
  scores_.resize(std::max(scores_.size(), size_t(threads.count())));
  const size_t size = 4 * size_t(std::max(piece.cross_slots, piece.self_slots));
  for (auto& scores : scores_) scores.resize(std::max(scores.size(), size));
  threads.each(int(latents.size()) * G, [&](int item, int thread) {
    attend_head(*latents[item / G].position, item / G, item % G, layer, scores_[thread].data());
  });
}

// The pass.

// Adds the attention output, then the feed-forward, to the residual stream; see `Residual`.
void Model::add_block(Threads& threads, const Block& block, int rows) {
  const int hidden_width = padded(config_.hidden);
  quantize(threads, attended_.data(), heads_width_, nullptr, config_.heads * config_.head_size, rows);
  multiply(threads, block.output, rows, Then::ADD, x_.data(), width_);
  quantize(threads, x_.data(), width_, block.feed_forward_norm.data(), config_.width, rows);
  multiply(threads, block.expand, rows, Then::SQUARED_RELU, hidden_.data(), hidden_width);
  quantize(threads, hidden_.data(), hidden_width, nullptr, config_.hidden, rows);
  multiply(threads, block.contract, rows, Then::ADD, x_.data(), width_);
}

// Embeds all positions, and writes their keys and values into the cross block's caches.
void Model::read_context(Threads& threads, const std::vector<Position>& positions) {
  const int T = int(positions.size());
  each_row(threads, T, [&](int t) {
    embed(positions[t].conditioning, embedded_.data() + size_t(t) * width_);
    find_angles(positions[t].conditioning, angles_.data() + size_t(t) * angle_stride_);
  });
  quantize(threads, embedded_.data(), width_, context_norm_.data(), config_.width, T);
  multiply(threads, cross_keys_values_, T, Then::STORE, projected_.data(), projected_width_);
  each_row(threads, T, [&](int t) {
    write(cross_, positions[t], projected_.data() + size_t(t) * projected_width_,
          angles_.data() + size_t(t) * angle_stride_, CROSS);
  });
}

void Model::run_block(Threads& threads, const Latents& latents, int layer) {
  const Block& block = layer == CROSS ? cross_ : blocks_[layer];
  const int rows = int(latents.size());
  quantize(threads, x_.data(), width_, block.attention_norm.data(), config_.width, rows);
  multiply(threads, block.projection, rows, Then::STORE, projected_.data(), projected_width_);
  each_row(threads, rows, [&](int row) {
    rotate_queries(block, row, latents[row].angles);
    const float* kv = projected_.data() + size_t(row) * projected_width_ + config_.heads * config_.head_size;
    if (layer != CROSS) write(block, *latents[row].position, kv, latents[row].angles, layer);
  });
  attend(threads, latents, layer);
  add_block(threads, block, rows);
}

// Gives latents their logits, from their rows of the residual stream.
void Model::predict(Threads& threads, const float* x, const Latents& latents) {
  const int rows = int(latents.size());
  quantize(threads, x, width_, final_norm_.data(), config_.width, rows);
  multiply(threads, head_, rows, Then::STORE, logits_.data(), head_.outputs);
  for (int row = 0; row < rows; ++row)
    std::copy_n(logits_.data() + size_t(row) * head_.outputs, vocabulary(), latents[row].logits_V);
}

// What leaving with this stream is expected to cost, in nats.
float Model::leaving_cost(const ExitCost& cost, const float* x_D) const {
  float product = 0, squares = 0;
  for (int d = 0; d < config_.width; ++d) {
    product += x_D[d] * cost.kernel_D[d];
    squares += x_D[d] * x_D[d];
  }
  return std::exp(product / std::sqrt(squares / config_.width + EPSILON) + cost.bias);
}

// Takes out the latents for which leaving before a block is expected to cost little enough: they get their logits, and
// the blocks from this one on their keys and values.
void Model::leave_early(Threads& threads, Latents& latents, int layer, int together) {
  const auto may_leave = [](const Latent& latent) { return latent.position->piece->tolerance > 0; };
  if (std::none_of(latents.begin(), latents.end(), may_leave)) return;
  const ExitCost& cost = exit_costs_.at(layer);
  std::vector<bool> leaving(latents.size(), true);
  for (size_t row = 0; row < latents.size(); ++row)
    if (!(leaving_cost(cost, x_.data() + row * width_) < latents[row].position->piece->tolerance))
      std::fill_n(leaving.begin() + row / together * together, together, false);
  Latents left, staying;
  for (size_t row = 0; row < latents.size(); ++row) {
    const float* x = x_.data() + row * width_;
    const bool leaves = leaving[row];
    float* to = leaves ? left_.data() + left.size() * width_ : x_.data() + staying.size() * width_;
    if (to != x) std::copy_n(x, width_, to);
    (leaves ? left : staying).push_back(latents[row]);
  }
  latents = staying;
  if (left.empty()) return;
  predict(threads, left_.data(), left);
  fill(threads, left, layer);
}

// Writes the keys and values that the streams in `left_` give in all blocks from `layer` on.
void Model::fill(Threads& threads, const Latents& left, int layer) {
  const int rows = int(left.size()), first = config_.heads * config_.head_size;
  for (; layer < left[0].position->piece->layers; ++layer) {
    const Block& block = blocks_[layer];
    quantize(threads, left_.data(), width_, block.attention_norm.data(), config_.width, rows);
    multiply(threads, block.projection, rows, Then::STORE, projected_.data(), projected_width_, first);
    each_row(threads, rows, [&](int row) {
      write(block, *left[row].position, projected_.data() + size_t(row) * projected_width_ + first, left[row].angles,
            layer);
    });
  }
}

void Model::forward(Threads& threads, const std::vector<Position>& positions, float* logits_TxV, int together) {
  read_context(threads, positions);
  size_t first = 0;
  while (first < positions.size() && positions[first].first_latent < 0) ++first;
  Latents latents;
  for (size_t t = first; t < positions.size(); ++t)
    latents.push_back({&positions[t], angles_.data() + t * angle_stride_,
                       logits_TxV == nullptr ? nullptr : logits_TxV + (t - first) * vocabulary()});
  if (latents.empty()) return;
  quantize(threads, embedded_.data() + first * width_, width_, nullptr, config_.width, int(latents.size()));
  multiply(threads, latent_, int(latents.size()), Then::STORE, x_.data(), width_);
  const int depth = latents[0].position->piece->layers;
  for (int layer = CROSS; layer < depth; ++layer) {
    if (logits_TxV != nullptr && exit_costs_.count(layer)) leave_early(threads, latents, layer, together);
    if (latents.empty()) return;
    run_block(threads, latents, layer);
    for (const Latent& latent : latents)
      if (logits_TxV != nullptr && layer != CROSS) ++latent.position->piece->layers_run;
  }
  if (logits_TxV != nullptr) predict(threads, x_.data(), latents);
}

void Model::bare_products(Threads& threads, int rows, int layers) {
  const auto product = [&](const Matrix& matrix, std::vector<float>& y) {
    multiply(threads, matrix, rows, Then::STORE, y.data(), int(y.size()) / MOST_POSITIONS);
  };
  product(cross_keys_values_, projected_);
  product(latent_, x_);
  for (int layer = CROSS; layer < layers; ++layer) {
    const Block& block = layer == CROSS ? cross_ : blocks_[layer];
    product(block.projection, projected_);
    product(block.output, x_);
    product(block.expand, hidden_);
    product(block.contract, x_);
  }
  product(head_, logits_);
}

}  // namespace music_ar
