/* Packed rows (packed_row.h) times the tokens of an expert, in the bits of unpacked ones.
 *
 * Weights are decoded tile by tile into the registers that a load would have filled. */
#ifndef MOE_PACKED_PRODUCTS_H
#define MOE_PACKED_PRODUCTS_H

#include "packed_row.h"
#include "row_products.h"

/* NAME: one packed row, as DOT computes it once unpacked: PAIR_OF are the two vectors of step i of
 * a decoded tile. The escapes of the row are used up. */
#define DEFINE_PACKED_DOT(NAME, DOT, TARGET, VECTOR, ZERO, PAIR, ADD, TOTAL, WORDS, NUM_WORDS,    \
                          HIGH, DECODE, PAIR_OF, JOIN, X_BYTES, LOAD, STEP, MANY_ROWS)            \
    TARGET INLINE void NAME##_block(const uint8_t *w, int64_t num_columns, const uint8_t *high,   \
                                    struct moe_escapes *escapes, const char *const *xs,           \
                                    float *const *ys, int64_t row, const int n) {                 \
        const WORDS table = HIGH(_mm_loadu_si128((const __m128i *)high));                         \
        VECTOR a[1][TOKENS], b[1][TOKENS];                                                        \
        const char *x[TOKENS];                                                                    \
        UNROLL for (int j = 0; j < n; j++) x[j] = xs[j];                                          \
        UNROLL for (int j = 0; j < n; j++) a[0][j] = b[0][j] = ZERO();                            \
        int64_t k = 0;                                                                            \
        for (; k + MOE_TILE <= num_columns; k += MOE_TILE, w += MOE_TILE_BYTES) {                 \
            WORDS tile[NUM_WORDS];                                                                \
            DECODE(w, table, escapes, tile);                                                      \
            UNROLL for (int i = 0; i < MOE_TILE / (STEP); i++) {                                  \
                const PAIR p = PAIR_OF;                                                           \
                UNROLL for (int j = 0; j < n; j++)                                                \
                    DOT##_add(a, b, &p, x[j] + (X_BYTES) * (k + i * (STEP)), 1, j);               \
            }                                                                                     \
        }                                                                                         \
        if (k < num_columns) {                                                                    \
            uint16_t rest_w[MOE_TILE] = {0}, rest_x[MOE_TILE] = {0};                              \
            const int64_t rest = num_columns - k;                                                 \
            moe_tail_plain(w, (int)rest, high, escapes, rest_w);                                  \
            UNROLL for (int j = 0; j < n; j++) {                                                  \
                memcpy(rest_x, x[j] + (X_BYTES) * k, (size_t)((X_BYTES) * rest));                 \
                for (int64_t i = 0; i < rest; i += (STEP)) {                                      \
                    const PAIR p = LOAD((const char *)(rest_w + i));                              \
                    DOT##_add(a, b, &p, (const char *)(rest_x + i), 1, j);                        \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
        UNROLL for (int j = 0; j < n; j++)                                                        \
            ys[j][row] = TOTAL(JOIN(ZERO(), a[0][j], b[0][j], 0));                                \
    }                                                                                             \
    TARGET static void NAME(const uint8_t *w, int64_t num_columns, const uint8_t *high,           \
                            struct moe_escapes *escapes, const struct tokens *tokens, int num,    \
                            int64_t row) {                                                        \
        const struct moe_escapes begin = *escapes;                                                \
        for (int first = 0; first < num; first += TOKENS) {                                       \
            *escapes = begin;                                                                     \
            FOR_TOKENS(NAME##_block, num - first, w, num_columns, high, escapes,                  \
                       tokens->x + first, tokens->y + first, row)                                 \
        }                                                                                         \
    }
#define DEFINE_PACKED_DOT_OF(...) DEFINE_PACKED_DOT(__VA_ARGS__)

DEFINE_PACKED_DOT_OF(dot_avx512_bf16_packed, dot_avx512_bf16, AVX512_BF16_LEVEL, __m512i, 4,
                     _mm512_broadcast_i32x4, moe_tile_512,
                     ((struct bf16_pair){tile[2 * i], tile[2 * i + 1]}), join_avx512, X_AS_IS)
DEFINE_PACKED_DOT_OF(dot_avx512_packed, dot_avx512_bf16_as_f32, AVX512_LEVEL, __m512i, 4,
                     _mm512_broadcast_i32x4, moe_tile_512, widen_bf16_avx512(tile[i]), join_avx512,
                     X_AVX512)
DEFINE_PACKED_DOT_OF(dot_avx2_packed, dot_avx2_bf16, AVX2_LEVEL, __m256i, 8,
                     _mm256_broadcastsi128_si256, moe_tile_256, widen_bf16_avx2(tile[i]), join_avx2,
                     X_AVX2)

#endif
