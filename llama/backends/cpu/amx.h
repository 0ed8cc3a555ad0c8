// Products with AMX, Intel's matrix instructions: 16 rows of x by 16 rows of w at once.
//
// Quantized weights give the same bits as with vector instructions: sums within a block are exact,
// and they are scaled and added in the same order. Products of bf16 are rounded differently, and so
// tiles compute all of them, those of one row too: within a block of 32, TDPBF16PS adds up the even
// and the odd products apart.

#pragma once

#include "tiles.h"
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

namespace {

// Asks Linux, once, for the permission to use tiles.
inline bool may_use_amx() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool granted = !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
    return granted;
}

// What was written is in memory: the compiler doesn't see what the instructions for tiles read.
inline void written() { asm volatile("" : : : "memory"); }

// The shapes of a thread's tiles: 0 to 3 are sums, 4 and 5 hold rows of x, 6 and 7 rows of w.
class Tiles {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } config;

public:
    ~Tiles() { _tile_release(); }
    // rows of x in tiles 4 and 5, bytes of each, and rows of w.
    void shape(int first, int second, int bytes, int columns) {
        if (config.rows[4] == first && config.rows[5] == second && config.bytes[6] == 4 * columns)
            return;
        for (int i = 0; i < 8; i++) config.bytes[i] = 4 * columns;
        config.bytes[4] = config.bytes[5] = bytes;
        config.rows[0] = config.rows[1] = config.rows[4] = first;
        config.rows[2] = config.rows[3] = config.rows[5] = second;
        config.rows[6] = config.rows[7] = bytes / 4;
        written();
        _tile_loadconfig(&config);
    }
};

// --- bf16 -----------------------------------------------------------------------------------------

// Bytes of a block of 16 rows.
constexpr size_t DENSE = LANES * BLOCK * sizeof(bf16);

// 32 rows of x, or the last few: the rows of a tile are `row` bytes apart, its blocks `step` values.
struct Rows {
    const bf16 *first, *second;
    size_t row, step;
};

// Adds to y the products of X times 16 rows of x and W times 16 rows of w, `group` bytes apart.
// For each block, `fetched` bytes from `ahead` on are prefetched.
template <int X, int W>
void dense_tiles(Rows x, const uint8_t *w, size_t group, int blocks, bool begins, float *y,
                 size_t stride, const uint8_t *ahead, int fetched) {
    float *below = y + LANES * stride;
    if (begins) {
        _tile_zero(0);
        if (W > 1) _tile_zero(1);
        if (X > 1) _tile_zero(2);
        if (X > 1 && W > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, y, 4 * stride);
        if (W > 1) _tile_loadd(1, y + LANES, 4 * stride);
        if (X > 1) _tile_loadd(2, below, 4 * stride);
        if (X > 1 && W > 1) _tile_loadd(3, below + LANES, 4 * stride);
    }
    for (int b = 0; b < blocks; b++, w += DENSE) {
        for (int i = 0; i < fetched; i += 64, ahead += 64) {
            PREFETCH(*ahead);
            if (W > 1) PREFETCH(ahead[group]);
        }
        _tile_loadd(4, x.first + b * x.step, x.row);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (W > 1) {
            _tile_loadd(7, w + group, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (X > 1) {
            _tile_loadd(5, x.second + b * x.step, x.row);
            _tile_dpbf16ps(2, 5, 6);
            if (W > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, y, 4 * stride);
    if (W > 1) _tile_stored(1, y + LANES, 4 * stride);
    if (X > 1) _tile_stored(2, below, 4 * stride);
    if (X > 1 && W > 1) _tile_stored(3, below + LANES, 4 * stride);
}

constexpr int RESIDENT = 1 << 20;  // bytes of x that stay in the second-level cache

inline void dense_product(const Weight &w, const Inputs &x, int tokens, float *y, Share mine) {
    constexpr int BOTH = 2 * LANES;
    const int blocks = w.cols / BLOCK, some = std::max(16, RESIDENT / (tokens * 2 * BLOCK));
    const size_t group = blocks * DENSE;
    Tiles tiles;
    // Of x as many columns as stay in the cache, so that w is read once for all rows of x.
    for (int from = 0; from < blocks; from += some)
        for (int r = mine.begin, wide; r < mine.end; r += wide) {
            const int n = std::min(some, blocks - from), parts = (tokens + BOTH - 1) / BOTH;
            wide = mine.end - r >= BOTH ? BOTH : std::min(LANES, mine.end - r);
            const uint8_t *at = w.data + r / LANES * group + from * DENSE;
            // Each pass over these rows of w prefetches a part of the next.
            const int part = parts == 1 ? DENSE : std::max(64, int(DENSE) / parts / 64 * 64);
            for (int m = 0; m < tokens; m += BOTH) {
                const bool more = tokens - m > LANES;
                const int first = std::min(LANES, tokens - m);
                const int second = more ? std::min(LANES, tokens - m - LANES) : 1;
                const size_t done = size_t(m / BOTH) * part;
                const uint8_t *ahead = parts == 1 ? at + AHEAD : at + 2 * group + done * n;
                const bf16 *above = x.halves + x.place(m, from) * BLOCK;
                Rows rows = {above, above + LANES * w.cols, size_t(2 * w.cols), BLOCK};
                if (x.height > 1) rows.row = 64, rows.step = LANES * BLOCK;
                tiles.shape(first, second, 2 * BLOCK, std::min(wide, LANES));
                auto run = [&](auto of_x, auto of_w) {
                    dense_tiles<decltype(of_x)::value, decltype(of_w)::value>(
                        rows, at, group, n, from == 0, y + size_t(m) * w.rows + r, w.rows, ahead,
                        done < DENSE ? part : 0);
                };
                std::integral_constant<int, 1> one;
                std::integral_constant<int, 2> two;
                if (wide == BOTH) more ? run(two, two) : run(one, two);
                else more ? run(two, one) : run(one, one);
            }
        }
}

// --- quantized ------------------------------------------------------------------------------------

// 16 rows of w as signed bytes, with their scales.
template <class T> struct Unpacked {
    static constexpr int SUBS = T::VALUES / BLOCK, PARTS = T::PARTS;
    std::vector<uvec> quants;
    std::vector<vec> scales, leasts;

    void read(T block, int blocks) {
        quants.resize(size_t(blocks) * SUBS * 8);
        scales.resize(size_t(blocks) * SUBS * PARTS);
        if (T::HAS_LEAST) leasts.resize(scales.size());
        typedef uint8_t all_bytes __attribute__((vector_size(64)));
        uvec *q = quants.data();
        vec *scale = scales.data(), *least = leasts.data();
        for (int b = 0; b < blocks; b++, block.p += LANES * block_bytes<T>()) {
            block.open();
            for (int s = 0; s < SUBS; s++) {
                prefetch(block, s, SUBS);
                for (int j = 0; j < 8; j++)
                    *q++ = (uvec)((all_bytes)block.quants(s, j) - uint8_t(T::OFFSET));
                for (int part = 0; part < PARTS; part++) {
                    *scale++ = block.scale(s, part);
                    if constexpr (T::HAS_LEAST) *least++ = block.least(s, part);
                }
            }
        }
        written();
    }
};

// The products of M rows of x with 16 rows of w.
template <class T, int M>
void quantized_tiles(const Fixed16 *x, const Unpacked<T> &w, int blocks, vec *sums) {
    constexpr int PARTS = T::PARTS, PER = 8 / PARTS;
    alignas(64) ivec upper[2][LANES], lower[2][LANES];
    for (int m = 0; m < M; m++) sums[m] = vec{};
    auto multiply = [&](int i) {  // part i of all
        _tile_loadd(6, &w.quants[i * PER], 64);
        _tile_loadd(4, x[i / PARTS].a[0] + i % PARTS * PER, BLOCK);
        _tile_loadd(5, x[i / PARTS].b[0] + i % PARTS * PER, BLOCK);
        _tile_zero(0);
        _tile_zero(1);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 5, 6);
        _tile_stored(0, upper[i % 2], 64);
        _tile_stored(1, lower[i % 2], 64);
    };
    multiply(0);
    for (int i = 0; i < blocks * PARTS; i++) {
        if (i + 1 < blocks * PARTS) multiply(i + 1);  // while part i is scaled
        const Fixed16 &f = x[i / PARTS];
        const vec scale = w.scales[i];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            const ivec total = (upper[i % 2][m] << 8) + lower[i % 2][m];
            sums[m] += __builtin_convertvector(total, vec) * (scale * f.scale[m]);
            if constexpr (T::HAS_LEAST)
                sums[m] += w.leasts[i] *
                           (PARTS == 1 ? f.sum[m] : f.scale[m] * float(f.sums[i % PARTS][m]));
        }
    }
}

template <class T>
void quantized_product(const Weight &w, const Inputs &x, int tokens, float *y, Share mine) {
    static thread_local Unpacked<T> unpacked;
    const int subs = w.cols / BLOCK, blocks = w.cols / T::VALUES;
    const int some = std::max(LANES, RESIDENT / int(subs * sizeof(Fixed16)) * LANES);
    Tiles tiles;
    for (int begin = 0; begin < tokens; begin += some)
        for (int r = mine.begin; r < mine.end; r += LANES) {
            T from;
            from.p = w.data + size_t(r) * blocks * block_bytes<T>();
            unpacked.read(from, blocks);
            const int end = std::min(tokens, begin + some), columns = std::min(LANES, mine.end - r);
            for (int m = begin; m < end; m += LANES) {
                const int rows = std::min(LANES, end - m);
                vec sums[LANES];
                tiles.shape(rows, rows, BLOCK / T::PARTS, LANES);
                auto run = [&](auto count) {
                    quantized_tiles<T, decltype(count)::value>(
                        (const Fixed16 *)(x.fixed + x.place(m, 0)), unpacked, subs, sums);
                };
                if (rows <= 4) run(std::integral_constant<int, 4>());
                else if (rows <= 8) run(std::integral_constant<int, 8>());
                else run(std::integral_constant<int, 16>());
                for (int i = 0; i < rows; i++)
                    memcpy(y + size_t(m + i) * w.rows + r, &sums[i], columns * sizeof(float));
            }
        }
}

}  // namespace
#endif
