/* Weights and tokens as vectors: what every dtype and form becomes in registers.
 *
 * A load takes STEP elements of a row and gives two vectors. bf16 becomes float32 by a shift, so
 * that the two hold the even and the odd elements; of x and of quantised weights they do too.
 * Where bf16 is multiplied as it is, they hold the first and the second half. */
#ifndef MOE_ROW_LOADS_H
#define MOE_ROW_LOADS_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "scaled_numbers.h"

#define INLINE static inline __attribute__((always_inline))
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512F __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl")))
#define TARGET_AVX512_BF16 \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512bf16")))
#define TARGET_AVX512_VBMI \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512bf16,avx512vbmi")))

struct bf16_pair { __m512i a, b; };
struct f32x16_pair { __m512 a, b; };
struct f32x8_pair { __m256 a, b; };

/* ---- Elements of x, and weights of the same dtype ---- */

TARGET_AVX512_BF16 INLINE struct bf16_pair load_bf16_as_is(const char *p) {
    return (struct bf16_pair){_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64)};
}
TARGET_AVX512F INLINE struct f32x16_pair widen_bf16_avx512(__m512i v) {
    return (struct f32x16_pair){
        _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
        _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)))};
}
TARGET_AVX512F INLINE struct f32x16_pair load_bf16_avx512(const char *p) {
    return widen_bf16_avx512(_mm512_loadu_si512(p));
}
TARGET_AVX512F INLINE struct f32x16_pair load_f16_avx512(const char *p) {
    return (struct f32x16_pair){_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)),
                                _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p + 32)))};
}
TARGET_AVX512F INLINE struct f32x16_pair load_f32_avx512(const char *p) {
    return (struct f32x16_pair){_mm512_loadu_ps(p), _mm512_loadu_ps(p + 64)};
}
TARGET_AVX2 INLINE struct f32x8_pair widen_bf16_avx2(__m256i v) {
    return (struct f32x8_pair){
        _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)),
        _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32((int)0xffff0000)))};
}
TARGET_AVX2 INLINE struct f32x8_pair load_bf16_avx2(const char *p) {
    return widen_bf16_avx2(_mm256_loadu_si256((const __m256i *)p));
}
TARGET_AVX2 INLINE struct f32x8_pair load_f16_avx2(const char *p) {
    return (struct f32x8_pair){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                               _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 16)))};
}
TARGET_AVX2 INLINE struct f32x8_pair load_f32_avx2(const char *p) {
    return (struct f32x8_pair){_mm256_loadu_ps((const float *)p),
                               _mm256_loadu_ps((const float *)(p + 32))};
}

/* ---- int8: the even one of two neighbours is shifted to the top of 32 bits, which is 2^24 times
 * what it is; its sum is set right at the end ---- */

TARGET_AVX512F INLINE struct f32x16_pair load_int8_avx512(const char *p) {
    const __m512i v = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return (struct f32x16_pair){_mm512_cvtepi32_ps(_mm512_slli_epi32(v, 24)),
                                _mm512_cvtepi32_ps(_mm512_srai_epi32(v, 8))};
}
TARGET_AVX2 INLINE struct f32x8_pair load_int8_avx2(const char *p) {
    const __m256i v = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)p));
    return (struct f32x8_pair){_mm256_cvtepi32_ps(_mm256_slli_epi32(v, 24)),
                               _mm256_cvtepi32_ps(_mm256_srai_epi32(v, 8))};
}

/* ---- int4: code minus 8, times the scale of its group ---- */

INLINE float bf16_at(const char *p) {
    uint16_t half;
    memcpy(&half, p, sizeof half);
    return moe_float((uint32_t)half << 16);
}
TARGET_AVX512F INLINE struct f32x16_pair load_int4_avx512(const char *p, const char *scale) {
    const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512 table = _mm512_mul_ps(codes, _mm512_set1_ps(bf16_at(scale)));
    const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return (struct f32x16_pair){_mm512_permutexvar_ps(v, table),
                                _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4), table)};
}
TARGET_AVX2 INLINE __m256 int4_avx2(__m256i codes, const char *scale) {
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(8))),
                         _mm256_set1_ps(bf16_at(scale)));
}
TARGET_AVX2 INLINE struct f32x8_pair load_int4_avx2(const char *p, const char *scale) {
    const __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    return (struct f32x8_pair){int4_avx2(_mm256_and_si256(v, _mm256_set1_epi32(15)), scale),
                               int4_avx2(_mm256_srli_epi32(v, 4), scale)};
}

/* ---- mxfp4 and fp8, by tables that are made when the library is loaded ---- */

static uint16_t SCALED_E2M1[256][16] __attribute__((aligned(64))); /* bf16, by scale and code */
static uint8_t E4M3_LOW[128] __attribute__((aligned(64)));  /* of the bf16 of a byte without sign */
static uint8_t E4M3_HIGH[128] __attribute__((aligned(64)));

__attribute__((constructor)) static void make_tables(void) {
    for (int scale = 0; scale < 256; scale++)
        moe_scaled_e2m1((uint8_t)scale, SCALED_E2M1[scale]);
    for (int byte = 0; byte < 128; byte++) {
        const uint16_t number = moe_bf16(moe_e4m3((uint8_t)byte));
        E4M3_LOW[byte] = (uint8_t)number;
        E4M3_HIGH[byte] = (uint8_t)(number >> 8);
    }
}

INLINE const uint16_t *e2m1_at(const char *scale) { return SCALED_E2M1[(uint8_t)*scale]; }

/* 32 codes as bf16. The table stands in the register twice, so that of a word the low four bits
 * decide, and what is above them need not be cleared. */
TARGET_AVX512_BF16 INLINE __m512i mxfp4_as_bf16(const char *p, const char *scale) {
    const __m512i table =
        _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i *)(const void *)e2m1_at(scale)));
    const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm512_permutexvar_epi16(_mm512_or_si512(v, _mm512_slli_epi32(v, 12)), table);
}
TARGET_AVX512_BF16 INLINE struct bf16_pair load_mxfp4_as_bf16(const char *p, const char *scales) {
    return (struct bf16_pair){mxfp4_as_bf16(p, scales), mxfp4_as_bf16(p + 16, scales + 1)};
}
TARGET_AVX512F INLINE struct f32x16_pair load_mxfp4_avx512(const char *p, const char *scale) {
    const __m256i words = _mm256_load_si256((const __m256i *)(const void *)e2m1_at(scale));
    const __m512 table =
        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return (struct f32x16_pair){_mm512_permutexvar_ps(v, table),
                                _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4), table)};
}
/* The first eight numbers, and the sign from bit 3. */
TARGET_AVX2 INLINE __m256 e2m1_avx2(__m256i v, __m256 table) {
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(v, 28), _mm256_set1_epi32(INT32_MIN));
    return _mm256_or_ps(_mm256_permutevar8x32_ps(table, v), _mm256_castsi256_ps(sign));
}
TARGET_AVX2 INLINE struct f32x8_pair load_mxfp4_avx2(const char *p, const char *scale) {
    const __m128i words = _mm_load_si128((const __m128i *)(const void *)e2m1_at(scale));
    const __m256 table =
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
    const __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    return (struct f32x8_pair){e2m1_avx2(v, table), e2m1_avx2(_mm256_srli_epi32(v, 4), table)};
}

/* Without their scale, which belongs to the sum. Eighths of the vector are put so that interleaving
 * low and high bytes, which goes by quarters, gives the first 32 weights and then the others. */
TARGET_AVX512_VBMI INLINE struct bf16_pair load_fp8_as_bf16(const char *p) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i v = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(p));
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(E4M3_LOW), v,
                                                 _mm512_load_si512(E4M3_LOW + 64));
    const __m512i rest = _mm512_permutex2var_epi8(_mm512_load_si512(E4M3_HIGH), v,
                                                  _mm512_load_si512(E4M3_HIGH + 64));
    const __m512i sign = _mm512_and_si512(v, _mm512_set1_epi8((char)0x80));
    const __m512i high = _mm512_or_si512(rest, sign);
    return (struct bf16_pair){_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

/* The bits of e4m3, moved, are those of a half 2^8 times smaller, subnormal numbers included; an
 * exponent of all ones makes the NaN. */
TARGET_AVX512F INLINE __m512 halves_avx512(__m256i sign, __m256i rest) {
    const __m256i most = _mm256_set1_epi16(0x3f80);
    const __m256i moved = _mm256_and_si256(rest, most);
    const __mmask16 is_nan = _mm256_cmpeq_epi16_mask(moved, most);
    const __m256i signs = _mm256_and_si256(sign, _mm256_set1_epi16(INT16_MIN));
    return _mm512_cvtph_ps(_mm256_mask_mov_epi16(_mm256_or_si256(moved, signs), is_nan,
                                                 _mm256_set1_epi16(0x7e00)));
}
TARGET_AVX512F INLINE struct f32x16_pair load_fp8_avx512(const char *p) {
    const __m256i v = _mm256_loadu_si256((const __m256i *)p);
    return (struct f32x16_pair){halves_avx512(_mm256_slli_epi16(v, 8), _mm256_slli_epi16(v, 7)),
                                halves_avx512(v, _mm256_srli_epi16(v, 1))};
}
TARGET_AVX2 INLINE __m256 halves_avx2(__m128i sign, __m128i rest) {
    const __m128i most = _mm_set1_epi16(0x3f80);
    const __m128i moved = _mm_and_si128(rest, most);
    const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(moved, most), _mm_set1_epi16(0x7e00));
    const __m128i signs = _mm_and_si128(sign, _mm_set1_epi16(INT16_MIN));
    return _mm256_cvtph_ps(_mm_or_si128(_mm_or_si128(moved, signs), nan));
}
TARGET_AVX2 INLINE struct f32x8_pair load_fp8_avx2(const char *p) {
    const __m128i v = _mm_loadu_si128((const __m128i *)p);
    return (struct f32x8_pair){halves_avx2(_mm_slli_epi16(v, 8), _mm_slli_epi16(v, 7)),
                               halves_avx2(v, _mm_srli_epi16(v, 1))};
}

#endif
