/* One-row bf16 linear layers, y = W x, with the bits of oneDNN and at the rate of the memory.
 *
 * Plain C11: no Python, no torch, no OpenMP at link time, no -march. Where the compiler does not
 * aim at x86-64 the library builds and says that it is not supported.
 *
 * The sum of one output, which the caller's trial compares with torch: k runs in pairs (k, k + 1)
 * from 0, each added by one VDPBF16PS to a float32 accumulator; a new accumulator starts every
 * `k_block`, and the accumulators are added up in order; the total is rounded once to bf16.
 * Outputs stand in lanes, so that this order costs nothing: 16 rows of W are loaded 64 bytes at a
 * time, as they lie in memory, and transposed in registers.
 */
#include <stdint.h>

#include "openmp.h"

#define EXPORT __attribute__((visibility("default")))

/* Raised whenever a signature or a struct below changes; gemv.py holds the same number. */
enum { INTERFACE = 2 };

/* Expert e computes y[e, 0..num_rows) = weights[e] (row-major [num_rows, num_columns]) times
 * x + e * x_stride. Strides and sizes count elements. */
struct moe_gemv {
    const uint16_t *const *weights;
    const uint16_t *x;
    uint16_t *y;
    int64_t x_stride;
    int64_t num_experts;
    int64_t num_rows;
    int64_t num_columns;
    int64_t k_block;
    const struct moe_openmp *openmp;
};

EXPORT int moe_gemv_interface(void) { return INTERFACE; }

/* A test defines MOE_OTHER_PROCESSOR to see what is built elsewhere. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(MOE_OTHER_PROCESSOR)

#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline)) TARGET

enum {
    LANES = 16, /* float32 in a register: rows of W that are summed together */
    STEP = 32,  /* bf16 in a register: columns of W that are loaded together */
    TILE = 512, /* columns of 16 rows that are used up while the next such tile is fetched */
    UNIT = 64,  /* rows that one thread takes at a time */
    SHARE_BYTES = 128 << 10, /* a thread that would read less than this costs more than it gives */
};

#ifndef PF
#define PF 1
#define HINT _MM_HINT_T0
#endif

EXPORT int moe_gemv_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* r[i] holds 16 pairs of row i; afterwards it holds pair i of 16 rows. */
INLINE void transpose(__m512i r[LANES]) {
    __m512i t[LANES];
    UNROLL for (int i = 0; i < LANES; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < LANES; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    /* r[4a + b] holds pairs b, b + 4, b + 8, b + 12 of rows 4a .. 4a + 3, one a quarter. */
    UNROLL for (int b = 0; b < 4; b++) {
        t[b] = _mm512_shuffle_i32x4(r[b], r[b + 4], 0x88);
        t[b + 4] = _mm512_shuffle_i32x4(r[b], r[b + 4], 0xdd);
        t[b + 8] = _mm512_shuffle_i32x4(r[b + 8], r[b + 12], 0x88);
        t[b + 12] = _mm512_shuffle_i32x4(r[b + 8], r[b + 12], 0xdd);
    }
    UNROLL for (int b = 0; b < 4; b++) {
        r[b] = _mm512_shuffle_i32x4(t[b], t[b + 8], 0x88);
        r[b + 8] = _mm512_shuffle_i32x4(t[b], t[b + 8], 0xdd);
        r[b + 4] = _mm512_shuffle_i32x4(t[b + 4], t[b + 12], 0x88);
        r[b + 12] = _mm512_shuffle_i32x4(t[b + 4], t[b + 12], 0xdd);
    }
}

INLINE __m512 add_pair(__m512 sum, const uint16_t *x, int num, __m512i w) {
    uint32_t pair = 0;
    memcpy(&pair, x, (size_t)num * sizeof *x);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)w);
}

/* Adds 32 columns of 16 rows. */
INLINE __m512 add_step(__m512 sum, const uint16_t *w, int64_t stride, const uint16_t *x) {
    __m512i r[LANES];
    UNROLL for (int i = 0; i < LANES; i++) r[i] = _mm512_loadu_si512(w + i * stride);
    transpose(r);
    UNROLL for (int i = 0; i < LANES; i++) sum = add_pair(sum, x + 2 * i, 2, r[i]);
    return sum;
}

/* Adds fewer than 32 columns, or of fewer than 16 rows; reads nothing else. */
INLINE __m512 add_rest(__m512 sum, const uint16_t *w, int64_t stride, const uint16_t *x,
                       int num_rows, int num_columns) {
    const __mmask32 columns = (__mmask32)(0xffffffffu >> (STEP - num_columns));
    __m512i r[LANES];
    UNROLL for (int i = 0; i < LANES; i++)
        r[i] = i < num_rows ? _mm512_maskz_loadu_epi16(columns, w + i * stride)
                            : _mm512_setzero_si512();
    transpose(r);
    UNROLL for (int i = 0; i < LANES; i++)
        if (2 * i < num_columns)
            sum = add_pair(sum, x + 2 * i, num_columns - 2 * i < 2 ? 1 : 2, r[i]);
    return sum;
}

/* A piece of W: `w` points at its first element. */
struct tile {
    const uint16_t *w;
    int64_t num_rows, num_columns;
};

/* Adds a tile of at most 16 rows, while `next` is fetched. Fetching by hand into the second-level
 * cache, a row's piece at a time, keeps the memory reading in order: sixteen strided streams alone
 * reach half the rate. */
INLINE __m512 add_tile(__m512 sum, struct tile tile, const uint16_t *x, struct tile next,
                       int64_t stride) {
    const int64_t num_steps = (tile.num_columns + STEP - 1) / STEP;
    int64_t row = 0;
    for (int64_t step = 0, k = 0; step < num_steps; step++, k += STEP) {
        for (; row * num_steps < next.num_rows * (step + 1); row++)
            for (int64_t column = 0; column < next.num_columns; column += STEP)
                _mm_prefetch((const char *)(next.w + row * stride + column), _MM_HINT_T1);
        const int64_t left = tile.num_columns - k;
        if (tile.num_rows == LANES && left >= STEP)
            sum = add_step(sum, tile.w + k, stride, x + k);
        else
            sum = add_rest(sum, tile.w + k, stride, x + k, (int)tile.num_rows,
                           (int)smaller(left, STEP));
    }
    return sum;
}

/* The outputs of `num_rows` <= 16 rows, while the first of `num_next` rows below are fetched. */
INLINE __m256i outputs_of(const struct moe_gemv *op, const uint16_t *w, const uint16_t *x,
                          int64_t num_rows, int64_t num_next) {
    const int64_t stride = op->num_columns;
    __m512 total = _mm512_setzero_ps();
    for (int64_t begin = 0, end; begin < stride; begin = end) {
        end = begin + smaller(op->k_block, stride - begin);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = begin, width; k < end; k += width) {
            width = smaller(TILE, end - k);
            const struct tile tile = {w + k, num_rows, width};
            const struct tile right = {w + k + width, num_rows, smaller(TILE, stride - k - width)};
            const struct tile below = {w + LANES * stride, num_next, smaller(TILE, stride)};
            sum = add_tile(sum, tile, x + k, k + width < stride ? right : below, stride);
        }
        total = begin ? _mm512_add_ps(total, sum) : sum;
    }
    return (__m256i)_mm512_cvtneps_pbh(total);
}

/* Rows [row, end) of one expert. An odd end takes 16 rows back from it and stores the new ones. */
TARGET static void run_rows(const struct moe_gemv *op, int64_t expert, int64_t row, int64_t end) {
    const int64_t stride = op->num_columns;
    const uint16_t *w = op->weights[expert];
    const uint16_t *x = op->x + expert * op->x_stride;
    uint16_t *y = op->y + expert * op->num_rows;
    for (; row + LANES <= end; row += LANES)
        _mm256_storeu_si256((__m256i *)(y + row),
                            outputs_of(op, w + row * stride, x, LANES,
                                       smaller(LANES, end - row - LANES)));
    if (row == end) return;
    const int num_new = (int)(end - row);
    if (end < LANES)
        _mm256_mask_storeu_epi16(y, (__mmask16)(0xffffu >> (LANES - num_new)),
                                 outputs_of(op, w, x, num_new, 0));
    else
        _mm256_mask_storeu_epi16(y + end - LANES, (__mmask16)(0xffffu << (LANES - num_new)),
                                 outputs_of(op, w + (end - LANES) * stride, x, LANES, 0));
}

/* The share of thread `thread`: consecutive units of 64 rows, counted through all experts. */
TARGET static void run_share(const struct moe_gemv *op, int thread, int num_threads) {
    const int64_t units_each = (op->num_rows + UNIT - 1) / UNIT;
    const int64_t num_units = units_each * op->num_experts;
    const int64_t end = num_units * (thread + 1) / num_threads;
    for (int64_t unit = num_units * thread / num_threads, next; unit < end; unit = next) {
        const int64_t expert = unit / units_each, first = expert * units_each;
        next = smaller(first + units_each, end);
        run_rows(op, expert, (unit - first) * UNIT, smaller((next - first) * UNIT, op->num_rows));
    }
}

static void team_body(void *argument) {
    const struct moe_gemv *op = argument;
    run_share(op, op->openmp->thread_num(), op->openmp->num_threads());
}

EXPORT void moe_gemv_run(const struct moe_gemv *op, int num_threads) {
    const int64_t num_weights = op->num_experts * op->num_rows * op->num_columns;
    const int64_t num_shares = num_weights * (int64_t)sizeof(uint16_t) / SHARE_BYTES;
    num_threads = (int)smaller(num_threads, num_shares);
    if (num_threads > 1 && op->openmp)
        op->openmp->parallel(team_body, (void *)op, (unsigned)num_threads, 0);
    else
        run_share(op, 0, 1);
}

#else

EXPORT int moe_gemv_supported(void) { return 0; }
EXPORT void moe_gemv_run(const struct moe_gemv *op, int num_threads) {
    (void)op;
    (void)num_threads;
}

#endif
