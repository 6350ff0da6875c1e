// Kernels for AVX2 with FMA and F16C: Intel from Haswell, AMD from Excavator.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace music_ar {
namespace avx2 {

constexpr int LANES = 8, OUTPUTS = 16, TILE_ROWS = 2;
using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Cached = uint16_t;  // float16

static inline Floats load_cached(const Cached* x) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)); }

static inline void store_cached(Cached* y, Floats x) {
  _mm_storeu_si128((__m128i*)y, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static inline Ints load_bytes(const int8_t* x) { return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)x)); }

// vpmaddwd multiplies int16, so the 15 bits of an activation go in at once, and weights are widened when they are read.

static inline void pack_group(int8_t* block, int group, int output, const int8_t* four) {
  for (int i = 0; i < 4; ++i) block[(group * OUTPUTS + output) * 4 + i] = four[i];
}

static inline void store_numbers(int8_t* numbers, int i, Ints high, Ints low) {
  const __m256i whole = (__m256i)(high * 128 + low);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole, whole), 0x08);
  _mm_storeu_si128((__m128i*)(numbers + 2 * i), _mm256_castsi256_si128(packed));
}

// Groups whose sums of products fit into int32: 1,024 inputs times 127 times LARGEST.
constexpr int SEGMENT = 256;

// Four times PARTS of a tile's outputs.
template <int ROWS, int PARTS>
static inline void part_tile(const int8_t* weights, int groups, const int8_t* numbers, int stride, float* y_TxO) {
  for (int r = 0; r < ROWS; ++r)
    for (int o = 0; o < 4 * PARTS; ++o) y_TxO[r * OUTPUTS + o] = 0;
  for (int begin = 0; begin < groups; begin += SEGMENT) {
    const int end = begin + SEGMENT < groups ? begin + SEGMENT : groups;
    __m256i sums[ROWS][PARTS];  // each of four outputs, and of two sums of pairs each
    for (int r = 0; r < ROWS; ++r)
      for (int part = 0; part < PARTS; ++part) sums[r][part] = _mm256_setzero_si256();
    for (int group = begin; group < end; ++group) {
      const int8_t* bytes = weights + group * 4 * OUTPUTS;
      __builtin_prefetch(bytes + 4096);  // the next page
      __m256i w[PARTS];
      for (int part = 0; part < PARTS; ++part)
        w[part] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(bytes + 16 * part)));
      for (int r = 0; r < ROWS; ++r) {
        int64_t four;
        __builtin_memcpy(&four, numbers + size_t(r) * stride + group * 8, 8);
        const __m256i x = _mm256_set1_epi64x(four);
        for (int part = 0; part < PARTS; ++part)
          sums[r][part] = _mm256_add_epi32(sums[r][part], _mm256_madd_epi16(w[part], x));
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int part = 0; part < PARTS; part += 2) {
        const __m256i pairs = _mm256_hadd_epi32(sums[r][part], sums[r][part + 1]);
        float* y = y_TxO + r * OUTPUTS + 4 * part;
        const __m256 y8 = _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(pairs, 0xD8));
        _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), y8));
      }
  }
}

// Two rows of all sixteen outputs do not fit into the registers: the loop would wait for a sum in memory.
template <int ROWS>
static inline void tile(const int8_t* weights, int groups, const int8_t* numbers, int stride, const int32_t*,
                        float* y_TxO) {
  constexpr int PARTS = ROWS == 1 ? 4 : 2;
  for (int first = 0; first < OUTPUTS; first += 4 * PARTS)
    part_tile<ROWS, PARTS>(weights + 4 * first, groups, numbers, stride, y_TxO + first);
}

#include "kernels.inc"

}  // namespace avx2

const Kernels kernels_avx2 = {
    "avx2",       sizeof(avx2::Cached), avx2::pack,      avx2::quantize,    avx2::product, avx2::add_row,
    avx2::rotate, avx2::write_key,      avx2::write_value, avx2::attend, avx2::log_sum_exp};

}  // namespace music_ar

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
