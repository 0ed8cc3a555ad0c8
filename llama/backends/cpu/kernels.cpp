// Llama's transformer blocks on a CPU: `TransformerBlock` of model.py, for some hundred tokens at a time.
//
// A decoding step reads every weight once to compute one token of each row, so it is bound by
// memory bandwidth; a prompt is bound by arithmetic. All layers run in one parallel region, weights
// have the block types of the checkpoint file, and activations stay in the processor's caches.
//
//     step        all layers of a model, or some; null in place of adapters: none is used
//     linear      one product: the output layer
//     norm, rows  RMSNorm; some rows of a weight, for the embedding
//     look        attention of some tokens to keys and values outside of the cache
//     attend_to_all  attention of all tokens to all
//     pack        a weight as in a file -> as the products read it
//
// Sums are fp32, in an order that depends on the model's shape alone, so that a token's result is
// bit-identical regardless of the rest of the batch and of the number of threads. Written in the
// vector extensions that GCC and Clang share, 16 floats wide on any processor; separate code there is
// for AMX, and for some of AVX2, AVX-512 and ARM's products of bytes.

#include "attention.h"
#include "experts.h"
#include "images.h"
#include "low_rank.h"

namespace {

enum Matrix { WQ, WK, WV, WO, W1, W3, W2 };  // those of the same inputs are neighbours
struct Layer {
    const void *attention_norm, *ffn_norm;
    Weight matrices[MATRICES];
    const float *biases[MATRICES];  // of this rank's rows; null: none
    Attending attending;
    const Experts *experts;  // beside the feed-forward network; null: none
};

// RMSNorm of a row, arXiv 1910.07467: gives each 32 of its values to `set`.
template <class A, class Set>
void norm_row(const A *row, const A *weight, int dim, float eps, Set set) {
    vec squares = {};
    for (int d = 0; d < dim; d += LANES) squares += load(row + d) * load(row + d);
    float scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
    auto at = [&](int d) { return load(row + d) * scale * load(weight + d); };
    for (int d = 0; d < dim; d += BLOCK) set(d / BLOCK, at(d), at(d + LANES));
}

template <class A>
void add_columns(A *h, const float *y, int tokens, Share columns, const Shape &s) {
    for (int m = 0; m < tokens; m++)
        for (int r = columns.begin; r < columns.end; r++) {
            size_t at = size_t(m) * s.dim + r;
            put(h + at, get(h + at) + y[at] * s.residual);
        }
}

struct Scratch {
    float *q, *k, *v, *gate, *up, *sum, *partial;
    void *rotated;
    Inputs x, heads, y;  // of the products: normalized, from attention, within the feed-forward
    float *normalized, *expert;  // of layers with experts: x, and one's results
    Routes routes;
};

enum Parts : int32_t { ATTENTION = 1, FEED_FORWARD = 2, ADD = 4 };

template <class A>
void run_layer(const Shape &s, const Layer &layer, int i, const Batch &b, A *h, const Scratch &z,
               const Adapters *adapters, int parts, Pieces &pieces) {
    const int M = b.tokens;
    const int least = std::max(adapters ? 256 : 0, least_rows(M));  // `expand` begins with sums over x
    auto normalize = [&](const void *weight, float *copy) {
        Share tokens = share(M);
        for (int m = tokens.begin; m < tokens.end; m++)
            norm_row(h + size_t(m) * s.dim, (const A *)weight, s.dim, s.eps,
                     [&](int block, vec low, vec high) {
                         z.x.set(m, block, low, high);
                         if (!copy) return;
                         float *at = copy + size_t(m) * s.dim + block * BLOCK;
                         store(at, low), store(at + LANES, high);
                     });
    };
    // Before products of x with n matrices from `at` on.
    auto begin = [&](int at, int n, const Inputs &x) {
        if (!adapters) return;
        reduce(*adapters, i, at, n, x, M);
#pragma omp barrier
    };
    // Some rows of the product of x with the nth of them.
    auto multiply_by = [&](int at, int nth, const Inputs &x, float *y, Share some) {
        const Weight &w = layer.matrices[at + nth];
        multiply(w, x, M, y, some);
        if (adapters) expand(*adapters, i, at, nth, x.cols, M, y, w.rows, some);
        if (const float *bias = layer.biases[at + nth])
            for (int m = 0; m < M; m++)
                for (int r = some.begin; r < some.end; r++) y[size_t(m) * w.rows + r] += bias[r];
    };
    auto add = [&](Share columns) {
        if (parts & ADD) add_columns(h, z.sum, M, columns, s);
    };
    if (parts & ATTENTION) {
        normalize(layer.attention_norm, nullptr);
#pragma omp barrier
        begin(WQ, 3, z.x);
        auto padded = [&](int nth) {
            return (layer.matrices[WQ + nth].rows + BLOCK - 1) / BLOCK * BLOCK;
        };
        // The rows of all three, one after the other.
        pieces.each(padded(0) + padded(1) + padded(2), least, most_rows(M), [&](Share some) {
            for (int nth = 0; nth < 3; nth++) {
                const int rows = layer.matrices[WQ + nth].rows;
                Share its = {std::max(0, some.begin), std::min(rows, some.end)};
                float *y[] = {z.q, z.k, z.v};
                if (its.begin < its.end) multiply_by(WQ, nth, z.x, y[nth], its);
                some.begin -= padded(nth), some.end -= padded(nth);
            }
        });
#pragma omp barrier
        with_cache<A>(b, i, s.head_dim, [&](auto keys, auto values) {
            auto *rotated = (typename Words<A>::Value *)z.rotated;
            enter_cache(s, b, z.q, z.k, z.v, rotated, keys, values, layer.attending);
#pragma omp barrier
            if (b.few) attend_few<A>(s, b, rotated, keys, values, z.partial, z.heads,
                                     layer.attending);
            if (b.few < b.rows) attend_many<A>(s, b, rotated, keys, values, z.heads,
                                               layer.attending);
        });
#pragma omp barrier
        begin(WO, 1, z.heads);
        pieces.each(layer.matrices[WO].rows, least, most_rows(M), [&](Share some) {
            multiply_by(WO, 0, z.heads, z.sum, some);
            add(some);
        });
#pragma omp barrier
    }
    if (parts & FEED_FORWARD) {
        Inputs y = z.y;
        y.cols = layer.matrices[W2].cols;
        normalize(layer.ffn_norm, layer.experts ? z.normalized : nullptr);
#pragma omp barrier
        begin(W1, 2, z.x);
        pieces.each(y.cols, least, most_rows(M), [&](Share some) {
            multiply_by(W1, 0, z.x, z.gate, some);
            multiply_by(W1, 1, z.x, z.up, some);
            activate(z.gate, z.up, M, y.cols, some, y);
        });
#pragma omp barrier
        begin(W2, 1, y);
        pieces.each(s.dim, least, most_rows(M), [&](Share some) {
            multiply_by(W2, 0, y, z.sum, some);
            if (!layer.experts) add(some);
        });
        if (layer.experts) {
            add_experts(*layer.experts, z.normalized, M, s.dim, z.routes, z.x, y, z.gate, z.up,
                        z.expert, z.sum, pieces);
#pragma omp barrier
            add(share(s.dim, BLOCK));
        }
#pragma omp barrier
    }
}

template <class A>
void run(const Shape &s, const Layer *layers, int first, int n, const Batch &b, A *h,
         const Scratch &z, const Adapters *adapters, int parts, int threads) {
    Taken taken(threads);
#pragma omp parallel num_threads(threads)
    {
        Pieces pieces(taken);
        for (int i = first; i < first + n; i++)
            run_layer(s, layers[i], i, b, h, z, adapters, parts, pieces);
    }
}

template <class A>
void linear_of(const Weight &w, const A *x, int tokens, float *y, const Inputs &in, Pieces pieces) {
    Share mine = share(tokens * (w.cols / BLOCK));
    for (int i = mine.begin; i < mine.end; i++) {
        const A *at = x + size_t(i) * BLOCK;
        in.set(i / (w.cols / BLOCK), i % (w.cols / BLOCK), load(at), load(at + LANES));
    }
#pragma omp barrier
    pieces.each(w.rows, least_rows(tokens), most_rows(tokens), [&](Share some) { multiply(w, in, tokens, y, some); });
}

template <class A>
void norm_rows(const A *x, const A *weight, A *out, int tokens, int dim, float eps) {
    Share mine = share(tokens);
    for (size_t m = mine.begin; m < size_t(mine.end); m++)
        norm_row(x + m * dim, weight, dim, eps, [&](int block, vec low, vec high) {
            A *at = out + m * dim + block * BLOCK;
            store(at, low), store(at + LANES, high);
        });
}

}  // namespace

// `is_bf16`: whether activations, norms' weights and the cache are bf16; otherwise fp32.
extern "C" {

// Whether bf16 is multiplied by bf16, in which case Inputs needs `halves` in place of `floats`.
int32_t multiplies_bf16() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

// Before a weight of this kind is packed: its functions, from products.cpp.
void add_type(int32_t kind, const Functions *functions) { types[kind] = functions; }

int32_t group_height(int32_t tokens) { return height_of(tokens); }

void step(int32_t is_bf16, const Shape *s, const Layer *layers, int32_t first, int32_t n,
          const Batch *b, void *h, const Scratch *z, const Adapters *adapters, int32_t parts,
          int32_t threads) {
    if (is_bf16) run(*s, layers, first, n, *b, (bf16 *)h, *z, adapters, parts, threads);
    else run(*s, layers, first, n, *b, (float *)h, *z, adapters, parts, threads);
}

void linear(int32_t is_bf16, const Weight *w, const void *x, int32_t tokens, float *y,
            const Inputs *in, int32_t threads) {
    Taken taken(threads);
#pragma omp parallel num_threads(threads)
    if (is_bf16) linear_of(*w, (const bf16 *)x, tokens, y, *in, Pieces(taken));
    else linear_of(*w, (const float *)x, tokens, y, *in, Pieces(taken));
}

void norm(int32_t is_bf16, const void *x, const void *weight, void *out, int32_t tokens,
          int32_t dim, float eps, int32_t threads) {
#pragma omp parallel num_threads(threads)
    if (is_bf16) norm_rows((const bf16 *)x, (const bf16 *)weight, (bf16 *)out, tokens, dim, eps);
    else norm_rows((const float *)x, (const float *)weight, (float *)out, tokens, dim, eps);
}

void rows(int32_t is_bf16, const Weight *w, const int64_t *which, int32_t n, void *out,
          int32_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int32_t i = 0; i < n; i++) {
        if (is_bf16) unpack_row(*w, int(which[i]), (bf16 *)out + size_t(i) * w->cols);
        else unpack_row(*w, int(which[i]), (float *)out + size_t(i) * w->cols);
    }
}

void pack_rows(int32_t kind, const void *in, int32_t rows, int32_t cols, void *out, int32_t threads) {
#pragma omp parallel num_threads(threads)
    types[kind]->pack((const uint8_t *)in, rows, cols, (uint8_t *)out);
}

// Attention of tokens to all keys of one row, alike: queries (tokens, heads, head_dim) as `step` makes
// them, rotated and scaled. `partial` as in its scratch.
void look(int32_t is_bf16, const Shape *s, const Batch *b, const void *queries, float *partial,
          const Inputs *out, int32_t threads) {
    auto run = [&](auto value) {
        using A = decltype(value);
        with_cache<A>(*b, 0, s->head_dim, [&](auto keys, auto values) {
            auto *q = (const typename Words<A>::Value *)queries;
            if (b->few) attend_few<A>(*s, *b, q, keys, values, partial, *out, {});
            else attend_many<A>(*s, *b, q, keys, values, *out, {});
        });
    };
#pragma omp parallel num_threads(threads)
    is_bf16 ? run(bf16()) : run(0.0f);
}

// Whether there is `attend_to_all`.
int32_t attends_to_all() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

void attend_to_all(const All *a, int32_t threads) {
#ifdef __AVX512BF16__
#pragma omp parallel num_threads(threads)
    attend_to_all(*a);
#endif
}

}  // extern "C"
