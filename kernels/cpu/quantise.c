/* Rows of bf16 as int8 or int4 ones, symmetric and rounded to the nearest; quantise.py says how.
 *
 * Plain C11: no Python, no torch, no -march. Loops that the compiler turns into vectors, once for
 * each level of instructions; no result depends on which.
 */
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

/* Raised whenever a signature below changes; quantise.py holds the same number. */
enum { INTERFACE = 1 };
enum { GROUP = 32, NOT_FINITE = 0x7f80 };

EXPORT int moe_quantise_interface(void) { return INTERFACE; }

#define INLINE static inline __attribute__((always_inline))

INLINE float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* The bits of the greatest magnitude: these are in the order of the numbers, NaN above all. */
INLINE uint16_t largest_of(const uint16_t *w, int64_t num) {
    uint16_t largest = 0;
    for (int64_t i = 0; i < num; i++) {
        const uint16_t magnitude = w[i] & 0x7fff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/* The whole number next to w / scale, half to even, between -most and most; 0 / 0 is 0. */
INLINE int32_t code_of(float w, float scale, float most) {
    float q = w / scale;
    q = q < most ? q : q == q ? most : 0.0f;
    q = q > -most ? q : -most;
    return (int32_t)((q + 12582912.0f) - 12582912.0f);
}

INLINE void int8_rows(const uint16_t *w, int64_t num_rows, int64_t num_columns, int8_t *values,
                      float *scales) {
    for (int64_t r = 0; r < num_rows; r++, w += num_columns, values += num_columns) {
        const uint16_t largest = largest_of(w, num_columns);
        const int is_finite = largest < NOT_FINITE;
        const float scale = of_bits((uint32_t)largest << 16) / 127.0f;
        scales[r] = is_finite ? scale : of_bits(0x7fc00000);
        if (is_finite)
            for (int64_t i = 0; i < num_columns; i++)
                values[i] = (int8_t)code_of(of_bits((uint32_t)w[i] << 16), scale, 127.0f);
        else
            memset(values, 0, (size_t)num_columns);
    }
}

/* The codes of a group; returns its scale. */
INLINE uint16_t int4_group(const uint16_t *w, uint8_t *values) {
    const uint16_t largest = largest_of(w, GROUP);
    const int is_finite = largest < NOT_FINITE;
    const uint32_t bits = bits_of(of_bits((uint32_t)largest << 16) / 7.0f);
    const uint16_t scale = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    const float step = of_bits((uint32_t)scale << 16);
    uint32_t pairs[GROUP / 2]; /* an even weight below an odd one */
    memcpy(pairs, w, sizeof pairs);
    for (int i = 0; i < GROUP / 2; i++) {
        const int32_t even = code_of(of_bits(pairs[i] << 16), step, 7.0f) + 8;
        const int32_t odd = code_of(of_bits(pairs[i] & 0xffff0000), step, 7.0f) + 8;
        values[i] = is_finite ? (uint8_t)(even | odd << 4) : 0x88;
    }
    return is_finite ? scale : 0x7fc0;
}

INLINE void int4_rows(const uint16_t *w, int64_t num_rows, int64_t num_columns, uint8_t *values,
                      uint16_t *scales) {
    const int64_t rest = num_columns % GROUP;
    for (int64_t r = 0; r < num_rows; r++) {
        for (int64_t k = 0; k + GROUP <= num_columns; k += GROUP) {
            *scales++ = int4_group(w, values);
            w += GROUP;
            values += GROUP / 2;
        }
        if (rest) {
            uint16_t last[GROUP] = {0};
            uint8_t codes[GROUP / 2];
            memcpy(last, w, (size_t)(2 * rest));
            *scales++ = int4_group(last, codes);
            memcpy(values, codes, (size_t)(rest / 2));
            w += rest;
            values += rest / 2;
        }
    }
}

#define DEFINE_LEVEL(NAME, TARGET)                                                                 \
    TARGET static void NAME(const uint16_t *w, int64_t num_rows, int64_t num_columns, int is_int4, \
                            void *values, void *scales) {                                          \
        if (is_int4)                                                                               \
            int4_rows(w, num_rows, num_columns, values, scales);                                   \
        else                                                                                       \
            int8_rows(w, num_rows, num_columns, values, scales);                                   \
    }

DEFINE_LEVEL(quantise_plain, )

#if defined(__x86_64__) && defined(__GNUC__)

DEFINE_LEVEL(quantise_avx512, __attribute__((target("avx2,avx512f,avx512bw,avx512vl"))))
DEFINE_LEVEL(quantise_avx2, __attribute__((target("avx2"))))

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
}
static int has_avx2(void) { return __builtin_cpu_supports("avx2"); }

#else

#define quantise_avx512 quantise_plain
#define quantise_avx2 quantise_plain
static int has_avx512(void) { return 0; }
static int has_avx2(void) { return 0; }

#endif

/* `weights` is bf16 [num_rows, num_columns]; values and scales have the room that form needs. */
EXPORT void moe_quantise(const uint16_t *weights, int64_t num_rows, int64_t num_columns,
                         int is_int4, void *values, void *scales) {
    if (has_avx512())
        quantise_avx512(weights, num_rows, num_columns, is_int4, values, scales);
    else if (has_avx2())
        quantise_avx2(weights, num_rows, num_columns, is_int4, values, scales);
    else
        quantise_plain(weights, num_rows, num_columns, is_int4, values, scales);
}
