// LoRA adapters beside the weights, each for some tokens of a pass: y += scale · B (A x).
//
// An adapter is read once for all of its tokens, and B a tile at a time, which stays in the
// first-level cache for all of them. Weights A and B are interleaved as in blocks.h, F32 or BF16;
// x and all sums are fp32. A sum over the columns of x is one of partial sums over SPAN columns
// each: threads share these out, and a token's result doesn't depend on how.

#pragma once

#include "products.h"

namespace {

struct LowRank {  // of one matrix; `rank`, a multiple of 16, is 0 where the adapter has none
    const uint8_t *A, *B;
    int32_t is_bf16, rank;
    float scale;
};
struct Run {  // neighbouring tokens of one adapter
    int32_t adapter, begin, end;
};
constexpr int MATRICES = 7;  // of a layer
struct Adapters {
    const LowRank *all;  // of all adapters, each with all layers
    const Run *runs;
    int32_t n_runs, n_layers, most;  // most: the largest rank
    float *partial;                  // (3 matrices, spans of x, tokens, most)

    const LowRank &of(const Run &run, int layer, int matrix) const {
        return all[(run.adapter * n_layers + layer) * MATRICES + matrix];
    }
};
constexpr int SPAN = 256;                        // columns of x in a partial sum
constexpr int SUMMED = 4096, LARGEST_RANK = 512;  // values of A x at a time; at most, of a token

inline int spans(int cols) { return (cols + SPAN - 1) / SPAN; }

template <class F> void with_dense(bool is_bf16, F f) {
    if (is_bf16) f(Type<BF16>());
    else f(Type<F32>());
}
// This thread's share of the partial sums of A x, for n matrices that have the same x.
inline void reduce(const Adapters &a, int layer, int matrix, int n, const Inputs &x, int tokens) {
    const int parts = spans(x.cols);
    Share mine = share(n * parts * a.n_runs);
    for (int i = mine.begin; i < mine.end; i++) {  // runs, which differ most, are shared out evenly
        const Run &run = a.runs[i % a.n_runs];
        const int part = i / a.n_runs % parts, nth = i / a.n_runs / parts, from = part * SPAN;
        const LowRank &w = a.of(run, layer, matrix + nth);
        const int blocks = std::min(SPAN, x.cols - from) / BLOCK;
        float *y = a.partial + size_t(nth * parts + part) * tokens * a.most;
        for (int r = 0; r < w.rank; r += LANES)
            with_dense(w.is_bf16, [&](auto type) {
                constexpr int bytes = block_bytes<decltype(type)>() / BLOCK;
                type.p = w.A + (size_t(r) * x.cols + from * LANES) * bytes;
                in_tiles(run.begin, run.end, [&](int m, auto count) {
                    tile<decltype(type), decltype(count)::value>(
                        type, x.floats + size_t(m) * x.cols + from, x.cols, blocks,
                        y + size_t(m) * a.most + r, a.most, LANES, {type.p, 0, 0});
                });
            });
    }
}

// Adds to M rows of y the products of z (M, rank) with 16 rows of B.
template <class T, int M>
inline void expand_tile(T w, const float *z, int rank, float *y, size_t stride) {
    vec sums[M] = {};
#pragma GCC unroll 8
    for (int k = 0; k < rank; k++) {
        const vec value = w.value(k);
        for (int m = 0; m < M; m++) sums[m] += value * z[m * rank + k];
    }
    for (int m = 0; m < M; m++) store(y + m * stride, load(y + m * stride) + sums[m]);
}

// This thread's rows of y += scale · B (A x): x of `cols` columns, the nth of the matrices of `reduce`.
inline void expand(const Adapters &a, int layer, int matrix, int nth, int cols, int tokens, float *y,
                   int rows, Share mine) {
    const int parts = spans(cols);
    const size_t apart = size_t(tokens) * a.most;
    const float *partial = a.partial + size_t(nth) * parts * apart;
    alignas(64) float z[SUMMED];
    for (const Run *run = a.runs; run < a.runs + a.n_runs; run++) {
        const LowRank &w = a.of(*run, layer, matrix + nth);
        if (!w.rank) continue;
        for (int begin = run->begin, end; begin < run->end; begin = end) {
            end = std::min(run->end, begin + SUMMED / w.rank);
            float *to = z;
            for (int m = begin; m < end; m++)
                for (int k = 0; k < w.rank; k += LANES, to += LANES) {
                    const float *at = partial + size_t(m) * a.most + k;
                    vec sum = {};
                    for (int part = 0; part < parts; part++) sum += load(at + part * apart);
                    store(to, sum * w.scale);
                }
            with_dense(w.is_bf16, [&](auto type) {
                constexpr int bytes = block_bytes<decltype(type)>() / BLOCK;
                for (int r = mine.begin; r < mine.end; r += LANES) {
                    type.p = w.B + size_t(r) * w.rank * bytes;
                    in_tiles(begin, end, [&](int m, auto count) {
                        expand_tile<decltype(type), decltype(count)::value>(
                            type, z + (m - begin) * w.rank, w.rank, y + size_t(m) * rows + r, rows);
                    });
                }
            });
        }
    }
}

}  // namespace
