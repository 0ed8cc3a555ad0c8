// Attention of some queries to the keys and values in the cache.

#pragma once

#include "products.h"

namespace {

// Attention multiplies words of 32 bits, 16 at a time: a word is one fp32 value or, if the
// processor multiplies pairs of bf16, two bf16 values.
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

// Keys or values of a layer: for each position a row of head_dim, in bf16, fp32, or int8 with a
// scale per row.
template <class C> struct Cache {
    C *values;
    float *scales;
    int head_dim;
    vec at(size_t row, int d) const {
        if constexpr (std::is_same<C, int8_t>::value)
            return whole(values + row * head_dim + d) * scales[row];
        else
            return load(values + row * head_dim + d);
    }
    uvec upper(size_t row, int d) const {  // as bf16, in the upper 16 bits; ignore the lower ones
        if constexpr (std::is_same<C, bf16>::value)
            return __builtin_convertvector(read<shorts>(values + row * head_dim + d), uvec) << 16;
        return rounded(at(row, d));
    }
    // along: 16 words of a row; across: 16 words, each with values of a row and of the next.
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
            float most = 0, broken = 0;  // NaN stays NaN
            for (int d = 0; d < head_dim; d++)
                most = std::max(most, std::fabs(x[d])), broken += x[d] * 0.0f;
            float inverse = most > 0 ? 127 / most : 0;
            for (int d = 0; d < head_dim; d++)
                values[row * head_dim + d] = int8_t(std::nearbyint(x[d] * inverse));
            scales[row] = most / 127 + broken;
        } else {
            for (int d = 0; d < head_dim; d += LANES)
                store(values + row * head_dim + d, load(x + d));
        }
    }
};

constexpr int KEYS = 64;     // processed together
constexpr int PAGE = KEYS;   // positions of a block of the cache
constexpr int CHUNK = 512;   // keys whose partial softmax is computed separately, then joined
constexpr int QUERIES = 64;  // processed together, at most
constexpr int MAX_HEAD = 256;

// Partial softmax over some keys (arXiv 2112.05682): the weighted sum of their values, the largest
// score (as a power of 2) and the sum of 2^(score - largest).
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

// R queries and KEYS keys; a query attends to those from its `since` on, before its `seen`.
// keys: (words of a head, KEYS), values: (words of KEYS, head_dim).
template <class A, int R>
void attend(const typename Words<A>::Value *const *q, const int *since, const int *seen, Part *parts,
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
    vec before = {}, after = {};  // the largest scores, without and with these keys
    for (int r = 0; r < R; r++) {
        vec most = vec{} - INFINITY;
        for (int c = 0; c < COLUMNS; c++) {
            vec &score = scores[r][c];
            const ivec at = lane + (first + c * LANES);
            score = at < seen[r] ? score : vec{} - INFINITY;
            score = at >= since[r] ? score : vec{} - INFINITY;
            most = larger(most, score);
        }
        before[r] = parts[r].largest;
        after[r] = parts[r].largest = std::max(parts[r].largest, largest(most));
    }
    vec shrink = before > -INFINITY ? exp2(before - after) : vec{};
    for (int r = 0; r < R; r++) {
        vec total = {};
        for (int c = 0; c < COLUMNS; c++) {
            vec score = scores[r][c];  // if all are -inf, exp2(NaN) is computed but not selected
            vec weight = score == -INFINITY ? vec{} : exp2(score - after[r]);
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

// --- a batch ------------------------------------------------------------------------------------

struct Shape {
    int32_t dim, n_heads, n_kv_heads, head_dim, hidden_dim;  // of this rank
    float eps;
    float residual;  // what attention and feed-forward give is multiplied by it
};

// How a layer attends: all zeros for RoPE, and all keys up to a query's own.
struct Attending {
    int32_t no_rope, qk_norm, chunk, window;  // attends within chunks, or to so many keys at most
    float floor_scale, attn_scale;  // queries grow by attn_scale · log(1 + position / floor_scale)
    // The first key that a query attends to, of the `seen` up to its own; that of its group of KEYS.
    int begin(int seen) const {
        const int at = chunk ? (seen - 1) / chunk * chunk : 0;
        return window ? std::max(at, seen - window) : at;
    }
    int group(int seen) const { return begin(seen) / KEYS * KEYS; }
    float growth(int position) const {
        return attn_scale ? 1 + attn_scale * std::log1p(std::floor((position + 1) / floor_scale)) : 1;
    }
};

// The tokens of a pass: those of row 0, in order, those of row 1, ...
struct Batch {
    int32_t rows, few, tokens;    // `few` rows, the first, have few tokens; `tokens` of all rows
    const int32_t *begins;        // (rows + 1): row r has tokens begins[r] to begins[r + 1]
    const int32_t *owners;        // (tokens): their rows
    const int64_t *positions;     // (tokens)
    const float *freqs_cis;       // (tokens, head_dim / 2) complex
    void *k, *v;                  // (layers, blocks, n_kv_heads, positions of a block, head_dim)
    float *k_scale, *v_scale;     // the same without head_dim, if k and v are bytes
    int64_t per_layer, per_block, per_head;  // strides, in positions
    const int32_t *blocks;        // (rows, width): a row's blocks of PAGE positions; null: row r has
    int32_t width;                // block r alone, of any length
    int count(int row) const { return begins[row + 1] - begins[row]; }
    size_t head(int row, int kv, int position) const {
        if (!blocks) return row * per_block + kv * per_head + position;
        return blocks[size_t(row) * width + position / PAGE] * per_block + kv * per_head + position % PAGE;
    }
};

// Queries of a row and a key/value head over the row's keys [begin, end). parts must be empty.
template <class A, class C>
void attend_chunk(const typename Words<A>::Value *const *q, const int *since, const int *seen,
                  Part *parts, int rows, const Cache<C> &k, const Cache<C> &v, const Batch &b,
                  int row, int kv, int begin, int end) {
    constexpr int PER = Words<A>::PER;
    const int head_dim = k.head_dim;
    alignas(64) float keys[MAX_HEAD * KEYS / PER], values[MAX_HEAD * KEYS / PER];
    for (int first = begin; first < end; first += KEYS) {
        const int n = std::min(KEYS, end - first);
        const size_t from = b.head(row, kv, first);
        for (int w = 0; w < head_dim / PER; w += LANES)
            for (int j = 0; j < KEYS; j += LANES) {
                vec square[LANES];
                for (int i = 0; i < LANES; i++)
                    square[i] = j + i < n ? k.template along<A>(from + j + i, w) : vec{};
                transpose(square);
                for (int i = 0; i < LANES; i++) store(keys + (w + i) * KEYS + j, square[i]);
            }
        for (int j = 0; j < n; j += PER)
            for (int d = 0; d < head_dim; d += LANES)
                store(values + j / PER * head_dim + d,
                      v.template across<A>(from + j, j + 1 < n, d));
        int r = 0;
        for (; r + 6 <= rows; r += 6)
            attend<A, 6>(q + r, since + r, seen + r, parts + r, keys, values, first, n, head_dim);
        for (; r + 3 <= rows; r += 3)
            attend<A, 3>(q + r, since + r, seen + r, parts + r, keys, values, first, n, head_dim);
        for (; r < rows; r++)
            attend<A, 1>(q + r, since + r, seen + r, parts + r, keys, values, first, n, head_dim);
    }
}

// Calls f with the keys and values of a layer; A is the type of activations.
template <class A, class F> void with_cache(const Batch &b, int layer, int head_dim, F f) {
    const size_t from = layer * b.per_layer, at = from * head_dim;
    if (b.k_scale)
        f(Cache<int8_t>{(int8_t *)b.k + at, b.k_scale + from, head_dim},
          Cache<int8_t>{(int8_t *)b.v + at, b.v_scale + from, head_dim});
    else
        f(Cache<A>{(A *)b.k + at, nullptr, head_dim}, Cache<A>{(A *)b.v + at, nullptr, head_dim});
}

// RoPE: rotates pairs of x by the angles of a position; null: not at all. arXiv 2104.09864.
template <class T, class Y>
void rotate(const T *x, Y *y, const float *cis, int head_dim, float scale) {
    for (int d = 0; d < head_dim; d += 2) {
        float a = get(x + d), b = get(x + d + 1), c = scale, s = 0;
        if (cis) c *= cis[d], s = cis[d + 1] * scale;
        put(y + d, a * c - b * s);
        put(y + d + 1, a * s + b * c);
    }
}

// This thread's share of storing the new keys and values and of rotating the queries, which are
// also multiplied by 1 / sqrt(head_dim) and by log2(e), for exp2 in place of exp.
template <class T, class Q, class C>
void enter_cache(const Shape &s, const Batch &b, const T *q, const T *k, const T *v, Q *rotated,
                 Cache<C> keys, Cache<C> values, const Attending &how) {
    const float scale = 1.44269504f / std::sqrt(float(s.head_dim));
    const int hd = s.head_dim, heads = s.n_heads + s.n_kv_heads;
    auto norm = [&](const T *x) {  // of RMSNorm without a weight, which a rotation doesn't change
        vec squares = {};
        for (int d = 0; d < hd; d += LANES) squares += load(x + d) * load(x + d);
        return how.qk_norm ? 1.0f / std::sqrt(sum(squares) / hd + s.eps) : 1.0f;
    };
    Share mine = share(b.tokens * heads);
    for (int i = mine.begin; i < mine.end; i++) {
        size_t m = i / heads;
        int head = i % heads;
        const float *cis = how.no_rope ? nullptr : b.freqs_cis + m * hd;
        if (head < s.n_heads) {
            size_t at = (m * s.n_heads + head) * hd;
            rotate(q + at, rotated + at, cis, hd, scale * norm(q + at) * how.growth(b.positions[m]));
        } else {
            head -= s.n_heads;
            size_t at = (m * s.n_kv_heads + head) * hd, row = b.head(b.owners[m], head, b.positions[m]);
            alignas(64) float x[MAX_HEAD];
            rotate(k + at, x, cis, hd, norm(k + at));
            keys.set(row, x);
            for (int d = 0; d < hd; d += LANES) store(x + d, load(v + at + d));
            values.set(row, x);
        }
    }
}

// A head's output, from column `first` on, to the product that follows.
inline void give(const Inputs &out, size_t m, int first, int head_dim, const float *sum, float total) {
    for (int d = 0; d < head_dim; d += BLOCK)
        out.set(m, (first + d) / BLOCK, load(sum + d) / total, load(sum + d + LANES) / total);
}

// Rows of few tokens: each chunk of each token's keys is a task, so that threads share a long context.
// partial: per token, head and chunk the weighted sum (head_dim), the largest score and the total.
template <class A, class C>
void attend_few(const Shape &s, const Batch &b, const typename Words<A>::Value *q,
                const Cache<C> &k, const Cache<C> &v, float *partial, const Inputs &out,
                const Attending &how) {
    const int hd = s.head_dim, group = s.n_heads / s.n_kv_heads, tokens = b.begins[b.few];
    int longest = 0;
    for (int m = 0; m < tokens; m++) longest = std::max(longest, int(b.positions[m]) + 1);
    const int chunks = (longest + CHUNK - 1) / CHUNK;
    auto at = [&](int m, int head, int chunk) {
        return partial + ((size_t(m) * s.n_heads + head) * chunks + chunk) * (hd + 2);
    };
    Share mine = share(tokens * s.n_kv_heads * chunks);
    for (int i = mine.begin; i < mine.end; i++) {
        int chunk = i % chunks, kv = i / chunks % s.n_kv_heads, m = i / chunks / s.n_kv_heads;
        int end = std::min((chunk + 1) * CHUNK, int(b.positions[m]) + 1);
        const int begin = std::max(chunk * CHUNK, how.group(b.positions[m] + 1));
        if (begin >= end) continue;
        const typename Words<A>::Value *queries[QUERIES];
        int since[QUERIES], seen[QUERIES];
        Part parts[QUERIES];
        for (int g = 0; g < group; g++) {
            float *p = at(m, kv * group + g, chunk);
            memset(p, 0, hd * sizeof *p);
            queries[g] = q + (size_t(m) * s.n_heads + kv * group + g) * hd;
            seen[g] = b.positions[m] + 1, since[g] = how.begin(seen[g]);
            parts[g] = {-INFINITY, 0, p};
        }
        attend_chunk<A>(queries, since, seen, parts, group, k, v, b, b.owners[m], kv, begin, end);
        for (int g = 0; g < group; g++) {
            parts[g].out[hd] = parts[g].largest;
            parts[g].out[hd + 1] = parts[g].total;
        }
    }
#pragma omp barrier
    mine = share(tokens * s.n_heads);
    for (int i = mine.begin; i < mine.end; i++) {
        int head = i % s.n_heads, m = i / s.n_heads;
        const int first = how.begin(b.positions[m] + 1) / CHUNK;
        float *p = at(m, head, first);
        Part whole = {p[hd], p[hd + 1], p};
        for (int chunk = first + 1; chunk * CHUNK <= b.positions[m]; chunk++) {
            float *next = at(m, head, chunk);
            join(whole, {next[hd], next[hd + 1], next}, hd);
        }
        give(out, m, head * hd, hd, p, whole.total);
    }
}

// Rows of many tokens: adjacent ones, which attend to almost the same keys, share a task.
template <class A, class C>
void attend_many(const Shape &s, const Batch &b, const typename Words<A>::Value *q,
                 const Cache<C> &k, const Cache<C> &v, const Inputs &out, const Attending &how) {
    const int hd = s.head_dim, group = s.n_heads / s.n_kv_heads;
    const int run = std::max(1, QUERIES / group), rows = b.rows - b.few;
    int most = 0;
    for (int row = b.few; row < b.rows; row++) most = std::max(most, b.count(row));
    static thread_local float sums[2][QUERIES * MAX_HEAD];
#pragma omp for schedule(dynamic)
    for (int i = (most + run - 1) / run * rows * s.n_kv_heads - 1; i >= 0; i--) {  // the longest first
        const int kv = i % s.n_kv_heads, row = b.few + i / s.n_kv_heads % rows;
        const int begin = i / s.n_kv_heads / rows * run;
        const int n = std::min(run, b.count(row) - begin) * group;
        if (n <= 0) continue;
        const size_t first_token = b.begins[row] + begin;
        const typename Words<A>::Value *queries[QUERIES];
        int since[QUERIES], seen[QUERIES];
        Part whole[QUERIES], parts[QUERIES];
        for (int j = 0; j < n; j++) {
            const size_t m = first_token + j / group;
            queries[j] = q + (m * s.n_heads + kv * group + j % group) * hd;
            seen[j] = b.positions[m] + 1, since[j] = how.begin(seen[j]);
            whole[j] = {-INFINITY, 0, sums[0] + j * hd};
            memset(whole[j].out, 0, hd * sizeof(float));
        }
        for (int at = how.group(seen[0]); at < seen[n - 1]; at = at / CHUNK * CHUNK + CHUNK) {
            for (int j = 0; j < n; j++) {
                parts[j] = {-INFINITY, 0, sums[1] + j * hd};
                memset(parts[j].out, 0, hd * sizeof(float));
            }
            int end = std::min(at / CHUNK * CHUNK + CHUNK, seen[n - 1]);
            attend_chunk<A>(queries, since, seen, parts, n, k, v, b, row, kv, at, end);
            for (int j = 0; j < n; j++) join(whole[j], parts[j], hd);
        }
        for (int j = 0; j < n; j++)
            give(out, first_token + j / group, (kv * group + j % group) * hd, hd, whole[j].out,
                 whole[j].total);
    }
}

}  // namespace
