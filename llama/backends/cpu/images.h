// Attention of all tokens to all, without a cache, in bf16: the image encoder's (ImageAttention).

#pragma once

#include "attention.h"
#include <optional>
#include <vector>

namespace {

struct All {
    const bf16 *q, *k, *v;  // (queries or keys, heads, head_dim), of multiples of 16
    const float *times;     // (keys): log2 of how often each of them is there
    bf16 *out;              // as q
    int32_t queries, keys, heads, head_dim;
    size_t at(int token, int head) const { return (size_t(token) * heads + head) * head_dim; }
};

#ifdef __AVX512BF16__
#ifndef HAS_AMX
struct Rows {  // 32 rows of x, `row` bytes apart
    const bf16 *first, *second;
    size_t row, step;
};
inline void written() {}
#endif

constexpr int NEAR = 256;  // keys whose scores for 32 queries stay in the first-level cache
constexpr int RUN = 512;   // queries that stay, with these keys, in the second-level cache

// A head's keys and values as tiles take them: a tile's rows have two dimensions of each of 16 keys,
// or two keys of each of 16 dimensions. What is missing of 32 keys or dimensions is zeros.
struct Head {
    std::vector<uvec> keys, values;
    std::vector<float> times;

    void pack(const All &a, int head) {
        const int blocks = (a.head_dim + BLOCK - 1) / BLOCK, n = (a.keys + BLOCK - 1) / BLOCK * BLOCK;
        keys.resize(size_t(n) * blocks), values.resize(size_t(n) / 2 * (a.head_dim / LANES));
        times.assign(n, -1e30f);
        for (int j = 0; j < a.keys; j++) times[j] = std::max(a.times[j], -1e30f);
        for (int j = 0; j < n; j += LANES)
            for (int b = 0; b < blocks; b++) {
                vec square[LANES] = {};
                for (int i = 0; i < std::min(LANES, a.keys - j); i++)
                    memcpy(&square[i], a.k + a.at(j + i, head) + b * BLOCK,
                           std::min(BLOCK, a.head_dim - b * BLOCK) * sizeof(bf16));
                transpose(square);
                memcpy(&keys[j * blocks + b * LANES], square, sizeof square);
            }
        auto words = [&](int j, int d) {
            return j < a.keys ? __builtin_convertvector(read<shorts>(a.v + a.at(j, head) + d), uvec) : uvec{};
        };
        for (int d = 0; d < a.head_dim; d += LANES)
            for (int j = 0; j < n; j += 2)
                values[d / LANES * (n / 2) + j / 2] = words(j, d) | words(j + 1, d) << 16;
    }
};

// 2^x, to 3e-6 of it: a polynomial of what is after the point; what is before goes to the exponent.
inline vec power(vec x) {
    const vec f = (vec)_mm512_reduce_ps((__m512)x, 1);
    const vec y = (((0.0135341790f * f + 0.0520114936f) * f + 0.241442695f) * f + 0.693003833f) * f
                  + 1.00000262f;
    return (vec)_mm512_scalef_ps((__m512)y, (__m512)x);
}

// The weights of n keys for a query, in place of its scores; its sum is scaled to the largest yet.
inline void soften(float *scores, const float *times, float scale, int n, float &largest_yet,
                   vec &total, float *sum, int head_dim) {
    vec most = vec{} + largest_yet;
    for (int c = 0; c < n; c += LANES) {
        const vec score = load(scores + c) * scale + load(times + c);
        store(scores + c, score);
        most = larger(most, score);
    }
    const float top = largest(most);
    if (top > largest_yet) {
        const vec shrink = power(vec{} + (largest_yet - top));
        total *= shrink;
        for (int d = 0; d < head_dim; d += LANES) store(sum + d, load(sum + d) * shrink);
        largest_yet = top;
    }
    for (int c = 0; c < n; c += 2 * LANES) {
        const vec low = power(load(scores + c) - top), high = power(load(scores + c + LANES) - top);
        total += low + high;
        const auto both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        memcpy((bf16 *)scores + c, &both, sizeof both);
    }
}

// y = x wᵀ, or what it adds to y, for 32 rows of x and W times 16 of w, `group` bytes apart, with tiles
// or without. `words`: pairs of columns.
template <int W>
void multiply(bool tiles, const Rows &x, const uint8_t *w, size_t group, int words, bool begins,
              float *y, size_t stride) {
#ifdef HAS_AMX
    if (tiles) {
        dense_tiles<2, W>(x, w, group, (words + LANES - 1) / LANES, begins, y, stride, w, 0);
        return;
    }
#endif
    constexpr int M = 8;  // rows at a time, as registers allow
    for (int m = 0; m < 2 * LANES; m += M, y += M * stride) {
        const uint8_t *row[M];
        vec sums[M][W];
        for (int r = 0; r < M; r++) {
            row[r] = (const uint8_t *)(m < LANES ? x.first : x.second) + (m + r) % LANES * x.row;
            for (int c = 0; c < W; c++) sums[r][c] = begins ? vec{} : load(y + r * stride + c * LANES);
        }
        for (int i = 0; i < words; i++) {
            __m512bh pairs[W];
            for (int c = 0; c < W; c++) pairs[c] = read<__m512bh>(w + c * group + i * sizeof(uvec));
            for (int r = 0; r < M; r++) {
                const auto of_x = (__m512bh)_mm512_set1_epi32(read<int>(row[r] + i * sizeof(int)));
                for (int c = 0; c < W; c++)
                    sums[r][c] = (vec)_mm512_dpbf16_ps((__m512)sums[r][c], of_x, pairs[c]);
            }
        }
        for (int r = 0; r < M; r++)
            for (int c = 0; c < W; c++) store(y + r * stride + c * LANES, sums[r][c]);
    }
}

inline void attend_to_all(const All &a) {
    constexpr int BOTH = 2 * LANES;
    static thread_local Head head;
    static thread_local std::vector<bf16> rows;
    static thread_local std::vector<float> sums;
    alignas(64) float scores[BOTH * NEAR];
    float largest_yet[RUN];
    vec totals[RUN];
    const int blocks = (a.head_dim + BLOCK - 1) / BLOCK, deep = blocks * BLOCK;
    const int runs = (a.queries + RUN - 1) / RUN;
    const float scale = 1.44269504f / std::sqrt(float(a.head_dim));
    const Share mine = share(a.heads * runs);
    bool tiles = false;
#ifdef HAS_AMX
    std::optional<Tiles> config;
    if ((tiles = may_use_amx())) config.emplace().shape(LANES, LANES, 2 * BLOCK, LANES);
#endif
    for (int i = mine.begin; i < mine.end; i++) {
        const int h = i / runs, begin = i % runs * RUN, n = std::min(RUN, a.queries - begin);
        if (i == mine.begin || i % runs == 0) head.pack(a, h);
        rows.assign(size_t(RUN) * deep, bf16{});
        for (int m = 0; m < n; m++)
            memcpy(&rows[m * deep], a.q + a.at(begin + m, h), a.head_dim * sizeof(bf16));
        sums.assign(size_t(RUN) * a.head_dim, 0);
        std::fill(largest_yet, largest_yet + RUN, -INFINITY);
        std::fill(totals, totals + RUN, vec{});
        const int keys = int(head.times.size());
        const size_t group = size_t(keys) * BLOCK;  // bytes of 16 dimensions of all values
        const size_t group_of_keys = size_t(deep) * BLOCK;  // bytes of 16 keys
        for (int first = 0; first < keys; first += NEAR) {
            const int some = std::min(NEAR, keys - first);
            for (int m = 0; m < n; m += BOTH) {
                const bf16 *of_q = &rows[m * deep];
                const Rows q = {of_q, of_q + LANES * deep, deep * sizeof(bf16), BLOCK};
                written();
                for (int j = 0; j < some; j += BOTH) {
                    const uint8_t *at = (const uint8_t *)&head.keys[(first + j) * blocks];
                    multiply<2>(tiles, q, at, group_of_keys, a.head_dim / 2, true, scores + j, NEAR);
                }
                for (int r = 0; r < BOTH; r++)
                    soften(scores + r * NEAR, &head.times[first], scale, some, largest_yet[m + r],
                           totals[m + r], &sums[(m + r) * a.head_dim], a.head_dim);
                const bf16 *weights = (const bf16 *)scores;
                const Rows p = {weights, weights + 2 * LANES * NEAR, NEAR * sizeof(float), BLOCK};
                written();
                for (int d = 0; d < a.head_dim; d += BOTH) {
                    const uint8_t *at = (const uint8_t *)&head.values[d / LANES * (keys / 2) + first / 2];
                    float *sum = &sums[m * a.head_dim + d];
                    if (d + LANES < a.head_dim)
                        multiply<2>(tiles, p, at, group, some / 2, false, sum, a.head_dim);
                    else
                        multiply<1>(tiles, p, at, group, some / 2, false, sum, a.head_dim);
                }
            }
        }
        for (int m = 0; m < n; m++) {
            const float total = sum(totals[m]);
            for (int d = 0; d < a.head_dim; d += LANES)
                store(a.out + a.at(begin + m, h) + d, load(&sums[m * a.head_dim + d]) / total);
        }
    }
}
#endif

}  // namespace
