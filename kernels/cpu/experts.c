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
 * Sums: an output is two partial sums of vector lanes, fed in turns and added up in a fixed tree.
 * Nothing in it depends on the other tokens, on the thread, or on which experts share a call.
 */
#include <stdint.h>

#include "openmp.h"

#define EXPORT __attribute__((visibility("default")))

/* Raised whenever a signature or a struct below changes; experts_status.py holds the same number. */
enum { INTERFACE = 2 };

enum level { AVX2 = 1, AVX512F = 2, AVX512_BF16 = 3 };
enum dtype { BF16 = 0, F16 = 1, F32 = 2 };
enum gate { NO_GATE = 0, SILU = 1, GELU_TANH = 2, RELU = 3, RELU_SQUARED = 4 };
enum stage { UP = 1, GATE = 2, DOWN = 4, SUM = 8 };

/* One call. Expert e has the rows first_row[e] .. first_row[e] + num_rows[e] of `token`, `weight`,
 * `up_y`, `h` and `y`. All matrices are row-major; x, weights, h and out have `dtype`. */
struct moe_experts {
    const void *const *up;   /* [num_experts] of [up_rows, dim]; gate before up, or in turns */
    const void *const *down; /* [num_experts] of [dim, ffn] */
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
    int32_t level, dtype, gate, is_interleaved, stages;
};

EXPORT int moe_experts_interface(void) { return INTERFACE; }

/* A test defines MOE_OTHER_PROCESSOR to see what is built elsewhere. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(MOE_OTHER_PROCESSOR)

#include <immintrin.h>
#include <string.h>

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512F __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl")))
#define TARGET_AVX512_BF16 \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512bf16")))

enum {
    MAX_TOKENS = 16,          /* of one expert, that a row of weights meets before the next row */
    TOKENS = 4,               /* of these, in registers at a time */
    FEW_TOKENS = 4,           /* up to which a thread reads one row of weights at a time */
    PIECE_BYTES = 128 << 10,  /* of weights that a thread takes at a time: stays in its L2 */
    SHARE_BYTES = 128 << 10,  /* a thread that would read less than this costs more than it gives */
    STEP_BYTES = 128,         /* the most that one step of any loop below reads of a row */
    NUM_SUM_COLUMNS = 256,    /* of the weighted sum, a piece */
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
INLINE int64_t size_of(int dtype) { return dtype == F32 ? 4 : 2; }

/* ---- Loads: STEP elements of a row as two vectors. Weights of another kind (packed, int8) need a
 * load of their own that yields the same vectors. bf16 becomes float32 by a shift, so that the two
 * vectors hold the even and the odd elements; of x they do too. ---- */

struct bf16_pair { __m512i a, b; };
struct f32x16_pair { __m512 a, b; };
struct f32x8_pair { __m256 a, b; };

TARGET_AVX512_BF16 INLINE struct bf16_pair load_bf16_as_is(const char *p) {
    return (struct bf16_pair){_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64)};
}
TARGET_AVX512F INLINE struct f32x16_pair load_bf16_avx512(const char *p) {
    const __m512i v = _mm512_loadu_si512(p);
    return (struct f32x16_pair){
        _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
        _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)))};
}
TARGET_AVX512F INLINE struct f32x16_pair load_f16_avx512(const char *p) {
    return (struct f32x16_pair){_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)),
                                _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p + 32)))};
}
TARGET_AVX512F INLINE struct f32x16_pair load_f32_avx512(const char *p) {
    return (struct f32x16_pair){_mm512_loadu_ps(p), _mm512_loadu_ps(p + 64)};
}
TARGET_AVX2 INLINE struct f32x8_pair load_bf16_avx2(const char *p) {
    const __m256i v = _mm256_loadu_si256((const __m256i *)p);
    return (struct f32x8_pair){
        _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)),
        _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32((int)0xffff0000)))};
}
TARGET_AVX2 INLINE struct f32x8_pair load_f16_avx2(const char *p) {
    return (struct f32x8_pair){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                               _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 16)))};
}
TARGET_AVX2 INLINE struct f32x8_pair load_f32_avx2(const char *p) {
    return (struct f32x8_pair){_mm256_loadu_ps((const float *)p),
                               _mm256_loadu_ps((const float *)(p + 32))};
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

/* The tokens of one expert, MAX_TOKENS at a time: rows of x, and of where outputs go. */
struct tokens {
    const char *x[MAX_TOKENS];
    float *y[MAX_TOKENS];
};

/* NAME: `num_rows` rows of `row_bytes` at w times `num` tokens, whose outputs go to y[.][row ..].
 * The loop over bytes stands here once; a level, a dtype and a kind of weights are its LOADs, its
 * ADD and its TOTAL. A few tokens take one row at a time; more take MANY_ROWS, as
 * then the loads of x are what costs. What is left of a row behind the last whole STEP is copied,
 * so that nothing beyond it is read. */
#define DEFINE_DOT(NAME, TARGET, VECTOR, ZERO, PAIR, LOAD_W, LOAD_X, ADD, TOTAL, STEP, MANY_ROWS) \
    TARGET INLINE void NAME##_block(const char *w, const int64_t row_bytes, const char *const *xs,\
                                    float *const *ys, int64_t row, const int m, const int n) {    \
        const char *const w2 = w + row_bytes;                                                     \
        const char *x[TOKENS];                                                                    \
        VECTOR a[TOKENS], b[TOKENS], a2[TOKENS], b2[TOKENS];                                      \
        UNROLL for (int j = 0; j < n; j++) x[j] = xs[j];                                          \
        UNROLL for (int j = 0; j < n; j++) a[j] = b[j] = a2[j] = b2[j] = ZERO();                  \
        int64_t k = 0;                                                                            \
        for (; k + (STEP) <= row_bytes; k += (STEP)) {                                            \
            const PAIR p = LOAD_W(w + k), p2 = LOAD_W((m > 1 ? w2 : w) + k);                      \
            UNROLL for (int j = 0; j < n; j++) {                                                  \
                const PAIR q = LOAD_X(x[j] + k);                                                  \
                a[j] = ADD(a[j], p.a, q.a);                                                       \
                b[j] = ADD(b[j], p.b, q.b);                                                       \
                if (m == 1) continue;                                                             \
                a2[j] = ADD(a2[j], p2.a, q.a);                                                    \
                b2[j] = ADD(b2[j], p2.b, q.b);                                                    \
            }                                                                                     \
        }                                                                                         \
        if (k < row_bytes) {                                                                      \
            char rest_w[STEP_BYTES] = {0}, rest_w2[STEP_BYTES] = {0}, rest_x[STEP_BYTES] = {0};   \
            memcpy(rest_w, w + k, (size_t)(row_bytes - k));                                       \
            if (m > 1) memcpy(rest_w2, w2 + k, (size_t)(row_bytes - k));                          \
            const PAIR p = LOAD_W(rest_w), p2 = LOAD_W(rest_w2);                                  \
            UNROLL for (int j = 0; j < n; j++) {                                                  \
                memcpy(rest_x, x[j] + k, (size_t)(row_bytes - k));                                \
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
    TARGET INLINE void NAME##_rows(const char *w, int64_t row_bytes, const struct tokens *tokens, \
                                   int num, int64_t row, const int m) {                           \
        for (int first = 0; first < num; first += TOKENS) {                                       \
            const char *const *x = tokens->x + first;                                             \
            float *const *y = tokens->y + first;                                                  \
            switch (num - first) {                                                                \
                case 1: NAME##_block(w, row_bytes, x, y, row, m, 1); break;                       \
                case 2: NAME##_block(w, row_bytes, x, y, row, m, 2); break;                       \
                case 3: NAME##_block(w, row_bytes, x, y, row, m, 3); break;                       \
                default: NAME##_block(w, row_bytes, x, y, row, m, TOKENS);                        \
            }                                                                                     \
        }                                                                                         \
    }                                                                                             \
    TARGET static void NAME(const char *w, int64_t num_rows, int64_t row_bytes,                   \
                            const struct tokens *tokens, int num) {                               \
        int64_t row = 0;                                                                          \
        if (num > FEW_TOKENS)                                                                     \
            for (; row + (MANY_ROWS) <= num_rows; row += (MANY_ROWS))                             \
                NAME##_rows(w + row * row_bytes, row_bytes, tokens, num, row, MANY_ROWS);         \
        for (; row < num_rows; row++)                                                             \
            NAME##_rows(w + row * row_bytes, row_bytes, tokens, num, row, 1);                     \
    }

DEFINE_DOT(dot_avx512_bf16, TARGET_AVX512_BF16, __m512, _mm512_setzero_ps, struct bf16_pair,
           load_bf16_as_is, load_bf16_as_is, add_bf16, total_avx512, 128, 2)
DEFINE_DOT(dot_avx512_bf16_as_f32, TARGET_AVX512F, __m512, _mm512_setzero_ps, struct f32x16_pair,
           load_bf16_avx512, load_bf16_avx512, add_avx512, total_avx512, 64, 2)
DEFINE_DOT(dot_avx512_f16, TARGET_AVX512F, __m512, _mm512_setzero_ps, struct f32x16_pair,
           load_f16_avx512, load_f16_avx512, add_avx512, total_avx512, 64, 2)
DEFINE_DOT(dot_avx512_f32, TARGET_AVX512F, __m512, _mm512_setzero_ps, struct f32x16_pair,
           load_f32_avx512, load_f32_avx512, add_avx512, total_avx512, 128, 2)
DEFINE_DOT(dot_avx2_bf16, TARGET_AVX2, __m256, _mm256_setzero_ps, struct f32x8_pair,
           load_bf16_avx2, load_bf16_avx2, add_avx2, total_avx2, 32, 1)
DEFINE_DOT(dot_avx2_f16, TARGET_AVX2, __m256, _mm256_setzero_ps, struct f32x8_pair,
           load_f16_avx2, load_f16_avx2, add_avx2, total_avx2, 32, 1)
DEFINE_DOT(dot_avx2_f32, TARGET_AVX2, __m256, _mm256_setzero_ps, struct f32x8_pair,
           load_f32_avx2, load_f32_avx2, add_avx2, total_avx2, 64, 1)

typedef void dot_rows(const char *w, int64_t num_rows, int64_t row_bytes,
                      const struct tokens *tokens, int n);

static dot_rows *dot_of(int level, int dtype) {
    if (level == AVX512_BF16) return dot_avx512_bf16;
    if (level == AVX512F)
        return dtype == BF16 ? dot_avx512_bf16_as_f32
                             : dtype == F16 ? dot_avx512_f16 : dot_avx512_f32;
    return dtype == BF16 ? dot_avx2_bf16 : dtype == F16 ? dot_avx2_f16 : dot_avx2_f32;
}

/* ---- Elementwise parts: loops that the compiler turns into vectors ---- */

/* e^v within 2 units of the last place from -87, where v is cut off, to 88, soon after which it is
 * infinite; NaN gives infinity. */
INLINE float exponential(float v) {
    v = v < 89.0f ? v : 89.0f;
    v = v > -87.0f ? v : -87.0f;
    const float n = (v * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounds to a whole number */
    const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23; /* 2^n */
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

INLINE float activation(int gate, float g) {
    switch (gate) {
        case SILU: return g / (1.0f + exponential(-g));
        case GELU_TANH: /* (1 + tanh u) / 2 is 1 / (1 + e^-2u) */
            return g / (1.0f + exponential(-1.59576912f * (g + 0.044715f * g * g * g)));
        case RELU: return g > 0.0f || g != g ? g : 0.0f;
        case RELU_SQUARED: return g > 0.0f || g != g ? g * g : 0.0f;
        default: return g;
    }
}

/* y[f] becomes the gated number f; in place, which never overtakes what is still to be read. */
INLINE void apply_gate_of(int gate, int is_gated, int is_interleaved, float *y, int64_t ffn) {
    if (!is_gated)
        for (int64_t f = 0; f < ffn; f++) y[f] = activation(gate, y[f]);
    else if (is_interleaved)
        for (int64_t f = 0; f < ffn; f++) y[f] = activation(gate, y[2 * f]) * y[2 * f + 1];
    else
        for (int64_t f = 0; f < ffn; f++) y[f] = activation(gate, y[f]) * y[ffn + f];
}

INLINE void round_bf16(uint16_t *out, const float *y, int64_t num) {
    for (int64_t i = 0; i < num; i++) {
        uint32_t bits;
        memcpy(&bits, y + i, sizeof bits);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        out[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

TARGET_AVX2 INLINE void round_f16(uint16_t *out, const float *y, int64_t num) {
    int64_t i = 0;
    for (; i + 8 <= num; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(y + i), 0));
    for (; i < num; i++) out[i] = _cvtss_sh(y[i], 0);
}

TARGET_AVX2 INLINE void round_row(int dtype, void *out, const float *y, int64_t num) {
    if (dtype == BF16)
        round_bf16(out, y, num);
    else if (dtype == F16)
        round_f16(out, y, num);
    else
        memcpy(out, y, (size_t)num * sizeof *y);
}

TARGET_AVX2 static void gate_row(const struct moe_experts *op, int64_t row) {
    float *y = op->up_y + row * op->up_rows;
    const int is_gated = op->up_rows == 2 * op->ffn, turns = op->is_interleaved;
    switch (op->gate) { /* each its own loop */
        case SILU: apply_gate_of(SILU, is_gated, turns, y, op->ffn); break;
        case GELU_TANH: apply_gate_of(GELU_TANH, is_gated, turns, y, op->ffn); break;
        case RELU: apply_gate_of(RELU, is_gated, turns, y, op->ffn); break;
        case RELU_SQUARED: apply_gate_of(RELU_SQUARED, is_gated, turns, y, op->ffn); break;
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
    const char *x; /* rows of `columns` numbers, by token or by row */
    const int64_t *x_index;
    float *y; /* [num_all_rows, num_rows] */
    int64_t num_rows, num_columns;
};

/* Weight rows [begin, end) of `expert` times all of its tokens. */
static void run_piece(const struct moe_experts *op, const struct product *product, int64_t expert,
                      int64_t begin, int64_t end) {
    const int64_t row_bytes = product->num_columns * size_of(op->dtype);
    const char *w = (const char *)product->weights[expert] + begin * row_bytes;
    dot_rows *dot = dot_of(op->level, op->dtype);
    for (int64_t first = 0; first < op->num_rows[expert]; first += MAX_TOKENS) {
        const int n = (int)smaller(MAX_TOKENS, op->num_rows[expert] - first);
        struct tokens tokens;
        for (int j = 0; j < n; j++) {
            const int64_t row = op->first_row[expert] + first + j;
            const int64_t x_row = product->x_index ? product->x_index[row] : row;
            tokens.x[j] = product->x + x_row * row_bytes;
            tokens.y[j] = product->y + row * product->num_rows + begin;
        }
        dot(w, end - begin, row_bytes, &tokens, n);
    }
}

/* Takes pieces until none are left: a thread that is held up leaves its share to the others. */
static void run_product(const struct moe_experts *op, const struct product *product,
                        int64_t *next) {
    const int64_t row_bytes = product->num_columns * size_of(op->dtype);
    const int64_t wanted = row_bytes ? PIECE_BYTES / row_bytes : product->num_rows;
    const int64_t piece_rows = wanted > 1 ? wanted : 1;
    const int64_t pieces_each = (product->num_rows + piece_rows - 1) / piece_rows;
    for (;;) {
        const int64_t piece = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (piece >= pieces_each * op->num_experts) return;
        const int64_t begin = piece % pieces_each * piece_rows;
        run_piece(op, product, piece / pieces_each, begin,
                  smaller(begin + piece_rows, product->num_rows));
    }
}

static void wait_for_all(const struct moe_experts *op, int num_threads) {
    if (num_threads > 1) op->openmp->barrier();
}

static void run_stages(struct moe_experts *op, int thread, int num_threads) {
    if (op->stages & UP) {
        const struct product up = {op->up, op->x, op->token, op->up_y, op->up_rows, op->dim};
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
        const struct product down = {op->down, op->h, 0, op->y, op->dim, op->ffn};
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
