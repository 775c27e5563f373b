/* One task of attention, and the scores of a page of its keys. */
#ifndef MOE_ATTENTION_SCORES_H
#define MOE_ATTENTION_SCORES_H

#include <stdint.h>

#include "attention_vectors.h"

/* What keys and values are; with queries that are bfloat16 too, products need no floats. */
enum { F32, BF16, BF16_PAIRS };

enum {
    TILE = 4, /* pages between two looks at the maximum */
    VECTORS = 2 * TILE,
    HEADS = 8, /* query heads that share a pass over keys */
    STEP = 4,  /* rows of keys between two hints to the memory */
    MOST_WIDTH = 1024,
};

/* Sequence n has lengths[n] tokens in pages table[n * table_width ...]; `window` 0: all are seen.
 * query [N, H, d], out [N, H, v] and sinks [H] (or NULL) are float32; keys [B, G, d, 32] and values
 * [B, G, 32, v] are float32 or bfloat16, as `kind` says. `next` is the first task not taken. */
struct moe_attention {
    const float *query;
    const void *keys;
    const void *values;
    const int64_t *table;
    const int64_t *lengths;
    const float *sinks;
    float *out;
    int64_t num_sequences;
    int64_t num_heads;
    int64_t num_groups;
    int64_t key_width;
    int64_t value_width;
    int64_t table_width;
    int64_t window;
    int64_t kind;
    double scaling;
    int64_t next;
    const struct moe_openmp *openmp;
};

struct task {
    const struct moe_attention *op;
    const int64_t *table; /* the sequence's pages */
    int64_t group, key_page_bytes, value_page_bytes;
    const float *query; /* [heads, d] of this task */
    const uint32_t *pairs; /* the same as bfloat16, [heads, (d + 1) / 2]: two neighbours each */
    float scaling;         /* such that weights are powers of two */
    int64_t first, length; /* tokens that are seen */
};

/* Tokens of a page that are seen: what others left in the rest may be NaN, which no weight hides. */
INLINE int from_token(const struct task *task, int64_t page) {
    return task->first > page * PAGE ? (int)(task->first - page * PAGE) : 0;
}

INLINE int to_token(const struct task *task, int64_t page) {
    return (int)smaller(PAGE, task->length - page * PAGE);
}

INLINE const char *key_page(const struct task *task, int64_t page) {
    const struct moe_attention *op = task->op;
    return (const char *)op->keys +
           (task->table[page] * op->num_groups + task->group) * task->key_page_bytes;
}

INLINE const char *value_page(const struct task *task, int64_t page) {
    const struct moe_attention *op = task->op;
    return (const char *)op->values +
           (task->table[page] * op->num_groups + task->group) * task->value_page_bytes;
}

/* Where number i of 32 is after loading: a token's score, a column's sum. */
INLINE int place(int i, int kind) {
    /* Interleaving two rows takes four of every eight to the first vector. */
    if (kind == BF16_PAIRS) return i / 4 % 2 * LANES + i / 8 * 4 + i % 4;
    return kind == BF16 ? i % 2 * LANES + i / 2 : i;
}

/* Scores of a page for `heads` query heads; the page's values are fetched meanwhile. */
INLINE void score_page(const struct task *task, int64_t page, v16 *scores, int heads,
                       int kind) {
    /* Sums of several rows at a time, where one alone would wait for itself. */
    const int parts = heads >= 4 ? 1 : heads == 2 ? 2 : STEP;
    const int is_bf16 = kind != F32, lines = is_bf16 ? 1 : 2; /* of a row */
    const int64_t d = task->op->key_width;
    const char *key = key_page(task, page), *value = value_page(task, page);
    v16 sums[HEADS][STEP][2], row[2];
    int64_t k = 0;
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int i = 0; i < parts; i++) sums[h][i][0] = sums[h][i][1] = (v16){0};
    for (; k + STEP <= d; k += STEP) {
        fetch(value + k * lines * LINE, STEP * lines);
        UNROLL for (int i = 0; i < STEP; i++) {
            load(row, key, (k + i) * PAGE, is_bf16);
            UNROLL for (int h = 0; h < heads; h++) {
                sums[h][i % parts][0] += row[0] * task->query[h * d + k + i];
                sums[h][i % parts][1] += row[1] * task->query[h * d + k + i];
            }
        }
    }
    for (; k < d; k++) {
        load(row, key, k * PAGE, is_bf16);
        UNROLL for (int h = 0; h < heads; h++) {
            sums[h][0][0] += row[0] * task->query[h * d + k];
            sums[h][0][1] += row[1] * task->query[h * d + k];
        }
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int half = 0; half < 2; half++) {
            UNROLL for (int i = 1; i < parts; i++) sums[h][0][half] += sums[h][i][half];
            scores[h * VECTORS + half] = sums[h][0][half] * task->scaling;
        }
}

#endif
