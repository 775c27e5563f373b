/* Rows of weights times the tokens of an expert: every level, dtype and form of weights but packed.
 *
 * An output is two partial sums of vector lanes, fed in turns and added up in a fixed tree. Nothing
 * in it depends on the other tokens or rows. */
#ifndef MOE_ROW_PRODUCTS_H
#define MOE_ROW_PRODUCTS_H

#include "row_loads.h"

enum {
    MAX_TOKENS = 16, /* of one expert, that a row of weights meets before the next row */
    TOKENS = 4,      /* of these, in registers at a time */
    FEW_TOKENS = 4,  /* up to which a thread reads one row of weights at a time */
    STEP_BYTES = 128, /* the most that one step of any loop below reads of a row */
    INT4_GROUP = 32,
    MXFP4_GROUP = 32,
    FP8_BLOCK = 128, /* rows and columns */
};
static const int64_t WHOLE_ROW = INT64_MAX;

/* The tokens of one expert, MAX_TOKENS at a time: rows of x, and of where outputs go. */
struct tokens {
    const char *x[MAX_TOKENS];
    float *y[MAX_TOKENS];
};

#define UNROLL _Pragma("GCC unroll 16")

/* BLOCK(.., n) for the n tokens that a constant is wanted for. */
#define FOR_TOKENS(BLOCK, NUM, ...)                    \
    switch (NUM) {                                     \
        case 1: BLOCK(__VA_ARGS__, 1); break;          \
        case 2: BLOCK(__VA_ARGS__, 2); break;          \
        case 3: BLOCK(__VA_ARGS__, 3); break;          \
        default: BLOCK(__VA_ARGS__, TOKENS);           \
    }

/* ---- Products of what was loaded ---- */

TARGET_AVX512_BF16 INLINE __m512 add_bf16(__m512 sum, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
}
TARGET_AVX512F INLINE __m512 add_avx512(__m512 sum, __m512 w, __m512 x) {
    return _mm512_fmadd_ps(w, x, sum);
}
TARGET_AVX2 INLINE __m256 add_avx2(__m256 sum, __m256 w, __m256 x) {
    return _mm256_fmadd_ps(w, x, sum);
}

/* ---- The two sums of a run of columns, and what stood before it, as one. Only fp8 has more than
 * one run, each with a scale. ---- */

TARGET_AVX512F INLINE __m512 join_avx512(__m512 before, __m512 a, __m512 b, const char *scale) {
    (void)before, (void)scale;
    return _mm512_add_ps(a, b);
}
TARGET_AVX2 INLINE __m256 join_avx2(__m256 before, __m256 a, __m256 b, const char *scale) {
    (void)before, (void)scale;
    return _mm256_add_ps(a, b);
}
TARGET_AVX512F INLINE __m512 join_int8_avx512(__m512 before, __m512 a, __m512 b,
                                              const char *scale) {
    return join_avx512(before, _mm512_mul_ps(a, _mm512_set1_ps(0x1p-24f)), b, scale);
}
TARGET_AVX2 INLINE __m256 join_int8_avx2(__m256 before, __m256 a, __m256 b, const char *scale) {
    return join_avx2(before, _mm256_mul_ps(a, _mm256_set1_ps(0x1p-24f)), b, scale);
}
INLINE float float_at(const char *p) {
    float value;
    memcpy(&value, p, sizeof value);
    return value;
}
TARGET_AVX512F INLINE __m512 join_fp8(__m512 before, __m512 a, __m512 b, const char *scale) {
    return _mm512_fmadd_ps(_mm512_add_ps(a, b), _mm512_set1_ps(float_at(scale)), before);
}
TARGET_AVX512F INLINE __m512 join_fp8_avx512(__m512 before, __m512 a, __m512 b,
                                             const char *scale) {
    const __m512 size = _mm512_set1_ps(256.0f); /* halves are 2^8 times smaller */
    return join_fp8(before, _mm512_mul_ps(a, size), _mm512_mul_ps(b, size), scale);
}
TARGET_AVX2 INLINE __m256 join_fp8_avx2(__m256 before, __m256 a, __m256 b, const char *scale) {
    const __m256 sum = _mm256_mul_ps(_mm256_add_ps(a, b), _mm256_set1_ps(256.0f));
    return _mm256_fmadd_ps(sum, _mm256_set1_ps(float_at(scale)), before);
}

TARGET_AVX512F INLINE float total_avx512(__m512 v) { return _mm512_reduce_add_ps(v); }
TARGET_AVX2 INLINE float total_avx2(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* NAME: `num_rows` rows of `num_columns` at w times `num` tokens, whose outputs go to y[.][row ..];
 * scales of a row are `scale_stride` bytes behind those of the last. The loop over columns stands
 * here once. A level is TARGET to TOTAL. A form is the BITS of a weight, its LOAD at `at` with the
 * scale of its group at `scale`, a scale's COLUMNS and bytes, the RUN of columns that is summed up
 * before a JOIN. A few tokens take one row at a time; more take MANY_ROWS, as then the loads of x
 * are what costs. What is left of a row behind the last whole STEP is copied, so that nothing
 * beyond it is read. */
#define DEFINE_DOT(NAME, TARGET, VECTOR, ZERO, PAIR, ADD, TOTAL, W_BITS, LOAD_W, SCALE_COLUMNS,   \
                   SCALE_BYTES, RUN, JOIN, X_BYTES, LOAD_X, STEP, MANY_ROWS)                      \
    TARGET INLINE PAIR NAME##_weights(const char *at, const char *scale) {                        \
        (void)scale;                                                                              \
        return LOAD_W;                                                                            \
    }                                                                                             \
    /* `m` rows' weights times token j. */                                                        \
    TARGET INLINE void NAME##_add(VECTOR (*a)[TOKENS], VECTOR (*b)[TOKENS], const PAIR *p,        \
                                  const char *x, const int m, const int j) {                      \
        const PAIR q = LOAD_X(x);                                                                 \
        UNROLL for (int i = 0; i < m; i++) {                                                      \
            a[i][j] = ADD(a[i][j], p[i].a, q.a);                                                  \
            b[i][j] = ADD(b[i][j], p[i].b, q.b);                                                  \
        }                                                                                         \
    }                                                                                             \
    TARGET INLINE void NAME##_block(const char *w, const char *s, const int64_t scale_stride,     \
                                    const int64_t num_columns, const char *const *xs,             \
                                    float *const *ys, int64_t row, const int m, const int n) {    \
        const int64_t row_bytes = num_columns * (W_BITS) / 8;                                     \
        const char *x[TOKENS];                                                                    \
        VECTOR total[2][TOKENS];                                                                  \
        PAIR p[2];                                                                                \
        UNROLL for (int j = 0; j < n; j++) x[j] = xs[j];                                          \
        UNROLL for (int i = 0; i < m; i++)                                                        \
            UNROLL for (int j = 0; j < n; j++) total[i][j] = ZERO();                              \
        for (int64_t k = 0, begin = 0; begin < num_columns; begin = k) {                          \
            const int64_t end = num_columns - begin > (RUN) ? begin + (RUN) : num_columns;        \
            VECTOR a[2][TOKENS], b[2][TOKENS];                                                    \
            UNROLL for (int i = 0; i < m; i++)                                                    \
                UNROLL for (int j = 0; j < n; j++) a[i][j] = b[i][j] = ZERO();                    \
            for (; k + (STEP) <= end; k += (STEP)) {                                              \
                const int64_t at = k * (W_BITS) / 8, scale = k / (SCALE_COLUMNS) * (SCALE_BYTES); \
                UNROLL for (int i = 0; i < m; i++)                                                \
                    p[i] = NAME##_weights(w + i * row_bytes + at, s + i * scale_stride + scale);  \
                UNROLL for (int j = 0; j < n; j++)                                                \
                    NAME##_add(a, b, p, x[j] + k * (X_BYTES), m, j);                              \
            }                                                                                     \
            if (k < end) {                                                                        \
                char rest_w[STEP_BYTES] = {0}, rest_x[STEP_BYTES] = {0}, rest_s[8] = {0};         \
                const int64_t at = k * (W_BITS) / 8, scale = k / (SCALE_COLUMNS) * (SCALE_BYTES); \
                const int64_t num_scales = (end - k + (SCALE_COLUMNS) - 1) / (SCALE_COLUMNS);     \
                UNROLL for (int i = 0; i < m; i++) {                                              \
                    memcpy(rest_w, w + i * row_bytes + at, (size_t)(row_bytes - at));             \
                    memcpy(rest_s, s + i * scale_stride + scale,                                  \
                           (size_t)(num_scales * (SCALE_BYTES)));                                 \
                    p[i] = NAME##_weights(rest_w, rest_s);                                        \
                }                                                                                 \
                UNROLL for (int j = 0; j < n; j++) {                                              \
                    memcpy(rest_x, x[j] + k * (X_BYTES), (size_t)((end - k) * (X_BYTES)));        \
                    NAME##_add(a, b, p, rest_x, m, j);                                            \
                }                                                                                 \
                k = end;                                                                          \
            }                                                                                     \
            UNROLL for (int i = 0; i < m; i++) {                                                  \
                const char *scale =                                                               \
                    s + i * scale_stride + begin / (SCALE_COLUMNS) * (SCALE_BYTES);               \
                UNROLL for (int j = 0; j < n; j++)                                                \
                    total[i][j] = JOIN(total[i][j], a[i][j], b[i][j], scale);                     \
            }                                                                                     \
        }                                                                                         \
        UNROLL for (int i = 0; i < m; i++)                                                        \
            UNROLL for (int j = 0; j < n; j++) ys[j][row + i] = TOTAL(total[i][j]);               \
    }                                                                                             \
    TARGET INLINE void NAME##_rows(const char *w, const char *s, int64_t scale_stride,            \
                                   int64_t num_columns, const struct tokens *tokens, int num,     \
                                   int64_t row, const int m) {                                    \
        for (int first = 0; first < num; first += TOKENS)                                         \
            FOR_TOKENS(NAME##_block, num - first, w, s, scale_stride, num_columns,                \
                       tokens->x + first, tokens->y + first, row, m)                              \
    }                                                                                             \
    TARGET static void NAME(const char *w, const char *s, int64_t scale_stride, int64_t num_rows, \
                            int64_t num_columns, const struct tokens *tokens, int num) {          \
        const int64_t row_bytes = num_columns * (W_BITS) / 8;                                     \
        int64_t row = 0;                                                                          \
        if (num > FEW_TOKENS)                                                                     \
            for (; row + (MANY_ROWS) <= num_rows; row += (MANY_ROWS))                             \
                NAME##_rows(w + row * row_bytes, s + row * scale_stride, scale_stride,            \
                            num_columns, tokens, num, row, MANY_ROWS);                            \
        for (; row < num_rows; row++)                                                             \
            NAME##_rows(w + row * row_bytes, s + row * scale_stride, scale_stride, num_columns,   \
                        tokens, num, row, 1);                                                     \
    }
#define DEFINE_DOT_OF(...) DEFINE_DOT(__VA_ARGS__) /* once the names below are taken apart */

#define IN_BF16(TARGET) TARGET, __m512, _mm512_setzero_ps, struct bf16_pair, add_bf16, total_avx512
#define AVX512_BF16_LEVEL IN_BF16(TARGET_AVX512_BF16)
#define AVX512_VBMI_LEVEL IN_BF16(TARGET_AVX512_VBMI)
#define AVX512_LEVEL \
    TARGET_AVX512F, __m512, _mm512_setzero_ps, struct f32x16_pair, add_avx512, total_avx512
#define AVX2_LEVEL TARGET_AVX2, __m256, _mm256_setzero_ps, struct f32x8_pair, add_avx2, total_avx2
#define NO_SCALES 1, 0, WHOLE_ROW
#define INT4_SCALES INT4_GROUP, 2, WHOLE_ROW
#define MXFP4_SCALES MXFP4_GROUP, 1, WHOLE_ROW
#define FP8_SCALES FP8_BLOCK, 4, FP8_BLOCK
#define X_AS_IS 2, load_bf16_as_is, 64, 2
#define X_AVX512 2, load_bf16_avx512, 32, 2
#define X_AVX2 2, load_bf16_avx2, 16, 1

DEFINE_DOT_OF(dot_avx512_bf16, AVX512_BF16_LEVEL, 16, load_bf16_as_is(at), NO_SCALES, join_avx512,
              X_AS_IS)
DEFINE_DOT_OF(dot_avx512_bf16_mxfp4, AVX512_BF16_LEVEL, 4, load_mxfp4_as_bf16(at, scale),
              MXFP4_SCALES, join_avx512, X_AS_IS)
DEFINE_DOT_OF(dot_avx512_vbmi_fp8, AVX512_VBMI_LEVEL, 8, load_fp8_as_bf16(at), FP8_SCALES, join_fp8,
              X_AS_IS)
DEFINE_DOT_OF(dot_avx512_bf16_as_f32, AVX512_LEVEL, 16, load_bf16_avx512(at), NO_SCALES,
              join_avx512, X_AVX512)
DEFINE_DOT_OF(dot_avx512_f16, AVX512_LEVEL, 16, load_f16_avx512(at), NO_SCALES, join_avx512, 2,
              load_f16_avx512, 32, 2)
DEFINE_DOT_OF(dot_avx512_f32, AVX512_LEVEL, 32, load_f32_avx512(at), NO_SCALES, join_avx512, 4,
              load_f32_avx512, 32, 2)
DEFINE_DOT_OF(dot_avx512_int8, AVX512_LEVEL, 8, load_int8_avx512(at), NO_SCALES, join_int8_avx512,
              X_AVX512)
DEFINE_DOT_OF(dot_avx512_int4, AVX512_LEVEL, 4, load_int4_avx512(at, scale), INT4_SCALES,
              join_avx512, X_AVX512)
DEFINE_DOT_OF(dot_avx512_fp8, AVX512_LEVEL, 8, load_fp8_avx512(at), FP8_SCALES, join_fp8_avx512,
              X_AVX512)
DEFINE_DOT_OF(dot_avx512_mxfp4, AVX512_LEVEL, 4, load_mxfp4_avx512(at, scale), MXFP4_SCALES,
              join_avx512, X_AVX512)
DEFINE_DOT_OF(dot_avx2_bf16, AVX2_LEVEL, 16, load_bf16_avx2(at), NO_SCALES, join_avx2, X_AVX2)
DEFINE_DOT_OF(dot_avx2_f16, AVX2_LEVEL, 16, load_f16_avx2(at), NO_SCALES, join_avx2, 2,
              load_f16_avx2, 16, 1)
DEFINE_DOT_OF(dot_avx2_f32, AVX2_LEVEL, 32, load_f32_avx2(at), NO_SCALES, join_avx2, 4,
              load_f32_avx2, 16, 1)
DEFINE_DOT_OF(dot_avx2_int8, AVX2_LEVEL, 8, load_int8_avx2(at), NO_SCALES, join_int8_avx2, X_AVX2)
DEFINE_DOT_OF(dot_avx2_int4, AVX2_LEVEL, 4, load_int4_avx2(at, scale), INT4_SCALES, join_avx2,
              X_AVX2)
DEFINE_DOT_OF(dot_avx2_fp8, AVX2_LEVEL, 8, load_fp8_avx2(at), FP8_SCALES, join_fp8_avx2, X_AVX2)
DEFINE_DOT_OF(dot_avx2_mxfp4, AVX2_LEVEL, 4, load_mxfp4_avx2(at, scale), MXFP4_SCALES, join_avx2,
              X_AVX2)

#endif
