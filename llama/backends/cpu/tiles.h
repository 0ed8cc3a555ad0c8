// y = x wᵀ for any number of rows of x. A weight is read once for all of them.
//
// Each lane of a vector computes one output: it adds up its row's blocks in order, so that the
// result depends on the two rows alone, not on how many others are computed with them, by which
// thread, or in which tile.
//
// Quantized weights are multiplied by activations in 16-bit fixed point, with a scale for each
// block of 32. Sums within a block are exact integers.

#pragma once

#include "blocks.h"
#include "threads.h"

namespace {

struct Weight {  // (rows, cols), packed
    const uint8_t *data;
    int32_t kind, rows, cols;
};

// --- four unsigned bytes times four 16-bit activations, in each lane ------------------------------

// An activation block has two words for each four values. With products of bytes they are the upper
// and the lower bytes (both signed: q = 256 a + b); else the first and third, the second and fourth.
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
#define MULTIPLIES_BYTES
#endif
#ifdef __ARM_FEATURE_DOTPROD
constexpr int BIAS = 128;  // what `dot` subtracts from each byte, since ARM's are both signed
#else
constexpr int BIAS = 0;
#endif
struct Sums {
    ivec a, b;
};
// The sum of the products of two 16-bit halves, in each lane.
inline ivec multiply_pairs(uvec w, int32_t x) {
#ifdef __AVX2__
    auto half = [&](auto v) { return (ints)_mm256_madd_epi16((__m256i)v, _mm256_set1_epi32(x)); };
    return both(half(lower((ivec)w)), half(upper((ivec)w)));
#else
    return (ivec)(w & 0xffff) * int16_t(x) + (ivec)(w >> 16) * (x >> 16);
#endif
}
inline void dot(Sums &sums, uvec quants, int32_t a, int32_t b) {
#ifdef __AVX512VNNI__
    sums.a = (ivec)_mm512_dpbusd_epi32((__m512i)sums.a, (__m512i)quants, _mm512_set1_epi32(a));
    sums.b = (ivec)_mm512_dpbusd_epi32((__m512i)sums.b, (__m512i)quants, _mm512_set1_epi32(b));
#elif defined(__ARM_FEATURE_DOTPROD)
    quants ^= every(BIAS);
    const int8x16_t of_a = vreinterpretq_s8_s32(vdupq_n_s32(a));
    const int8x16_t of_b = vreinterpretq_s8_s32(vdupq_n_s32(b));
    int8x16_t q[4];
    int32x4_t to_a[4], to_b[4];
    memcpy(q, &quants, 64), memcpy(to_a, &sums.a, 64), memcpy(to_b, &sums.b, 64);
    for (int i = 0; i < 4; i++) {
        to_a[i] = vdotq_s32(to_a[i], q[i], of_a);
        to_b[i] = vdotq_s32(to_b[i], q[i], of_b);
    }
    memcpy(&sums.a, to_a, 64), memcpy(&sums.b, to_b, 64);
#else
    const uvec bytes = uvec{} + 0x00ff00ff;
    sums.a += multiply_pairs(quants & bytes, a);
    sums.b += multiply_pairs(quants >> 8 & bytes, b);
#endif
}
inline ivec total(const Sums &sums) {
#ifdef MULTIPLIES_BYTES
    return (sums.a << 8) + sums.b;
#else
    return sums.a + sums.b;
#endif
}
// A block of 32 activations in fixed point: value = scale * q.
struct Fixed {
    int32_t a[8], b[8];  // of each four values, as `dot` takes them
    float scale;
    float sum;        // of the values
    int32_t sums[2];  // of the first and the last 16 of q
};
// The same of 16 rows, as AMX takes them.
struct Fixed16 {
    int32_t a[LANES][8], b[LANES][8];
    float scale[LANES], sum[LANES];
    int32_t sums[2][LANES];
};
inline void encode(const int32_t *q, int32_t *to_a, int32_t *to_b) {
    for (int j = 0; j < 8; j++, q += 4) {
#ifdef MULTIPLIES_BYTES
        uint32_t a = 0, b = 0;
        for (int i = 0; i < 4; i++) {
            a |= uint32_t((q[i] + 128) >> 8 & 255) << (8 * i);
            b |= uint32_t(q[i] & 255) << (8 * i);
        }
        to_a[j] = int32_t(a), to_b[j] = int32_t(b);
#else
        to_a[j] = int32_t((q[0] & 0xffff) | uint32_t(q[2]) << 16);
        to_b[j] = int32_t((q[1] & 0xffff) | uint32_t(q[3]) << 16);
#endif
    }
}
constexpr float LARGEST = 32639;  // whose upper byte still rounds to 127

// --- the inputs of a product ----------------------------------------------------------------------

// x (tokens, cols), in each of the forms that some weight needs; null in others. `halves` and `fixed`
// are in groups of `height` rows, 1 or 16: block 0 of each of them, block 1 of each, ...
struct Inputs {
    float *floats;
    bf16 *halves;
    Fixed *fixed;
    int32_t cols, height;

    // The number of blocks that come before block b of row m.
    size_t place(size_t m, size_t b) const {
        return (m / height * (cols / BLOCK) + b) * height + m % height;
    }
    // Values 32 b to 32 b + 31 of row m.
    void set(size_t m, size_t b, vec low, vec high) const {
        size_t at = m * cols + b * BLOCK;
        if (floats) store(floats + at, low), store(floats + at + LANES, high);
        at = place(m, b) * BLOCK;
        if (halves) store(halves + at, low), store(halves + at + LANES, high);
        if (!fixed) return;
        vec a = low < 0 ? -low : low, c = high < 0 ? -high : high;
        float most = largest(larger(a, c)), broken = sum((low + high) * 0.0f);  // NaN stays NaN
        float inverse = most > 1e-30f ? LARGEST / most : 0;
        const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
        ivec q[2] = {__builtin_convertvector((low * inverse + magic) - magic, ivec),
                     __builtin_convertvector((high * inverse + magic) - magic, ivec)};
        float scale = (most > 1e-30f ? most / LARGEST : 0) + broken;
        int32_t sums[2] = {};
        for (int i = 0; i < LANES; i++) sums[0] += q[0][i], sums[1] += q[1][i];
        float sum = scale * float(sums[0] + sums[1]);
        alignas(64) int32_t all[BLOCK];
        memcpy(all, q, sizeof all);
        if (height == 1) {
            Fixed &to = fixed[at / BLOCK];
            encode(all, to.a, to.b);
            to.scale = scale, to.sum = sum, to.sums[0] = sums[0], to.sums[1] = sums[1];
        } else {
            Fixed16 &to = ((Fixed16 *)fixed)[at / BLOCK / LANES];
            const int i = m % LANES;
            encode(all, to.a[i], to.b[i]);
            to.scale[i] = scale, to.sum[i] = sum, to.sums[0][i] = sums[0], to.sums[1][i] = sums[1];
        }
    }
};

// --- tiles: 16 rows of w by M rows of x -----------------------------------------------------------

#ifdef __AVX512F__
constexpr int MOST = 8;  // rows of x in a tile, as registers allow
#else
constexpr int MOST = 2;
#endif

// As assembly, since compilers gather prefetches of unrolled code in one place.
#if defined(__x86_64__)
#define PREFETCH(byte) asm volatile("prefetcht0 %0" : : "m"(byte) : "memory")
#else
#define PREFETCH(byte) __builtin_prefetch(&(byte))
#endif

// Prefetches part `i` of n of what lies one distance after a block: about memory's latency times its
// bandwidth, in bytes. In parts, since more than some requests at once would have to wait.
constexpr int AHEAD = 4096;
template <class T> inline void prefetch(const T &block, int i, int n) {
    if (T::IS_CACHED) return;
    constexpr int lines = (LANES * block_bytes<T>() + 63) / 64;
    for (int line = lines * i / n; line < lines * (i + 1) / n; line++)
        PREFETCH(block.p[line * 64 + AHEAD]);
}

// Adds to M sums the products of a part of a sub-block.
template <class T, int M>
inline __attribute__((always_inline)) void add_part(const T &w, unsigned s, int part, const Fixed **x,
                                                    vec *sums) {
    constexpr int PER = 8 / T::PARTS;
    Sums acc[M];
    for (int m = 0; m < M; m++) {
        const int32_t *given = x[m]->sums;
        int all = T::PARTS == 1 ? given[0] + given[1] : given[part];
        acc[m] = {ivec{}, ivec{} + (BIAS - T::OFFSET) * all};
    }
#pragma GCC unroll 8
    for (int j = part * PER; j < part * PER + PER; j++) {
        uvec q = w.quants(s, j);
        for (int m = 0; m < M; m++) dot(acc[m], q, x[m]->a[j], x[m]->b[j]);
    }
    vec scale = w.scale(s, part), least = {};
    if constexpr (T::HAS_LEAST) least = w.least(s, part);
    for (int m = 0; m < M; m++) {
        sums[m] += __builtin_convertvector(total(acc[m]), vec) * (scale * x[m]->scale);
        if constexpr (T::HAS_LEAST)
            sums[m] += least * (T::PARTS == 1 ? x[m]->sum : x[m]->scale * float(x[m]->sums[part]));
    }
}
template <class T, int M>
inline void add_sub_block(const T &w, unsigned s, const Fixed **x, vec *sums) {
    prefetch(w, s, T::VALUES / BLOCK);
    if constexpr (T::PARTS == 2 && T::IS_CACHED)  // unrolled, which is faster there
        add_part<T, M>(w, s, 0, x, sums), add_part<T, M>(w, s, 1, x, sums);
    else
        for (int part = 0; part < T::PARTS; part++) add_part<T, M>(w, s, part, x, sums);
    for (int m = 0; m < M; m++) x[m]++;
}

// Sub-blocks with all that `add_sub_block` needs of them: types that take long to unpack are unpacked to
// the first-level cache, for several tiles or since compilers do better with the short loops.
template <int OFFSET, int PARTS, bool LEAST>
struct Prepared : Quantized<Prepared<OFFSET, PARTS, LEAST>, BLOCK, OFFSET, PARTS, LEAST> {
    static constexpr bool IS_CACHED = true;
    static constexpr int LEASTS = LEAST ? PARTS : 0;
    static constexpr Field FIELDS[] = {{0, 4, 8}, {32, 4, PARTS}, {32 + 4 * PARTS, 4, LEASTS}};
    void open() {}
    uvec quants(unsigned, int j) const { return this->template word<0>(j); }
    vec scale(unsigned, int part) const { return load((const float *)this->template at<1>(part)); }
    vec least(unsigned, int part) const { return load((const float *)this->template at<2>(part)); }
};
template <class T> using PreparedOf = Prepared<T::OFFSET, T::PARTS, T::HAS_LEAST>;
template <class T> constexpr int prepared_bytes() {  // of a block
    return T::VALUES / BLOCK * LANES * block_bytes<PreparedOf<T>>();
}
template <class T> constexpr bool takes_long() {
    if constexpr (T::IS_QUANTIZED) return !T::IS_CACHED && (T::PARTS > 1 || T::VALUES > 128);
    return false;
}

template <class T> void prepare(T from, int blocks, uint8_t *to) {
    auto put = [&](auto v) { memcpy(to, &v, sizeof v), to += sizeof v; };
    for (int b = 0; b < blocks; b++, from.p += LANES * block_bytes<T>()) {
        from.open();
        for (int s = 0; s < T::VALUES / BLOCK; s++) {
            prefetch(from, s, T::VALUES / BLOCK);
            for (int j = 0; j < 8; j++) put(from.quants(s, j));
            for (int part = 0; part < T::PARTS; part++) put(from.scale(s, part));
            if constexpr (T::HAS_LEAST)
                for (int part = 0; part < T::PARTS; part++) put(from.least(s, part));
        }
    }
}

// Each adds to M sums the products of a block of 16 rows of w with a block of M rows of x, which
// begin at x[m] and are left behind.
template <class T, int M> inline void add(T w, const Fixed **x, vec *sums) {
    constexpr unsigned SUBS = T::VALUES / BLOCK;
    if constexpr (takes_long<T>() && T::PARTS > 1 && MOST > 2 && M > 1) {
        alignas(64) uint8_t prepared[prepared_bytes<T>()];
        prepare(w, 1, prepared);
        PreparedOf<T> block;
        for (block.p = prepared; block.p < std::end(prepared); block.p += prepared_bytes<T>() / SUBS)
            add_sub_block<PreparedOf<T>, M>(block, 0, x, sums);
        return;
    }
#ifdef __AVX512VNNI__
    // Unrolled, shifts are by constants. Types of two parts are slower from memory if wholly unrolled.
    constexpr unsigned SOME = T::PARTS == 1 || SUBS < 4 ? SUBS : 4;
#else
    constexpr unsigned SOME = 1;  // products take longer than shifts
#endif
    w.open();
    for (unsigned group = 0; group < SUBS / SOME; group++)
#pragma GCC unroll 8
        for (unsigned s = group * SOME; s < group * SOME + SOME; s++)
            add_sub_block<T, M>(w, s, x, sums);
}
template <class T, int M> inline void add(const T &w, const float **x, vec *sums) {
    vec all[M] = {};
#pragma GCC unroll 4
    for (int begin = 0; begin < T::VALUES; begin += T::CHAIN) {
        vec acc[M] = {};
#pragma GCC unroll 32
        for (int i = begin; i < begin + T::CHAIN; i++) {
            vec value = w.value(i);
            for (int m = 0; m < M; m++) acc[m] += value * x[m][i];
        }
        for (int m = 0; m < M; m++) all[m] = begin ? all[m] + acc[m] : acc[m];
    }
    for (int m = 0; m < M; m++) sums[m] += all[m] * w.scale(), x[m] += T::VALUES;
}
template <class T, int M> inline void add(const T &w, const bf16 **x, vec *sums) {
#ifdef __AVX512BF16__
    vec acc[M] = {};
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK / 2; i++) {
        __m512bh pairs = (__m512bh)w.template word<0>(i);
        for (int m = 0; m < M; m++)
            acc[m] = (vec)_mm512_dpbf16_ps((__m512)acc[m], pairs,
                                           (__m512bh)_mm512_set1_epi32(read<int>(x[m] + 2 * i)));
    }
    for (int m = 0; m < M; m++) sums[m] += acc[m], x[m] += BLOCK;
#endif
}

// What a tile of dense weights prefetches: `step` bytes from `at` for each block.
struct Ahead {
    const uint8_t *at;
    int step, done;
};

// y[m][r] = w[r] · x[m] for M rows of x and `rows` <= 16 rows of w; `row` values of x are a row's.
// If it continues, it adds to y what further columns give.
template <class T, int M, class X>
void tile(T w, const X *x, size_t row, int blocks, float *y, size_t stride, int rows, Ahead ahead,
          bool continues = false) {
    vec sums[M] = {};
    if (continues)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) sums[m] = load(y + m * stride, rows);
    const X *at[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) at[m] = x + m * row;
    for (int b = 0; b < blocks; b++, w.p += LANES * block_bytes<T>()) {
        if (!T::IS_QUANTIZED && M > 2)  // else the processor does it better
            for (int end = (b + 1) * ahead.step; ahead.done < end; ahead.done += 64)
                PREFETCH(ahead.at[ahead.done]);
        add<T, M>(w, at, sums);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) store(y + m * stride, sums[m], rows);
}

// Calls f with the beginning and the number of at most MOST tokens, as a constant, until `end`.
template <class F> void in_tiles(int m, int end, F f) {
    for (; m + MOST <= end; m += MOST) f(m, std::integral_constant<int, MOST>());
    if constexpr (MOST > 4)
        if (end - m & 4) f(m, std::integral_constant<int, 4>()), m += 4;
    if constexpr (MOST > 2)
        if (end - m & 2) f(m, std::integral_constant<int, 2>()), m += 2;
    if (end - m & 1) f(m, std::integral_constant<int, 1>());
}

// Compilers unroll and schedule these loops better in functions of their own.
#define NOINLINE __attribute__((noinline))

// Rows `begin` to `end` of y = x wᵀ, `slice` columns at a time. `row`: of x, in its units.
template <class T, class X>
NOINLINE void multiply_as_read(const Weight &w, const X *x, size_t row, int begin, int end, int slice,
                               float *y, Share mine) {
    const size_t size = LANES * block_bytes<T>();
    for (int col = 0; col < w.cols; col += slice)
        for (int r = mine.begin; r < mine.end; r += LANES) {
            const int blocks = std::min(slice, w.cols - col) / T::VALUES;
            T from;
            from.p = w.data + (size_t(r / LANES) * w.cols + col) / T::VALUES * size;
            // Each of several tiles fetches its part of the next 16 rows, so that reading takes as
            // long as computing; one alone, what comes next.
            const int tiles = (end - begin) / MOST;
            Ahead ahead = {from.p + AHEAD, int(size), 0};
            if (tiles > 1) ahead = {from.p + w.cols / T::VALUES * size, int(size) / tiles, 0};
            in_tiles(begin, end, [&](int m, auto count) {
                tile<T, decltype(count)::value>(
                    from, x + m * row + col * row / w.cols, row, blocks, y + size_t(m) * w.rows + r,
                    w.rows, std::min(LANES, mine.end - r), ahead, col > 0);
                if (tiles > 1) ahead.at += blocks * ahead.step;
            });
        }
}

// The same for types that take long to unpack.
constexpr int PREPARED = 1024;  // columns, that fit into the first-level cache
template <class T>
NOINLINE void multiply_prepared(const Weight &w, const Fixed *x, size_t row, int begin, int end,
                                float *y, Share mine) {
    alignas(64) uint8_t prepared[PREPARED / T::VALUES * prepared_bytes<T>()];
    for (int col = 0; col < w.cols; col += PREPARED)
        for (int r = mine.begin; r < mine.end; r += LANES) {
            const int cols = std::min(PREPARED, w.cols - col);
            T from;
            from.p = w.data + (size_t(r / LANES) * w.cols + col) / T::VALUES * LANES * block_bytes<T>();
            prepare(from, cols / T::VALUES, prepared);
            PreparedOf<T> block;
            block.p = prepared;
            in_tiles(begin, end, [&](int m, auto count) {
                tile<PreparedOf<T>, decltype(count)::value>(
                    block, x + m * row + col / BLOCK, row, cols / BLOCK, y + size_t(m) * w.rows + r,
                    w.rows, std::min(LANES, mine.end - r), {}, col > 0);
            });
        }
}

constexpr int CACHED = 1 << 19;  // bytes of x that stay in the second-level cache

// The same for any number of rows of each: of many rows of x, as many at a time as stay in the cache.
template <class T, class X>
void product(const Weight &w, const X *x, size_t row, int tokens, float *y, Share mine) {
    const bool many = tokens >= 4 * MOST, prepares = many && takes_long<T>();
    const int slice = std::min(w.cols, prepares ? PREPARED : many ? 2 * PREPARED : w.cols);
    const int some = std::max(16, CACHED / (2 * slice) / 16 * 16);
    for (int begin = 0; begin < tokens; begin += some) {
        const int end = std::min(tokens, begin + some);
        if constexpr (takes_long<T>())
            if (prepares) {
                multiply_prepared<T>(w, x, row, begin, end, y, mine);
                continue;
            }
        multiply_as_read<T>(w, x, row, begin, end, slice, y, mine);
    }
}

}  // namespace
