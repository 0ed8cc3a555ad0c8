// Block types: how the weights of 16 rows lie in memory, and how to read them.
//
// A row of a weight is a sequence of blocks, as in the file: 32 values of a dtype or of ggml's types
// with a common scale, or 256 values of ggml's "K" types, in sub-blocks of 32. A block consists of
// fields (scales, low bits, high bits, ...), and a field of units of 1, 2 or 4 bytes.
//
// Rows are interleaved by 16, so that each lane of a vector computes one row's product:
//
//     16 rows:             their blocks 0 | their blocks 1 | ...
//     a block of 16 rows:  field 0 | field 1 | ...
//     a field of 16 rows:  unit 0 of rows 0 to 15 | unit 1 of rows 0 to 15 | ...
//
// This takes the bytes of the file and no more, in the order in which they are read. A vector of
// 4-byte units of low bits holds, for each of 16 rows, four (8 bits) or eight (4 bits) neighbours.
// Layouts of blocks: github.com/ggml-org/ggml, ggml-common.h.

#pragma once

#include "vectors.h"

namespace {

enum Kind : int32_t {
    F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4,
    I4_32, I4_64, I4_128, I8_32, I8_128, FP8, NF4, FP4, E2M1, KINDS
};

struct Field {
    int offset, unit, count;  // bytes before it in the block of the file, bytes of a unit, units
};
template <class T> constexpr int block_bytes(size_t fields = std::size(T::FIELDS)) {
    int all = 0;
    for (size_t i = 0; i < fields; i++) all += T::FIELDS[i].unit * T::FIELDS[i].count;
    return all;
}

// A block of 16 rows, and how to read units of its fields.
template <class T> struct Block {
    const uint8_t *p;
    template <int FIELD> const uint8_t *at(int unit) const {
        return p + LANES * (block_bytes<T>(FIELD) + unit * T::FIELDS[FIELD].unit);
    }
    template <int FIELD> uvec word(int unit = 0) const { return read<uvec>(at<FIELD>(unit)); }
    template <int FIELD> vec half(int unit = 0) const { return halves(at<FIELD>(unit)); }
};

inline uvec every(uint32_t byte) { return uvec{} + byte * 0x01010101; }
inline vec byte_of(uvec words, int i) {  // byte i of each word, 0 to 255
    return __builtin_convertvector((words >> (8 * i)) & 255, vec);
}
inline vec signed_byte_of(uvec words, int i) {
    return __builtin_convertvector((ivec)(words << (24 - 8 * i)) >> 24, vec);
}

// A type of quantized blocks gives:
//     open()           reads what sub-blocks share
//     quants(s, j)     unsigned bytes: values 4 j to 4 j + 3 of sub-block s, of each of 16 rows
//     scale(s, part)   value = scale * (quant - OFFSET) + least; a part is 32 / PARTS values
//     least(s, part)   only if HAS_LEAST
template <class T, int VALUES_, int OFFSET_, int PARTS_ = 1, bool LEAST = false>
struct Quantized : Block<T> {
    static constexpr int VALUES = VALUES_, OFFSET = OFFSET_, PARTS = PARTS_;
    static constexpr bool IS_QUANTIZED = true, HAS_LEAST = LEAST, IS_CACHED = false;
    vec d, m;
    vec scale(int, int) const { return d; }
    vec least(int, int) const { return m; }
    static uvec nibbles(uvec words, int high) { return (words >> (4 * high)) & every(15); }
};

template <int KIND> struct Type;

template <> struct Type<Q4_0> : Quantized<Type<Q4_0>, 32, 8> {
    static constexpr Field FIELDS[] = {{0, 2, 1}, {2, 4, 4}};
    void open() { d = half<0>(); }
    uvec quants(int, int j) const { return nibbles(word<1>(j % 4), j / 4); }
};

template <> struct Type<Q4_1> : Quantized<Type<Q4_1>, 32, 0, 1, true> {
    static constexpr Field FIELDS[] = {{0, 2, 1}, {2, 2, 1}, {4, 4, 4}};
    void open() { d = half<0>(), m = half<1>(); }
    uvec quants(int, int j) const { return nibbles(word<2>(j % 4), j / 4); }
};

// Bits 4 j to 4 j + 3 of each word, as bit 4 of four bytes.
inline uvec fifth_bits(uvec bits, int j) {
    return ((((bits >> (4 * j)) & 15) * 0x00204081) & every(1)) << 4;
}

template <> struct Type<Q5_0> : Quantized<Type<Q5_0>, 32, 16> {
    static constexpr Field FIELDS[] = {{0, 2, 1}, {2, 4, 1}, {6, 4, 4}};
    uvec bits;
    void open() { d = half<0>(), bits = word<1>(); }
    uvec quants(int, int j) const {
        return nibbles(word<2>(j % 4), j / 4) | fifth_bits(bits, j);
    }
};

template <> struct Type<Q5_1> : Quantized<Type<Q5_1>, 32, 0, 1, true> {
    static constexpr Field FIELDS[] = {{0, 2, 1}, {2, 2, 1}, {4, 4, 1}, {8, 4, 4}};
    uvec bits;
    void open() { d = half<0>(), m = half<1>(), bits = word<2>(); }
    uvec quants(int, int j) const {
        return nibbles(word<3>(j % 4), j / 4) | fifth_bits(bits, j);
    }
};

template <> struct Type<Q8_0> : Quantized<Type<Q8_0>, 32, 128> {
    static constexpr Field FIELDS[] = {{0, 2, 1}, {2, 4, 8}};
    void open() { d = half<0>(); }
    uvec quants(int, int j) const { return word<1>(j) ^ every(128); }
};

template <> struct Type<Q2_K> : Quantized<Type<Q2_K>, 256, 0, 2, true> {
    static constexpr Field FIELDS[] = {{80, 2, 1}, {82, 2, 1}, {0, 4, 4}, {16, 4, 16}};
    void open() { d = half<0>(), m = half<1>(); }
    uvec scales(unsigned s) const { return word<2>(s / 2); }
    vec scale(unsigned s, int part) const { return d * byte_of(scales(s) & every(15), 2 * (s & 1) + part); }
    vec least(unsigned s, int part) const {
        return -m * byte_of(scales(s) >> 4 & every(15), 2 * (s & 1) + part);
    }
    uvec quants(unsigned s, int j) const {
        return (word<3>(s / 4 * 8 + j) >> (2 * (s & 3))) & every(3);
    }
};

template <> struct Type<Q3_K> : Quantized<Type<Q3_K>, 256, 4, 2> {
    static constexpr Field FIELDS[] = {{108, 2, 1}, {96, 4, 3}, {0, 4, 8}, {32, 4, 16}};
    uvec scales[4];
    void open() {
        d = half<0>();
        uvec low[2] = {word<1>(), word<1>(1)}, high = word<1>(2);
        for (int i = 0; i < 4; i++)
            scales[i] = ((low[i % 2] >> (4 * (i / 2))) & every(15)) |
                        (((high >> (2 * i)) & every(3)) << 4);
    }
    vec scale(unsigned s, int part) const {
        return d * (byte_of(scales[s / 2], 2 * (s & 1) + part) - 32.0f);
    }
    uvec quants(unsigned s, int j) const {
        return ((word<3>(s / 4 * 8 + j) >> (2 * (s & 3))) & every(3)) |
               (rotate_right(word<2>(j), s - 2) & every(4));
    }
};

// Q4_K and Q5_K: for each of 8 sub-blocks a scale and a minimum of 6 bits, in 12 bytes.
template <class T> struct SixBits : Quantized<T, 256, 0, 1, true> {
    uvec scales[2], leasts[2];
    void open() {
        this->d = this->template half<0>(), this->m = -this->template half<1>();
        uvec u = this->template word<2>(0), v = this->template word<2>(1);
        uvec w = this->template word<2>(2);
        scales[0] = u & every(63), leasts[0] = v & every(63);
        scales[1] = (w & every(15)) | ((u >> 6) & every(3)) << 4;
        leasts[1] = ((w >> 4) & every(15)) | ((v >> 6) & every(3)) << 4;
    }
    vec scale(unsigned s, int) const { return this->d * byte_of(scales[s / 4], s & 3); }
    vec least(unsigned s, int) const { return this->m * byte_of(leasts[s / 4], s & 3); }
};

template <> struct Type<Q4_K> : SixBits<Type<Q4_K>> {
    static constexpr Field FIELDS[] = {{0, 2, 1}, {2, 2, 1}, {4, 4, 3}, {16, 4, 32}};
    uvec quants(unsigned s, int j) const { return nibbles(word<3>(s / 2 * 8 + j), s & 1); }
};

template <> struct Type<Q5_K> : SixBits<Type<Q5_K>> {
    static constexpr Field FIELDS[] = {{0, 2, 1}, {2, 2, 1}, {4, 4, 3}, {16, 4, 8}, {48, 4, 32}};
    uvec quants(unsigned s, int j) const {
        return nibbles(word<4>(s / 2 * 8 + j), s & 1) |
               (rotate_right(word<3>(j), s - 4) & every(16));
    }
};

template <> struct Type<Q6_K> : Quantized<Type<Q6_K>, 256, 32, 2> {
    static constexpr Field FIELDS[] = {{208, 2, 1}, {192, 4, 4}, {128, 4, 16}, {0, 4, 32}};
    void open() { d = half<0>(); }
    vec scale(unsigned s, int part) const {
        return d * signed_byte_of(word<1>(s / 2), 2 * (s & 1) + part);
    }
    uvec quants(unsigned s, int j) const {
        return nibbles(word<3>(s / 4 * 16 + (s & 1) * 8 + j), s >> 1 & 1) |
               (rotate_right(word<2>(s / 4 * 8 + j), 2 * (s & 3) - 4) & every(48));
    }
};

// Four bits choose one of 16 values.
alignas(16) constexpr int8_t NONLINEAR[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                              1,    13,   25,  38,  53,  69,  89,  113};
alignas(16) constexpr int8_t TWICE_FP4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

template <> struct Type<IQ4_NL> : Quantized<Type<IQ4_NL>, 32, 128> {
    static constexpr Field FIELDS[] = {{0, 2, 1}, {2, 4, 4}};
    void open() { d = half<0>(); }
    uvec quants(int, int j) const {
        return lookup(NONLINEAR, nibbles(word<1>(j % 4), j / 4)) ^ every(128);
    }
};

template <> struct Type<IQ4_XS> : Quantized<Type<IQ4_XS>, 256, 128> {
    static constexpr Field FIELDS[] = {{0, 2, 1}, {2, 2, 1}, {4, 4, 1}, {8, 4, 32}};
    void open() { d = half<0>(); }
    vec scale(unsigned s, int) const {
        uvec high = __builtin_convertvector(read<shorts>(at<1>(0)), uvec);
        uvec bits = ((word<2>() >> (4 * s)) & 15) | ((high >> (2 * s)) & 3) << 4;
        return d * (__builtin_convertvector(bits, vec) - 32.0f);
    }
    uvec quants(unsigned s, int j) const {
        return lookup(NONLINEAR, nibbles(word<3>(4 * s + j % 4), j / 4)) ^ every(128);
    }
};

template <> struct Type<MXFP4> : Quantized<Type<MXFP4>, 32, 128> {
    static constexpr Field FIELDS[] = {{0, 1, 1}, {1, 4, 4}};
    void open() {  // the scale is a power of two, 2^(e - 128), since FP4 holds twice the values
        uvec e = __builtin_convertvector(read<bytes>(at<0>(0)), uvec);
        uvec bits = e < 2 ? (uvec{} + 0x00200000) << e : (e - 1) << 23;
        d = read<vec>(&bits);
    }
    uvec quants(int, int j) const {
        return lookup(TWICE_FP4, nibbles(word<1>(j % 4), j / 4)) ^ every(128);
    }
};

// Integers with a zero point and an fp32 scale (checkpoint/integers.py).
template <int KIND, int VALUES>
struct Int4 : Quantized<Type<KIND>, VALUES, 16> {
    static constexpr Field FIELDS[] = {{0, 4, 1}, {5, 4, VALUES / 8}, {4, 1, 1}};
    uvec shift;  // makes each byte q - zero + OFFSET, which is from 1 to 31
    void open() {
        this->d = load((const float *)this->template at<0>(0));
        shift = __builtin_convertvector(16 - read<bytes>(this->template at<2>(0)), uvec) * 0x01010101;
    }
    uvec quants(unsigned s, int j) const {
        return this->nibbles(this->template word<1>(4 * s + j % 4), j / 4) + shift;
    }
};
template <int KIND, int VALUES>
struct Int8 : Quantized<Type<KIND>, VALUES, 128, 1, true> {
    static constexpr Field FIELDS[] = {{0, 4, 1}, {5, 4, VALUES / 4}, {4, 1, 1}};
    void open() {
        this->d = load((const float *)this->template at<0>(0));
        uvec zero = __builtin_convertvector(read<bytes>(this->template at<2>(0)), uvec);
        this->m = this->d * (128.0f - __builtin_convertvector(zero, vec));
    }
    uvec quants(unsigned s, int j) const { return this->template word<1>(8 * s + j); }
};
template <> struct Type<I4_32> : Int4<I4_32, 32> {};
template <> struct Type<I4_64> : Int4<I4_64, 64> {};
template <> struct Type<I4_128> : Int4<I4_128, 128> {};
template <> struct Type<I8_32> : Int8<I8_32, 32> {};
template <> struct Type<I8_128> : Int8<I8_128, 128> {};

// --- not ggml's: 64 values, an fp32 scale first (checkpoint/floats.py) ----------------------------

// Bytes of FP8 (e4m3) in the upper half of each, as fp16 of which every value is 2^-8 times as large.
template <class Shorts> inline Shorts fp8_as_fp16(Shorts bytes) {
    typedef int16_t of_16 __attribute__((vector_size(sizeof(Shorts))));
    return (Shorts)((of_16)bytes >> 1) & 0xbf80;
}

template <> struct Type<E2M1> : Quantized<Type<E2M1>, 64, 128, 2> {
    static constexpr Field FIELDS[] = {{0, 4, 1}, {4, 1, 4}, {8, 4, 8}};  // a scale for each 16
    void open() { d = read<vec>(at<0>(0)) * 128.0f; }  // half of 2^8, for twice the values
    vec scale(unsigned s, int part) const {
        shorts wide = __builtin_convertvector(read<bytes>(at<1>(2 * s + part)), shorts) << 8;
        return d * halves(fp8_as_fp16(wide));
    }
    uvec quants(unsigned s, int j) const {
        return lookup(TWICE_FP4, nibbles(word<2>(4 * s + j % 4), j / 4)) ^ every(128);
    }
};

// What is multiplied in fp32: value(i) of 16 rows, and what the sum of a block is multiplied by. Each
// addition waits for the one before, and so a block has several sums, of CHAIN values.
template <class T, int VALUES_, int CHAIN_> struct Floats : Block<T> {
    static constexpr int VALUES = VALUES_, CHAIN = CHAIN_;
    static constexpr bool IS_QUANTIZED = false;
};

template <> struct Type<FP8> : Floats<Type<FP8>, 64, 16> {
    static constexpr Field FIELDS[] = {{0, 4, 1}, {4, 2, 32}};
    vec scale() const { return read<vec>(at<0>(0)) * 256.0f; }
    vec value(int i) const {  // of 64 bytes, which are two units, the first or second half
        two_shorts two = read<two_shorts>(at<1>(i / 4 * 2));
        two = fp8_as_fp16(i % 2 ? two : two << 8);
        return halves(i / 2 % 2 ? upper(two) : lower(two));
    }
};

template <class T> struct Codebook : Floats<T, 64, 16> {
    static constexpr Field FIELDS[] = {{0, 4, 1}, {4, 4, 8}};
    vec scale() const { return read<vec>(this->template at<0>(0)); }
    vec value(int i) const {
        uvec words = this->template word<1>(i / 32 * 4 + i % 16 / 4);
        return lookup(T::VALUES_OF, words >> (i % 4 * 8 + i % 32 / 16 * 4));
    }
};
template <> struct Type<NF4> : Codebook<Type<NF4>> {
    alignas(64) static constexpr float VALUES_OF[16] = {
        -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
        -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
        0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
        0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
};
template <> struct Type<FP4> : Codebook<Type<FP4>> {  // bitsandbytes': 1/192, and 2 to 12 twelfths
    alignas(64) static constexpr float VALUES_OF[16] = {
        0, 0.0625f / 12, 8 / 12.0f, 1, 4 / 12.0f, 6 / 12.0f, 2 / 12.0f, 3 / 12.0f,
        0, -0.0625f / 12, -8 / 12.0f, -1, -4 / 12.0f, -6 / 12.0f, -2 / 12.0f, -3 / 12.0f};
};

// Dense types, in blocks of 32 as well: value(i) is value i of 16 rows, in fp32.
template <class T> struct Dense : Floats<T, 32, 32> {
    vec scale() const { return vec{} + 1.0f; }
};
template <> struct Type<F32> : Dense<Type<F32>> {
    static constexpr Field FIELDS[] = {{0, 4, 32}};
    vec value(int i) const { return load((const float *)at<0>(i)); }
};
template <> struct Type<F16> : Dense<Type<F16>> {
    static constexpr Field FIELDS[] = {{0, 2, 32}};
    vec value(int i) const { return half<0>(i); }
};
template <> struct Type<BF16> : Dense<Type<BF16>> {
    static constexpr Field FIELDS[] = {{0, 4, 16}};  // pairs of neighbours, for vdpbf16ps
    vec value(int i) const {
        uvec bits = i % 2 ? word<0>(i / 2) & 0xffff0000 : word<0>(i / 2) << 16;
        return read<vec>(&bits);
    }
};

}  // namespace
