/* Blocks of packed bf16 weights: written, sealed with a checksum, checked and unpacked.
 *
 * Plain C11: no Python, no torch, no OpenMP at link time, no -march. AVX-512 or AVX2 where the
 * processor has them, plain C elsewhere, with equal bytes. docs/formats.md has the layout; every
 * field of a block is little-endian, and so is whoever runs this (checked by moe_unpack_levels).
 */
#include "openmp.h"
#include "packed_row.h"

#define EXPORT __attribute__((visibility("default")))

/* Raised whenever a signature or a struct below changes; unpack_status.py holds the same number. */
enum { INTERFACE = 2 };

enum { MAGIC = 0x3150524d, SEAL = sizeof(uint64_t) }; /* "MRP1" */
enum { PLAIN = 0, AVX2 = 1, AVX512 = 2 };
enum { INTACT = 0, ALTERED = 1, FOREIGN = 2 };

/* One block to check and, where `weights` is not null, to unpack there. */
struct moe_block {
    const uint8_t *block;
    int64_t block_bytes;
    uint16_t *weights;
    int64_t num_rows;
    int64_t num_columns;
    uint64_t identity;
    int64_t status; /* written */
};

struct moe_unpack {
    struct moe_block *blocks;
    int64_t num_blocks;
    int64_t level;
    int64_t stream;   /* whether to write past the caches, where addresses allow */
    int64_t is_known; /* whether the checksums were right before, and need not be looked at */
    const struct moe_openmp *openmp;
};

EXPORT int moe_unpack_interface(void) { return INTERFACE; }

/* Checksum: eight lanes of 64 bits over stripes of 64 bytes. In stripe s lane i adds the word of
 * its neighbour i ^ 1, and the product of the halves of its own word xor (KEY[i] + s * STEP). */
static const uint64_t KEY[8] = {
    0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb, 0xd6e8feb86659fd93,
    0xa0761d6478bd642f, 0xe7037ed1a0b428db, 0x8ebc6af09c88c6e3, 0x589965cc75374cc3,
};
static const uint64_t STEP = 0x2545f4914f6cdd1d;

static void sum_plain(uint64_t lanes[8], const uint8_t *data, int64_t first, int64_t num_stripes) {
    for (int64_t s = first; s < first + num_stripes; s++, data += 64) {
        uint64_t words[8];
        memcpy(words, data, 64);
        for (int i = 0; i < 8; i++) {
            const uint64_t mixed = words[i] ^ (KEY[i] + (uint64_t)s * STEP);
            lanes[i] += words[i ^ 1] + (uint64_t)(uint32_t)mixed * (mixed >> 32);
        }
    }
}

static int is_little_endian(void) {
    const uint16_t one = 1;
    uint8_t first;
    memcpy(&first, &one, 1);
    return first == 1;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(MOE_OTHER_PROCESSOR)

/* The best level here. */
EXPORT int moe_unpack_levels(void) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return AVX512;
    return __builtin_cpu_supports("avx2") ? AVX2 : PLAIN;
}

MOE_AVX512 static void sum_512(uint64_t lanes[8], const uint8_t *data, int64_t first,
                               int64_t num_stripes) {
    const __m512i step = _mm512_set1_epi64((int64_t)STEP);
    __m512i sum = _mm512_loadu_si512(lanes), other = _mm512_setzero_si512();
    __m512i key = _mm512_add_epi64(_mm512_loadu_si512(KEY),
                                   _mm512_set1_epi64((int64_t)((uint64_t)first * STEP)));
    for (int64_t s = 0; s < num_stripes; s++, data += 64) {
        const __m512i words = _mm512_loadu_si512(data);
        const __m512i mixed = _mm512_xor_si512(words, key);
        sum = _mm512_add_epi64(sum, _mm512_shuffle_epi32(words, _MM_PERM_BADC));
        other = _mm512_add_epi64(other, _mm512_mul_epu32(mixed, _mm512_srli_epi64(mixed, 32)));
        key = _mm512_add_epi64(key, step);
    }
    _mm512_storeu_si512(lanes, _mm512_add_epi64(sum, other));
}

MOE_AVX2 static void sum_256(uint64_t lanes[8], const uint8_t *data, int64_t first,
                             int64_t num_stripes) {
    const __m256i step = _mm256_set1_epi64x((int64_t)STEP);
    const __m256i start = _mm256_set1_epi64x((int64_t)((uint64_t)first * STEP));
    __m256i sums[2], keys[2];
    for (int i = 0; i < 2; i++) {
        sums[i] = _mm256_loadu_si256((const __m256i *)(lanes + 4 * i));
        keys[i] = _mm256_add_epi64(_mm256_loadu_si256((const __m256i *)(KEY + 4 * i)), start);
    }
    for (int64_t s = 0; s < num_stripes; s++, data += 64)
        for (int i = 0; i < 2; i++) {
            const __m256i words = _mm256_loadu_si256((const __m256i *)(data + 32 * i));
            const __m256i mixed = _mm256_xor_si256(words, keys[i]);
            const __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
            sums[i] = _mm256_add_epi64(sums[i], _mm256_shuffle_epi32(words, 0x4e));
            sums[i] = _mm256_add_epi64(sums[i], product);
            keys[i] = _mm256_add_epi64(keys[i], step);
        }
    for (int i = 0; i < 2; i++) _mm256_storeu_si256((__m256i *)(lanes + 4 * i), sums[i]);
}

MOE_AVX512 static void row_512(const uint8_t *packed, int64_t num_columns, const uint8_t high[16],
                               struct moe_escapes *escapes, uint16_t *w, int64_t stream) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)high));
    for (; num_columns >= MOE_TILE; num_columns -= MOE_TILE) {
        __m512i tile[4];
        moe_tile_512(packed, table, escapes, tile);
        if (stream)
            MOE_UNROLL for (int i = 0; i < 4; i++)
                _mm512_stream_si512((__m512i *)(w + 32 * i), tile[i]);
        else
            MOE_UNROLL for (int i = 0; i < 4; i++) _mm512_storeu_si512(w + 32 * i, tile[i]);
        packed += MOE_TILE_BYTES;
        w += MOE_TILE;
    }
    if (num_columns) moe_tail_512(packed, (int)num_columns, table, escapes, w);
}

MOE_AVX2 static void row_256(const uint8_t *packed, int64_t num_columns, const uint8_t high[16],
                             struct moe_escapes *escapes, uint16_t *w, int64_t stream) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)high));
    for (; num_columns >= MOE_TILE; num_columns -= MOE_TILE) {
        __m256i tile[8];
        moe_tile_256(packed, table, escapes, tile);
        if (stream)
            MOE_UNROLL for (int i = 0; i < 8; i++)
                _mm256_stream_si256((__m256i *)(w + 16 * i), tile[i]);
        else
            MOE_UNROLL for (int i = 0; i < 8; i++)
                _mm256_storeu_si256((__m256i *)(w + 16 * i), tile[i]);
        packed += MOE_TILE_BYTES;
        w += MOE_TILE;
    }
    if (num_columns) moe_tail_plain(packed, (int)num_columns, high, escapes, w);
}

static void end_stream(void) { _mm_sfence(); }

#else

EXPORT int moe_unpack_levels(void) { return PLAIN; }

#define sum_512 sum_plain
#define sum_256 sum_plain
#define row_512 row_plain
#define row_256 row_plain

static void end_stream(void) {}

#endif

static void row_plain(const uint8_t *packed, int64_t num_columns, const uint8_t high[16],
                      struct moe_escapes *escapes, uint16_t *w, int64_t stream) {
    (void)stream;
    for (; num_columns >= MOE_TILE; num_columns -= MOE_TILE) {
        moe_tile_plain(packed, high, escapes, w);
        packed += MOE_TILE_BYTES;
        w += MOE_TILE;
    }
    if (num_columns) moe_tail_plain(packed, (int)num_columns, high, escapes, w);
}

/* Of `num_bytes` bytes, of which the first `skip` (at most 64) count as zero. */
static uint64_t checksum_of(const uint8_t *data, int64_t num_bytes, int skip, int64_t level) {
    void (*const sum)(uint64_t *, const uint8_t *, int64_t, int64_t) =
        level == AVX512 ? sum_512 : level == AVX2 ? sum_256 : sum_plain;
    uint64_t lanes[8];
    memcpy(lanes, KEY, sizeof lanes);
    int64_t stripe = 0;
    uint8_t edge[64];
    if (skip && num_bytes >= 64) {
        memset(edge, 0, (size_t)skip);
        memcpy(edge + skip, data + skip, (size_t)(64 - skip));
        sum(lanes, edge, stripe++, 1);
    }
    const int64_t whole = num_bytes / 64 - stripe, rest = num_bytes % 64;
    sum(lanes, data + 64 * stripe, stripe, whole);
    if (rest) {
        memset(edge, 0, 64);
        memcpy(edge, data + num_bytes - rest, (size_t)rest);
        sum(lanes, edge, stripe + whole, 1);
    }
    uint64_t total = (uint64_t)num_bytes;
    for (int i = 0; i < 8; i++) {
        total = (total ^ lanes[i]) * KEY[0];
        total ^= total >> 29;
    }
    return total;
}

EXPORT uint64_t moe_checksum(const uint8_t *data, int64_t num_bytes, int64_t level) {
    return checksum_of(data, num_bytes, 0, level);
}

/* Names the block, which is whole and padded, and writes its checksum. */
EXPORT void moe_seal(uint8_t *block, int64_t block_bytes, uint64_t identity, int64_t level) {
    memcpy(block + SEAL, &identity, sizeof identity);
    const uint64_t checksum = checksum_of(block, block_bytes, SEAL, level);
    memcpy(block, &checksum, sizeof checksum);
}

static int64_t unpack_block(const struct moe_block *op, int64_t level, int64_t stream,
                            int64_t is_known) {
    struct moe_block_header head;
    if (op->block_bytes < (int64_t)sizeof head) return ALTERED;
    memcpy(&head, op->block, sizeof head);
    if (!is_known && checksum_of(op->block, op->block_bytes, SEAL, level) != head.checksum)
        return ALTERED;
    if (head.magic != MAGIC || head.identity != op->identity || head.num_rows != op->num_rows ||
        head.num_columns != op->num_columns)
        return FOREIGN;
    const int64_t row_bytes = moe_row_bytes(op->num_columns), group = moe_group_rows(op->num_columns);
    const int64_t num_starts = moe_num_starts(op->num_rows, op->num_columns);
    const uint8_t *const rows = op->block + sizeof head;
    const uint8_t *const starts = rows + op->num_rows * row_bytes;
    const uint8_t *const first = starts + num_starts * (int64_t)sizeof(uint32_t);
    if (first + head.num_escapes > op->block + op->block_bytes) return ALTERED;
    uint32_t total;
    memcpy(&total, first - sizeof total, sizeof total);
    if (total != head.num_escapes) return ALTERED;
    if (!op->weights) return INTACT;
    void (*const row)(const uint8_t *, int64_t, const uint8_t *, struct moe_escapes *, uint16_t *,
                      int64_t) = level == AVX512 ? row_512 : level == AVX2 ? row_256 : row_plain;
    stream = stream && (uintptr_t)op->weights % 64 == 0 && op->num_columns % 32 == 0;
    struct moe_escapes escapes = {first, first + head.num_escapes};
    for (int64_t r = 0; r < op->num_rows; r++) {
        if (r % group == 0) {
            uint32_t start;
            memcpy(&start, starts + r / group * (int64_t)sizeof start, sizeof start);
            if (escapes.next != first + start) return ALTERED;
        }
        row(rows + r * row_bytes, op->num_columns, head.high, &escapes,
            op->weights + r * op->num_columns, stream);
    }
    if (stream) end_stream();
    return escapes.next == escapes.end ? INTACT : ALTERED;
}

static void run_share(const struct moe_unpack *op, int64_t thread, int64_t num_threads) {
    const int64_t end = op->num_blocks * (thread + 1) / num_threads;
    for (int64_t i = op->num_blocks * thread / num_threads; i < end; i++)
        op->blocks[i].status = unpack_block(&op->blocks[i], op->level, op->stream, op->is_known);
}

static void team_body(void *argument) {
    const struct moe_unpack *op = argument;
    run_share(op, op->openmp->thread_num(), op->openmp->num_threads());
}

EXPORT void moe_unpack_run(const struct moe_unpack *op, int num_threads) {
    if (num_threads > op->num_blocks) num_threads = (int)op->num_blocks;
    if (num_threads > 1 && op->openmp)
        op->openmp->parallel(team_body, (void *)op, (unsigned)num_threads, 0);
    else
        run_share(op, 0, 1);
}

/* The 15 most frequent high bytes, smaller ones first among equals; and the code of each byte. */
static void choose_codes(const uint16_t *weights, int64_t num_weights, uint8_t high[16],
                         uint8_t code[256]) {
    int64_t counts[4][256] = {{0}};
    for (int64_t i = 0; i < num_weights; i++) counts[i % 4][weights[i] >> 8]++;
    memset(code, MOE_ESCAPE, 256);
    memset(high, 0, 16);
    for (int c = 0; c < MOE_ESCAPE; c++) {
        int best = -1;
        int64_t most = 0;
        for (int byte = 0; byte < 256; byte++) {
            int64_t count = 0;
            for (int k = 0; k < 4; k++) count += counts[k][byte];
            if (code[byte] == MOE_ESCAPE && count > most) {
                best = byte;
                most = count;
            }
        }
        if (best < 0) break;
        high[c] = (uint8_t)best;
        code[best] = (uint8_t)c;
    }
}

/* Writes an unsealed block; returns its bytes without padding. `block` has room for the worst:
 * all weights escaped. */
EXPORT int64_t moe_pack(const uint16_t *weights, int64_t num_rows, int64_t num_columns,
                        uint8_t *block) {
    struct moe_block_header head = {.magic = MAGIC,
                          .num_rows = (uint32_t)num_rows,
                          .num_columns = (uint32_t)num_columns};
    uint8_t code[256];
    choose_codes(weights, num_rows * num_columns, head.high, code);
    int place[MOE_TILE];
    for (int p = 0; p < MOE_TILE; p++) place[p] = moe_weight_at(p);
    const int64_t group = moe_group_rows(num_columns);
    uint8_t *out = block + sizeof head;
    uint8_t *starts = out + num_rows * moe_row_bytes(num_columns);
    uint8_t *const first =
        starts + moe_num_starts(num_rows, num_columns) * (int64_t)sizeof(uint32_t);
    uint8_t *next = first;
    for (int64_t r = 0; r < num_rows; r++) {
        if (r % group == 0) {
            const uint32_t start = (uint32_t)(next - first);
            memcpy(starts, &start, sizeof start);
            starts += sizeof start;
        }
        const uint16_t *w = weights + r * num_columns;
        for (int64_t left = num_columns; left >= MOE_TILE; left -= MOE_TILE) {
            uint8_t codes[MOE_TILE];
            for (int p = 0; p < MOE_TILE; p++) {
                const uint16_t weight = w[place[p]];
                out[p] = (uint8_t)weight;
                codes[p] = code[weight >> 8];
                *next = (uint8_t)(weight >> 8); /* kept only if it is an escape */
                next += codes[p] == MOE_ESCAPE;
            }
            for (int p = 0; p < 64; p++) out[128 + p] = (uint8_t)(codes[p] | codes[p + 64] << 4);
            out += MOE_TILE_BYTES;
            w += MOE_TILE;
        }
        const int num = (int)(num_columns % MOE_TILE), half = (num + 1) / 2;
        for (int i = 0; i < num; i++) {
            const uint8_t c = code[w[i] >> 8];
            out[i] = (uint8_t)w[i];
            if (i < half)
                out[num + i] = c;
            else
                out[num + i - half] |= (uint8_t)(c << 4);
            *next = (uint8_t)(w[i] >> 8);
            next += c == MOE_ESCAPE;
        }
        out += moe_tail_bytes(num);
    }
    const uint32_t num_escapes = (uint32_t)(next - first);
    memcpy(starts, &num_escapes, sizeof num_escapes);
    head.num_escapes = num_escapes;
    memcpy(block, &head, sizeof head);
    return next - block;
}

EXPORT int moe_unpack_supported(void) { return is_little_endian(); }
