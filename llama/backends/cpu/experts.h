// Mixtures of experts: each token's experts, and their products for the tokens that chose them.

#pragma once

#include "products.h"

namespace {

struct Experts {
    int32_t n, top_k;
    const float *router;     // (n, dim)
    const Weight *matrices;  // w1, w3 and w2 of each
};

// Which tokens chose an expert, and how much their inputs weigh.
struct Routes {
    float *scores;     // (tokens, n): of the router
    int32_t *begins;   // (n + 1): expert e has the places begins[e] to begins[e + 1]
    int32_t *tokens;   // of each place
    float *weights;    // of each place: the sigmoid of the score
    int32_t *chosen;   // (tokens, top_k)
};

inline vec silu_times(const float *gate, const float *up) {
    vec g = load(gate);
    return g / (1.0f + exp2(g * -1.44269504f)) * load(up);
}

// The columns `some` of silu(gate) · up, both (tokens, rows).
inline void activate(const float *gate, const float *up, int tokens, int rows, Share some,
                     const Inputs &y) {
    for (int m = 0; m < tokens; m++)
        for (int r = some.begin; r < some.end; r += BLOCK) {
            const float *g = gate + size_t(m) * rows + r, *u = up + size_t(m) * rows + r;
            y.set(m, r / BLOCK, silu_times(g, u), silu_times(g + LANES, u + LANES));
        }
}

// The experts of the greatest scores; of equal ones, the first. x: (tokens, dim).
void route(const Experts &e, const float *x, int tokens, int dim, const Routes &to) {
    Share mine = share(tokens * e.n);
    for (int i = mine.begin; i < mine.end; i++) {
        const float *row = x + size_t(i / e.n) * dim, *weight = e.router + size_t(i % e.n) * dim;
        vec total = {};
        for (int d = 0; d < dim; d += LANES) total += load(row + d) * load(weight + d);
        to.scores[i] = sum(total);
    }
#pragma omp barrier
#pragma omp single
    {
        memset(to.begins, 0, (e.n + 1) * sizeof *to.begins);
        for (int m = 0; m < tokens; m++) {
            float *scores = to.scores + size_t(m) * e.n;
            for (int k = 0; k < e.top_k; k++) {
                int32_t &best = to.chosen[m * e.top_k + k] = -1;
                for (int i = 0; i < e.n; i++) {
                    bool taken = false;
                    for (int j = 0; j < k; j++) taken |= to.chosen[m * e.top_k + j] == i;
                    if (!taken && (best < 0 || scores[i] > scores[best])) best = i;
                }
                to.begins[best + 1]++;
            }
        }
        for (int i = 0; i < e.n; i++) to.begins[i + 1] += to.begins[i];
        for (int i = 0; i < tokens * e.top_k; i++) {  // begins[e] moves to the end of e
            const int best = to.chosen[i], m = i / e.top_k, place = to.begins[best]++;
            to.tokens[place] = m;
            to.weights[place] = 1 / (1 + std::exp(-to.scores[size_t(m) * e.n + best]));
        }
        for (int i = e.n; i > 0; i--) to.begins[i] = to.begins[i - 1];
        to.begins[0] = 0;
    }
}

// Adds to `sum`, (tokens, dim), what experts make of x.
// in, between: room for the inputs of w1 and w3, and of w2; gate, up, out: for their results.
void add_experts(const Experts &e, const float *x, int tokens, int dim, const Routes &routes,
                 Inputs in, Inputs between, float *gate, float *up, float *out, float *sum,
                 Pieces &pieces) {
    route(e, x, tokens, dim, routes);
    for (int i = 0; i < e.n; i++) {
        const int first = routes.begins[i], n = routes.begins[i + 1] - first;
        if (!n) continue;
        const Weight *w = e.matrices + 3 * i;
        in.height = between.height = height_of(n), between.cols = w[2].cols;
        const int blocks = dim / BLOCK;
        Share mine = share(n * blocks);
        for (int j = mine.begin; j < mine.end; j++) {
            const int place = first + j / blocks, b = j % blocks;
            const float *at = x + size_t(routes.tokens[place]) * dim + b * BLOCK;
            const float weight = routes.weights[place];
            in.set(j / blocks, b, load(at) * weight, load(at + LANES) * weight);
        }
#pragma omp barrier
        pieces.each(w[0].rows, least_rows(n), most_rows(n), [&](Share some) {
            multiply(w[0], in, n, gate, some);
            multiply(w[1], in, n, up, some);
            activate(gate, up, n, w[0].rows, some, between);
        });
#pragma omp barrier
        pieces.each(dim, least_rows(n), most_rows(n), [&](Share some) {
            multiply(w[2], between, n, out, some);
            for (int j = 0; j < n; j++)
                for (int r = some.begin; r < some.end; r++)
                    sum[size_t(routes.tokens[first + j]) * dim + r] += out[size_t(j) * dim + r];
        });
    }
}

}  // namespace
