/* A tile of 16-bit numbers that leaves the first cache transposed, in whole cache lines. */
#ifndef MOE_TRANSPOSE_H
#define MOE_TRANSPOSE_H

#include <stdint.h>
#include <string.h>

enum { TILE_ROWS = 128, TILE_COLUMNS = 64 };

/* `stride` is that of the rows of `out`, which get the columns of `tile`. */
static void transpose_plain(const uint16_t *tile, int64_t num_rows, int64_t num_columns,
                            uint16_t *out, int64_t stride) {
    for (int64_t k = 0; k < num_columns; k++)
        for (int64_t n = 0; n < num_rows; n++) out[k * stride + n] = tile[n * TILE_COLUMNS + k];
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(MOE_OTHER_PROCESSOR)

#include <immintrin.h>

#define UNROLL _Pragma("GCC unroll 8")

/* Eight rows of eight, by the instructions that every x86-64 has. */
static void transpose_8x8(const uint16_t *tile, uint16_t *out, int64_t stride) {
    __m128i a[8], b[8];
    UNROLL for (int n = 0; n < 8; n++) a[n] = _mm_loadu_si128((const __m128i *)(tile + n * TILE_COLUMNS));
    UNROLL for (int n = 0; n < 4; n++) {
        b[2 * n] = _mm_unpacklo_epi16(a[2 * n], a[2 * n + 1]);
        b[2 * n + 1] = _mm_unpackhi_epi16(a[2 * n], a[2 * n + 1]);
    }
    UNROLL for (int n = 0; n < 2; n++) {
        a[4 * n] = _mm_unpacklo_epi32(b[4 * n], b[4 * n + 2]);
        a[4 * n + 1] = _mm_unpackhi_epi32(b[4 * n], b[4 * n + 2]);
        a[4 * n + 2] = _mm_unpacklo_epi32(b[4 * n + 1], b[4 * n + 3]);
        a[4 * n + 3] = _mm_unpackhi_epi32(b[4 * n + 1], b[4 * n + 3]);
    }
    UNROLL for (int k = 0; k < 4; k++) {
        _mm_storeu_si128((__m128i *)(out + 2 * k * stride), _mm_unpacklo_epi64(a[k], a[k + 4]));
        _mm_storeu_si128((__m128i *)(out + (2 * k + 1) * stride),
                         _mm_unpackhi_epi64(a[k], a[k + 4]));
    }
}

static void store_line(uint16_t *out, const uint16_t *line, int64_t count, int stream) {
    if (!stream || (uintptr_t)out % 16) {
        memcpy(out, line, (size_t)count * sizeof *out);
        return;
    }
    for (int64_t n = 0; n < count; n += 8)
        _mm_stream_si128((__m128i *)(out + n), _mm_load_si128((const __m128i *)(line + n)));
}

static void end_stream(void) { _mm_sfence(); }

static void transpose(const uint16_t *tile, int64_t num_rows, int64_t num_columns, uint16_t *out,
                      int64_t stride, int stream) {
    const int64_t rows = num_rows / 8 * 8, columns = num_columns / 8 * 8;
    uint16_t lines[8 * TILE_ROWS] __attribute__((aligned(64)));
    for (int64_t k = 0; k < columns; k += 8) {
        for (int64_t n = 0; n < rows; n += 8)
            transpose_8x8(tile + n * TILE_COLUMNS + k, lines + n, TILE_ROWS);
        for (int64_t i = 0; i < 8; i++)
            store_line(out + (k + i) * stride, lines + i * TILE_ROWS, rows, stream);
    }
    transpose_plain(tile + columns, rows, num_columns - columns, out + columns * stride, stride);
    transpose_plain(tile + rows * TILE_COLUMNS, num_rows - rows, num_columns, out + rows, stride);
}

#else

#define transpose(tile, rows, columns, out, stride, stream) \
    transpose_plain(tile, rows, columns, out, stride)
#define end_stream() ((void)0)

#endif
#endif
