/* Attention of decoding sequences, one query each, over keys and values in pages of 32 tokens.
 *
 * Plain C11 and GCC's vectors: no Python, no torch, no OpenMP at link time, no -march. The body is
 * written once, in vectors of 16 floats, and compiled for AVX-512, for AVX2 and for what the
 * compiler aims at; the processor chooses at run time.
 *
 * A page of keys stands with its tokens side by side, [d][32], so that two vectors hold the scores
 * of a page and no sum runs across lanes; a page of values stands token by token, [32][v]. 32
 * bfloat16 of a row are one load: a shift makes floats of the even ones, a mask of the odd ones, and
 * scores and sums stay in that order, even ones first, until they are used.
 * One task is one sequence and one key-value head, for all the query heads that share it: each key
 * and value is read once. A tile of TILE pages goes through scores, softmax and sum of values
 * before the next one (online softmax: Milakov and Gimelshein, arXiv 1805.02867, algorithm 3; in
 * blocks as FlashAttention, arXiv 2205.14135, algorithm 1). All sums are in float32.
 */
#include <stdint.h>

#include "openmp.h"

#define EXPORT __attribute__((visibility("default")))

/* Raised whenever a signature or a struct below changes; attention_status.py holds the same. */
enum { INTERFACE = 1 };

/* Sequence n has lengths[n] tokens in pages table[n * table_width ...]; `window` 0: all are seen.
 * query [N, H, d], out [N, H, v] and sinks [H] (or NULL) are float32; keys [B, G, d, 32] and values
 * [B, G, 32, v] are float32, or bfloat16 with `is_bf16`. `next` is the first task not taken. */
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
    int64_t is_bf16;
    double scaling;
    int64_t next;
    const struct moe_openmp *openmp;
};

EXPORT int moe_attention_interface(void) { return INTERFACE; }

enum {
    LANES = 16,
    PAGE = 32,       /* tokens */
    TILE = 4,        /* pages between two looks at the maximum */
    VECTORS = 2 * TILE,
    HEADS = 8,       /* query heads that share a pass over keys */
    STEP = 4,        /* rows of keys between two hints to the memory */
    MOST_WIDTH = 1024,
    LINE = 64,
};

typedef float v16 __attribute__((vector_size(64)));
typedef float v16u __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint32_t u16u __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE v16 all(float x) { return x - (v16){0}; }

/* 32 numbers from element `at` on: bfloat16 as even and odd ones, float32 as two halves. */
INLINE void load(v16 to[2], const char *from, int64_t at, int is_bf16) {
    if (is_bf16) {
        const u16 both = *(const u16u *)(from + 2 * at);
        to[0] = (v16)(both << 16);
        to[1] = (v16)(both & 0xffff0000u);
    } else {
        to[0] = *(const v16u *)(from + 4 * at);
        to[1] = *(const v16u *)(from + 4 * at + LINE);
    }
}

/* 16 numbers, in order. */
INLINE v16 load_half(const char *from, int64_t at, int is_bf16) {
    if (!is_bf16) return *(const v16u *)(from + 4 * at);
    return (v16)(__builtin_convertvector(*(const h16 *)(from + 2 * at), u16) << 16);
}

/* Where number i of 32 is after `load`. */
INLINE int place(int i, int is_bf16) { return is_bf16 ? i % 2 * LANES + i / 2 : i; }

INLINE v16 larger(v16 a, v16 b) {
    const i16 is_a = a > b;
    return (v16)((is_a & (i16)a) | (~is_a & (i16)b));
}

INLINE float max_of(v16 x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

INLINE float sum_of(v16 x) {
    float parts[8], sum = 0;
    for (int i = 0; i < 8; i++) parts[i] = x[i] + x[i + 8];
    for (int i = 0; i < 8; i++) sum += parts[i];
    return sum;
}

/* exp(x) for x <= 0, 0 below -87: 2^n times a polynomial of degree 6 (Cephes), within 2 ulp. */
INLINE v16 exp_of(v16 x) {
    const i16 is_some = x > all(-87.0f);
    x = larger(x, all(-87.0f));
    const v16 shifted = x * 1.44269504f + all(12582912.0f); /* 1.5 * 2^23 rounds to nearest */
    const v16 n = shifted - all(12582912.0f);
    const v16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    v16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const i16 power = ((i16)shifted - (i16)all(12582912.0f)) << 23;
    return (v16)(((i16)p + power) & is_some);
}

/* Asks for what is needed soon: the memory keeps reading while registers compute. Hints only, so
 * they may point anywhere. */
INLINE void fetch(const char *from, int num_lines) {
    for (int i = 0; i < num_lines; i++) __builtin_prefetch(from + i * LINE, 0, 2);
}

struct task {
    const struct moe_attention *op;
    const int64_t *table; /* the sequence's pages */
    int64_t group, key_page_bytes, value_page_bytes;
    const float *query; /* [heads, d] of this task */
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

/* Scores of a page for `heads` query heads; the page's values are fetched meanwhile. */
INLINE void score_page(const struct task *task, int64_t page, v16 *scores, int heads,
                       int is_bf16) {
    /* Sums of several rows at a time, where one alone would wait for itself. */
    const int parts = heads >= 4 ? 1 : heads == 2 ? 2 : STEP;
    const int lines = is_bf16 ? 1 : 2; /* of a row */
    const int64_t d = task->op->key_width;
    const char *key = key_page(task, page), *value = value_page(task, page);
    v16 sums[HEADS][STEP][2], row[2];
    int64_t k = 0;
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < parts; i++) sums[h][i][0] = sums[h][i][1] = (v16){0};
    for (; k + STEP <= d; k += STEP) {
        fetch(value + k * lines * LINE, STEP * lines);
        for (int i = 0; i < STEP; i++) {
            load(row, key, (k + i) * PAGE, is_bf16);
            for (int h = 0; h < heads; h++) {
                sums[h][i % parts][0] += row[0] * task->query[h * d + k + i];
                sums[h][i % parts][1] += row[1] * task->query[h * d + k + i];
            }
        }
    }
    for (; k < d; k++) {
        load(row, key, k * PAGE, is_bf16);
        for (int h = 0; h < heads; h++) {
            sums[h][0][0] += row[0] * task->query[h * d + k];
            sums[h][0][1] += row[1] * task->query[h * d + k];
        }
    }
    for (int h = 0; h < heads; h++)
        for (int half = 0; half < 2; half++) {
            for (int i = 1; i < parts; i++) sums[h][0][half] += sums[h][i][half];
            scores[h * VECTORS + half] = sums[h][0][half] * (float)task->op->scaling;
        }
}

/* Tokens of a page outside first .. length get no weight. */
INLINE void mask_page(const struct task *task, int64_t page, v16 *scores, int heads,
                      int is_bf16) {
    for (int t = 0; t < PAGE; t++)
        if (t < from_token(task, page) || t >= to_token(task, page))
            for (int h = 0; h < heads; h++)
                ((float *)(scores + h * VECTORS))[place(t, is_bf16)] = -1e30f;
}

/* Scores of a tile become weights; what was added up before shrinks if there is a new maximum. */
INLINE void weigh(v16 *scores, int64_t vectors, float *most, float *weight_sum, float *total,
                  int64_t width) {
    v16 high = scores[0], sum = {0};
    for (int64_t i = 1; i < vectors; i++) high = larger(high, scores[i]);
    const float peak = max_of(high);
    if (peak > *most) {
        const float shrink = exp_of(all(*most - peak))[0];
        *most = peak;
        *weight_sum *= shrink;
        for (int64_t i = 0; i < width; i++) total[i] *= shrink;
    }
    for (int64_t i = 0; i < vectors; i++) {
        scores[i] = exp_of(scores[i] - all(*most));
        sum += scores[i];
    }
    *weight_sum += sum_of(sum);
}

/* Adds weighted values of tokens `from` .. `to` of a page, and fetches as much from `next` on. */
INLINE void add_page(v16 (*sums)[2], const char *value, int64_t width, int64_t column,
                     const char *next, const float *weight, int from, int to, int heads,
                     int is_bf16) {
    const int lines = is_bf16 ? 1 : 2;
    v16 row[2];
    for (int t = from; t < to; t++) {
        const int at = place(t, is_bf16);
        fetch(next + t * lines * LINE, lines);
        load(row, value, t * width + column, is_bf16);
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < 2; i++) sums[h][i] += row[i] * weight[h * VECTORS * LANES + at];
    }
}

/* Adds weighted values of a tile to 32 columns of `heads` sums; keys of the next tile are fetched
 * meanwhile. */
INLINE void add_values(const struct task *task, int64_t begin, int64_t pages, int64_t next_pages,
                       int64_t column, const v16 *weights, float *total, int heads, int is_bf16) {
    const int64_t width = task->op->value_width;
    const int lines = is_bf16 ? 1 : 2;
    v16 sums[HEADS][2];
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < 2; i++) sums[h][i] = *(v16u *)(total + h * width + column + i * LANES);
    for (int64_t page = 0; page < pages; page++) {
        const char *value = value_page(task, begin + page);
        const char *next = page < next_pages ? key_page(task, begin + pages + page) : value;
        const float *weight = (const float *)&weights[2 * page];
        next += column * lines * LINE;
        const int from = from_token(task, begin + page), to = to_token(task, begin + page);
        if (from == 0 && to == PAGE) /* nearly all pages: a loop of known length */
            add_page(sums, value, width, column, next, weight, 0, PAGE, heads, is_bf16);
        else
            add_page(sums, value, width, column, next, weight, from, to, heads, is_bf16);
    }
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < 2; i++) *(v16u *)(total + h * width + column + i * LANES) = sums[h][i];
}

/* The same for the last 16 columns of a width that is no multiple of 32. */
INLINE void add_last_values(const struct task *task, int64_t begin, int64_t pages,
                            const v16 *weights, float *total, int heads, int is_bf16) {
    const int64_t width = task->op->value_width, column = width - LANES;
    for (int64_t page = 0; page < pages; page++) {
        const char *value = value_page(task, begin + page);
        const float *weight = (const float *)&weights[2 * page];
        const int to = to_token(task, begin + page);
        for (int t = from_token(task, begin + page); t < to; t++) {
            const v16 row = load_half(value, t * width + column, is_bf16);
            for (int h = 0; h < heads; h++)
                *(v16u *)(total + h * width + column) +=
                    row * weight[h * VECTORS * LANES + place(t, is_bf16)];
        }
    }
}

/* `heads` query heads of one sequence, from `out` on; their sinks from `sinks` on, or NULL. */
INLINE void attend(const struct task *task, const float *sinks, float *out, int heads,
                   int is_bf16) {
    const int64_t width = task->op->value_width, whole = width / PAGE * PAGE;
    const int64_t start = task->first / PAGE, end = (task->length + PAGE - 1) / PAGE;
    float most[HEADS], weight_sum[HEADS];
    _Alignas(LINE) float total[HEADS * MOST_WIDTH];
    v16 scores[HEADS * VECTORS];
    for (int h = 0; h < heads; h++) {
        most[h] = sinks ? sinks[h] : -1e30f;
        weight_sum[h] = sinks ? 1.0f : 0.0f;
    }
    for (int64_t i = 0; i < heads * width; i++) total[i] = 0.0f;
    for (int64_t begin = start, pages; begin < end; begin += pages) {
        pages = smaller(TILE, end - begin);
        for (int64_t i = 0; i < pages; i++) {
            score_page(task, begin + i, scores + 2 * i, heads, is_bf16);
            if (begin + i == start || begin + i == end - 1)
                mask_page(task, begin + i, scores + 2 * i, heads, is_bf16);
        }
        for (int h = 0; h < heads; h++)
            weigh(scores + h * VECTORS, 2 * pages, most + h, weight_sum + h, total + h * width,
                  width);
        const int64_t next_pages = smaller(TILE, end - begin - pages);
        for (int64_t column = 0; column < whole; column += PAGE)
            add_values(task, begin, pages, next_pages, column, scores, total, heads, is_bf16);
        if (whole < width) add_last_values(task, begin, pages, scores, total, heads, is_bf16);
    }
    for (int h = 0; h < heads; h++)
        for (int64_t i = 0; i < width; i++) {
            const int64_t at = i < whole ? i / PAGE * PAGE + place((int)(i % PAGE), is_bf16) : i;
            out[h * width + i] = total[h * width + at] / weight_sum[h];
        }
}

/* Sequence and key-value head number `number`, in as many passes as it has heads for. */
INLINE void run_task(const struct moe_attention *op, int64_t number, int is_bf16) {
    const int64_t n = number / op->num_groups, group = number % op->num_groups;
    const int64_t shared = op->num_heads / op->num_groups;
    const int64_t value_bytes = is_bf16 ? 2 : 4;
    const int64_t length = op->lengths[n];
    struct task task = {
        .op = op,
        .table = op->table + n * op->table_width,
        .group = group,
        .key_page_bytes = op->key_width * PAGE * value_bytes,
        .value_page_bytes = op->value_width * PAGE * value_bytes,
        .first = op->window && length > op->window ? length - op->window : 0,
        .length = length,
    };
    for (int64_t done = 0, now; done < shared; done += now) {
        const int64_t head = group * shared + done;
        const float *sinks = op->sinks ? op->sinks + head : 0;
        float *out = op->out + (n * op->num_heads + head) * op->value_width;
        task.query = op->query + (n * op->num_heads + head) * op->key_width;
        now = shared - done >= HEADS ? HEADS : shared - done >= 4 ? 4 : shared - done >= 2 ? 2 : 1;
        if (now == HEADS)
            attend(&task, sinks, out, HEADS, is_bf16);
        else if (now == 4)
            attend(&task, sinks, out, 4, is_bf16);
        else if (now == 2)
            attend(&task, sinks, out, 2, is_bf16);
        else
            attend(&task, sinks, out, 1, is_bf16);
    }
}

/* Tasks, the next one to whoever is free: sequences differ in length. */
INLINE void run_tasks(struct moe_attention *op) {
    const int64_t num_tasks = op->num_sequences * op->num_groups;
    for (;;) {
        const int64_t number = __atomic_fetch_add(&op->next, 1, __ATOMIC_RELAXED);
        if (number >= num_tasks) return;
        if (op->is_bf16)
            run_task(op, number, 1);
        else
            run_task(op, number, 0);
    }
}

static void run_plain(void *op) { run_tasks(op); }

/* A test defines MOE_OTHER_PROCESSOR to see what is built elsewhere. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(MOE_OTHER_PROCESSOR)

__attribute__((target("avx2,fma"))) static void run_avx2(void *op) { run_tasks(op); }
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) static void
run_avx512(void *op) {
    run_tasks(op);
}

EXPORT int moe_attention_levels(void) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static void (*const BODIES[])(void *) = {run_plain, run_avx2, run_avx512};

#else

EXPORT int moe_attention_levels(void) { return 0; }
static void (*const BODIES[])(void *) = {run_plain};

#endif

/* `level` is at most moe_attention_levels(). */
EXPORT void moe_attention_run(struct moe_attention *op, int level, int num_threads) {
    const int64_t num_tasks = op->num_sequences * op->num_groups;
    num_threads = (int)smaller(num_threads, num_tasks);
    if (num_threads > 1 && op->openmp)
        op->openmp->parallel(BODIES[level], op, (unsigned)num_threads, 0);
    else
        BODIES[level](op);
}
