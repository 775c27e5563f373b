/* What stands between the products of an expert, number by number: gates, and rounding.
 *
 * Loops that the compiler turns into vectors. */
#ifndef MOE_GATES_H
#define MOE_GATES_H

#include "matrix_rows.h"

enum gate { NO_GATE = 0, SILU = 1, GELU_TANH = 2, RELU = 3, RELU_SQUARED = 4, CLAMPED_SILU = 5 };

/* Of CLAMPED_SILU: alpha in g sigmoid(alpha g) (u + 1), g at most limit and u within it. */
struct moe_clamp {
    float alpha, limit;
};

/* e^v within 2 units of the last place from -87, where v is cut off, to 88, soon after which it is
 * infinite; NaN gives infinity. */
INLINE float exponential(float v) {
    v = v < 89.0f ? v : 89.0f;
    v = v > -87.0f ? v : -87.0f;
    const float n = (v * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounds to a whole number */
    const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23; /* 2^n */
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

INLINE float activation(int gate, float g) {
    switch (gate) {
        case SILU: return g / (1.0f + exponential(-g));
        case GELU_TANH: /* (1 + tanh u) / 2 is 1 / (1 + e^-2u) */
            return g / (1.0f + exponential(-1.59576912f * (g + 0.044715f * g * g * g)));
        case RELU: return g > 0.0f || g != g ? g : 0.0f;
        case RELU_SQUARED: return g > 0.0f || g != g ? g * g : 0.0f;
        default: return g;
    }
}

INLINE float gated(int gate, struct moe_clamp clamp, float g, float u) {
    if (gate != CLAMPED_SILU) return activation(gate, g) * u;
    g = g > clamp.limit ? clamp.limit : g;
    u = u > clamp.limit ? clamp.limit : u;
    u = u < -clamp.limit ? -clamp.limit : u;
    return g / (1.0f + exponential(-clamp.alpha * g)) * (u + 1.0f);
}

/* y[f] becomes the gated number f; in place, which never overtakes what is still to be read. */
INLINE void apply_gate_of(int gate, int is_gated, int is_interleaved, struct moe_clamp clamp,
                          float *y, int64_t ffn) {
    if (!is_gated)
        for (int64_t f = 0; f < ffn; f++) y[f] = activation(gate, y[f]);
    else if (is_interleaved)
        for (int64_t f = 0; f < ffn; f++) y[f] = gated(gate, clamp, y[2 * f], y[2 * f + 1]);
    else
        for (int64_t f = 0; f < ffn; f++) y[f] = gated(gate, clamp, y[f], y[ffn + f]);
}

/* bias[i] is added to y[i]. */
TARGET_AVX2 static void add_bias(int dtype, float *restrict y, const void *bias, int64_t num) {
    const uint16_t *const words = bias;
    if (dtype == F32)
        for (int64_t i = 0; i < num; i++) y[i] += ((const float *)bias)[i];
    else if (dtype == F16)
        for (int64_t i = 0; i < num; i++) y[i] += _cvtsh_ss(words[i]);
    else
        for (int64_t i = 0; i < num; i++) y[i] += moe_float((uint32_t)words[i] << 16);
}

INLINE void round_bf16(uint16_t *out, const float *y, int64_t num) {
    for (int64_t i = 0; i < num; i++) {
        uint32_t bits;
        memcpy(&bits, y + i, sizeof bits);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        out[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

TARGET_AVX2 INLINE void round_f16(uint16_t *out, const float *y, int64_t num) {
    int64_t i = 0;
    for (; i + 8 <= num; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(y + i), 0));
    for (; i < num; i++) out[i] = _cvtss_sh(y[i], 0);
}

TARGET_AVX2 INLINE void round_row(int dtype, void *out, const float *y, int64_t num) {
    if (dtype == BF16)
        round_bf16(out, y, num);
    else if (dtype == F16)
        round_f16(out, y, num);
    else
        memcpy(out, y, (size_t)num * sizeof *y);
}

#endif
