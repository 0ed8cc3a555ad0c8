// y = x wᵀ for any number of rows of x, and packing the weights for it.
//
// What is done with a block type is compiled by itself, by products.cpp, so that a machine compiles
// what its models need: the table `types` holds what has been loaded.

#pragma once

#include "amx.h"

namespace {

constexpr int FEW = 9;  // rows of x from which AMX is faster than vectors

// The rows of a group in Inputs, for products of so many rows.
inline int32_t height_of(int tokens) {
#ifdef HAS_AMX
    if (tokens >= FEW && may_use_amx()) return LANES;
#endif
    return 1;
}

// The functions of a block type.
struct Functions {
    void (*multiply)(const Weight &w, const Inputs &x, int tokens, float *y, Share mine);
    void (*pack)(const uint8_t *in, int rows, int cols, uint8_t *out);
    void (*unpack_to_fp32)(const Weight &w, int r, float *out);
    void (*unpack_to_bf16)(const Weight &w, int r, bf16 *out);
};
const Functions *types[KINDS];

// The rows `some` of y = x wᵀ: x (tokens, cols), y (tokens, rows).
inline void multiply(const Weight &w, const Inputs &x, int tokens, float *y, Share some) {
    types[w.kind]->multiply(w, x, tokens, y, some);
}
// How many rows of weights a thread takes at least: so many that x, which is read anew for them, costs
// little beside their products.
inline int least_rows(int tokens) { return std::max(2 * BLOCK, tokens / 2 / BLOCK * BLOCK); }

// And at most: of many tokens, so few that the weights stay in a cache for all of them.
inline int most_rows(int tokens) { return tokens < 4 * MOST ? 1 << 30 : 4 * least_rows(tokens); }

// Row r of a packed weight, dequantized.
inline void unpack_row(const Weight &w, int r, float *out) { types[w.kind]->unpack_to_fp32(w, r, out); }
inline void unpack_row(const Weight &w, int r, bf16 *out) { types[w.kind]->unpack_to_bf16(w, r, out); }

// --- one block type -------------------------------------------------------------------------------

// y = x wᵀ of the rows `mine` of w.
template <class T>
void multiply_rows(const Weight &w, const Inputs &x, int tokens, float *y, Share mine) {
#ifdef HAS_AMX
    if constexpr (T::IS_QUANTIZED) {
        if (tokens >= FEW && may_use_amx()) return quantized_product<T>(w, x, tokens, y, mine);
    } else if (std::is_same<T, Type<BF16>>::value && x.halves && may_use_amx()) {
        return dense_product(w, x, tokens, y, mine);
    }
#endif
    if constexpr (T::IS_QUANTIZED)
        product<T>(w, x.fixed, w.cols / BLOCK, tokens, y, mine);
    else if (std::is_same<T, Type<BF16>>::value && x.halves)
        product<Type<BF16>>(w, x.halves, w.cols, tokens, y, mine);
    else
        product<T>(w, x.floats, w.cols, tokens, y, mine);
}

// Interleaves rows as they are in a file. Rows beyond the last are zeros.
template <class T> void pack(const uint8_t *in, int rows, int cols, uint8_t *out) {
    constexpr int size = block_bytes<T>();
    const size_t row = size_t(cols / T::VALUES) * size;
#pragma omp for
    for (int first = 0; first < rows; first += LANES) {
        uint8_t *to = out + first * row;
        for (const uint8_t *block = in + first * row; block < in + (first + 1) * row; block += size)
            for (const Field &field : T::FIELDS)
                for (int u = 0; u < field.count; u++)
                    for (int r = 0; r < LANES; r++, to += field.unit) {
                        const uint8_t *from = block + r * row + field.offset + u * field.unit;
                        if (first + r >= rows) memset(to, 0, field.unit);
                        else if (field.unit == 4) memcpy(to, from, 4);
                        else if (field.unit == 2) memcpy(to, from, 2);
                        else *to = *from;
                    }
    }
}

template <class T, class A> void unpack(const Weight &w, int r, A *out) {
    T block;
    const int blocks = w.cols / T::VALUES, lane = r % LANES;
    block.p = w.data + size_t(r / LANES * LANES) * blocks * block_bytes<T>();
    for (int b = 0; b < blocks; b++, block.p += LANES * block_bytes<T>())
        if constexpr (T::IS_QUANTIZED) {
            block.open();
            for (int s = 0; s < T::VALUES / BLOCK; s++)
                for (int j = 0; j < 8; j++) {
                    uint32_t quants = block.quants(s, j)[lane];
                    float scale = block.scale(s, j * T::PARTS / 8)[lane], least = 0;
                    if constexpr (T::HAS_LEAST) least = block.least(s, j * T::PARTS / 8)[lane];
                    for (int i = 0; i < 4; i++, quants >>= 8)
                        put(out++, scale * (int(quants & 255) - T::OFFSET) + least);
                }
        } else {
            const float scale = block.scale()[lane];
            for (int i = 0; i < T::VALUES; i++) put(out++, block.value(i)[lane] * scale);
        }
}

template <int KIND>
constexpr Functions FUNCTIONS = {multiply_rows<Type<KIND>>, pack<Type<KIND>>,
                                 unpack<Type<KIND>, float>, unpack<Type<KIND>, bf16>};

}  // namespace
