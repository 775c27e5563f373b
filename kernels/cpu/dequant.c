/* fp8 and mxfp4 weights as bfloat16: a whole matrix at a time, as rows or transposed.
 *
 * Plain C11: no Python, no torch, no OpenMP at link time, no -march. AVX-512 or AVX2 where the
 * processor has them, plain C elsewhere, with equal bits: a weight is its number times its scale in
 * float32, rounded once to bfloat16, to nearest, ties to even.
 *
 * A weight that is stored [N, K] and wanted [K, N] is decoded 128 rows by 64 columns at a time into
 * a tile that stays in the first cache, and leaves it in whole cache lines of the result: past the
 * caches where the result is larger than they are.
 */
#include <stdint.h>
#include <string.h>

#include "openmp.h"
#include "scaled_numbers.h"
#include "transpose.h"

#define EXPORT __attribute__((visibility("default")))

/* Raised whenever a signature or a struct below changes; dequant_status.py holds the same number. */
enum { INTERFACE = 1 };

enum { PLAIN = 0, AVX2 = 1, AVX512 = 2 };
enum { BLOCK = 128, GROUP = 32 };
/* Rows that are asked for before they are decoded: each lies in another page than the last. */
enum { ROWS_AHEAD = 16 };
/* Weights of a result that goes past the caches, 8 MiB. */
static const int64_t LARGE = 1 << 22;

struct moe_dequant {
    const uint8_t *values; /* fp8: [rows, columns] e4m3; mxfp4: [rows, columns / 2] */
    const void *scales;    /* fp8: float [rows / 128, columns / 128], up; mxfp4: uint8 a group */
    uint16_t *dense;
    int64_t num_rows, num_columns;
    int64_t stride; /* of rows of `dense`, or of its columns if it is transposed */
    int32_t is_transposed, is_mxfp4;
    int64_t level;
    const struct moe_openmp *openmp;
};

EXPORT int moe_dequant_interface(void) { return INTERFACE; }

/* `count` weights that share a scale. */
typedef void fp8_run(const uint8_t *values, float scale, int64_t count, uint16_t *out);
/* `num_groups` groups of 32 weights. */
typedef void mxfp4_run(const uint8_t *codes, const uint8_t *scales, int64_t num_groups,
                       uint16_t *out);

static void fp8_plain(const uint8_t *values, float scale, int64_t count, uint16_t *out) {
    for (int64_t i = 0; i < count; i++) out[i] = moe_bf16(moe_e4m3(values[i]) * scale);
}

static void mxfp4_plain(const uint8_t *codes, const uint8_t *scales, int64_t num_groups,
                        uint16_t *out) {
    for (int64_t g = 0; g < num_groups; g++) {
        uint16_t numbers[16];
        moe_scaled_e2m1(scales[g], numbers);
        for (int i = 0; i < GROUP / 2; i++) {
            *out++ = numbers[*codes & 15];
            *out++ = numbers[*codes++ >> 4];
        }
    }
}

/* A test defines MOE_OTHER_PROCESSOR to see what is built elsewhere. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(MOE_OTHER_PROCESSOR)

#include <immintrin.h>

#define MOE_AVX2 __attribute__((target("avx2,f16c")))
#define MOE_AVX512 __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512vl")))

/* The best level here. */
EXPORT int moe_dequant_levels(void) {
    const int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return AVX512;
    return has_avx2 ? AVX2 : PLAIN;
}

/* Scales with which every number is normal: their exponents are simply added. */
static int is_usual(uint8_t scale) { return scale >= 2 && scale <= 252; }

/* The bits of e4m3, moved, are those of a half 2^8 times smaller, subnormal numbers included. */
MOE_AVX512 static __m256i product_512(__m256i halves, __mmask16 is_nan, __m512 scale) {
    const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000));
    __m512 x = _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(256.0f));
    x = _mm512_mul_ps(_mm512_mask_mov_ps(x, is_nan, nan), scale);
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    sum = _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
}

MOE_AVX512 static void fp8_512(const uint8_t *values, float scale, int64_t count, uint16_t *out) {
    const __m512 factor = _mm512_set1_ps(scale);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m512i v = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(values + i)));
        const __m512i rest = _mm512_and_si512(v, _mm512_set1_epi16(0x7f));
        const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(rest, _mm512_set1_epi16(0x7f));
        const __m512i sign = _mm512_slli_epi16(_mm512_xor_si512(v, rest), 8);
        const __m512i h = _mm512_or_si512(sign, _mm512_slli_epi16(rest, 7));
        const __m256i low = product_512(_mm512_castsi512_si256(h), (__mmask16)is_nan, factor);
        const __m256i high =
            product_512(_mm512_extracti64x4_epi64(h, 1), (__mmask16)(is_nan >> 16), factor);
        _mm256_storeu_si256((__m256i *)(out + i), low);
        _mm256_storeu_si256((__m256i *)(out + i + 16), high);
    }
    fp8_plain(values + i, scale, count - i, out + i);
}

MOE_AVX512 static void mxfp4_512(const uint8_t *codes, const uint8_t *scales, int64_t num_groups,
                                 uint16_t *out) {
    const __m512i base =
        _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(const void *)MOE_E2M1));
    for (int64_t g = 0; g < num_groups; g++, codes += GROUP / 2, out += GROUP) {
        if (!is_usual(scales[g])) {
            mxfp4_plain(codes, scales + g, 1, out);
            continue;
        }
        const __m512i power = _mm512_set1_epi16((int16_t)((scales[g] - 127) * 128));
        const __m512i numbers = _mm512_mask_add_epi16(base, 0xfefefefe, base, power);
        const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
        const __m512i index = _mm512_or_si512(
            _mm512_and_si512(v, _mm512_set1_epi32(15)),
            _mm512_and_si512(_mm512_slli_epi32(v, 12), _mm512_set1_epi32(0xf0000)));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, numbers));
    }
}

MOE_AVX2 static __m128i product_256(__m128i halves, __m256 is_nan, __m256 scale) {
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    __m256 x = _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(256.0f));
    x = _mm256_mul_ps(_mm256_blendv_ps(x, nan, is_nan), scale);
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    sum = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(sum), nan,
                                               _mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    sum = _mm256_srli_epi32(sum, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
}

MOE_AVX2 static void fp8_256(const uint8_t *values, float scale, int64_t count, uint16_t *out) {
    const __m256 factor = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m128i v = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)(values + i)));
        const __m128i rest = _mm_and_si128(v, _mm_set1_epi16(0x7f));
        const __m128i is_nan = _mm_cmpeq_epi16(rest, _mm_set1_epi16(0x7f));
        const __m128i sign = _mm_slli_epi16(_mm_xor_si128(v, rest), 8);
        const __m128i h = _mm_or_si128(sign, _mm_slli_epi16(rest, 7));
        const __m256 wide = _mm256_castsi256_ps(_mm256_cvtepi16_epi32(is_nan));
        _mm_storeu_si128((__m128i *)(out + i), product_256(h, wide, factor));
    }
    fp8_plain(values + i, scale, count - i, out + i);
}

MOE_AVX2 static void mxfp4_256(const uint8_t *codes, const uint8_t *scales, int64_t num_groups,
                               uint16_t *out) {
    const __m256i base = _mm256_loadu_si256((const __m256i *)(const void *)MOE_E2M1);
    const __m256i is_zero = _mm256_cmpeq_epi16(
        _mm256_and_si256(base, _mm256_set1_epi16(0x7fff)), _mm256_setzero_si256());
    const __m128i nibble = _mm_set1_epi8(15);
    for (int64_t g = 0; g < num_groups; g++, codes += GROUP / 2, out += GROUP) {
        if (!is_usual(scales[g])) {
            mxfp4_plain(codes, scales + g, 1, out);
            continue;
        }
        const __m256i power = _mm256_set1_epi16((int16_t)((scales[g] - 127) * 128));
        const __m256i numbers = _mm256_add_epi16(base, _mm256_andnot_si256(is_zero, power));
        /* Low bytes of all 16 numbers, then high ones. */
        const __m256i bytes = _mm256_permute4x64_epi64(
            _mm256_packus_epi16(_mm256_and_si256(numbers, _mm256_set1_epi16(255)),
                                _mm256_srli_epi16(numbers, 8)),
            0xd8);
        const __m128i low = _mm256_castsi256_si128(bytes);
        const __m128i high = _mm256_extracti128_si256(bytes, 1);
        const __m128i v = _mm_loadu_si128((const __m128i *)codes);
        const __m128i even = _mm_and_si128(v, nibble);
        const __m128i odd = _mm_and_si128(_mm_srli_epi16(v, 4), nibble);
        const __m128i index[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
        for (int i = 0; i < 2; i++) {
            const __m128i l = _mm_shuffle_epi8(low, index[i]), h = _mm_shuffle_epi8(high, index[i]);
            _mm_storeu_si128((__m128i *)(out + 16 * i), _mm_unpacklo_epi8(l, h));
            _mm_storeu_si128((__m128i *)(out + 16 * i + 8), _mm_unpackhi_epi8(l, h));
        }
    }
}

#else

EXPORT int moe_dequant_levels(void) { return PLAIN; }

#define fp8_256 fp8_plain
#define fp8_512 fp8_plain
#define mxfp4_256 mxfp4_plain
#define mxfp4_512 mxfp4_plain

#endif

/* `count` columns of one row, all of one block. */
static void decode(const struct moe_dequant *op, int64_t row, int64_t column, int64_t count,
                   uint16_t *out) {
    const int64_t K = op->num_columns;
    if (op->is_mxfp4) {
        mxfp4_run *const run = op->level == AVX512 ? mxfp4_512
                               : op->level == AVX2 ? mxfp4_256
                                                   : mxfp4_plain;
        const uint8_t *scales = (const uint8_t *)op->scales + (row * K + column) / GROUP;
        run(op->values + (row * K + column) / 2, scales, count / GROUP, out);
        return;
    }
    fp8_run *const run = op->level == AVX512 ? fp8_512 : op->level == AVX2 ? fp8_256 : fp8_plain;
    const int64_t blocks = (K + BLOCK - 1) / BLOCK;
    const float scale = ((const float *)op->scales)[row / BLOCK * blocks + column / BLOCK];
    run(op->values + row * K + column, scale, count, out);
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void run_rows(const struct moe_dequant *op, int64_t first, int64_t end) {
    for (int64_t n = first; n < end; n++)
        for (int64_t k = 0; k < op->num_columns; k += BLOCK)
            decode(op, n, k, least(BLOCK, op->num_columns - k), op->dense + n * op->stride + k);
}

/* Blocks of columns `first` to `end`, each from its first row to its last. */
static void run_columns(const struct moe_dequant *op, int64_t first, int64_t end) {
    uint16_t tile[TILE_ROWS * TILE_COLUMNS] __attribute__((aligned(64)));
    const int stream = op->num_rows * op->num_columns >= LARGE;
    for (int64_t k = first * BLOCK; k < least(end * BLOCK, op->num_columns); k += TILE_COLUMNS) {
        const int64_t columns = least(TILE_COLUMNS, op->num_columns - k);
        for (int64_t n = 0; n < op->num_rows; n += TILE_ROWS) {
            const int64_t rows = least(TILE_ROWS, op->num_rows - n);
            for (int64_t r = 0; r < rows; r++) {
                const int64_t row = least(n + r + ROWS_AHEAD, op->num_rows - 1);
                const int64_t ahead = row * op->num_columns + k;
                __builtin_prefetch(op->values + (op->is_mxfp4 ? ahead / 2 : ahead));
                decode(op, n + r, k, columns, tile + r * TILE_COLUMNS);
            }
            transpose(tile, rows, columns, op->dense + k * op->stride + n, op->stride, stream);
        }
    }
    if (stream) end_stream();
}

static int64_t num_shares(const struct moe_dequant *op) {
    return op->is_transposed ? (op->num_columns + BLOCK - 1) / BLOCK : op->num_rows;
}

static void run_share(const struct moe_dequant *op, int64_t thread, int64_t num_threads) {
    const int64_t all = num_shares(op);
    const int64_t first = all * thread / num_threads, end = all * (thread + 1) / num_threads;
    (op->is_transposed ? run_columns : run_rows)(op, first, end);
}

static void team_body(void *argument) {
    const struct moe_dequant *op = argument;
    run_share(op, op->openmp->thread_num(), op->openmp->num_threads());
}

EXPORT void moe_dequant_run(const struct moe_dequant *op, int num_threads) {
    num_threads = (int)least(num_threads, num_shares(op));
    if (num_threads > 1 && op->openmp)
        op->openmp->parallel(team_body, (void *)op, (unsigned)num_threads, 0);
    else
        run_share(op, 0, 1);
}
