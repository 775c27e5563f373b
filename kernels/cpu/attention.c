/* Attention of decoding sequences, one query each, over keys and values in pages of 32 tokens.
 *
 * Plain C11 and GCC's vectors: no Python, no torch, no OpenMP at link time, no -march. The body is
 * written once, in vectors of 16 floats, and compiled for AVX-512, for AVX2 and for what the
 * compiler aims at; the processor chooses at run time.
 *
 * A page of keys stands with its tokens side by side, [d][32], so that two vectors hold the scores
 * of a page and no sum runs across lanes; a page of values stands token by token, [32][v]. 32
 * bfloat16 of a row are one load: a shift makes floats of the even ones, a mask of the odd ones, and
 * scores and sums stay in that order, even ones first, until they are used. Keys whose queries are
 * bfloat16 too are multiplied as they are, where the processor does that: attention_pairs.h.
 * One task is one sequence and one key-value head, for all the query heads that share it: each key
 * and value is read once. A tile of TILE pages goes through scores, softmax and sum of values
 * before the next one (online softmax: Milakov and Gimelshein, arXiv 1805.02867, algorithm 3; in
 * blocks as FlashAttention, arXiv 2205.14135, algorithm 1). All sums are in float32.
 */
#include <stdint.h>

#include "attention_pairs.h"
#include "attention_scores.h"
#include "openmp.h"

#define EXPORT __attribute__((visibility("default")))

/* Raised whenever a signature or struct moe_attention changes; attention_status.py has the same. */
enum { INTERFACE = 2 };

#define LOG2_E 1.44269504f

EXPORT int moe_attention_interface(void) { return INTERFACE; }

/* Tokens of a page outside first .. length get no weight. */
INLINE void mask_page(const struct task *task, int64_t page, v16 *scores, int heads, int kind) {
    for (int t = 0; t < PAGE; t++)
        if (t < from_token(task, page) || t >= to_token(task, page))
            for (int h = 0; h < heads; h++)
                ((float *)(scores + h * VECTORS))[place(t, kind)] = -1e30f;
}

/* Scores of a tile, exponents of two, become weights; what was added up before shrinks if there is
 * a new maximum. */
INLINE void weigh(v16 *scores, int64_t vectors, float *most, float *weight_sum, float *total,
                  int64_t width) {
    v16 high = scores[0], sum = {0};
    for (int64_t i = 1; i < vectors; i++) high = larger(high, scores[i]);
    const float peak = max_of(high);
    if (peak > *most) {
        const float shrink = power_of_two(all(*most - peak))[0];
        *most = peak;
        *weight_sum *= shrink;
        for (int64_t i = 0; i < width; i++) total[i] *= shrink;
    }
    for (int64_t i = 0; i < vectors; i++) {
        scores[i] = power_of_two(scores[i] - all(*most));
        sum += scores[i];
    }
    *weight_sum += sum_of(sum);
}

/* Adds weighted values of tokens `from` .. `to` of a page, and fetches as much from `next` on. */
INLINE void add_page(v16 (*sums)[2], const char *value, int64_t width, int64_t column,
                     const char *next, const float *weight, int from, int to, int heads,
                     int kind) {
    const int is_bf16 = kind != F32, lines = is_bf16 ? 1 : 2;
    v16 row[2];
    for (int t = from; t < to; t++) {
        const int at = place(t, kind);
        fetch(next + t * lines * LINE, lines);
        load(row, value, t * width + column, is_bf16);
        UNROLL for (int h = 0; h < heads; h++)
            UNROLL for (int i = 0; i < 2; i++)
                sums[h][i] += row[i] * weight[h * VECTORS * LANES + at];
    }
}

/* Adds weighted values of a tile to 32 columns of `heads` sums; keys of the next tile are fetched
 * meanwhile. */
INLINE void add_values(const struct task *task, int64_t begin, int64_t pages, int64_t next_pages,
                       int64_t column, const v16 *weights, float *total, int heads, int kind) {
    const int64_t width = task->op->value_width;
    const int lines = kind == F32 ? 2 : 1;
    v16 sums[HEADS][2];
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int i = 0; i < 2; i++)
            sums[h][i] = *(v16u *)(total + h * width + column + i * LANES);
    for (int64_t page = 0; page < pages; page++) {
        const char *value = value_page(task, begin + page);
        const char *next = page < next_pages ? key_page(task, begin + pages + page) : value;
        const float *weight = (const float *)&weights[2 * page];
        next += column * lines * LINE;
        const int from = from_token(task, begin + page), to = to_token(task, begin + page);
        if (from == 0 && to == PAGE) /* nearly all pages: a loop of known length */
            add_page(sums, value, width, column, next, weight, 0, PAGE, heads, kind);
        else
            add_page(sums, value, width, column, next, weight, from, to, heads, kind);
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int i = 0; i < 2; i++)
            *(v16u *)(total + h * width + column + i * LANES) = sums[h][i];
}

/* The same for the last 16 columns of a width that is no multiple of 32. */
INLINE void add_last_values(const struct task *task, int64_t begin, int64_t pages,
                            const v16 *weights, float *total, int heads, int kind) {
    const int64_t width = task->op->value_width, column = width - LANES;
    for (int64_t page = 0; page < pages; page++) {
        const char *value = value_page(task, begin + page);
        const float *weight = (const float *)&weights[2 * page];
        const int to = to_token(task, begin + page);
        for (int t = from_token(task, begin + page); t < to; t++) {
            const v16 row = load_half(value, t * width + column, kind != F32);
            UNROLL for (int h = 0; h < heads; h++)
                *(v16u *)(total + h * width + column) +=
                    row * weight[h * VECTORS * LANES + place(t, kind)];
        }
    }
}

/* `heads` query heads of one sequence, from `out` on; their sinks from `sinks` on, or NULL. */
INLINE void attend(const struct task *task, const float *sinks, float *out, int heads, int kind) {
    const int64_t width = task->op->value_width, whole = width / PAGE * PAGE;
    const int64_t start = task->first / PAGE, end = (task->length + PAGE - 1) / PAGE;
    float most[HEADS], weight_sum[HEADS];
    _Alignas(LINE) float total[HEADS * MOST_WIDTH];
    v16 scores[HEADS * VECTORS];
    for (int h = 0; h < heads; h++) {
        most[h] = sinks ? sinks[h] * LOG2_E : -1e30f;
        weight_sum[h] = sinks ? 1.0f : 0.0f;
    }
    for (int64_t i = 0; i < heads * width; i++) total[i] = 0.0f;
    for (int64_t begin = start, pages; begin < end; begin += pages) {
        pages = smaller(TILE, end - begin);
        for (int64_t i = 0; i < pages; i++) {
            if (kind == BF16_PAIRS)
                score_pairs(task, begin + i, scores + 2 * i, heads);
            else
                score_page(task, begin + i, scores + 2 * i, heads, kind);
            if (begin + i == start || begin + i == end - 1)
                mask_page(task, begin + i, scores + 2 * i, heads, kind);
        }
        const int64_t next_pages = smaller(TILE, end - begin - pages);
        if (kind == BF16_PAIRS) {
            weigh_pairs(scores, 2 * pages, most, weight_sum, total, width, heads);
            add_value_pairs(task, begin, pages, next_pages, scores, total, heads);
        } else {
            for (int h = 0; h < heads; h++)
                weigh(scores + h * VECTORS, 2 * pages, most + h, weight_sum + h,
                      total + h * width, width);
            for (int64_t column = 0; column < whole; column += PAGE)
                add_values(task, begin, pages, next_pages, column, scores, total, heads, kind);
        }
        if (whole < width) add_last_values(task, begin, pages, scores, total, heads, kind);
    }
    for (int h = 0; h < heads; h++)
        for (int64_t i = 0; i < width; i++) {
            const int64_t at = i < whole ? i / PAGE * PAGE + place((int)(i % PAGE), kind) : i;
            out[h * width + i] = total[h * width + at] / weight_sum[h];
        }
}

/* Sequence and key-value head number `number`, in as many passes as it has heads for. */
INLINE void run_task(const struct moe_attention *op, int64_t number, int kind) {
    const int64_t n = number / op->num_groups, group = number % op->num_groups;
    const int64_t shared = op->num_heads / op->num_groups;
    const int64_t value_bytes = kind == F32 ? 4 : 2;
    const int64_t length = op->lengths[n];
    struct task task = {
        .op = op,
        .table = op->table + n * op->table_width,
        .group = group,
        .key_page_bytes = op->key_width * PAGE * value_bytes,
        .value_page_bytes = op->value_width * PAGE * value_bytes,
        .scaling = (float)(op->scaling * LOG2_E),
        .first = op->window && length > op->window ? length - op->window : 0,
        .length = length,
    };
    uint32_t pairs[HEADS * MOST_WIDTH / 2];
    task.pairs = pairs;
    for (int64_t done = 0, now; done < shared; done += now) {
        const int64_t head = group * shared + done;
        const float *sinks = op->sinks ? op->sinks + head : 0;
        float *out = op->out + (n * op->num_heads + head) * op->value_width;
        task.query = op->query + (n * op->num_heads + head) * op->key_width;
        now = shared - done >= HEADS ? HEADS : shared - done >= 4 ? 4 : shared - done >= 2 ? 2 : 1;
        if (kind == BF16_PAIRS) pair_up(task.query, pairs, now, op->key_width);
        if (now == HEADS)
            attend(&task, sinks, out, HEADS, kind);
        else if (now == 4)
            attend(&task, sinks, out, 4, kind);
        else if (now == 2)
            attend(&task, sinks, out, 2, kind);
        else
            attend(&task, sinks, out, 1, kind);
    }
}

/* Tasks, the next one to whoever is free: sequences differ in length. */
INLINE void run_tasks(struct moe_attention *op, int kind) {
    const int64_t num_tasks = op->num_sequences * op->num_groups;
    for (;;) {
        const int64_t number = __atomic_fetch_add(&op->next, 1, __ATOMIC_RELAXED);
        if (number >= num_tasks) return;
        run_task(op, number, kind);
    }
}

INLINE void run_floats(struct moe_attention *op) {
    if (op->kind == F32)
        run_tasks(op, F32);
    else
        run_tasks(op, BF16);
}

static void run_plain(void *op) { run_floats(op); }

/* A test defines MOE_OTHER_PROCESSOR to see what is built elsewhere. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(MOE_OTHER_PROCESSOR)

#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"

__attribute__((target("avx2,fma"))) static void run_avx2(void *op) { run_floats(op); }
__attribute__((target(AVX512))) static void run_avx512(void *op) { run_floats(op); }
__attribute__((target(AVX512))) static void run_avx512_bf16(void *op) {
    if (((struct moe_attention *)op)->kind == BF16_PAIRS)
        run_tasks(op, BF16_PAIRS);
    else
        run_avx512(op);
}

EXPORT int moe_attention_levels(void) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static void (*const BODIES[])(void *) = {run_plain, run_avx2, run_avx512, run_avx512_bf16};

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
