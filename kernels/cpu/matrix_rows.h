/* Rows of a matrix in any form, and what multiplies them at a level. */
#ifndef MOE_MATRIX_ROWS_H
#define MOE_MATRIX_ROWS_H

#include "packed_products.h"

enum level { AVX2 = 1, AVX512F = 2, AVX512_BF16 = 3 };
enum dtype { BF16 = 0, F16 = 1, F32 = 2 };

/* How weights stand in memory. PLAIN ones have the dtype of x. All others go with bf16 x: PACKED
 * rows are those of a block (packed_row.h); INT8 ones have a scale each; of INT4 ones, code minus
 * 8, INT4_GROUP of a row share one, of which the last may be fewer; FP8 ones share one in squares
 * of FP8_BLOCK, the first from the first row of the part; of MXFP4 ones MXFP4_GROUP of a row do.
 * The low half of a byte is the even column's. */
enum form { PLAIN = 0, PACKED = 1, INT8 = 2, INT4 = 3, FP8 = 4, MXFP4 = 5 };

/* Rows of a matrix that lie behind each other. */
struct moe_part {
    const void *rows;   /* the first of them; of PACKED ones, their block */
    const void *scales; /* INT8: float [num_rows]; INT4: bf16, one a group; FP8: float, one a
                         * square, those beside each other first; MXFP4: uint8, one a group */
    int64_t num_rows, form;
};

typedef void dot_rows(const char *w, const char *scales, int64_t scale_stride, int64_t num_rows,
                      int64_t num_columns, const struct tokens *tokens, int num);
typedef void dot_packed_row(const uint8_t *w, int64_t num_columns, const uint8_t *high,
                            struct moe_escapes *escapes, const struct tokens *tokens, int num,
                            int64_t row);

static inline int64_t size_of(int dtype) { return dtype == F32 ? 4 : 2; }

static dot_rows *dot_of(int level, int dtype, int64_t form) {
    const int is_512 = level != AVX2;
    switch (form) {
        case INT8: return is_512 ? dot_avx512_int8 : dot_avx2_int8;
        case INT4: return is_512 ? dot_avx512_int4 : dot_avx2_int4;
        case MXFP4:
            if (level == AVX512_BF16) return dot_avx512_bf16_mxfp4;
            return is_512 ? dot_avx512_mxfp4 : dot_avx2_mxfp4;
        case FP8: /* few processors have the one and not the other */
            if (level == AVX512_BF16 && __builtin_cpu_supports("avx512vbmi"))
                return dot_avx512_vbmi_fp8;
            return is_512 ? dot_avx512_fp8 : dot_avx2_fp8;
        default: break;
    }
    if (level == AVX512_BF16) return dot_avx512_bf16;
    if (dtype == BF16) return is_512 ? dot_avx512_bf16_as_f32 : dot_avx2_bf16;
    if (dtype == F16) return is_512 ? dot_avx512_f16 : dot_avx2_f16;
    return is_512 ? dot_avx512_f32 : dot_avx2_f32;
}

static int64_t bytes_of_row(int dtype, int64_t form, int64_t num_columns) {
    switch (form) {
        case PACKED: return moe_row_bytes(num_columns);
        case INT8:
        case FP8: return num_columns;
        case INT4:
        case MXFP4: return num_columns / 2;
        default: return num_columns * size_of(dtype);
    }
}

/* Bytes of the scales of `form` that a row, or a row of squares, has in the loop over columns. */
static int64_t scale_bytes_of_row(int64_t form, int64_t num_columns) {
    switch (form) {
        case INT4: return (num_columns + INT4_GROUP - 1) / INT4_GROUP * 2;
        case MXFP4: return num_columns / MXFP4_GROUP;
        case FP8: return (num_columns + FP8_BLOCK - 1) / FP8_BLOCK * (int64_t)sizeof(float);
        default: return 0;
    }
}

/* Rows [begin, end) of a block that was checked; `begin` is the first row of a group. */
static void multiply_packed(int level, const struct moe_part *part, int64_t num_columns,
                            int64_t begin, int64_t end, const struct tokens *tokens, int num) {
    dot_packed_row *const dot = level == AVX512_BF16 ? dot_avx512_bf16_packed
                                : level == AVX512F   ? dot_avx512_packed
                                                     : dot_avx2_packed;
    const uint8_t *const block = part->rows;
    struct moe_block_header head;
    memcpy(&head, block, sizeof head);
    const int64_t row_bytes = moe_row_bytes(num_columns);
    const uint8_t *const rows = block + sizeof head;
    const uint8_t *const starts = rows + part->num_rows * row_bytes;
    const uint8_t *const first =
        starts + moe_num_starts(part->num_rows, num_columns) * (int64_t)sizeof(uint32_t);
    uint32_t start;
    memcpy(&start, starts + begin / moe_group_rows(num_columns) * (int64_t)sizeof start,
           sizeof start);
    struct moe_escapes escapes = {first + start, first + head.num_escapes};
    for (int64_t r = begin; r < end; r++)
        dot(rows + r * row_bytes, num_columns, head.high, &escapes, tokens, num, r - begin);
}

/* Outputs of rows [begin, end) of `part` go to y[.][0 ..]; of FP8 they have the same squares. */
static void multiply_rows(int level, int dtype, const struct moe_part *part, int64_t num_columns,
                          int64_t begin, int64_t end, const struct tokens *tokens, int num) {
    if (part->form == PACKED) {
        multiply_packed(level, part, num_columns, begin, end, tokens, num);
        return;
    }
    const int64_t row_bytes = bytes_of_row(dtype, part->form, num_columns);
    const int64_t scale_bytes = scale_bytes_of_row(part->form, num_columns);
    const int is_fp8 = part->form == FP8;
    const char *const rows = (const char *)part->rows + begin * row_bytes;
    const char *const scales =
        (const char *)part->scales + (is_fp8 ? begin / FP8_BLOCK : begin) * scale_bytes;
    dot_of(level, dtype, part->form)(rows, scales, is_fp8 ? 0 : scale_bytes, end - begin,
                                     num_columns, tokens, num);
    if (part->form != INT8) return;
    const float *const scale = (const float *)part->scales + begin;
    for (int j = 0; j < num; j++)
        for (int64_t r = 0; r < end - begin; r++) tokens->y[j][r] *= scale[r];
}

/* How many rows make a piece of about `bytes`; packed ones begin where the escapes of a group do,
 * and those of FP8 have the same squares. */
static int64_t rows_of_piece(int dtype, const struct moe_part *part, int64_t num_columns,
                             int64_t bytes) {
    const int64_t row_bytes = bytes_of_row(dtype, part->form, num_columns);
    const int64_t wanted = row_bytes ? bytes / row_bytes : part->num_rows;
    if (part->form == FP8) {
        int64_t rows = FP8_BLOCK;
        while (rows > 1 && rows > wanted) rows /= 2;
        return rows;
    }
    const int64_t step = part->form == PACKED ? moe_group_rows(num_columns) : 1;
    return wanted > step ? wanted / step * step : step;
}

#endif
