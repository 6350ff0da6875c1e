// What the engine computes with vector instructions, once for each instruction set.
//
// Each `kernels_*.cpp` defines a few primitives for its instruction set, and includes `kernels.inc`, which builds the
// functions below on them. `chosen_kernels` picks the best set that the CPU has. Results depend on the set in the last
// bits, but never on how many rows or threads there are: every output is summed in one order.
//
// Dimension key, in addition to that of music_ar/model/config.py: I inputs and O outputs of a matrix, T rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace music_ar {

constexpr int PADDING = 32;  // rows of activations, and outputs, are padded with zeros to a multiple of this
constexpr int MOST_HEAD_SIZE = 256;
constexpr float EPSILON = 1e-6f;  // of RMSNorm, as in Flax
constexpr float LARGEST = 127 * 128 + 63;  // of 128 * high + low, with high in -127..127 and low in -64..64

inline int padded(int size) { return (size + PADDING - 1) / PADDING * PADDING; }

// An int8 matrix [I, O] with one scale per output, packed by the kernels.
struct Matrix {
  int inputs, outputs;              // outputs are padded
  std::vector<int8_t> packed;       // in the order in which `product` reads it
  std::vector<float> scale_O;
  std::vector<float> bias_O;        // empty: none
};

// Rows rounded to 15 bits: value = whole number * step. Two bytes a number; their order is the kernels' own.
struct Activations {
  int stride = 0;                   // bytes a row
  std::vector<int8_t> numbers_TxI;
  std::vector<float> step_T;
  std::vector<int32_t> sums_Tx2;    // of the high and of the low parts, for kernels with unsigned weights

  Activations(int rows, int inputs)
      : stride(2 * padded(inputs)), numbers_TxI(size_t(rows) * stride), step_T(rows), sums_Tx2(2 * rows) {}
};

enum class Then { STORE, SQUARED_RELU, ADD };  // what to do with a product

// One query position and one key head: what it reads, and where its output goes.
struct Attention {
  int heads, size, stride;          // query heads of the key head; K; K padded
  const float* q_HxK;               // already multiplied by K**-0.5; rows are `stride` apart
  const void* keys;                 // see `write_key`
  const void* values;
  int slots, first, count;          // of the rolling cache; first visible slot; number of visible ones
  float* out_HxK;                   // rows are K apart
  float* scores;                    // 4 * slots numbers
};

struct Kernels {
  const char* name;
  size_t cached_bytes;              // of a cached number: 2 (float16) or 4

  // Pack an [I, O] matrix into `outputs` columns from `first` of a packed one.
  void (*pack)(Matrix& matrix, const int8_t* kernel_IxO, int first, int outputs);
  // Round a row; before that, RMSNorm with these scales unless they are null.
  void (*quantize)(const float* x_I, const float* norm_I, int inputs, Activations& into, int row);
  // Outputs `begin` to `end`, multiples of PADDING, of all rows; rows of y are `stride` numbers apart.
  void (*product)(const Matrix& matrix, const Activations& x, int rows, int begin, int end, Then then, float* y_TxO,
                  int stride);
  // y += weight * row of an int8 matrix.
  void (*add_row)(float* y_D, const int8_t* row_D, float weight, int width);
  // y = RMSNorm(x) * scale, rotated by position, times a factor; y is padded with zeros.
  void (*rotate)(const float* x_K, const float* scale_K, const float* cos_R, const float* sin_R, int pairs, int size,
                 float factor, float* y_K);
  // Keys are cached as blocks of positions, [position / P, K, P], so that lanes are positions; values as [position, K].
  void (*write_key)(void* keys, int slot, const float* k_K, int size);
  void (*write_value)(void* values, int slot, const float* v_K, int size, int stride);
  void (*attend)(const Attention& attention);
  float (*log_sum_exp)(const float* x, int size);
};

extern const Kernels kernels_vnni, kernels_avx2, kernels_portable;

// The best kernels for this CPU, or those that the environment variable MUSIC_AR_CPU names.
const Kernels& chosen_kernels();

}  // namespace music_ar
