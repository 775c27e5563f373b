/* Keys and values multiplied as bfloat16, two products and their sum in one instruction.
 *
 * Two rows become pairs, 32 of them in two vectors: half the work of making floats of them. Products
 * are exact in float32 and sums are float32. Queries are bfloat16 already; weights are rounded to
 * it, as transformers' own attention rounds them: relative errors of 2^-8, like the output's.
 */
#ifndef MOE_ATTENTION_PAIRS_H
#define MOE_ATTENTION_PAIRS_H

#include <stdint.h>
#include <string.h>

#include "attention_scores.h"

/* Rows of floats that are bfloat16 as pairs of neighbours; an odd one's neighbour is 0. */
INLINE void pair_up(const float *query, uint32_t *pairs, int64_t rows, int64_t width) {
    for (int64_t h = 0; h < rows; h++)
        for (int64_t k = 0; k < width; k += 2) {
            uint32_t low, high = 0;
            memcpy(&low, query + h * width + k, sizeof low);
            if (k + 1 < width) memcpy(&high, query + h * width + k + 1, sizeof high);
            pairs[h * ((width + 1) / 2) + k / 2] = low >> 16 | (high & 0xffff0000u);
        }
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(MOE_OTHER_PROCESSOR)

#include <immintrin.h>

#define PAIRS_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")))

/* Adds `heads` rows of pairs times 32 columns of two rows to their sums. */
PAIRS_TARGET INLINE void add_pairs(__m512 (*sums)[2], __m512i even, __m512i odd,
                                   const uint32_t *pairs, int64_t stride, int heads) {
    const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, odd);
    const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
    UNROLL for (int h = 0; h < heads; h++) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32((int)pairs[h * stride]);
        sums[h][0] = _mm512_dpbf16_ps(sums[h][0], low, pair);
        sums[h][1] = _mm512_dpbf16_ps(sums[h][1], high, pair);
    }
}

PAIRS_TARGET INLINE void score_pairs_of(const struct task *task, int64_t page, v16 *scores,
                                        int heads) {
    const int64_t d = task->op->key_width, num_pairs = (d + 1) / 2;
    const char *key = key_page(task, page), *value = value_page(task, page);
    __m512 sums[HEADS][2];
    UNROLL for (int h = 0; h < heads; h++) sums[h][0] = sums[h][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < num_pairs; i++) {
        const char *row = key + 2 * i * LINE;
        fetch(value + 2 * i * LINE, 2);
        add_pairs(sums, _mm512_loadu_si512(row),
                  2 * i + 1 < d ? _mm512_loadu_si512(row + LINE) : _mm512_setzero_si512(),
                  task->pairs + i, num_pairs, heads);
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int half = 0; half < 2; half++)
            scores[h * VECTORS + half] = (v16)sums[h][half] * task->scaling;
}

/* 2^x: what stands behind the point by a polynomial of degree 4 (minimax: within 3e-6, where weights
 * are rounded to 2^-9), the rest as an exponent. */
PAIRS_TARGET INLINE __m512 power_of_two_pairs(__m512 x) {
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.353416685e-2f), _mm512_set1_ps(5.201146007e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.414427549e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.930038333e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.000002623f));
    return _mm512_scalef_ps(p, x);
}

/* Row t of 32 values, or zeros where nobody looks: what stands there may be NaN. */
PAIRS_TARGET INLINE __m512i value_row(const char *value, int64_t row_bytes, int t, int from,
                                      int to) {
    return from <= t && t < to ? _mm512_loadu_si512(value + t * row_bytes)
                               : _mm512_setzero_si512();
}

/* `pairs` [heads, VECTORS, 8]: weights of neighbouring lanes, which are neighbouring tokens. */
PAIRS_TARGET INLINE void add_column(const struct task *task, int64_t begin, int64_t pages,
                                    int64_t next_pages, int64_t column, const uint32_t *pairs,
                                    float *total, int heads) {
    const int64_t width = task->op->value_width, row_bytes = 2 * width;
    __m512 sums[HEADS][2];
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int i = 0; i < 2; i++)
            sums[h][i] = _mm512_loadu_ps(total + h * width + column + i * LANES);
    for (int64_t page = 0; page < pages; page++) {
        const char *value = value_page(task, begin + page) + 2 * column;
        const char *next = page < next_pages ? key_page(task, begin + pages + page) : value;
        const int from = from_token(task, begin + page), to = to_token(task, begin + page);
        const int is_whole = from == 0 && to == PAGE; /* nearly all pages */
        next += column * LINE;
        for (int i = 0; i < PAGE / 2; i++) {
            const int at = i % 4 / 2 * LANES / 2 + i / 4 * 2 + i % 2;
            const char *row = value + 2 * i * row_bytes;
            fetch(next + 2 * i * LINE, 2);
            add_pairs(sums,
                      is_whole ? _mm512_loadu_si512(row)
                               : value_row(value, row_bytes, 2 * i, from, to),
                      is_whole ? _mm512_loadu_si512(row + row_bytes)
                               : value_row(value, row_bytes, 2 * i + 1, from, to),
                      pairs + page * LANES + at, VECTORS * LANES / 2, heads);
        }
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int i = 0; i < 2; i++)
            _mm512_storeu_ps(total + h * width + column + i * LANES, sums[h][i]);
}

PAIRS_TARGET INLINE void add_value_pairs_of(const struct task *task, int64_t begin, int64_t pages,
                                            int64_t next_pages, const v16 *weights, float *total,
                                            int heads) {
    uint32_t pairs[HEADS * VECTORS * LANES / 2];
    for (int64_t i = 0; i < heads * VECTORS; i++)
        _mm256_storeu_si256((__m256i *)(pairs + i * LANES / 2),
                            (__m256i)_mm512_cvtneps_pbh((__m512)weights[i]));
    for (int64_t column = 0; column + PAGE <= task->op->value_width; column += PAGE)
        add_column(task, begin, pages, next_pages, column, pairs, total, heads);
}

/* Not inlined, as the code around is compiled for less; a call a page costs nothing beside it. */
#define PAIRS_BODY PAIRS_TARGET static __attribute__((noinline))
#define BY_HEADS(function, ...)         \
    if (heads == HEADS)                 \
        function(__VA_ARGS__, HEADS);   \
    else if (heads == 4)                \
        function(__VA_ARGS__, 4);       \
    else if (heads == 2)                \
        function(__VA_ARGS__, 2);       \
    else                                \
        function(__VA_ARGS__, 1)

PAIRS_BODY void score_pairs(const struct task *task, int64_t page, v16 *scores, int heads) {
    BY_HEADS(score_pairs_of, task, page, scores);
}

/* `weigh` for all heads, in instructions made for it. */
PAIRS_BODY void weigh_pairs(v16 *scores, int64_t vectors, float *most, float *weight_sum,
                            float *total, int64_t width, int heads) {
    for (int h = 0; h < heads; h++, scores += VECTORS, total += width) {
        __m512 high = (__m512)scores[0], sum = _mm512_setzero_ps();
        for (int64_t i = 1; i < vectors; i++) high = _mm512_max_ps(high, (__m512)scores[i]);
        const float peak = _mm512_reduce_max_ps(high);
        if (peak > most[h]) {
            const __m512 shrink = power_of_two_pairs(_mm512_set1_ps(most[h] - peak));
            most[h] = peak;
            weight_sum[h] *= _mm512_cvtss_f32(shrink);
            for (int64_t i = 0; i < width; i += LANES)
                _mm512_storeu_ps(total + i, _mm512_mul_ps(_mm512_loadu_ps(total + i), shrink));
        }
        for (int64_t i = 0; i < vectors; i++) {
            const __m512 weight =
                power_of_two_pairs(_mm512_sub_ps((__m512)scores[i], _mm512_set1_ps(most[h])));
            scores[i] = (v16)weight;
            sum = _mm512_add_ps(sum, weight);
        }
        weight_sum[h] += _mm512_reduce_add_ps(sum);
    }
}

PAIRS_BODY void add_value_pairs(const struct task *task, int64_t begin, int64_t pages,
                                int64_t next_pages, const v16 *weights, float *total, int heads) {
    BY_HEADS(add_value_pairs_of, task, begin, pages, next_pages, weights, total);
}

#else

/* No level has them, so nobody calls. */
static inline void score_pairs(const struct task *task, int64_t page, v16 *scores, int heads) {
    (void)task, (void)page, (void)scores, (void)heads;
}
static inline void weigh_pairs(v16 *scores, int64_t vectors, float *most, float *weight_sum,
                               float *total, int64_t width, int heads) {
    (void)scores, (void)vectors, (void)most, (void)weight_sum, (void)total, (void)width;
    (void)heads;
}
static inline void add_value_pairs(const struct task *task, int64_t begin, int64_t pages,
                                   int64_t next_pages, const v16 *weights, float *total,
                                   int heads) {
    (void)task, (void)begin, (void)pages, (void)next_pages, (void)weights, (void)total, (void)heads;
}

#endif

#endif
