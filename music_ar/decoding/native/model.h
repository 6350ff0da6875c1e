// The weights, and the forward pass of a few positions over the rolling caches of their pieces.
//
// One pass serves decoding and prefill. When decoding, its positions are the pending tokens of several pieces; in a
// prefill, they are neighbors in one piece. First all of them write their keys and values, then each attends to what it
// may see. See `DecodingModel`, `step` and `prefill` in Python.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "conditioning.h"
#include "kernels.h"
#include "thread_pool.h"

namespace music_ar {

// A tensor of a pretrained model; mirrored in library.py.
struct Tensor {
  const char* name;
  const int8_t* numbers_IxO;  // of a matrix, with scales; otherwise null
  const float* values;        // the scales, or all values
  int32_t inputs, outputs;
};

struct Position {
  const Piece* piece;
  Conditioning conditioning;
  int first_latent;  // position of the oldest latent that it sees; -1: it is input only, without a latent of its own
};

class Model {
 public:
  static constexpr int MOST_POSITIONS = 64;  // in a pass
  static constexpr int HEAD_PADDING = 64;    // cached values have a multiple of so many channels

  Model(const Config& config, const std::vector<Tensor>& tensors);

  const Config& config() const { return config_; }
  const Kernels& kernels() const { return kernels_; }
  int value_stride() const { return value_stride_; }
  int vocabulary() const { return config_.vocabulary_size; }

  // Run up to MOST_POSITIONS positions of pieces of one depth; those without a latent come first. Gives the logits of the
  // token after each latent, [T, vocabulary], unless the pointer is null: then no latent leaves early. Of so many
  // neighbors `together`, all leave or none.
  void forward(Threads& threads, const std::vector<Position>& positions, float* logits_TxV, int together = 1);

  // Run all int8 products of one step, and nothing else, on so many rows and self blocks.
  void bare_products(Threads& threads, int rows, int layers);

 private:
  struct Block {
    std::vector<float> attention_norm, query_norm, key_norm, feed_forward_norm;
    Matrix projection;  // queries, keys and values; of the cross block, queries only
    Matrix output, expand, contract;
  };
  // Feature vectors as a sum of rows of an int8 matrix.
  struct EmbeddingBag {
    std::vector<int8_t> rows_CxD;
    std::vector<float> scale_D;
  };
  // What leaving at an exit is expected to cost, in nats: the exponential of a linear map of the normalized stream.
  struct ExitCost {
    std::vector<float> kernel_D;  // with the norm's scale
    float bias;
  };
  // A latent on its way through the blocks; row i of `x_` is that of the i-th that has not left.
  struct Latent {
    const Position* position;
    const float* angles;
    float* logits_V;
  };
  using Latents = std::vector<Latent>;
  using Named = std::map<std::string, Tensor>;
  static constexpr int CROSS = -1;  // in place of a layer's number

  Matrix matrix(const Named& tensors, const std::vector<std::string>& names) const;
  Block block(const Named& tensors, const std::string& name, bool cross) const;

  void embed(const Conditioning& conditioning, float* x_D) const;
  void add_keyboard(const Conditioning& conditioning, float* x_D) const;
  void add_retrieved(const Conditioning& conditioning, float* x_D) const;
  void add_gap(const Conditioning& conditioning, float* x_D) const;
  void find_angles(const Conditioning& conditioning, float* angles) const;

  void read_context(Threads& threads, const std::vector<Position>& positions);
  void quantize(Threads& threads, const float* x, int stride, const float* norm, int inputs, int rows);
  void multiply(Threads& threads, const Matrix& matrix, int rows, Then then, float* y, int stride, int first = 0);
  void rotate_queries(const Block& block, int latent, const float* angles);
  void write(const Block& block, const Position& position, const float* kv, const float* angles, int layer) const;
  void attend(Threads& threads, const Latents& latents, int layer);
  void attend_head(const Position& position, int latent, int g, int layer, float* scores);
  void add_block(Threads& threads, const Block& block, int rows);
  void run_block(Threads& threads, const Latents& latents, int layer);
  void predict(Threads& threads, const float* x, const Latents& latents);
  float leaving_cost(const ExitCost& cost, const float* x_D) const;
  void leave_early(Threads& threads, Latents& latents, int layer, int together);
  void fill(Threads& threads, const Latents& left, int layer);

  Config config_;
  const Kernels& kernels_;
  int width_, heads_width_, projected_width_, value_stride_, angle_stride_;  // of rows, padded
  std::vector<float> rotary_rates_, embedding_VxD_, taps_LxD_, context_norm_, final_norm_;
  EmbeddingBag keyboard_, retrieval_, gap_;
  Matrix latent_, cross_keys_values_, head_;
  Block cross_;
  std::vector<Block> blocks_;
  std::map<int, ExitCost> exit_costs_;  // by the number of blocks before the exit

  // Buffers of a pass, with a row for each position or latent.
  Activations rounded_;
  std::vector<float> angles_, embedded_, x_, left_, projected_, queries_, attended_, hidden_, logits_;
  std::vector<std::vector<float>> scores_;  // of each thread
};

}  // namespace music_ar
