// Kernels for any CPU, in plain vectors of four; int8 products by NEON's dot product where the compiler may use it.
#include "kernels.h"

#include <cmath>

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace music_ar {
namespace portable {

constexpr int LANES = 4, OUTPUTS = 16, TILE_ROWS = 2;
using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Cached = float;

static inline Floats load_cached(const Cached* x) {
  Floats y;
  __builtin_memcpy(&y, x, sizeof y);
  return y;
}

static inline void store_cached(Cached* y, Floats x) { __builtin_memcpy(y, &x, sizeof x); }

static inline Ints load_bytes(const int8_t* x) { return Ints{x[0], x[1], x[2], x[3]}; }

#if defined(__ARM_FEATURE_DOTPROD)

static inline void pack_group(int8_t* block, int group, int output, const int8_t* four) {
  for (int i = 0; i < 4; ++i) block[(group * OUTPUTS + output) * 4 + i] = four[i];
}

// [I / 4, high and low, 4]
static inline void store_numbers(int8_t* numbers, int i, Ints high, Ints low) {
  for (int lane = 0; lane < LANES; ++lane) {
    numbers[2 * i + lane] = int8_t(high[lane]);
    numbers[2 * i + 4 + lane] = int8_t(low[lane]);
  }
}

template <int ROWS>
static inline void tile(const int8_t* weights, int groups, const int8_t* numbers, int stride, const int32_t*,
                        float* y_TxO) {
  int32x4_t high[ROWS][4] = {}, low[ROWS][4] = {};
  for (int group = 0; group < groups; ++group) {
    for (int part = 0; part < 4; ++part) {
      const int8x16_t w = vld1q_s8(weights + group * 4 * OUTPUTS + 16 * part);
      for (int r = 0; r < ROWS; ++r) {
        const int8x8_t x = vld1_s8(numbers + size_t(r) * stride + group * 8);
        high[r][part] = vdotq_lane_s32(high[r][part], w, x, 0);
        low[r][part] = vdotq_lane_s32(low[r][part], w, x, 1);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int part = 0; part < 4; ++part)
      vst1q_f32(y_TxO + r * OUTPUTS + 4 * part,
                vaddq_f32(vmulq_n_f32(vcvtq_f32_s32(high[r][part]), 128), vcvtq_f32_s32(low[r][part])));
}

#else

// [I, outputs of a block], so that a compiler multiplies a row of outputs by one number.
static inline void pack_group(int8_t* block, int group, int output, const int8_t* four) {
  for (int i = 0; i < 4; ++i) block[(4 * group + i) * OUTPUTS + output] = four[i];
}

static inline void store_numbers(int8_t* numbers, int i, Ints high, Ints low) {
  for (int lane = 0; lane < LANES; ++lane) {
    const int16_t whole = int16_t(high[lane] * 128 + low[lane]);
    __builtin_memcpy(numbers + 2 * (i + lane), &whole, 2);
  }
}

// Inputs whose sums of products fit into int32: 1,024 times 127 times LARGEST.
constexpr int SEGMENT = 1024;

template <int ROWS>
static inline void tile(const int8_t* weights, int groups, const int8_t* numbers, int stride, const int32_t*,
                        float* y_TxO) {
  for (int i = 0; i < ROWS * OUTPUTS; ++i) y_TxO[i] = 0;
  for (int begin = 0; begin < 4 * groups; begin += SEGMENT) {
    const int end = begin + SEGMENT < 4 * groups ? begin + SEGMENT : 4 * groups;
    int32_t sums[ROWS][OUTPUTS] = {};
    for (int i = begin; i < end; ++i)
      for (int r = 0; r < ROWS; ++r) {
        int16_t x;
        __builtin_memcpy(&x, numbers + size_t(r) * stride + 2 * i, 2);
        for (int o = 0; o < OUTPUTS; ++o) sums[r][o] += int16_t(weights[i * OUTPUTS + o]) * x;
      }
    for (int r = 0; r < ROWS; ++r)
      for (int o = 0; o < OUTPUTS; ++o) y_TxO[r * OUTPUTS + o] += float(sums[r][o]);
  }
}

#endif

#include "kernels.inc"

}  // namespace portable

const Kernels kernels_portable = {"portable",         sizeof(portable::Cached), portable::pack,
                                  portable::quantize, portable::product,        portable::add_row,
                                  portable::rotate,   portable::write_key,      portable::write_value,
                                  portable::attend,   portable::log_sum_exp};

}  // namespace music_ar
