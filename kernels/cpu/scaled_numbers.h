/* The numbers of fp8 and mxfp4 weights, one at a time, and as bfloat16.
 *
 * e4m3: sign, four bits of exponent, three of mantissa; 0x7f and 0xff are NaN. e2m1: sixteen
 * numbers, which share a scale 2^(byte - 127), of which the byte 255 is NaN. */
#ifndef MOE_SCALED_NUMBERS_H
#define MOE_SCALED_NUMBERS_H

#include <stdint.h>
#include <string.h>

static inline float moe_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To nearest, ties to even. */
static inline uint16_t moe_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0; /* NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float moe_e4m3(uint8_t byte) {
    const uint32_t sign = (uint32_t)(byte & 0x80) << 24, rest = byte & 0x7f;
    if (rest == 0x7f) return moe_float(0x7fc00000);
    if (rest < 8) return moe_float(sign | 0x3b000000) * (float)rest; /* subnormal: rest * 2^-9 */
    return moe_float(sign | ((rest << 20) + (120u << 23)));
}

/* bfloat16 bits of the 16 numbers of e2m1. */
static const uint16_t MOE_E2M1[16] = {
    0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
    0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0,
};

/* bfloat16 bits of the 16 numbers times the scale of their group. */
static inline void moe_scaled_e2m1(uint8_t scale, uint16_t numbers[16]) {
    const uint32_t bits = scale == 255 ? 0x7fc00000 : scale ? (uint32_t)scale << 23 : 1u << 22;
    for (int c = 0; c < 16; c++)
        numbers[c] = moe_bf16(moe_float((uint32_t)MOE_E2M1[c] << 16) * moe_float(bits));
}

#endif
