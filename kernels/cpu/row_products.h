/* Rows of weights times the tokens of an expert: every level, dtype and form of weights.
 *
 * An output is two partial sums of vector lanes, fed in turns and added up in a fixed tree. Nothing
 * in it depends on the other tokens or rows, and packed rows give the bits of the rows that they
 * are packed from: weights are decoded into the registers that a load would have filled. */
#ifndef MOE_ROW_PRODUCTS_H
#define MOE_ROW_PRODUCTS_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "packed_row.h"

enum level { AVX2 = 1, AVX512F = 2, AVX512_BF16 = 3 };
enum dtype { BF16 = 0, F16 = 1, F32 = 2 };

/* How weights stand in memory. PLAIN ones have the dtype of x. All others go with bf16 x: PACKED
 * rows are those of a block (packed_row.h); INT8 ones have a scale each; of INT4 ones, code minus 8,
 * GROUP of a row share one, of which the last may be fewer, and the low half of a byte is the even
 * column's. */
enum form { PLAIN = 0, PACKED = 1, INT8 = 2, INT4 = 3 };

/* Rows of a matrix that lie behind each other. */
struct moe_part {
    const void *rows;   /* the first of them; of PACKED ones, their block */
    const void *scales; /* INT8: float [num_rows]; INT4: bf16, one a group */
    int64_t num_rows, form;
};

enum {
    MAX_TOKENS = 16, /* of one expert, that a row of weights meets before the next row */
    TOKENS = 4,      /* of these, in registers at a time */
    FEW_TOKENS = 4,  /* up to which a thread reads one row of weights at a time */
    STEP_BYTES = 128, /* the most that one step of any loop below reads of a row */
    GROUP = 32,
};

/* The tokens of one expert, MAX_TOKENS at a time: rows of x, and of where outputs go. */
struct tokens {
    const char *x[MAX_TOKENS];
    float *y[MAX_TOKENS];
};

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512F __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl")))
#define TARGET_AVX512_BF16 \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512bf16")))

INLINE int64_t size_of(int dtype) { return dtype == F32 ? 4 : 2; }
INLINE int64_t int4_scale_bytes(int64_t num_columns) { return (num_columns + GROUP - 1) / GROUP * 2; }

/* ---- Loads: STEP elements of a row as two vectors. bf16 becomes float32 by a shift, so that the
 * two vectors hold the even and the odd elements; of x and of quantised weights they do too. ---- */

struct bf16_pair { __m512i a, b; };
struct f32x16_pair { __m512 a, b; };
struct f32x8_pair { __m256 a, b; };

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

/* Quantised weights: the bytes at p, and the scale of their group, if groups have one.
 * int8: the even one of two neighbours is shifted to the top of 32 bits, which is 2^24 times what
 * it is; its sum is set right at the end. */
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
INLINE float bf16_at(const char *p) {
    uint16_t half;
    memcpy(&half, p, sizeof half);
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
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

/* ---- Products and sums of what was loaded ---- */

TARGET_AVX512_BF16 INLINE __m512 add_bf16(__m512 sum, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
}
TARGET_AVX512F INLINE __m512 add_avx512(__m512 sum, __m512 w, __m512 x) {
    return _mm512_fmadd_ps(w, x, sum);
}
TARGET_AVX2 INLINE __m256 add_avx2(__m256 sum, __m256 w, __m256 x) {
    return _mm256_fmadd_ps(w, x, sum);
}
TARGET_AVX2 INLINE float total_avx2(__m256 a, __m256 b) {
    const __m256 v = _mm256_add_ps(a, b);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
TARGET_AVX512F INLINE float total_avx512(__m512 a, __m512 b) {
    return _mm512_reduce_add_ps(_mm512_add_ps(a, b));
}
TARGET_AVX2 INLINE float total_int8_avx2(__m256 a, __m256 b) {
    return total_avx2(_mm256_mul_ps(a, _mm256_set1_ps(0x1p-24f)), b);
}
TARGET_AVX512F INLINE float total_int8_avx512(__m512 a, __m512 b) {
    return total_avx512(_mm512_mul_ps(a, _mm512_set1_ps(0x1p-24f)), b);
}

/* NAME: `num_rows` rows of `num_columns` at w times `num` tokens, whose outputs go to y[.][row ..].
 * The loop over columns stands here once; a level, a dtype and a form of weights are the BITS of a
 * weight, its LOAD at `at` with the scale of its group at `scale`, BYTES and LOAD of x, ADD and
 * TOTAL. A few tokens take one row at a time; more take MANY_ROWS, as then the loads of x are what
 * costs. What is left of a row behind the last whole STEP is copied, so that nothing beyond it is
 * read. */
#define DEFINE_DOT(NAME, TARGET, VECTOR, ZERO, PAIR, W_BITS, LOAD_W, X_BYTES, LOAD_X, ADD, TOTAL, \
                   STEP, MANY_ROWS)                                                               \
    TARGET INLINE PAIR NAME##_weights(const char *at, const char *scale) {                        \
        (void)scale;                                                                              \
        return LOAD_W;                                                                            \
    }                                                                                             \
    TARGET INLINE void NAME##_block(const char *w, const char *s, const int64_t num_columns,      \
                                    const char *const *xs, float *const *ys, int64_t row,         \
                                    const int m, const int n) {                                   \
        const char *const w2 = w + num_columns * (W_BITS) / 8;                                    \
        const char *const s2 = s + int4_scale_bytes(num_columns);                                 \
        const char *x[TOKENS];                                                                    \
        VECTOR a[TOKENS], b[TOKENS], a2[TOKENS], b2[TOKENS];                                      \
        UNROLL for (int j = 0; j < n; j++) x[j] = xs[j];                                          \
        UNROLL for (int j = 0; j < n; j++) a[j] = b[j] = a2[j] = b2[j] = ZERO();                  \
        int64_t k = 0;                                                                            \
        for (; k + (STEP) <= num_columns; k += (STEP)) {                                          \
            const int64_t at = k * (W_BITS) / 8, group = k / GROUP * 2;                           \
            const PAIR p = NAME##_weights(w + at, s + group);                                     \
            const PAIR p2 = NAME##_weights((m > 1 ? w2 : w) + at, (m > 1 ? s2 : s) + group);      \
            UNROLL for (int j = 0; j < n; j++) {                                                  \
                const PAIR q = LOAD_X(x[j] + k * (X_BYTES));                                      \
                a[j] = ADD(a[j], p.a, q.a);                                                       \
                b[j] = ADD(b[j], p.b, q.b);                                                       \
                if (m == 1) continue;                                                             \
                a2[j] = ADD(a2[j], p2.a, q.a);                                                    \
                b2[j] = ADD(b2[j], p2.b, q.b);                                                    \
            }                                                                                     \
        }                                                                                         \
        if (k < num_columns) {                                                                    \
            char rest_w[STEP_BYTES] = {0}, rest_w2[STEP_BYTES] = {0}, rest_x[STEP_BYTES] = {0};   \
            const int64_t at = k * (W_BITS) / 8, group = k / GROUP * 2;                           \
            const size_t w_bytes = (size_t)((num_columns - k) * (W_BITS) / 8);                    \
            memcpy(rest_w, w + at, w_bytes);                                                      \
            if (m > 1) memcpy(rest_w2, w2 + at, w_bytes);                                         \
            const PAIR p = NAME##_weights(rest_w, s + group);                                     \
            const PAIR p2 = NAME##_weights(rest_w2, (m > 1 ? s2 : s) + group);                    \
            UNROLL for (int j = 0; j < n; j++) {                                                  \
                memcpy(rest_x, x[j] + k * (X_BYTES), (size_t)((num_columns - k) * (X_BYTES)));    \
                const PAIR q = LOAD_X(rest_x);                                                    \
                a[j] = ADD(a[j], p.a, q.a);                                                       \
                b[j] = ADD(b[j], p.b, q.b);                                                       \
                if (m == 1) continue;                                                             \
                a2[j] = ADD(a2[j], p2.a, q.a);                                                    \
                b2[j] = ADD(b2[j], p2.b, q.b);                                                    \
            }                                                                                     \
        }                                                                                         \
        UNROLL for (int j = 0; j < n; j++) ys[j][row] = TOTAL(a[j], b[j]);                        \
        if (m == 1) return;                                                                       \
        UNROLL for (int j = 0; j < n; j++) ys[j][row + 1] = TOTAL(a2[j], b2[j]);                  \
    }                                                                                             \
    TARGET INLINE void NAME##_rows(const char *w, const char *s, int64_t num_columns,             \
                                   const struct tokens *tokens, int num, int64_t row,             \
                                   const int m) {                                                 \
        for (int first = 0; first < num; first += TOKENS) {                                       \
            const char *const *x = tokens->x + first;                                             \
            float *const *y = tokens->y + first;                                                  \
            switch (num - first) {                                                                \
                case 1: NAME##_block(w, s, num_columns, x, y, row, m, 1); break;                  \
                case 2: NAME##_block(w, s, num_columns, x, y, row, m, 2); break;                  \
                case 3: NAME##_block(w, s, num_columns, x, y, row, m, 3); break;                  \
                default: NAME##_block(w, s, num_columns, x, y, row, m, TOKENS);                   \
            }                                                                                     \
        }                                                                                         \
    }                                                                                             \
    TARGET static void NAME(const char *w, const char *s, int64_t num_rows, int64_t num_columns,  \
                            const struct tokens *tokens, int num) {                               \
        const int64_t row_bytes = num_columns * (W_BITS) / 8;                                     \
        const int64_t scales = int4_scale_bytes(num_columns);                                     \
        int64_t row = 0;                                                                          \
        if (num > FEW_TOKENS)                                                                     \
            for (; row + (MANY_ROWS) <= num_rows; row += (MANY_ROWS))                             \
                NAME##_rows(w + row * row_bytes, s + row * scales, num_columns, tokens, num, row, \
                            MANY_ROWS);                                                           \
        for (; row < num_rows; row++)                                                             \
            NAME##_rows(w + row * row_bytes, s + row * scales, num_columns, tokens, num, row, 1); \
    }

#define AVX512_F32 TARGET_AVX512F, __m512, _mm512_setzero_ps, struct f32x16_pair
#define AVX2_F32 TARGET_AVX2, __m256, _mm256_setzero_ps, struct f32x8_pair
#define DEFINE_DOT_OF(...) DEFINE_DOT(__VA_ARGS__) /* once the two above are taken apart */

DEFINE_DOT(dot_avx512_bf16, TARGET_AVX512_BF16, __m512, _mm512_setzero_ps, struct bf16_pair, 16,
           load_bf16_as_is(at), 2, load_bf16_as_is, add_bf16, total_avx512, 64, 2)
DEFINE_DOT_OF(dot_avx512_bf16_as_f32, AVX512_F32, 16, load_bf16_avx512(at), 2, load_bf16_avx512,
              add_avx512, total_avx512, 32, 2)
DEFINE_DOT_OF(dot_avx512_f16, AVX512_F32, 16, load_f16_avx512(at), 2, load_f16_avx512, add_avx512,
              total_avx512, 32, 2)
DEFINE_DOT_OF(dot_avx512_f32, AVX512_F32, 32, load_f32_avx512(at), 4, load_f32_avx512, add_avx512,
              total_avx512, 32, 2)
DEFINE_DOT_OF(dot_avx512_int8, AVX512_F32, 8, load_int8_avx512(at), 2, load_bf16_avx512, add_avx512,
              total_int8_avx512, 32, 2)
DEFINE_DOT_OF(dot_avx512_int4, AVX512_F32, 4, load_int4_avx512(at, scale), 2, load_bf16_avx512,
              add_avx512, total_avx512, 32, 2)
DEFINE_DOT_OF(dot_avx2_bf16, AVX2_F32, 16, load_bf16_avx2(at), 2, load_bf16_avx2, add_avx2,
              total_avx2, 16, 1)
DEFINE_DOT_OF(dot_avx2_f16, AVX2_F32, 16, load_f16_avx2(at), 2, load_f16_avx2, add_avx2, total_avx2,
              16, 1)
DEFINE_DOT_OF(dot_avx2_f32, AVX2_F32, 32, load_f32_avx2(at), 4, load_f32_avx2, add_avx2, total_avx2,
              16, 1)
DEFINE_DOT_OF(dot_avx2_int8, AVX2_F32, 8, load_int8_avx2(at), 2, load_bf16_avx2, add_avx2,
              total_int8_avx2, 16, 1)
DEFINE_DOT_OF(dot_avx2_int4, AVX2_F32, 4, load_int4_avx2(at, scale), 2, load_bf16_avx2, add_avx2,
              total_avx2, 16, 1)

/* NAME: one packed row, as DEFINE_DOT computes it once unpacked: PAIR_OF are the two vectors of step
 * i of a decoded tile. The escapes of the row are used up. */
#define DEFINE_PACKED_DOT(NAME, TARGET, VECTOR, ZERO, PAIR, WORDS, NUM_WORDS, HIGH, DECODE,       \
                          PAIR_OF, LOAD, ADD, TOTAL, STEP)                                        \
    TARGET INLINE void NAME##_block(const uint8_t *w, int64_t num_columns, const uint8_t *high,   \
                                    struct moe_escapes *escapes, const char *const *xs,           \
                                    float *const *ys, int64_t row, const int n) {                 \
        const WORDS table = HIGH(_mm_loadu_si128((const __m128i *)high));                         \
        VECTOR a[TOKENS], b[TOKENS];                                                              \
        const char *x[TOKENS];                                                                    \
        UNROLL for (int j = 0; j < n; j++) x[j] = xs[j];                                          \
        UNROLL for (int j = 0; j < n; j++) a[j] = b[j] = ZERO();                                  \
        int64_t k = 0;                                                                            \
        for (; k + MOE_TILE <= num_columns; k += MOE_TILE, w += MOE_TILE_BYTES) {                 \
            WORDS tile[NUM_WORDS];                                                                \
            DECODE(w, table, escapes, tile);                                                      \
            UNROLL for (int i = 0; i < MOE_TILE / (STEP); i++) {                                  \
                const PAIR p = PAIR_OF;                                                           \
                UNROLL for (int j = 0; j < n; j++) {                                              \
                    const PAIR q = LOAD(x[j] + 2 * (k + i * (STEP)));                             \
                    a[j] = ADD(a[j], p.a, q.a);                                                   \
                    b[j] = ADD(b[j], p.b, q.b);                                                   \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
        if (k < num_columns) {                                                                    \
            uint16_t rest_w[MOE_TILE] = {0}, rest_x[MOE_TILE] = {0};                              \
            const int64_t rest = num_columns - k;                                                 \
            moe_tail_plain(w, (int)rest, high, escapes, rest_w);                                  \
            UNROLL for (int j = 0; j < n; j++) {                                                  \
                memcpy(rest_x, x[j] + 2 * k, (size_t)(2 * rest));                                 \
                for (int64_t i = 0; i < rest; i += (STEP)) {                                      \
                    const PAIR p = LOAD((const char *)(rest_w + i));                              \
                    const PAIR q = LOAD((const char *)(rest_x + i));                              \
                    a[j] = ADD(a[j], p.a, q.a);                                                   \
                    b[j] = ADD(b[j], p.b, q.b);                                                   \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
        UNROLL for (int j = 0; j < n; j++) ys[j][row] = TOTAL(a[j], b[j]);                        \
    }                                                                                             \
    TARGET static void NAME(const uint8_t *w, int64_t num_columns, const uint8_t *high,           \
                            struct moe_escapes *escapes, const struct tokens *tokens, int num,    \
                            int64_t row) {                                                        \
        const struct moe_escapes begin = *escapes;                                                \
        for (int first = 0; first < num; first += TOKENS) {                                       \
            const char *const *x = tokens->x + first;                                             \
            float *const *y = tokens->y + first;                                                  \
            *escapes = begin;                                                                     \
            switch (num - first) {                                                                \
                case 1: NAME##_block(w, num_columns, high, escapes, x, y, row, 1); break;         \
                case 2: NAME##_block(w, num_columns, high, escapes, x, y, row, 2); break;         \
                case 3: NAME##_block(w, num_columns, high, escapes, x, y, row, 3); break;         \
                default: NAME##_block(w, num_columns, high, escapes, x, y, row, TOKENS);          \
            }                                                                                     \
        }                                                                                         \
    }
#define DEFINE_PACKED_DOT_OF(...) DEFINE_PACKED_DOT(__VA_ARGS__)

DEFINE_PACKED_DOT(dot_avx512_bf16_packed, TARGET_AVX512_BF16, __m512, _mm512_setzero_ps,
                  struct bf16_pair, __m512i, 4, _mm512_broadcast_i32x4, moe_tile_512,
                  ((struct bf16_pair){tile[2 * i], tile[2 * i + 1]}), load_bf16_as_is, add_bf16,
                  total_avx512, 64)
DEFINE_PACKED_DOT_OF(dot_avx512_packed, AVX512_F32, __m512i, 4, _mm512_broadcast_i32x4,
                     moe_tile_512, widen_bf16_avx512(tile[i]), load_bf16_avx512, add_avx512,
                     total_avx512, 32)
DEFINE_PACKED_DOT_OF(dot_avx2_packed, AVX2_F32, __m256i, 8, _mm256_broadcastsi128_si256,
                     moe_tile_256, widen_bf16_avx2(tile[i]), load_bf16_avx2, add_avx2, total_avx2,
                     16)

/* ---- By form ---- */

typedef void dot_rows(const char *w, const char *scales, int64_t num_rows, int64_t num_columns,
                      const struct tokens *tokens, int num);
typedef void dot_packed_row(const uint8_t *w, int64_t num_columns, const uint8_t *high,
                            struct moe_escapes *escapes, const struct tokens *tokens, int num,
                            int64_t row);

static dot_rows *dot_of(int level, int dtype, int64_t form) {
    const int is_512 = level != AVX2;
    if (form == INT8) return is_512 ? dot_avx512_int8 : dot_avx2_int8;
    if (form == INT4) return is_512 ? dot_avx512_int4 : dot_avx2_int4;
    if (level == AVX512_BF16) return dot_avx512_bf16;
    if (dtype == BF16) return is_512 ? dot_avx512_bf16_as_f32 : dot_avx2_bf16;
    if (dtype == F16) return is_512 ? dot_avx512_f16 : dot_avx2_f16;
    return is_512 ? dot_avx512_f32 : dot_avx2_f32;
}

static int64_t bytes_of_row(int dtype, int64_t form, int64_t num_columns) {
    switch (form) {
        case PACKED: return moe_row_bytes(num_columns);
        case INT8: return num_columns;
        case INT4: return num_columns / 2;
        default: return num_columns * size_of(dtype);
    }
}

/* Rows [begin, end) of a block that was checked; `begin` is the first row of a group. */
static void multiply_packed(int level, const struct moe_part *part, int64_t num_columns,
                            int64_t begin, int64_t end, const struct tokens *tokens, int num) {
    dot_packed_row *const dot = level == AVX512_BF16 ? dot_avx512_bf16_packed
                                : level == AVX512F   ? dot_avx512_packed
                                                     : dot_avx2_packed;
    const uint8_t *const block = part->rows;
    struct moe_block_header head;
    memcpy(&head, block, sizeof head);
    const int64_t row_bytes = moe_row_bytes(num_columns);
    const uint8_t *const rows = block + sizeof head;
    const uint8_t *const starts = rows + part->num_rows * row_bytes;
    const uint8_t *const first =
        starts + moe_num_starts(part->num_rows, num_columns) * (int64_t)sizeof(uint32_t);
    uint32_t start;
    memcpy(&start, starts + begin / moe_group_rows(num_columns) * (int64_t)sizeof start,
           sizeof start);
    struct moe_escapes escapes = {first + start, first + head.num_escapes};
    for (int64_t r = begin; r < end; r++)
        dot(rows + r * row_bytes, num_columns, head.high, &escapes, tokens, num, r - begin);
}

/* Outputs of rows [begin, end) of `part` go to y[.][0 ..]. */
static void multiply_rows(int level, int dtype, const struct moe_part *part, int64_t num_columns,
                          int64_t begin, int64_t end, const struct tokens *tokens, int num) {
    if (part->form == PACKED) {
        multiply_packed(level, part, num_columns, begin, end, tokens, num);
        return;
    }
    const char *const rows = part->rows, *const scales = part->scales;
    const int64_t row_bytes = bytes_of_row(dtype, part->form, num_columns);
    const int64_t scale_bytes = part->form == INT4 ? int4_scale_bytes(num_columns) : 0;
    dot_of(level, dtype, part->form)(rows + begin * row_bytes, scales + begin * scale_bytes,
                                     end - begin, num_columns, tokens, num);
    if (part->form != INT8) return;
    const float *const scale = (const float *)part->scales + begin;
    for (int j = 0; j < num; j++)
        for (int64_t r = 0; r < end - begin; r++) tokens->y[j][r] *= scale[r];
}

#endif
