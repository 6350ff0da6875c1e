// Kernels for AVX-512 with VNNI: Intel from Cascade Lake, AMD from Zen 4.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif

namespace music_ar {
namespace vnni {

constexpr int LANES = 16, OUTPUTS = 32, TILE_ROWS = 4;
using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Cached = uint16_t;  // float16

static inline Floats load_cached(const Cached* x) {
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
}

static inline void store_cached(Cached* y, Floats x) {
  _mm256_storeu_si256((__m256i*)y, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static inline Ints load_bytes(const int8_t* x) { return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x)); }

// vpdpbusd multiplies unsigned by signed bytes. Weights are the unsigned ones, raised by 128, so that four activations
// can be broadcast from memory; 128 times the sum of the activations is taken off again.

static inline void pack_group(int8_t* block, int group, int output, const int8_t* four) {
  for (int i = 0; i < 4; ++i) block[(group * OUTPUTS + output) * 4 + i] = int8_t(four[i] ^ 0x80);
}

// [I / 4, high and low, 4]
static inline void store_numbers(int8_t* numbers, int i, Ints high, Ints low) {
  const __m128i h = _mm512_cvtepi32_epi8((__m512i)high), l = _mm512_cvtepi32_epi8((__m512i)low);
  _mm_storeu_si128((__m128i*)(numbers + 2 * i), _mm_unpacklo_epi32(h, l));
  _mm_storeu_si128((__m128i*)(numbers + 2 * i + 16), _mm_unpackhi_epi32(h, l));
}

template <int ROWS>
static inline void tile(const int8_t* weights, int groups, const int8_t* numbers, int stride, const int32_t* sums_Tx2,
                        float* y_TxO) {
  __m512i high[ROWS][2], low[ROWS][2];
  for (int r = 0; r < ROWS; ++r)
    for (int half = 0; half < 2; ++half) {
      high[r][half] = _mm512_set1_epi32(-128 * sums_Tx2[2 * r]);
      low[r][half] = _mm512_set1_epi32(-128 * sums_Tx2[2 * r + 1]);
    }
  for (int group = 0; group < groups; ++group, weights += 4 * OUTPUTS, numbers += 8) {
    __builtin_prefetch(weights + 4096);  // the next page
    __builtin_prefetch(weights + 4096 + 64);
    const __m512i w[2] = {_mm512_loadu_si512(weights), _mm512_loadu_si512(weights + 64)};
    for (int r = 0; r < ROWS; ++r) {
      int32_t x[2];
      __builtin_memcpy(x, numbers + size_t(r) * stride, 8);
      for (int half = 0; half < 2; ++half) {
        high[r][half] = _mm512_dpbusd_epi32(high[r][half], w[half], _mm512_set1_epi32(x[0]));
        low[r][half] = _mm512_dpbusd_epi32(low[r][half], w[half], _mm512_set1_epi32(x[1]));
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int half = 0; half < 2; ++half) {
      const __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[r][half]), _mm512_set1_ps(128),
                                       _mm512_cvtepi32_ps(low[r][half]));
      _mm512_storeu_ps(y_TxO + r * OUTPUTS + 16 * half, y);
    }
}

#include "kernels.inc"

}  // namespace vnni

const Kernels kernels_vnni = {
    "vnni",       sizeof(vnni::Cached), vnni::pack,      vnni::quantize,    vnni::product, vnni::add_row,
    vnni::rotate, vnni::write_key,      vnni::write_value, vnni::attend, vnni::log_sum_exp};

}  // namespace music_ar

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
