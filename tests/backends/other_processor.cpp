// The kernels and all block types, compiled at once: a library for other instructions that this
// processor has; a product as a program, which an emulator of another processor can run.
//
//     other_processor KIND ROWS COLS TOKENS BYTES
//
// reads BYTES of a weight as in a file and TOKENS * COLS fp32 values, and writes TOKENS * ROWS values.

#include "../../llama/backends/cpu/kernels.cpp"

#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

template <int... ALL> void add_types(std::integer_sequence<int, ALL...>) {
    (add_type(ALL, &FUNCTIONS<ALL>), ...);
}

extern "C" void add_all_types() { add_types(std::make_integer_sequence<int, KINDS>()); }

int main(int, char **given) {
    add_all_types();
    const int kind = atoi(given[1]), rows = atoi(given[2]), cols = atoi(given[3]);
    const int tokens = atoi(given[4]), size = atoi(given[5]), all = (rows + 15) / 16 * 16;
    std::vector<uint8_t> stored(size), packed(size_t(size) / rows * all + 8192);
    std::vector<float> x(tokens * cols), floats(tokens * cols), y(tokens * rows);
    std::vector<bf16> halves(tokens * cols);
    std::vector<Fixed> fixed(tokens * cols / BLOCK);
    if (fread(stored.data(), 1, size, stdin) != size_t(size)) return 1;
    if (fread(x.data(), 4, x.size(), stdin) != x.size()) return 1;
    pack_rows(kind, stored.data(), rows, cols, packed.data(), 2);
    const Weight weight = {packed.data(), kind, rows, cols};
    const Inputs inputs = {floats.data(), multiplies_bf16() ? halves.data() : nullptr, fixed.data(), cols};
    linear(0, &weight, x.data(), tokens, y.data(), &inputs, 2);
    return fwrite(y.data(), 4, y.size(), stdout) != y.size();
}
