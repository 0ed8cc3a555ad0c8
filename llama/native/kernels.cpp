// The blocks of Llama on a CPU: what `TransformerBlock` in model.py does, for few tokens at a time.
//
// A step of generation reads every weight once to make one token of each row, so it can be no
// faster than the memory. Here nothing but that reading is left: all layers run in one parallel
// region, a weight is used in the layout in which the file holds it (bf16, fp32, or ggml's blocks
// of 32 values), and what passes between the products stays in the cache of a core.
//
//     step        all layers of a model, for up to some dozens of tokens
//     linear      one matrix, for the same
//     norm, attention, swiglu, dequantize     what stands between the matrix products of a prompt,
//                 which are bound by arithmetic and which oneDNN does better
//
// Sums are fp32, in an order that depends on the shape of the model alone, so a token is the same
// to the bit whatever else is in the batch. Written in the vector extensions that GCC and Clang
// share, 16 floats wide whatever the processor has; AVX512-BF16 alone has code of its own.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <utility>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t shorts __attribute__((vector_size(32)));
constexpr int LANES = 16, BLOCK = 32;  // of a vector; of ggml's quantization types

struct bf16 {
    uint16_t bits;
};

// --- vectors ------------------------------------------------------------------------------------

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

template <int N, size_t... I> inline auto part(vec v, std::index_sequence<I...>) {
    return __builtin_shufflevector(v, v, (N + int(I))...);
}
inline float sum(vec v) {
    auto half = part<0>(v, std::make_index_sequence<8>()) + part<8>(v, std::make_index_sequence<8>());
    auto quarter = __builtin_shufflevector(half, half, 0, 1, 2, 3) +
                   __builtin_shufflevector(half, half, 4, 5, 6, 7);
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}
template <class V> inline V larger(V a, V b) { return a > b ? a : b; }
inline float largest(vec v) {
    auto half = larger(part<0>(v, std::make_index_sequence<8>()), part<8>(v, std::make_index_sequence<8>()));
    auto quarter = larger(__builtin_shufflevector(half, half, 0, 1, 2, 3),
                          __builtin_shufflevector(half, half, 4, 5, 6, 7));
    return std::max(std::max(quarter[0], quarter[2]), std::max(quarter[1], quarter[3]));
}

// 2^x: the nearest whole number goes to the exponent, Taylor's series does the rest (|f| <= 1/2).
inline vec exp2(vec x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for a fraction
    x = x < -126.0f ? vec{} - 126.0f : x;
    x = x > 126.0f ? vec{} + 126.0f : x;
    vec n = (x + magic) - magic, f = x - n;
    vec y = ((((1.54035304e-4f * f + 1.33335581e-3f) * f + 9.61812911e-3f) * f + 5.55041087e-2f) * f
             + 2.40226507e-1f) * f + 6.93147181e-1f;
    y = y * f + 1.0f;
    ivec bits = read<ivec>(&y) + (__builtin_convertvector(n, ivec) << 23);
    return read<vec>(&bits);
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

// --- weights ------------------------------------------------------------------------------------

enum Kind : int32_t { F32, BF16, Q8_0, Q4_0, Q4_1 };

constexpr int block_bytes(int kind) {
    return kind == F32 ? 128 : kind == BF16 ? 64 : kind == Q8_0 ? 34 : kind == Q4_0 ? 18 : 20;
}
inline vec half(const uint8_t *p) {  // fp16, 16 times
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

// How 32 weights are read and multiplied by as many activations.

// In fp32, any kind of weight. A block's values are exact: scale (11 bits) times q (at most 8) fits.
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
            return {whole((const int8_t *)w + 2) * scale, whole((const int8_t *)w + 2 + LANES) * scale};
        // Four bits choose one of 16 values: low halves of the bytes first, then the high ones.
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
    static vec whole(const int8_t *q) {
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

constexpr int AHEAD = 16;  // rows: some kB, what memory delivers while one waits for it

// y[m][r] = w[r] · x[m] for a few rows of each, which stay in registers.
template <class Dot, int KIND, int R, int M>
inline void tile(const uint8_t *w, const typename Dot::X *x, int cols, float *y, size_t stride) {
    constexpr int size = block_bytes(KIND);
    const size_t row = size_t(cols) / BLOCK * size;
    vec acc[R][M] = {};
    for (int b = 0; b < cols / BLOCK; b++)
        for (int r = 0; r < R; r++) {
            const uint8_t *at = w + r * row + size_t(b) * size;
            __builtin_prefetch(at + AHEAD * row);  // rows of odd lengths defeat the hardware's own
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

// A thread's share of n things, in multiples of `unit`.
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
    Share mine = share(w.rows, 4);
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

// --- attention ----------------------------------------------------------------------------------

// Products of attention are done in words of 32 bits, 16 at a time: a word is one fp32 value or,
// where the processor multiplies pairs of bf16, two of them.
template <class A> struct Words {
    typedef float Value;
    static constexpr int PER = 1;  // values in a word
    static vec add(vec acc, const float *x, vec y) { return acc + *x * y; }
};
#ifdef __AVX512BF16__
template <> struct Words<bf16> {
    typedef bf16 Value;
    static constexpr int PER = 2;
    static vec add(vec acc, const float *x, vec y) {
        return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(read<int>(x)),
                                     (__m512bh)y);
    }
};
#endif

// Keys or values of a layer: a row of head_dim for each position, bf16, fp32, or bytes with a scale.
template <class C> struct Cache {
    C *values;
    float *scales;
    int head_dim;
    vec at(size_t row, int d) const {
        if constexpr (std::is_same<C, int8_t>::value)
            return Floats::whole(values + row * head_dim + d) * scales[row];
        else
            return load(values + row * head_dim + d);
    }
    uvec upper(size_t row, int d) const {  // as bf16, in the upper half of what is otherwise rest
        if constexpr (std::is_same<C, bf16>::value)
            return __builtin_convertvector(read<shorts>(values + row * head_dim + d), uvec) << 16;
        return rounded(at(row, d));
    }
    // 16 words of a row, and words of neighbours in two rows (one, if a word is one value).
    template <class A> vec along(size_t row, int word) const {
        if constexpr (Words<A>::PER == 1) return at(row, word);
        if constexpr (std::is_same<C, bf16>::value)
            return read<vec>(values + row * head_dim + 2 * word);
        alignas(64) bf16 pairs[2 * LANES];
        store(pairs, at(row, 2 * word));
        store(pairs + LANES, at(row, 2 * word + LANES));
        return read<vec>(pairs);
    }
    template <class A> vec across(size_t row, bool next, int d) const {
        if constexpr (Words<A>::PER == 1) return at(row, d);
        uvec words = upper(row, d) >> 16;
        if (next) words |= upper(row + 1, d) & 0xffff0000;
        return read<vec>(&words);
    }
    void set(size_t row, const float *x) {
        if constexpr (std::is_same<C, int8_t>::value) {
            float most = 0;
            for (int d = 0; d < head_dim; d++) most = std::max(most, std::fabs(x[d]));
            float inverse = most > 0 ? 127 / most : 0;
            for (int d = 0; d < head_dim; d++)
                values[row * head_dim + d] = int8_t(std::nearbyint(x[d] * inverse));
            scales[row] = most / 127;
        } else {
            for (int d = 0; d < head_dim; d += LANES) store(values + row * head_dim + d, load(x + d));
        }
    }
};

constexpr int KEYS = 64;     // that are looked at together
constexpr int CHUNK = 512;   // of the keys; each is summed up on its own, then they are joined
constexpr int QUERIES = 64;  // at most, that are looked at together
constexpr int MAX_HEAD = 256;

// Softmax in parts (2112.05682): of some keys the weighted sum of values, the largest score (in
// powers of 2) and the sum of 2^(score - largest).
struct Part {
    float largest, total, *out;
};

inline void join(Part &a, const Part &b, int head_dim) {
    float top = std::max(a.largest, b.largest);
    if (top == -INFINITY) return;
    float fa = a.largest == -INFINITY ? 0 : exp2(a.largest - top);
    float fb = b.largest == -INFINITY ? 0 : exp2(b.largest - top);
    for (int d = 0; d < head_dim; d += LANES)
        store(a.out + d, load(a.out + d) * fa + load(b.out + d) * fb);
    a.total = a.total * fa + b.total * fb;
    a.largest = top;
}

// R queries and KEYS keys, of which they see those before `seen`. keys: (words of a head, KEYS),
// values: (words of KEYS, head_dim).
template <class A, int R>
void attend(const typename Words<A>::Value *const *q, const int *seen, Part *parts,
            const float *keys, const float *values, int first, int n, int head_dim) {
    constexpr int PER = Words<A>::PER, COLUMNS = KEYS / LANES;
    vec scores[R][COLUMNS] = {};
    for (int w = 0; w < head_dim / PER; w++)
        for (int c = 0; c < COLUMNS; c++) {
            vec column = load(keys + w * KEYS + c * LANES);
            for (int r = 0; r < R; r++)
                scores[r][c] = Words<A>::add(scores[r][c], (const float *)(q[r] + w * PER), column);
        }
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    alignas(64) typename Words<A>::Value weights[R][KEYS];
    vec before = {}, after = {};  // the largest scores so far
    for (int r = 0; r < R; r++) {
        vec most = vec{} - INFINITY;
        for (int c = 0; c < COLUMNS; c++) {
            vec &score = scores[r][c];
            score = lane < seen[r] - first - c * LANES ? score : vec{} - INFINITY;
            most = larger(most, score);
        }
        before[r] = parts[r].largest;
        after[r] = parts[r].largest = std::max(parts[r].largest, largest(most));
    }
    vec shrink = before > -INFINITY ? exp2(before - after) : vec{};
    for (int r = 0; r < R; r++) {
        vec total = {};
        for (int c = 0; c < COLUMNS; c++) {
            vec score = scores[r][c];  // of no key yet: -inf - -inf is no number, but isn't taken
            vec weight = score > -INFINITY ? exp2(score - after[r]) : vec{};
            total += weight;
            store(weights[r] + c * LANES, weight);
        }
        parts[r].total = parts[r].total * shrink[r] + sum(total);
    }
    for (int d = 0; d < head_dim; d += 2 * LANES) {
        vec acc[R][2];
        for (int r = 0; r < R; r++) {
            acc[r][0] = load(parts[r].out + d) * shrink[r];
            acc[r][1] = load(parts[r].out + d + LANES) * shrink[r];
        }
        for (int w = 0; w < (n + PER - 1) / PER; w++) {
            vec low = load(values + w * head_dim + d);
            vec high = load(values + w * head_dim + d + LANES);
            for (int r = 0; r < R; r++) {
                const float *weight = (const float *)(weights[r] + w * PER);
                acc[r][0] = Words<A>::add(acc[r][0], weight, low);
                acc[r][1] = Words<A>::add(acc[r][1], weight, high);
            }
        }
        for (int r = 0; r < R; r++) {
            store(parts[r].out + d, acc[r][0]);
            store(parts[r].out + d + LANES, acc[r][1]);
        }
    }
}

// Queries of one key/value head, whose positions begin at a row of the cache, over keys [begin,
// end). parts must be empty.
template <class A, class C>
void attend_chunk(const typename Words<A>::Value *const *q, const int *seen, Part *parts, int rows,
                  const Cache<C> &k, const Cache<C> &v, size_t row, int begin, int end) {
    constexpr int PER = Words<A>::PER;
    const int head_dim = k.head_dim;
    alignas(64) float keys[MAX_HEAD * KEYS / PER], values[MAX_HEAD * KEYS / PER];
    for (int first = begin; first < end; first += KEYS) {
        int n = std::min(KEYS, end - first);
        for (int w = 0; w < head_dim / PER; w += LANES)
            for (int j = 0; j < KEYS; j += LANES) {
                vec square[LANES];
                for (int i = 0; i < LANES; i++)
                    square[i] = j + i < n ? k.template along<A>(row + first + j + i, w) : vec{};
                transpose(square);
                for (int i = 0; i < LANES; i++) store(keys + (w + i) * KEYS + j, square[i]);
            }
        for (int j = 0; j < n; j += PER)
            for (int d = 0; d < head_dim; d += LANES)
                store(values + j / PER * head_dim + d,
                      v.template across<A>(row + first + j, j + 1 < n, d));
        int r = 0;
        for (; r + 6 <= rows; r += 6)
            attend<A, 6>(q + r, seen + r, parts + r, keys, values, first, n, head_dim);
        for (; r + 3 <= rows; r += 3)
            attend<A, 3>(q + r, seen + r, parts + r, keys, values, first, n, head_dim);
        for (; r < rows; r++)
            attend<A, 1>(q + r, seen + r, parts + r, keys, values, first, n, head_dim);
    }
}

// --- the model ----------------------------------------------------------------------------------

struct Shape {
    int32_t dim, n_heads, n_kv_heads, head_dim, hidden_dim;  // of this rank
    float eps;
};

struct Layer {
    const void *attention_norm, *ffn_norm;
    Weight wq, wk, wv, wo, w1, w2, w3;
};

struct Batch {
    int32_t rows, tokens;       // B and T
    int32_t alike;              // whether one row of positions stands for all
    const int64_t *positions;   // (1 or B, T)
    const float *freqs_cis;     // (1 or B, T, head_dim / 2) complex
    void *k, *v;                // (layers, rows, n_kv_heads, positions, head_dim)
    float *k_scale, *v_scale;   // the same without head_dim, if k and v are bytes
    int64_t per_layer, per_row, per_head;  // positions from one to the next
    int position(int m) const { return positions[alike ? m % tokens : m]; }
    int all() const { return rows * tokens; }
    size_t head(int m, int kv) const { return m / tokens * per_row + kv * per_head; }
};

// f(keys, values) of a layer, whose activations are A.
template <class A, class F> void with_cache(const Batch &b, int layer, int head_dim, F f) {
    const size_t from = layer * b.per_layer, at = from * head_dim;
    if (b.k_scale)
        f(Cache<int8_t>{(int8_t *)b.k + at, b.k_scale + from, head_dim},
          Cache<int8_t>{(int8_t *)b.v + at, b.v_scale + from, head_dim});
    else
        f(Cache<A>{(A *)b.k + at, nullptr, head_dim}, Cache<A>{(A *)b.v + at, nullptr, head_dim});
}

template <class A, class X>
void norm_rows(const A *x, const A *weight, X *out, int begin, int end, int dim, float eps) {
    for (int m = begin; m < end; m++) {
        const A *row = x + size_t(m) * dim;
        vec squares = {};
        for (int d = 0; d < dim; d += LANES) squares += load(row + d) * load(row + d);
        float scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
        for (int d = 0; d < dim; d += LANES)
            store(out + size_t(m) * dim + d, load(row + d) * scale * load(weight + d));
    }
}

// Turns pairs of x by the angles of a position. arXiv 2104.09864.
template <class T, class Y>
void rotate(const T *x, Y *y, const float *cis, int head_dim, float scale) {
    for (int d = 0; d < head_dim; d += 2) {
        float a = get(x + d), b = get(x + d + 1), c = cis[d] * scale, s = cis[d + 1] * scale;
        put(y + d, a * c - b * s);
        put(y + d + 1, a * s + b * c);
    }
}

// This thread's part of storing the new keys and values and of rotating the queries, which also
// get the factor of softmax(q kᵀ / sqrt(head_dim)) and that from e to powers of 2.
template <class T, class Q, class C>
void enter_cache(const Shape &s, const Batch &b, const T *q, const T *k, const T *v, Q *rotated,
                 Cache<C> keys, Cache<C> values) {
    const float scale = 1.44269504f / std::sqrt(float(s.head_dim));
    const int hd = s.head_dim, heads = s.n_heads + s.n_kv_heads;
    Share mine = share(b.all() * heads);
    for (int i = mine.begin; i < mine.end; i++) {
        size_t m = i / heads;
        int head = i % heads;
        const float *cis = b.freqs_cis + (b.alike ? m % b.tokens : m) * hd;
        if (head < s.n_heads) {
            size_t at = (m * s.n_heads + head) * hd;
            rotate(q + at, rotated + at, cis, hd, scale);
        } else {
            head -= s.n_heads;
            size_t at = (m * s.n_kv_heads + head) * hd, row = b.head(m, head) + b.position(m);
            alignas(64) float x[MAX_HEAD];
            rotate(k + at, x, cis, hd, 1.0f);
            keys.set(row, x);
            for (int d = 0; d < hd; d += LANES) store(x + d, load(v + at + d));
            values.set(row, x);
        }
    }
}

// Few tokens: each chunk of each row's keys is a thing to do, so that threads share a long context.
// partial: per token, head and chunk the sum (head_dim) and its largest and total.
template <class A, class C, class X>
void attend_few(const Shape &s, const Batch &b, const typename Words<A>::Value *q,
                const Cache<C> &k, const Cache<C> &v, float *partial, X *out) {
    const int hd = s.head_dim, group = s.n_heads / s.n_kv_heads;
    int longest = 0;
    for (int m = 0; m < b.all(); m++) longest = std::max(longest, b.position(m) + 1);
    const int chunks = (longest + CHUNK - 1) / CHUNK;
    auto at = [&](int m, int head, int chunk) {
        return partial + ((size_t(m) * s.n_heads + head) * chunks + chunk) * (hd + 2);
    };
    Share mine = share(b.all() * s.n_kv_heads * chunks);
    for (int i = mine.begin; i < mine.end; i++) {
        int chunk = i % chunks, kv = i / chunks % s.n_kv_heads, m = i / chunks / s.n_kv_heads;
        int end = std::min((chunk + 1) * CHUNK, b.position(m) + 1);
        if (chunk * CHUNK >= end) continue;
        const typename Words<A>::Value *queries[QUERIES];
        int seen[QUERIES];
        Part parts[QUERIES];
        for (int g = 0; g < group; g++) {
            float *p = at(m, kv * group + g, chunk);
            memset(p, 0, hd * sizeof *p);
            queries[g] = q + (size_t(m) * s.n_heads + kv * group + g) * hd;
            seen[g] = end;
            parts[g] = {-INFINITY, 0, p};
        }
        attend_chunk<A>(queries, seen, parts, group, k, v, b.head(m, kv), chunk * CHUNK, end);
        for (int g = 0; g < group; g++) {
            parts[g].out[hd] = parts[g].largest;
            parts[g].out[hd + 1] = parts[g].total;
        }
    }
#pragma omp barrier
    mine = share(b.all() * s.n_heads);
    for (int i = mine.begin; i < mine.end; i++) {
        int head = i % s.n_heads, m = i / s.n_heads;
        float *p = at(m, head, 0);
        Part whole = {p[hd], p[hd + 1], p};
        for (int chunk = 1; chunk * CHUNK <= b.position(m); chunk++) {
            float *next = at(m, head, chunk);
            join(whole, {next[hd], next[hd + 1], next}, hd);
        }
        for (int d = 0; d < hd; d += LANES)
            store(out + size_t(i) * hd + d, load(p + d) / whole.total);
    }
}

// Many tokens: neighbours in a row, which see almost the same keys, are done together.
template <class A, class C, class X>
void attend_many(const Shape &s, const Batch &b, const typename Words<A>::Value *q,
                 const Cache<C> &k, const Cache<C> &v, X *out) {
    const int hd = s.head_dim, group = s.n_heads / s.n_kv_heads;
    const int run = std::max(1, QUERIES / group), runs = (b.tokens + run - 1) / run;
    static thread_local float sums[2][QUERIES * MAX_HEAD];
#pragma omp for schedule(dynamic)
    for (int i = b.rows * runs * s.n_kv_heads - 1; i >= 0; i--) {  // the last see most: first
        int kv = i % s.n_kv_heads, row = i / s.n_kv_heads % b.rows;
        int begin = i / s.n_kv_heads / b.rows * run, n = std::min(run, b.tokens - begin) * group;
        const typename Words<A>::Value *queries[QUERIES];
        int seen[QUERIES];
        Part whole[QUERIES], parts[QUERIES];
        size_t places[QUERIES];
        for (int j = 0; j < n; j++) {
            size_t m = size_t(row) * b.tokens + begin + j / group;
            places[j] = (m * s.n_heads + kv * group + j % group) * hd;
            queries[j] = q + places[j];
            seen[j] = b.position(m) + 1;
            whole[j] = {-INFINITY, 0, sums[0] + j * hd};
            memset(whole[j].out, 0, hd * sizeof(float));
        }
        for (int first = 0; first < seen[n - 1]; first += CHUNK) {
            for (int j = 0; j < n; j++) {
                parts[j] = {-INFINITY, 0, sums[1] + j * hd};
                memset(parts[j].out, 0, hd * sizeof(float));
            }
            int end = std::min(first + CHUNK, seen[n - 1]);
            attend_chunk<A>(queries, seen, parts, n, k, v, b.head(row * b.tokens, kv), first, end);
            for (int j = 0; j < n; j++) join(whole[j], parts[j], hd);
        }
        for (int j = 0; j < n; j++)
            for (int d = 0; d < hd; d += LANES)
                store(out + places[j] + d, load(whole[j].out + d) / whole[j].total);
    }
}

template <class T, class Y> void silu_times(const T *gate, const T *up, Y *out) {
    vec g = load(gate);
    store(out, g / (1.0f + exp2(g * -1.44269504f)) * load(up));
}

template <class A> void add_columns(A *h, const float *y, int tokens, Share columns, int dim) {
    for (int m = 0; m < tokens; m++)
        for (int r = columns.begin; r < columns.end; r++) {
            size_t at = size_t(m) * dim + r;
            put(h + at, get(h + at) + y[at]);
        }
}

struct Scratch {
    float *q, *k, *v, *gate, *up, *sum, *partial;
    void *rotated, *x;
};

enum Part_ : int32_t { ATTENTION = 1, FEED_FORWARD = 2, ADD = 4 };

template <class A, class Dot>
void run(const Shape &s, const Layer *layers, int first, int n, const Batch &b, A *h,
         const Scratch &z, int parts, int threads) {
    typedef typename Dot::X X;
    const int M = b.all();
    X *x = (X *)z.x;
#pragma omp parallel num_threads(threads)
    for (int i = first; i < first + n; i++) {
        const Layer &layer = layers[i];
        Share tokens = share(M);
        if (parts & ATTENTION) {
            norm_rows(h, (const A *)layer.attention_norm, x, tokens.begin, tokens.end, s.dim, s.eps);
#pragma omp barrier
            multiply<Dot>(layer.wq, x, M, z.q);
            multiply<Dot>(layer.wk, x, M, z.k);
            multiply<Dot>(layer.wv, x, M, z.v);
#pragma omp barrier
            with_cache<A>(b, i, s.head_dim, [&](auto keys, auto values) {
                auto *rotated = (typename Words<A>::Value *)z.rotated;
                enter_cache(s, b, z.q, z.k, z.v, rotated, keys, values);
#pragma omp barrier
                attend_few<A>(s, b, rotated, keys, values, z.partial, x);
            });
#pragma omp barrier
            Share mine = multiply<Dot>(layer.wo, x, M, z.sum);
            if (parts & ADD) add_columns(h, z.sum, M, mine, s.dim);
#pragma omp barrier
        }
        if (parts & FEED_FORWARD) {
            norm_rows(h, (const A *)layer.ffn_norm, x, tokens.begin, tokens.end, s.dim, s.eps);
#pragma omp barrier
            multiply<Dot>(layer.w1, x, M, z.gate);
            Share mine = multiply<Dot>(layer.w3, x, M, z.up);
#pragma omp barrier
            for (int m = 0; m < M; m++)
                for (int r = mine.begin; r < mine.end; r += LANES) {
                    size_t at = size_t(m) * s.hidden_dim + r;
                    silu_times(z.gate + at, z.up + at, x + at);
                }
#pragma omp barrier
            mine = multiply<Dot>(layer.w2, x, M, z.sum);
            if (parts & ADD) add_columns(h, z.sum, M, mine, s.dim);
#pragma omp barrier
        }
    }
}

bool all_bf16(const Layer *layers, int first, int n) {
    for (int i = first; i < first + n; i++)
        for (auto *w : {&layers[i].wq, &layers[i].wk, &layers[i].wv, &layers[i].wo, &layers[i].w1,
                        &layers[i].w2, &layers[i].w3})
            if (w->kind != BF16) return false;
    return true;
}

void to_floats(const bf16 *x, float *out, Share mine) {
    for (int i = mine.begin; i < mine.end; i++) out[i] = get(x + i);
}

template <int KIND, class A> void dequantize_rows(const Weight &w, A *out) {
    Share mine = share(w.rows);
    for (size_t i = size_t(mine.begin) * w.cols / BLOCK; i < size_t(mine.end) * w.cols / BLOCK; i++) {
        const uint8_t *block = w.data + i * block_bytes(KIND);
        auto values = Floats::decode<KIND>(block);
        store(out + i * BLOCK, values.low);
        store(out + i * BLOCK + LANES, values.high);
    }
}

template <class A> void dequantize_any(const Weight &w, A *out) {
    if (w.kind == Q8_0) dequantize_rows<Q8_0>(w, out);
    if (w.kind == Q4_0) dequantize_rows<Q4_0>(w, out);
    if (w.kind == Q4_1) dequantize_rows<Q4_1>(w, out);
}

template <class A>
void attention_of(const Shape &s, const Batch &b, int layer, const void *q, const void *k,
                  const void *v, void *rotated, void *out, int threads) {
#pragma omp parallel num_threads(threads)
    with_cache<A>(b, layer, s.head_dim, [&](auto keys, auto values) {
        auto *turned = (typename Words<A>::Value *)rotated;
        enter_cache(s, b, (const A *)q, (const A *)k, (const A *)v, turned, keys, values);
#pragma omp barrier
        attend_many<A>(s, b, turned, keys, values, (A *)out);
    });
}

}  // namespace

// `is_bf16`: whether activations, norms' weights and the cache are bf16 or fp32.
extern "C" {

void step(int32_t is_bf16, const Shape *s, const Layer *layers, int32_t first, int32_t n,
          const Batch *b, void *h, const Scratch *z, int32_t parts, int32_t threads) {
#ifdef __AVX512BF16__
    if (is_bf16 && all_bf16(layers, first, n))
        return run<bf16, Pairs>(*s, layers, first, n, *b, (bf16 *)h, *z, parts, threads);
#endif
    if (is_bf16) run<bf16, Floats>(*s, layers, first, n, *b, (bf16 *)h, *z, parts, threads);
    else run<float, Floats>(*s, layers, first, n, *b, (float *)h, *z, parts, threads);
}

void linear(int32_t is_bf16, const Weight *w, const void *x, int32_t tokens, float *y, float *scratch,
            int32_t threads) {
#pragma omp parallel num_threads(threads)
    {
#ifdef __AVX512BF16__
        if (is_bf16 && w->kind == BF16) multiply<Pairs>(*w, (const bf16 *)x, tokens, y);
        else
#endif
        if (is_bf16) {
            to_floats((const bf16 *)x, scratch, share(tokens * w->cols));
#pragma omp barrier
            multiply<Floats>(*w, scratch, tokens, y);
        } else {
            multiply<Floats>(*w, (const float *)x, tokens, y);
        }
    }
}

void norm(int32_t is_bf16, const void *x, const void *weight, void *out, int32_t tokens, int32_t dim,
          float eps, int32_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Share mine = share(tokens);
        if (is_bf16)
            norm_rows((const bf16 *)x, (const bf16 *)weight, (bf16 *)out, mine.begin, mine.end, dim, eps);
        else
            norm_rows((const float *)x, (const float *)weight, (float *)out, mine.begin, mine.end, dim, eps);
    }
}

void attention(int32_t is_bf16, const Shape *s, const Batch *b, int32_t layer, const void *q,
               const void *k, const void *v, void *rotated, void *out, int32_t threads) {
    if (is_bf16) attention_of<bf16>(*s, *b, layer, q, k, v, rotated, out, threads);
    else attention_of<float>(*s, *b, layer, q, k, v, rotated, out, threads);
}

void swiglu(int32_t is_bf16, const void *gate, const void *up, void *out, int64_t n, int32_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i += LANES) {
        if (is_bf16) silu_times((const bf16 *)gate + i, (const bf16 *)up + i, (bf16 *)out + i);
        else silu_times((const float *)gate + i, (const float *)up + i, (float *)out + i);
    }
}

void dequantize(int32_t is_bf16, const Weight *w, void *out, int32_t threads) {
#pragma omp parallel num_threads(threads)
    if (is_bf16) dequantize_any(*w, (bf16 *)out);
    else dequantize_any(*w, (float *)out);
}

}  // extern "C"
