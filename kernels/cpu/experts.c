/* The experts of one layer for a few tokens: gate|up, gate function, down and weighted sum.
 *
 * Plain C11: no Python, no torch, no OpenMP at link time, no -march. The instructions are chosen by
 * the caller, who asks `moe_experts_supports` first; elsewhere than on x86-64 nothing is supported.
 *
 * Every weight is read once, in the order of memory: a thread takes some rows of a matrix that lie
 * behind each other and multiplies each with all tokens of that expert before it goes on. One such
 * stream a thread is what the processor's own prefetching follows; rows read side by side fall, at
 * strides of 4096 bytes, into the same sets of the cache.
 *
 * Nothing in a sum depends on the other tokens, on the thread, or on which experts share a call.
 */
#include <stdint.h>

#include "openmp.h"

#define EXPORT __attribute__((visibility("default")))

/* Raised whenever a signature or a struct below changes; experts_status.py holds the same number. */
enum { INTERFACE = 4 };

enum stage { UP = 1, GATE = 2, DOWN = 4, SUM = 8 };

/* A matrix whose rows stand in several places or forms; matrix_rows.h has the parts. */
struct moe_matrix {
    const struct moe_part *parts;
    int64_t num_parts;
};

/* One call. Expert e has the rows first_row[e] .. first_row[e] + num_rows[e] of `token`, `weight`,
 * `up_y`, `h` and `y`. All matrices are row-major; x, weights, biases, h and out have `dtype`.
 * Weights are where `up` and `down` point, or, with `is_in_parts`, described there by a struct
 * moe_matrix. */
struct moe_experts {
    const void *const *up;   /* [num_experts] of [up_rows, dim]; gate before up, or in turns */
    const void *const *down; /* [num_experts] of [dim, ffn] */
    const void *const *up_bias;   /* [num_experts] of [up_rows], or 0 */
    const void *const *down_bias; /* [num_experts] of [dim], or 0 */
    const int64_t *first_row;
    const int64_t *num_rows;
    const int64_t *token; /* [num_all_rows] */
    const float *weight;  /* [num_all_rows] */
    const void *x;        /* [num_tokens, dim] */
    float *up_y;          /* [num_all_rows, up_rows] */
    void *h;              /* [num_all_rows, ffn] */
    float *y;             /* [num_all_rows, dim], not weighted */
    float *total;         /* [num_tokens, dim], scratch of SUM */
    void *out;            /* [num_tokens, dim], for SUM, which looks at all rows */
    const struct moe_openmp *openmp;
    int64_t num_experts, num_all_rows, num_tokens, dim, ffn, up_rows;
    int64_t next_up, next_down; /* 0 at the start: pieces that threads have taken */
    int32_t level, dtype, gate, is_interleaved, is_in_parts, stages;
    float alpha, limit; /* of CLAMPED_SILU */
};

EXPORT int moe_experts_interface(void) { return INTERFACE; }

/* A test defines MOE_OTHER_PROCESSOR to see what is built elsewhere. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(MOE_OTHER_PROCESSOR)

#include "gates.h"

enum {
    PIECE_BYTES = 128 << 10, /* of weights that a thread takes at a time: stays in its L2 */
    SHARE_BYTES = 128 << 10, /* a thread that would read less than this costs more than it gives */
    NUM_SUM_COLUMNS = 256,   /* of the weighted sum, a piece */
};

EXPORT int moe_experts_supports(int level, int dtype) {
    const int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("f16c");
    const int has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (level == AVX2) return has_avx2;
    if (level == AVX512F) return has_avx512;
    return level == AVX512_BF16 && dtype == BF16 && has_avx512 &&
           __builtin_cpu_supports("avx512bf16");
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- Elementwise stages ---- */

TARGET_AVX2 static void gate_row(const struct moe_experts *op, int64_t row) {
    float *y = op->up_y + row * op->up_rows;
    const int is_gated = op->up_rows == 2 * op->ffn, turns = op->is_interleaved;
    const struct moe_clamp clamp = {op->alpha, op->limit};
    switch (op->gate) { /* each its own loop */
        case SILU: apply_gate_of(SILU, is_gated, turns, clamp, y, op->ffn); break;
        case GELU_TANH: apply_gate_of(GELU_TANH, is_gated, turns, clamp, y, op->ffn); break;
        case RELU: apply_gate_of(RELU, is_gated, turns, clamp, y, op->ffn); break;
        case RELU_SQUARED: apply_gate_of(RELU_SQUARED, is_gated, turns, clamp, y, op->ffn); break;
        case CLAMPED_SILU: apply_gate_of(CLAMPED_SILU, is_gated, turns, clamp, y, op->ffn); break;
        default: break;
    }
    round_row(op->dtype, (char *)op->h + row * op->ffn * size_of(op->dtype), y, op->ffn);
}

/* Columns [begin, end) of the weighted sum: each token's rows in the order of rows. */
TARGET_AVX2 static void sum_columns(const struct moe_experts *op, int64_t begin, int64_t end) {
    const int64_t dim = op->dim, num = end - begin;
    for (int64_t t = 0; t < op->num_tokens; t++)
        memset(op->total + t * dim + begin, 0, (size_t)num * sizeof *op->total);
    for (int64_t row = 0; row < op->num_all_rows; row++) {
        float *restrict total = op->total + op->token[row] * dim + begin;
        const float *restrict y = op->y + row * dim + begin;
        const float weight = op->weight[row];
        for (int64_t i = 0; i < num; i++) total[i] += weight * y[i];
    }
    for (int64_t t = 0; t < op->num_tokens; t++) {
        char *out = (char *)op->out + (t * dim + begin) * size_of(op->dtype);
        round_row(op->dtype, out, op->total + t * dim + begin, num);
    }
}

/* ---- Who does what ---- */

/* One of the two matrices of every expert, and what its rows are multiplied with. */
struct product {
    const void *const *weights;
    const void *const *bias;
    const char *x; /* rows of `columns` numbers, by token or by row */
    const int64_t *x_index;
    float *y; /* [num_all_rows, num_rows] */
    int64_t num_rows, num_columns;
};

/* Rows [begin, end) of `part`, which are those from `row` on of the matrix, times all tokens. */
static void run_piece(const struct moe_experts *op, const struct product *product, int64_t expert,
                      const struct moe_part *part, int64_t begin, int64_t end, int64_t row) {
    const int64_t x_bytes = product->num_columns * size_of(op->dtype);
    for (int64_t first = 0; first < op->num_rows[expert]; first += MAX_TOKENS) {
        const int n = (int)smaller(MAX_TOKENS, op->num_rows[expert] - first);
        struct tokens tokens;
        for (int j = 0; j < n; j++) {
            const int64_t at = op->first_row[expert] + first + j;
            tokens.x[j] = product->x + (product->x_index ? product->x_index[at] : at) * x_bytes;
            tokens.y[j] = product->y + at * product->num_rows + row;
        }
        multiply_rows(op->level, op->dtype, part, product->num_columns, begin, end, &tokens, n);
        if (!product->bias) continue;
        const char *const bias = (const char *)product->bias[expert] + row * size_of(op->dtype);
        for (int j = 0; j < n; j++) add_bias(op->dtype, tokens.y[j], bias, end - begin);
    }
}

/* Takes pieces until none are left: a thread that is held up leaves its share to the others. Each
 * thread goes through all parts and their pieces, which are numbered in that order. */
static void run_product(const struct moe_experts *op, const struct product *product,
                        int64_t *next) {
    int64_t first = 0, piece = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    for (int64_t e = 0; e < op->num_experts; e++) {
        const struct moe_part whole = {product->weights[e], 0, product->num_rows, PLAIN};
        const struct moe_matrix plain = {&whole, 1};
        const struct moe_matrix *matrix = op->is_in_parts ? product->weights[e] : &plain;
        for (int64_t p = 0, row = 0; p < matrix->num_parts; row += matrix->parts[p++].num_rows) {
            const struct moe_part *part = &matrix->parts[p];
            const int64_t step =
                rows_of_piece(op->dtype, part, product->num_columns, PIECE_BYTES);
            const int64_t num_pieces = (part->num_rows + step - 1) / step;
            while (piece < first + num_pieces) {
                const int64_t begin = (piece - first) * step;
                run_piece(op, product, e, part, begin, smaller(begin + step, part->num_rows),
                          row + begin);
                piece = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
            }
            first += num_pieces;
        }
    }
}

static void wait_for_all(const struct moe_experts *op, int num_threads) {
    if (num_threads > 1) op->openmp->barrier();
}

static void run_stages(struct moe_experts *op, int thread, int num_threads) {
    if (op->stages & UP) {
        const struct product up = {op->up,   op->up_bias, op->x,  op->token,
                                   op->up_y, op->up_rows, op->dim};
        run_product(op, &up, &op->next_up);
        wait_for_all(op, num_threads);
    }
    if (op->stages & GATE) {
        for (int64_t e = 0, turn = 0; e < op->num_experts; e++)
            for (int64_t i = 0; i < op->num_rows[e]; i++, turn++)
                if (turn % num_threads == thread) gate_row(op, op->first_row[e] + i);
        wait_for_all(op, num_threads);
    }
    if (op->stages & DOWN) {
        const struct product down = {op->down, op->down_bias, op->h,   0,
                                     op->y,    op->dim,       op->ffn};
        run_product(op, &down, &op->next_down);
        wait_for_all(op, num_threads);
    }
    if (op->stages & SUM)
        for (int64_t i = thread * NUM_SUM_COLUMNS; i < op->dim; i += num_threads * NUM_SUM_COLUMNS)
            sum_columns(op, i, smaller(i + NUM_SUM_COLUMNS, op->dim));
}

static void team_body(void *argument) {
    struct moe_experts *op = argument;
    run_stages(op, op->openmp->thread_num(), op->openmp->num_threads());
}

EXPORT void moe_experts_run(struct moe_experts *op, int num_threads) {
    const int64_t num_weights = op->num_experts * op->dim * (op->up_rows + op->ffn);
    num_threads = (int)smaller(num_threads, num_weights * size_of(op->dtype) / SHARE_BYTES);
    if (num_threads > 1 && op->openmp)
        op->openmp->parallel(team_body, op, (unsigned)num_threads, 0);
    else
        run_stages(op, 0, 1);
}

/* ---- The rate to compare with: the same memory, threads and pieces, and nothing computed ---- */

struct reading {
    const char *bytes;
    int64_t num_bytes, next;
    uint64_t seen; /* keeps the reads from being left out */
};

TARGET_AVX2 static void read_pieces(struct reading *reading) {
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (;;) {
        const int64_t begin =
            __atomic_fetch_add(&reading->next, 1, __ATOMIC_RELAXED) * PIECE_BYTES;
        if (begin >= reading->num_bytes) break;
        const int64_t end = begin + smaller(PIECE_BYTES, reading->num_bytes - begin);
        for (int64_t i = begin; i + 128 <= end; i += 128) {
            const __m256i *p = (const __m256i *)(reading->bytes + i);
            a = _mm256_or_si256(a, _mm256_loadu_si256(p));
            b = _mm256_or_si256(b, _mm256_loadu_si256(p + 1));
            c = _mm256_or_si256(c, _mm256_loadu_si256(p + 2));
            d = _mm256_or_si256(d, _mm256_loadu_si256(p + 3));
        }
    }
    a = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
    const uint64_t seen = (uint64_t)_mm256_extract_epi64(a, 0) | (uint64_t)_mm256_extract_epi64(a, 3);
    __atomic_fetch_or(&reading->seen, seen, __ATOMIC_RELAXED);
}

static void read_body(void *argument) { read_pieces(argument); }

EXPORT uint64_t moe_experts_read(const void *bytes, int64_t num_bytes,
                                 const struct moe_openmp *openmp, int num_threads) {
    struct reading reading = {bytes, num_bytes, 0, 0};
    if (num_threads > 1 && openmp)
        openmp->parallel(read_body, &reading, (unsigned)num_threads, 0);
    else
        read_pieces(&reading);
    return reading.seen;
}

#else

EXPORT uint64_t moe_experts_read(const void *bytes, int64_t num_bytes,
                                 const struct moe_openmp *openmp, int num_threads) {
    (void)bytes;
    (void)num_bytes;
    (void)openmp;
    (void)num_threads;
    return 0;
}
EXPORT int moe_experts_supports(int level, int dtype) {
    (void)level;
    (void)dtype;
    return 0;
}
EXPORT void moe_experts_run(struct moe_experts *op, int num_threads) {
    (void)op;
    (void)num_threads;
}

#endif
