/* Vectors of 16 floats for attention, in GCC's own notation: each level compiles them for itself. */
#ifndef MOE_ATTENTION_VECTORS_H
#define MOE_ATTENTION_VECTORS_H

#include <stdint.h>

enum {
    LANES = 16,
    PAGE = 32, /* tokens */
    LINE = 64,
};

typedef float v16 __attribute__((vector_size(64)));
typedef float v16u __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint32_t u16u __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))
/* Loops of known length over what stays in registers: at -O2 they would stay loops. */
#define UNROLL _Pragma("GCC unroll 8")

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

INLINE v16 larger(v16 a, v16 b) {
    const i16 is_a = a > b;
    return (v16)((is_a & (i16)a) | (~is_a & (i16)b));
}

INLINE float max_of(v16 x) {
    float most = x[0];
    UNROLL for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

INLINE float sum_of(v16 x) {
    float parts[8], sum = 0;
    UNROLL for (int i = 0; i < 8; i++) parts[i] = x[i] + x[i + 8];
    UNROLL for (int i = 0; i < 8; i++) sum += parts[i];
    return sum;
}

/* 2^x for x <= 0, nothing to speak of below -126: a polynomial of degree 6 (Cephes), within 2 ulp,
 * whose exponent is then added to. */
INLINE v16 power_of_two(v16 x) {
    x = larger(x, all(-126.0f));
    const v16 shifted = x + all(12582912.0f); /* 1.5 * 2^23 rounds to nearest */
    const v16 r = x - (shifted - all(12582912.0f));
    v16 p = r * 1.535336188e-4f + 1.339887440e-3f;
    p = p * r + 9.618437357e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472029e-1f;
    p = p * r + 1.0f;
    return (v16)((i16)p + ((i16)shifted << 23));
}

/* Asks for what is needed soon: the memory keeps reading while registers compute. Hints only, so
 * they may point anywhere. */
INLINE void fetch(const char *from, int num_lines) {
    for (int i = 0; i < num_lines; i++) __builtin_prefetch(from + i * LINE, 0, 2);
}

#endif
