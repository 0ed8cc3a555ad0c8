// y = x wᵀ for few rows of x: each weight is read once, in the layout of the checkpoint file.

#pragma once

#include "vectors.h"

namespace {

enum Kind : int32_t { F32, BF16, Q8_0, Q4_0, Q4_1 };

constexpr int block_bytes(int kind) {
    return kind == F32 ? 128 : kind == BF16 ? 64 : kind == Q8_0 ? 34 : kind == Q4_0 ? 18 : 20;
}
inline vec half(const uint8_t *p) {  // one fp16 value, in all 16 lanes
#ifdef __AVX512F__
    return (vec)_mm512_cvtph_ps(_mm256_set1_epi16(read<int16_t>(p)));
#else
    return vec{} + float(read<_Float16>(p));
#endif
}

struct Weight {  // (rows, cols), row-major, cols a multiple of BLOCK
    const uint8_t *data;
    int32_t kind, rows, cols;
};

// Ways to read a block of 32 weights and multiply it by 32 activations.

// In fp32, for any kind of weight. Dequantized values are exact: a scale has 11 bits, q at most 8.
struct Floats {
    typedef float X;
    struct Block {
        vec low, high;
    };
    static Block at(const float *x) { return {load(x), load(x + LANES)}; }
    static vec dot(vec acc, const Block &a, const Block &b) {
        return acc + a.low * b.low + a.high * b.high;
    }
    template <int KIND> static Block decode(const uint8_t *w) {
        if constexpr (KIND == F32) return at((const float *)w);
        if constexpr (KIND == BF16) return {load((const bf16 *)w), load((const bf16 *)w + LANES)};
        vec scale = half(w);
        if constexpr (KIND == Q8_0)
            return {whole(w + 2) * scale, whole(w + 2 + LANES) * scale};
        // Four bits index one of 16 values: first the low halves of all bytes, then the high ones.
        const vec q = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        vec table = KIND == Q4_1 ? q * scale + half(w + 2) : (q - 8.0f) * scale;
        const uint8_t *packed = w + (KIND == Q4_1 ? 4 : 2);
#ifdef __AVX512F__
        __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)packed));
        return {(vec)_mm512_permutexvar_ps(both, (__m512)table),
                (vec)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), (__m512)table)};
#else
        Block out;
        for (int i = 0; i < LANES; i++) {
            out.low[i] = table[packed[i] & 15];
            out.high[i] = table[packed[i] >> 4];
        }
        return out;
#endif
    }
    static vec whole(const void *bytes) {  // 16 of int8
        const int8_t *q = (const int8_t *)bytes;
#ifdef __AVX512F__
        return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)q)));
#else
        vec out;
        for (int i = 0; i < LANES; i++) out[i] = q[i];
        return out;
#endif
    }
};

#ifdef __AVX512BF16__
struct Pairs {  // bf16 by bf16: vdpbf16ps adds two products to each of 16 sums
    typedef bf16 X;
    typedef __m512bh Block;
    static Block at(const bf16 *x) { return (__m512bh)_mm512_loadu_si512(x); }
    static vec dot(vec acc, Block a, Block b) { return (vec)_mm512_dpbf16_ps((__m512)acc, a, b); }
    template <int KIND> static Block decode(const uint8_t *w) { return at((const bf16 *)w); }
};
#endif

constexpr int AHEAD = 8192;  // prefetch distance in bytes, about memory's latency times bandwidth

// y[m][r] = w[r] · x[m] for a few rows of each, accumulated in registers.
template <class Dot, int KIND, int R, int M>
inline void tile(const uint8_t *w, const typename Dot::X *x, int cols, float *y, size_t stride) {
    constexpr int size = block_bytes(KIND);
    const size_t row = size_t(cols) / BLOCK * size;
    vec acc[R][M] = {};
    for (int b = 0; b < cols / BLOCK; b++)
        for (int r = 0; r < R; r++) {
            const uint8_t *at = w + r * row + size_t(b) * size;
            __builtin_prefetch(at + AHEAD);  // hardware prefetchers fail on rows of odd lengths
            auto block = Dot::template decode<KIND>(at);
            for (int m = 0; m < M; m++)
                acc[r][m] = Dot::dot(acc[r][m], block, Dot::at(x + size_t(m) * cols + b * BLOCK));
        }
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) y[m * stride + r] = sum(acc[r][m]);
}

template <class Dot, int KIND, int R>
inline void rows_of(const uint8_t *w, const typename Dot::X *x, int tokens, int cols, float *y,
                    size_t stride) {
    int m = 0;
    for (; m + 4 <= tokens; m += 4)
        tile<Dot, KIND, R, 4>(w, x + size_t(m) * cols, cols, y + m * stride, stride);
    const typename Dot::X *rest = x + size_t(m) * cols;
    if (tokens - m == 3) tile<Dot, KIND, R, 3>(w, rest, cols, y + m * stride, stride);
    if (tokens - m == 2) tile<Dot, KIND, R, 2>(w, rest, cols, y + m * stride, stride);
    if (tokens - m == 1) tile<Dot, KIND, R, 1>(w, rest, cols, y + m * stride, stride);
}

template <class Dot, int KIND>
void product(const Weight &w, const typename Dot::X *x, int tokens, float *y, int begin, int end) {
    const size_t row = size_t(w.cols) / BLOCK * block_bytes(KIND);
    int r = begin;
    for (; r + 4 <= end; r += 4)
        rows_of<Dot, KIND, 4>(w.data + r * row, x, tokens, w.cols, y + r, w.rows);
    for (; r < end; r++)
        rows_of<Dot, KIND, 1>(w.data + r * row, x, tokens, w.cols, y + r, w.rows);
}

// This thread's share of n items, in multiples of `unit`.
struct Share {
    int begin, end;
};
inline Share share(int n, int unit = 1) {
    long id = omp_get_thread_num(), all = omp_get_num_threads(), units = (n + unit - 1) / unit;
    return {int(units * id / all * unit), std::min(n, int(units * (id + 1) / all * unit))};
}

// This thread's rows of y = x wᵀ: x (tokens, cols), y (tokens, rows).
template <class Dot>
Share multiply(const Weight &w, const typename Dot::X *x, int tokens, float *y) {
    Share mine = share(w.rows, LANES);
    auto run = [&](auto kind) {
        product<Dot, decltype(kind)::value>(w, x, tokens, y, mine.begin, mine.end);
    };
    if (w.kind == BF16) run(std::integral_constant<int, BF16>());
    if constexpr (std::is_same<Dot, Floats>::value) {
        if (w.kind == F32) run(std::integral_constant<int, F32>());
        if (w.kind == Q8_0) run(std::integral_constant<int, Q8_0>());
        if (w.kind == Q4_0) run(std::integral_constant<int, Q4_0>());
        if (w.kind == Q4_1) run(std::integral_constant<int, Q4_1>());
    }
    return mine;
}

}  // namespace
