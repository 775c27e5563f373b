/* Rows of packed bf16 weights, decoded into registers or memory; docs/formats.md has the layout.
 *
 * A row of K weights is K / 128 tiles and, where K is no multiple, a tail. A tile holds 128 low
 * bytes, then 64 code bytes: 192 bytes, three cache lines. A code of 4 bits names one of 15 high
 * bytes of the block's table; code 15 takes the next byte of the escape list. Low bytes and codes
 * stand in the order in which interleaving them within 128-bit lanes gives weights in order, so a
 * tile costs two table look-ups and four interleaves for four registers of 32 bf16.
 *
 * To include in other kernels: everything is static inline, and needs what its target names. */
#ifndef MOE_PACKED_ROW_H
#define MOE_PACKED_ROW_H

#include <stdint.h>
#include <string.h>

enum {
    MOE_TILE = 128,       /* weights */
    MOE_TILE_BYTES = 192, /* of which the last 64 are codes */
    MOE_ESCAPE = 15,
    MOE_GROUP_WEIGHTS = 4096, /* rows that share an entry of the escape index hold this many */
};

/* What a block begins with; its rows follow, then the escape index, then the escapes. */
struct moe_block_header {
    uint64_t checksum; /* of the whole block with this field zero */
    uint64_t identity; /* says which block of which packing this is */
    uint32_t magic, num_rows, num_columns, num_escapes;
    uint8_t high[16]; /* high bytes by code; the last is zero */
    uint8_t zero[16];
};

_Static_assert(sizeof(struct moe_block_header) == 64, "a cache line");

/* The escapes not yet used. Reading past `end` gives zeros and moves on, so that whoever compares
 * `next` with the index sees the damage, and no foreign memory is read. */
struct moe_escapes {
    const uint8_t *next, *end;
};

static inline uint8_t moe_next_escape(struct moe_escapes *escapes) {
    const uint8_t byte = escapes->next < escapes->end ? *escapes->next : 0;
    escapes->next++;
    return byte;
}

static inline int64_t moe_tail_bytes(int64_t num_weights) {
    return num_weights + (num_weights + 1) / 2;
}

static inline int64_t moe_row_bytes(int64_t num_columns) {
    return num_columns / MOE_TILE * MOE_TILE_BYTES + moe_tail_bytes(num_columns % MOE_TILE);
}

/* Rows that share an entry of the escape index. */
static inline int64_t moe_group_rows(int64_t num_columns) {
    return (MOE_GROUP_WEIGHTS + num_columns - 1) / num_columns;
}

/* Entries of the escape index: one a group of rows, and the number of all. */
static inline int64_t moe_num_starts(int64_t num_rows, int64_t num_columns) {
    const int64_t group = moe_group_rows(num_columns);
    return (num_rows + group - 1) / group + 1;
}

/* Which of the 128 weights stands at place p of a tile. */
static inline int moe_weight_at(int p) {
    const int lane = p % 64 / 16, t = p % 16;
    return p / 64 * 64 + t / 8 * 32 + lane * 8 + t % 8;
}

static inline void moe_tile_plain(const uint8_t *tile, const uint8_t high[16],
                                  struct moe_escapes *escapes, uint16_t *w) {
    for (int p = 0; p < MOE_TILE; p++) {
        const int code = tile[128 + p % 64] >> (p / 64 * 4) & 15;
        const uint8_t byte = code == MOE_ESCAPE ? moe_next_escape(escapes) : high[code];
        w[moe_weight_at(p)] = (uint16_t)(byte << 8 | tile[p]);
    }
}

/* The last weights of a row, in order: low bytes, then codes of the first half in low nibbles and
 * of the second in high ones. */
static inline void moe_tail_plain(const uint8_t *tail, int num, const uint8_t high[16],
                                  struct moe_escapes *escapes, uint16_t *w) {
    const int half = (num + 1) / 2;
    for (int i = 0; i < num; i++) {
        const int code = i < half ? tail[num + i] & 15 : tail[num + i - half] >> 4;
        const uint8_t byte = code == MOE_ESCAPE ? moe_next_escape(escapes) : high[code];
        w[i] = (uint16_t)(byte << 8 | tail[i]);
    }
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(MOE_OTHER_PROCESSOR)

#include <immintrin.h>

#define MOE_UNROLL _Pragma("GCC unroll 8")
#define MOE_AVX2 __attribute__((target("avx2")))
#define MOE_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

/* Escapes are rare (one tile in twenty of normal weights): out of the way. */
static __attribute__((noinline)) void moe_patch(uint8_t *high, uint64_t mask,
                                                struct moe_escapes *escapes) {
    for (; mask; mask &= mask - 1) high[__builtin_ctzll(mask)] = moe_next_escape(escapes);
}

static __attribute__((noinline)) MOE_AVX512 __m512i
moe_patch_512(__m512i high, uint64_t mask, struct moe_escapes *escapes) {
    uint8_t room[64];
    _mm512_storeu_si512(room, high);
    moe_patch(room, mask, escapes);
    return _mm512_loadu_si512(room);
}

/* Weights 32 i .. 32 i + 31 of a tile into w[i]; `high` holds the table in each quarter. */
static inline __attribute__((always_inline)) MOE_AVX512 void
moe_tile_512(const uint8_t *tile, __m512i high, struct moe_escapes *escapes, __m512i w[4]) {
    const __m512i nibble = _mm512_set1_epi8(15), codes = _mm512_loadu_si512(tile + 128);
    const __m512i c0 = _mm512_and_si512(codes, nibble);
    const __m512i c1 = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble);
    const __mmask64 mask0 = _mm512_cmpeq_epi8_mask(c0, nibble);
    const __mmask64 mask1 = _mm512_cmpeq_epi8_mask(c1, nibble);
    __m512i h0 = _mm512_shuffle_epi8(high, c0), h1 = _mm512_shuffle_epi8(high, c1);
    if (__builtin_expect((mask0 | mask1) != 0, 0)) {
        h0 = moe_patch_512(h0, mask0, escapes);
        h1 = moe_patch_512(h1, mask1, escapes);
    }
    const __m512i low0 = _mm512_loadu_si512(tile), low1 = _mm512_loadu_si512(tile + 64);
    w[0] = _mm512_unpacklo_epi8(low0, h0);
    w[1] = _mm512_unpackhi_epi8(low0, h0);
    w[2] = _mm512_unpacklo_epi8(low1, h1);
    w[3] = _mm512_unpackhi_epi8(low1, h1);
}

static inline MOE_AVX512 __mmask64 moe_first_512(int num) {
    return num ? ~(__mmask64)0 >> (64 - num) : 0;
}

/* `num` <= 64 weights whose low bytes and codes stand in order. */
static inline MOE_AVX512 void moe_half_tail_512(__m512i low, __m512i codes, int num, __m512i high,
                                                struct moe_escapes *escapes, uint16_t *w) {
    const __m512i c = _mm512_maskz_mov_epi8(moe_first_512(num), codes);
    const __mmask64 escaped = _mm512_cmpeq_epi8_mask(c, _mm512_set1_epi8(MOE_ESCAPE));
    __m512i h = _mm512_shuffle_epi8(high, c);
    if (__builtin_expect(escaped != 0, 0)) h = moe_patch_512(h, escaped, escapes);
    const __mmask64 mask = moe_first_512(num);
    const __m512i first = _mm512_or_si512(
        _mm512_cvtepu8_epi16(_mm512_castsi512_si256(low)),
        _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(h)), 8));
    const __m512i second = _mm512_or_si512(
        _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(low, 1)),
        _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(h, 1)), 8));
    _mm512_mask_storeu_epi16(w, (__mmask32)mask, first);
    if (num > 32) _mm512_mask_storeu_epi16(w + 32, (__mmask32)(mask >> 32), second);
}

static inline MOE_AVX512 void moe_tail_512(const uint8_t *tail, int num, __m512i high,
                                           struct moe_escapes *escapes, uint16_t *w) {
    const int half = (num + 1) / 2;
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i codes = _mm512_maskz_loadu_epi8(moe_first_512(half), tail + num);
    moe_half_tail_512(_mm512_maskz_loadu_epi8(moe_first_512(half), tail),
                      _mm512_and_si512(codes, nibble), half, high, escapes, w);
    if (num > 1)
        moe_half_tail_512(_mm512_maskz_loadu_epi8(moe_first_512(num - half), tail + half),
                          _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble), num - half, high,
                          escapes, w + half);
}

/* Weights 16 i .. 16 i + 15 of a tile into w[i]. */
static inline __attribute__((always_inline)) MOE_AVX2 void
moe_tile_256(const uint8_t *tile, __m256i high, struct moe_escapes *escapes, __m256i w[8]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    MOE_UNROLL for (int i = 0; i < 4; i++) {
        const __m256i low = _mm256_loadu_si256((const __m256i *)(tile + 32 * i));
        const __m256i codes = _mm256_loadu_si256((const __m256i *)(tile + 128 + i % 2 * 32));
        const __m256i c = _mm256_and_si256(i < 2 ? codes : _mm256_srli_epi16(codes, 4), nibble);
        const int mask = _mm256_movemask_epi8(_mm256_cmpeq_epi8(c, nibble));
        __m256i h = _mm256_shuffle_epi8(high, c);
        if (__builtin_expect(mask != 0, 0)) {
            uint8_t room[32];
            _mm256_storeu_si256((__m256i *)room, h);
            moe_patch(room, (uint32_t)mask, escapes);
            h = _mm256_loadu_si256((const __m256i *)room);
        }
        w[i / 2 * 4 + i % 2] = _mm256_unpacklo_epi8(low, h);
        w[i / 2 * 4 + i % 2 + 2] = _mm256_unpackhi_epi8(low, h);
    }
}

#endif
#endif
