/* Simulated annealing over swaps of two items of one layer between GPUs.
 *
 * Plain C11: no Python, no threads, no -march. Deterministic for a seed.
 *
 * L layers, P items (slots) a layer, G GPUs. The cost of an assignment g[l][p] is
 *   sum_l sum_pq chain[l][p][q] * costs[g[l][p]][g[l+1][q]]
 * + sum_l sum_{p<q} within[l][p][q] * sym[g[l][p]][g[l][q]]
 * + sum_l sum_p unary[l][g[l][p]][p]
 * + sum_l sum_g penalty * max(0, load - limit) + price * max(0, load - 1)^2.
 *
 * attraction[l][g][p] is kept as what item p of layer l would pay on GPU g with all other items
 * where they are, so a proposal reads four numbers, and only an accepted swap costs O(P) for each
 * GPU whose distance to the two differs (two of them where all hops cost the same).
 */
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* Raised whenever a signature or the struct below changes; anneal.py holds the same number. */
enum { INTERFACE = 1 };

enum { LOG_STEPS = 4096 };

struct moe_annealing {
    int64_t num_layers, num_items, num_gpus, num_experts;
    const double *chain;      /* [L-1][P][P] */
    const double *chain_back; /* [L-1][P][P], each matrix transposed */
    const double *within;     /* [L][P][P] symmetric, diagonal 0; or null */
    const double *costs;      /* [G][G] */
    const double *sym;        /* [G][G] symmetric */
    const double *load;       /* [L][P], each layer's mean GPU having 1 */
    const int32_t *expert;    /* [L][P] whose replica an item is; null where each has one */
    const double *neg_log;    /* [LOG_STEPS] -log((i + 0.5) / LOG_STEPS) */
    double limit;             /* of a GPU's load */
    double price;             /* of over-load squared */
    int32_t *gpu;             /* [L][P] the assignment */
    double *attraction;       /* [L][G][P] */
    double *gpu_load;         /* [L][G] */
    uint8_t *holds;           /* [L][G][E] with replicas, else null */
    double *difference;       /* [P] scratch */
    uint64_t random[2];       /* state of xoroshiro128+ */
    int64_t accepted;         /* swaps made, counted up */
};

EXPORT int moe_annealing_interface(void) { return INTERFACE; }

static inline uint64_t rotate(uint64_t x, int by) { return (x << by) | (x >> (64 - by)); }

static inline uint64_t next_random(uint64_t s[2]) {
    const uint64_t s0 = s[0];
    uint64_t s1 = s[1];
    const uint64_t result = s0 + s1;
    s1 ^= s0;
    s[0] = rotate(s0, 24) ^ s1 ^ (s1 << 16);
    s[1] = rotate(s1, 37);
    return result;
}

static inline double over(double load, double limit, double penalty, double price) {
    double cost = 0.0;
    if (load > limit) cost += penalty * (load - limit);
    if (load > 1.0) cost += price * (load - 1.0) * (load - 1.0);
    return cost;
}

/* attraction[g] += (to[g] - from[g]) * difference, for every GPU g; strides walk the cost matrix */
static void spread(double *attraction, const double *difference, int64_t P, int64_t G,
                   const double *from, const double *to, int64_t stride) {
    for (int64_t g = 0; g < G; g++) {
        const double k = to[g * stride] - from[g * stride];
        if (k == 0.0) continue;
        double *row = attraction + g * P;
        for (int64_t p = 0; p < P; p++) row[p] += k * difference[p];
    }
}

static void subtract(double *difference, const double *a, const double *b, int64_t P) {
    for (int64_t p = 0; p < P; p++) difference[p] = a[p] - b[p];
}

static void swap(struct moe_annealing *a, int64_t l, int64_t e, int64_t f) {
    const int64_t L = a->num_layers, P = a->num_items, G = a->num_gpus, E = a->num_experts;
    int32_t *gpu = a->gpu + l * P;
    const int64_t ge = gpu[e], gf = gpu[f];
    double *difference = a->difference;
    if (l + 1 < L) { /* item q of the next layer on g pays chain[e][q] * costs[g of e][g] */
        const double *m = a->chain + l * P * P;
        subtract(difference, m + e * P, m + f * P, P);
        spread(a->attraction + (l + 1) * G * P, difference, P, G, a->costs + ge * G,
               a->costs + gf * G, 1);
    }
    if (l > 0) { /* item q of the layer before on g pays chain[q][e] * costs[g][g of e] */
        const double *m = a->chain_back + (l - 1) * P * P;
        subtract(difference, m + e * P, m + f * P, P);
        spread(a->attraction + (l - 1) * G * P, difference, P, G, a->costs + ge, a->costs + gf, G);
    }
    if (a->within) {
        const double *m = a->within + l * P * P;
        subtract(difference, m + e * P, m + f * P, P);
        spread(a->attraction + l * G * P, difference, P, G, a->sym + ge * G, a->sym + gf * G, 1);
    }
    const double moved = a->load[l * P + f] - a->load[l * P + e];
    a->gpu_load[l * G + ge] += moved;
    a->gpu_load[l * G + gf] -= moved;
    if (a->expert) {
        uint8_t *holds = a->holds + l * G * E;
        const int64_t ee = a->expert[l * P + e], ef = a->expert[l * P + f];
        holds[ge * E + ee] = 0;
        holds[gf * E + ef] = 0;
        holds[gf * E + ee] = 1;
        holds[ge * E + ef] = 1;
    }
    gpu[e] = (int32_t)gf;
    gpu[f] = (int32_t)ge;
    a->accepted++;
}

/* What swapping items e and f of layer l adds to the cost. */
static inline double change(const struct moe_annealing *a, int64_t l, int64_t e, int64_t f,
                            int64_t ge, int64_t gf, double penalty) {
    const int64_t P = a->num_items, G = a->num_gpus;
    const double *s = a->attraction + l * G * P;
    double delta = s[gf * P + e] - s[ge * P + e] + s[ge * P + f] - s[gf * P + f];
    if (a->within) /* the attraction of each saw the other where it no longer is */
        delta += a->within[(l * P + e) * P + f] *
                 (2.0 * a->sym[ge * G + gf] - a->sym[ge * G + ge] - a->sym[gf * G + gf]);
    if (penalty > 0.0 || a->price > 0.0) {
        const double le = a->gpu_load[l * G + ge], lf = a->gpu_load[l * G + gf];
        const double moved = a->load[l * P + f] - a->load[l * P + e];
        delta += over(le + moved, a->limit, penalty, a->price) -
                 over(le, a->limit, penalty, a->price) +
                 over(lf - moved, a->limit, penalty, a->price) -
                 over(lf, a->limit, penalty, a->price);
    }
    return delta;
}

/* Proposes `num_proposals` swaps in each layer in turn at one temperature (0: only gains).
 * Returns the sum of the changes made. */
EXPORT double moe_annealing_sweep(struct moe_annealing *a, int64_t num_proposals,
                                  double temperature, double penalty) {
    const int64_t L = a->num_layers, P = a->num_items, G = a->num_gpus, E = a->num_experts;
    double total = 0.0;
    for (int64_t l = 0; l < L; l++) {
        const int32_t *gpu = a->gpu + l * P;
        for (int64_t i = 0; i < num_proposals; i++) {
            const uint64_t r = next_random(a->random);
            /* 26 bits for each item, 12 for the threshold; P is far below 2^26 */
            const int64_t e = (int64_t)((r >> 38) * (uint64_t)P >> 26);
            const int64_t f = (int64_t)(((r >> 12) & 0x3ffffff) * (uint64_t)P >> 26);
            const int64_t ge = gpu[e], gf = gpu[f];
            if (ge == gf) continue;
            const double delta = change(a, l, e, f, ge, gf, penalty);
            if (delta >= temperature * a->neg_log[r & (LOG_STEPS - 1)]) continue;
            if (a->expert) {
                const uint8_t *holds = a->holds + l * G * E;
                const int64_t ee = a->expert[l * P + e], ef = a->expert[l * P + f];
                if (ee == ef || holds[gf * E + ee] || holds[ge * E + ef]) continue;
            }
            swap(a, l, e, f);
            total += delta;
        }
    }
    return total;
}

/* Takes the best swap of each item in turn while any gains; returns the sum of the changes. */
EXPORT double moe_annealing_descend(struct moe_annealing *a, double penalty, double least_gain,
                                    int64_t max_rounds) {
    const int64_t L = a->num_layers, P = a->num_items, G = a->num_gpus, E = a->num_experts;
    double total = 0.0;
    for (int64_t round = 0; round < max_rounds; round++) {
        int64_t made = 0;
        for (int64_t l = 0; l < L; l++) {
            const int32_t *gpu = a->gpu + l * P;
            for (int64_t e = 0; e < P; e++) {
                double best = -least_gain;
                int64_t best_f = -1;
                for (int64_t f = 0; f < P; f++) {
                    const int64_t ge = gpu[e], gf = gpu[f];
                    if (ge == gf) continue;
                    const double delta = change(a, l, e, f, ge, gf, penalty);
                    if (delta >= best) continue;
                    if (a->expert) {
                        const uint8_t *holds = a->holds + l * G * E;
                        const int64_t ee = a->expert[l * P + e], ef = a->expert[l * P + f];
                        if (ee == ef || holds[gf * E + ee] || holds[ge * E + ef]) continue;
                    }
                    best = delta;
                    best_f = f;
                }
                if (best_f >= 0) {
                    swap(a, l, e, best_f);
                    total += best;
                    made++;
                }
            }
        }
        if (!made) break;
    }
    return total;
}
