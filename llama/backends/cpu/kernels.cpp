// Llama's transformer blocks on a CPU: `TransformerBlock` of model.py, for few tokens at a time.
//
// A decoding step reads every weight once to compute one token of each row, so it is bound by
// memory bandwidth. To add nothing to that, all layers run in one parallel region, weights are used
// in the layout of the checkpoint file (bf16, fp32, or ggml's blocks of 32 values), and activations
// stay in the processor's caches.
//
//     step        all layers of a model, for up to some dozens of tokens
//     linear      one matrix, likewise
//     norm, attention, swiglu, dequantize     for prompts: all but the matrix products, which are
//                 compute-bound and faster in oneDNN
//
// Sums are fp32, in an order that depends on the model's shape alone, so that a token's result is
// bit-identical regardless of the rest of the batch. Written in the vector extensions that GCC and
// Clang share, 16 floats wide on any processor; only AVX-512 has separate code.

#include "attention.h"

namespace {

struct Layer {
    const void *attention_norm, *ffn_norm;
    Weight wq, wk, wv, wo, w1, w2, w3;
};

template <class A, class X>
void norm_rows(const A *x, const void *weight, X *out, Share rows, int dim, float eps) {
    for (int m = rows.begin; m < rows.end; m++) {
        const A *row = x + size_t(m) * dim;
        vec squares = {};
        for (int d = 0; d < dim; d += LANES) squares += load(row + d) * load(row + d);
        float scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
        for (int d = 0; d < dim; d += LANES)
            store(out + size_t(m) * dim + d, load(row + d) * scale * load((const A *)weight + d));
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
    void *rotated, *x, *y;
};

enum Parts : int32_t { ATTENTION = 1, FEED_FORWARD = 2, ADD = 4 };

template <class A, class Dot>
void run(const Shape &s, const Layer *layers, int first, int n, const Batch &b, A *h,
         const Scratch &z, int parts, int threads) {
    typedef typename Dot::X X;
    const int M = b.all();
    X *x = (X *)z.x, *y = (X *)z.y;
#pragma omp parallel num_threads(threads)
    for (int i = first; i < first + n; i++) {
        const Layer &layer = layers[i];
        Share tokens = share(M);
        if (parts & ATTENTION) {
            norm_rows(h, layer.attention_norm, x, tokens, s.dim, s.eps);
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
            norm_rows(h, layer.ffn_norm, x, tokens, s.dim, s.eps);
#pragma omp barrier
            multiply<Dot>(layer.w1, x, M, z.gate);
            Share mine = multiply<Dot>(layer.w3, x, M, z.up);  // the same rows as of w1
            for (int m = 0; m < M; m++)
                for (int r = mine.begin; r < mine.end; r += LANES) {
                    size_t at = size_t(m) * s.hidden_dim + r;
                    silu_times(z.gate + at, z.up + at, y + at);
                }
#pragma omp barrier
            mine = multiply<Dot>(layer.w2, y, M, z.sum);
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
    const size_t blocks = w.cols / BLOCK;  // of a row
    for (size_t i = mine.begin * blocks; i < mine.end * blocks; i++) {
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

// `is_bf16`: whether activations, norms' weights and the cache are bf16; otherwise fp32.
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

void linear(int32_t is_bf16, const Weight *w, const void *x, int32_t tokens, float *y,
            float *scratch, int32_t threads) {
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

void norm(int32_t is_bf16, const void *x, const void *weight, void *out, int32_t tokens,
          int32_t dim, float eps, int32_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Share mine = share(tokens);
        if (is_bf16) norm_rows((const bf16 *)x, weight, (bf16 *)out, mine, dim, eps);
        else norm_rows((const float *)x, weight, (float *)out, mine, dim, eps);
    }
}

void attention(int32_t is_bf16, const Shape *s, const Batch *b, int32_t layer, const void *q,
               const void *k, const void *v, void *rotated, void *out, int32_t threads) {
    if (is_bf16) attention_of<bf16>(*s, *b, layer, q, k, v, rotated, out, threads);
    else attention_of<float>(*s, *b, layer, q, k, v, rotated, out, threads);
}

void swiglu(int32_t is_bf16, const void *gate, const void *up, void *out, int64_t n,
            int32_t threads) {
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
