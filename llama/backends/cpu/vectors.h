// Vectors of 16 floats, in the vector extensions that GCC and Clang share: the compiler maps them
// to the processor's own.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <omp.h>
#include <utility>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

namespace {

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t shorts __attribute__((vector_size(32)));
typedef uint8_t bytes __attribute__((vector_size(16)));
constexpr int LANES = 16, BLOCK = 32;  // values of a vector; of a block (or of a sub-block)

struct bf16 {
    uint16_t bits;
};

template <class V, class P> inline V read(const P *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline vec load(const float *p) { return read<vec>(p); }
inline vec load(const bf16 *p) {
    uvec wide = __builtin_convertvector(read<shorts>(p), uvec) << 16;
    return read<vec>(&wide);
}
inline void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
// The first n of them.
inline vec load(const float *p, int n) {
    if (n == LANES) return load(p);
    alignas(64) float values[LANES] = {};
    memcpy(values, p, n * sizeof *p);
    return load(values);
}
inline void store(float *p, vec v, int n) {
    if (n == LANES) return store(p, v);
    alignas(64) float values[LANES];
    store(values, v);
    memcpy(p, values, n * sizeof *p);
}
inline uvec rounded(vec v) {  // to bf16, in the upper bits; to nearest, ties to even
    uvec u = read<uvec>(&v);
    return u + 0x7fff + ((u >> 16) & 1);
}
inline void store(bf16 *p, vec v) {
    shorts s = __builtin_convertvector(rounded(v) >> 16, shorts);
    memcpy(p, &s, sizeof s);
}
inline float get(const float *p) { return *p; }
inline float get(const bf16 *p) {
    uint32_t u = uint32_t(p->bits) << 16;
    return read<float>(&u);
}
inline void put(float *p, float x) { *p = x; }
inline void put(bf16 *p, float x) {
    uint32_t u = read<uint32_t>(&x);
    p->bits = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

#ifdef __ARM_NEON
typedef __fp16 fp16;
#else
typedef _Float16 fp16;
#endif
inline vec halves(const void *p) {  // 16 fp16 values
#ifdef __AVX512F__
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
    vec v;
    for (int i = 0; i < LANES; i++) v[i] = read<fp16>((const uint16_t *)p + i);
    return v;
#endif
}
inline vec halves(shorts v) { return halves(&v); }
inline uvec rotate_right(uvec v, int n) {  // by n modulo 32 bits
#ifdef __AVX512F__
    return (uvec)_mm512_rorv_epi32((__m512i)v, _mm512_set1_epi32(n));
#else
    return n & 31 ? (v >> (n & 31)) | (v << (32 - (n & 31))) : v;
#endif
}
inline vec whole(const int8_t *p) {  // 16 integers
    typedef int8_t chars __attribute__((vector_size(16)));
    return __builtin_convertvector(__builtin_convertvector(read<chars>(p), ivec), vec);
}
inline uvec lookup(const int8_t *table, uvec indices) {  // of each byte, 0 to 15
#ifdef __AVX512BW__
    __m512i all = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)table));
    return (uvec)_mm512_shuffle_epi8(all, (__m512i)indices);
#else
    uint8_t at[64];
    memcpy(at, &indices, sizeof at);
    for (auto &i : at) i = table[i];
    return read<uvec>(at);
#endif
}

inline vec lookup(const float *table, uvec indices) {  // by the lowest four bits of each
#ifdef __AVX512F__
    return (vec)_mm512_permutexvar_ps((__m512i)indices, _mm512_load_ps(table));
#else
    vec v;
    for (int i = 0; i < LANES; i++) v[i] = table[indices[i] & 15];
    return v;
#endif
}

template <class V> inline auto lower(V v) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
}
template <class V> inline auto upper(V v) {
    return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}
typedef uint16_t two_shorts __attribute__((vector_size(64)));
inline shorts lower(two_shorts v) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
inline shorts upper(two_shorts v) {
    return __builtin_shufflevector(v, v, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
}
typedef int32_t ints __attribute__((vector_size(32)));
inline ivec both(ints a, ints b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
inline float sum(vec v) {
    auto half = lower(v) + upper(v);
    auto quarter = __builtin_shufflevector(half, half, 0, 1, 2, 3) +
                   __builtin_shufflevector(half, half, 4, 5, 6, 7);
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}
template <class V> inline V larger(V a, V b) { return a > b ? a : b; }
inline float largest(vec v) {
    auto half = larger(lower(v), upper(v));
    auto quarter = larger(__builtin_shufflevector(half, half, 0, 1, 2, 3),
                          __builtin_shufflevector(half, half, 4, 5, 6, 7));
    return std::max(std::max(quarter[0], quarter[2]), std::max(quarter[1], quarter[3]));
}

// 2^x: the nearest whole number goes to the exponent, Taylor's series does the rest (|f| <= 1/2).
inline vec exp2(vec given) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    vec x = given;
    x = x < -126.0f ? vec{} - 126.0f : x;
    x = x > 126.0f ? vec{} + 126.0f : x;
    vec n = (x + magic) - magic, f = x - n;
    vec y = ((((1.54035304e-4f * f + 1.33335581e-3f) * f + 9.61812911e-3f) * f + 5.55041087e-2f) * f
             + 2.40226507e-1f) * f + 6.93147181e-1f;
    y = y * f + 1.0f;
    ivec bits = read<ivec>(&y) + (__builtin_convertvector(n, ivec) << 23);
    return given == given ? read<vec>(&bits) : given;  // NaN stays
}
inline float exp2(float x) { return exp2(vec{} + x)[0]; }

template <int S, size_t... I> inline void exchange(vec &a, vec &b, std::index_sequence<I...>) {
    vec low = __builtin_shufflevector(a, b, (I & S ? int(I) + LANES - S : int(I))...);
    b = __builtin_shufflevector(a, b, (I & S ? int(I) + LANES : int(I) + S)...);
    a = low;
}
template <int S> inline void exchange_all(vec *rows) {
    for (int i = 0; i < LANES; i++)
        if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_index_sequence<LANES>());
}
inline void transpose(vec *rows) {
    exchange_all<1>(rows), exchange_all<2>(rows), exchange_all<4>(rows), exchange_all<8>(rows);
}

}  // namespace
