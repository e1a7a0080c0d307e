// LoRA's two products, for rows each of which has an adapter of its own or none: s = x aᵀ, and y + scaling · (s b).
//
// Rows are sorted by adapter, so that each adapter is read once for up to kTall rows of it. Every output is one sum in
// an order that depends neither on its neighbours nor on threads: a row has the same bits in any batch. float32 or
// bfloat16, float32 sums.
#include "cpu_threads.h"
#include "linear_words.h"

namespace {

constexpr int kTall = 32;                   // rows of one adapter that a task takes
constexpr int kM = 4, kC = kLanes / kM;     // rows and ranks whose sums are made at once: one transposition adds them up
constexpr int kV = kLanes == 16 ? 4 : 2;    // vectors of columns of y at once
constexpr int64_t kRanks = 16, kWide = 256; // ranks, and columns of y, of a task
constexpr int64_t kSerialBytes = 96 << 10;  // of adapters, below which one thread is faster

struct Words32 : Singles {
    static Vec multiply_add(Vec sum, Vec a, Vec x) { return accumulate(sum, a, x); }
};

struct Words16 : Pairs {
    static Vec multiply_add(Vec sum, Vec a, Vec x) {
        if constexpr (kPairs) return Pairs::multiply_add(sum, a, x);
        sum = accumulate(sum, Pairs::widened(a, 0), Pairs::widened(x, 0));
        return accumulate(sum, Pairs::widened(a, 1), Pairs::widened(x, 1));
    }
};

// Rows in the order of their adapters, those of none first; and blocks of up to kTall rows of one adapter.
struct Sorted {
    struct Block {
        int64_t adapter, first, count;
    };
    int64_t *order, *starts, wrong = 0, num_blocks = 0;  // wrong: 1 + the first row whose adapter is not below L
    Block* blocks;

    template <class Index>
    Sorted(const Index* adapter, int64_t T, int64_t L) {
        static thread_local Scratch scratch;
        order = (int64_t*)scratch.reserve(2 * (T + L + 3 + 3 * (T + 1)));
        starts = order + T, blocks = (Block*)(starts + L + 3);
        for (int64_t l = 0; l < L + 3; ++l) starts[l] = 0;
        for (int64_t t = 0; t < T; ++t) {
            if (adapter[t] >= L) {
                wrong = t + 1;
                return;
            }
            ++starts[(adapter[t] < 0 ? 0 : adapter[t] + 1) + 2];
        }
        for (int64_t l = 1; l < L + 3; ++l) starts[l] += starts[l - 1];
        for (int64_t t = 0; t < T; ++t) order[starts[(adapter[t] < 0 ? 0 : adapter[t] + 1) + 1]++] = t;
        for (int64_t l = 0; l <= L; ++l)
            for (int64_t first = starts[l]; first < starts[l + 1]; first += kTall)
                blocks[num_blocks++] = {l - 1, first, starts[l + 1] - first < kTall ? starts[l + 1] - first : kTall};
    }
};

struct Problem {
    const char *x, *weight, *y;
    char* out;
    const float* scaling;
    const int64_t* ends;  // of the slices of columns
    int64_t T, D, R, N, L, P, x_stride, y_stride, out_stride;  // strides in bytes
};

// Ask for bytes that are read soon: each adapter is read once for a few rows, from as many places as it has ranks, and
// prefetchers would begin anew at each. Always inlined: GCC drops calls of a function that only prefetches.
__attribute__((always_inline)) inline void ask_for(const char* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
}

// The dot products of M rows with kC ranks, at out[m kC + c].
template <class Words, int M>
void dots(const char* const* x, const char* const* a, int64_t D, float* out) {
    using Element = typename Words::Input;
    Vec sum[kLanes] = {};
    const auto add = [&](const char* const* rows, const char* const* ranks, int64_t at) __attribute__((always_inline)) {
        Vec weight[kC];
#pragma GCC unroll 4
        for (int c = 0; c < kC; ++c) weight[c] = in_register(load(ranks[c] + at));
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const Vec row = in_register(load(rows[m] + at));
#pragma GCC unroll 4
            for (int c = 0; c < kC; ++c) sum[m * kC + c] = Words::multiply_add(sum[m * kC + c], weight[c], row);
        }
    };
    const int64_t step = kLanes * Words::kPerWord, whole = D / step, left = D % step;
    for (int64_t i = 0; i < whole; ++i) add(x, a, i * kLanes * 4);
    if (left) {
        char tail[M + kC][kLanes * 4] = {};
        const char *rows[M], *ranks[kC];
        const int64_t at = whole * kLanes * 4;
        for (int m = 0; m < M; ++m) rows[m] = tail[m], std::memcpy(tail[m], x[m] + at, left * sizeof(Element));
        for (int c = 0; c < kC; ++c) ranks[c] = tail[M + c], std::memcpy(tail[M + c], a[c] + at, left * sizeof(Element));
        add(rows, ranks, 0);
    }
    transpose(sum);
    Vec total = sum[0];
    for (int i = 1; i < kLanes; ++i) total = total + sum[i];
    store(out, total);
}

template <class Words, int M = kM>
inline void dots_of(int rows, const char* const* x, const char* const* a, int64_t D, float* out) {
    if (rows == M) return dots<Words, M>(x, a, D, out);
    if constexpr (M > 1) dots_of<Words, M - 1>(rows, x, a, D, out);
}

// s of a block's rows, ranks [first, last).
template <class Words>
void shrink(const Problem& p, const Sorted& sorted, const Sorted::Block& block, int64_t first, int64_t last) {
    using Element = typename Words::Input;
    const int64_t* order = sorted.order + block.first;
    if (block.adapter < 0) {
        for (int64_t i = 0; i < block.count; ++i)
            std::memset(p.out + order[i] * p.out_stride + first * sizeof(Element), 0, (last - first) * sizeof(Element));
        return;
    }
    const char* a = p.weight + block.adapter * p.R * p.D * sizeof(Element);
    for (int64_t r = first; r < last; r += kC) {
        const char* ranks[kC];
        for (int c = 0; c < kC; ++c) ranks[c] = a + (r + c < last ? r + c : last - 1) * p.D * sizeof(Element);
        if (r + kC < last) ask_for(a + (r + kC) * p.D * sizeof(Element), kC * p.D * sizeof(Element));
        for (int64_t i = 0; i < block.count; i += kM) {
            const int rows = int(block.count - i < kM ? block.count - i : kM);
            const char* x[kM];
            for (int m = 0; m < rows; ++m) x[m] = p.x + order[i + m] * p.x_stride;
            float out[kLanes];
            dots_of<Words>(rows, x, ranks, p.D, out);
            const int64_t count = last - r < kC ? last - r : kC;
            for (int m = 0; m < rows; ++m)
                narrow(out + m * kC, (Element*)(p.out + order[i + m] * p.out_stride) + r, int(count));
        }
    }
}

// y + scaling · (s b) of M rows, `columns` of them from n on, at most V vectors; s are floats, R a row.
template <class Words, int M, int V>
void update(const Problem& p, const int64_t* order, const float* s, const char* b, float scaling, int64_t n, int columns) {
    using Element = typename Words::Input;
    const bool full = columns == V * kLanes;
    Vec sum[M][V] = {};
    for (int64_t r = 0; r < p.R; ++r) {
        const Element* at = (const Element*)b + r * p.N + n;
        Element tail[V * kLanes];
        if (!full) std::memset(tail, 0, sizeof(tail)), std::memcpy(tail, at, columns * sizeof(Element)), at = tail;
        Vec weight[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) weight[v] = in_register(widened(at + v * kLanes));
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const Vec one = splat(s[m * p.R + r]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[m][v] = accumulate(sum[m][v], weight[v], one);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
        const Element* y = (const Element*)(p.y + order[m] * p.y_stride) + n;
        Element* out = (Element*)(p.out + order[m] * p.out_stride) + n;
        Element tail[V * kLanes];
        if (!full) std::memset(tail, 0, sizeof(tail)), std::memcpy(tail, y, columns * sizeof(Element)), y = tail;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const int left = columns - v * kLanes;
            const Vec total = widened(y + v * kLanes) + sum[m][v] * splat(scaling);
            if (left > 0) Words::put(out + v * kLanes, total, left < kLanes ? left : kLanes);
        }
    }
}

template <class Words, int M = kM>
inline void update_of(int rows, const Problem& p, const int64_t* order, const float* s, const char* b, float scaling,
                      int64_t n, int columns) {
    if (rows == M) {
        if (columns > kLanes) return update<Words, M, kV>(p, order, s, b, scaling, n, columns);
        return update<Words, M, 1>(p, order, s, b, scaling, n, columns);
    }
    if constexpr (M > 1) update_of<Words, M - 1>(rows, p, order, s, b, scaling, n, columns);
}

// Columns [first, last) of slice `slice` of a block's rows of y.
template <class Words>
void expand(const Problem& p, const Sorted& sorted, const Sorted::Block& block, int64_t slice, int64_t first, int64_t last) {
    using Element = typename Words::Input;
    const int64_t* order = sorted.order + block.first;
    if (block.adapter < 0) {
        for (int64_t i = 0; i < block.count; ++i)
            std::memcpy(p.out + order[i] * p.out_stride + first * sizeof(Element),
                        p.y + order[i] * p.y_stride + first * sizeof(Element), (last - first) * sizeof(Element));
        return;
    }
    static thread_local Scratch scratch;
    float* s = scratch.reserve(block.count * p.R);
    for (int64_t i = 0; i < block.count; ++i) {
        const Element* from = (const Element*)(p.x + order[i] * p.x_stride) + slice * p.R;
        widen(from, s + i * p.R, int(p.R));
    }
    const char* b = p.weight + block.adapter * p.R * p.N * sizeof(Element);
    const auto columns_of = [&](int64_t n) __attribute__((always_inline)) {
        if (n >= last) return;
        for (int64_t r = 0; r < p.R; ++r) ask_for(b + (r * p.N + n) * sizeof(Element), kV * kLanes * sizeof(Element));
    };
    columns_of(first);
    columns_of(first + kV * kLanes);
    const float scaling = p.scaling[block.adapter * p.P + slice];
    for (int64_t n = first; n < last; n += kV * kLanes) {
        const int columns = int(last - n < kV * kLanes ? last - n : kV * kLanes);
        columns_of(n + 2 * kV * kLanes);
        for (int64_t i = 0; i < block.count; i += kM) {
            const int rows = int(block.count - i < kM ? block.count - i : kM);
            update_of<Words>(rows, p, order + i, s + i * p.R, b, scaling, n, columns);
        }
    }
}

template <class Words, class Index>
int64_t run_shrink(const Problem& p, const Index* adapter, int64_t threads) {
    const Sorted sorted(adapter, p.T, p.L);
    if (sorted.wrong) return sorted.wrong;
    const int64_t parts = (p.R + kRanks - 1) / kRanks, tasks = sorted.num_blocks * parts;
    if (sorted.num_blocks * p.R * p.D * int64_t(sizeof(typename Words::Input)) < kSerialBytes) threads = 1;
    parallel_for(threads, tasks, [&](int64_t task) {
        const int64_t first = task % parts * kRanks, last = first + kRanks < p.R ? first + kRanks : p.R;
        shrink<Words>(p, sorted, sorted.blocks[task / parts], first, last);
    });
    return 0;
}

template <class Words, class Index>
int64_t run_expand(const Problem& p, const Index* adapter, int64_t threads) {
    const Sorted sorted(adapter, p.T, p.L);
    if (sorted.wrong) return sorted.wrong;
    int64_t parts = 0;
    for (int64_t i = 0; i < p.P; ++i) parts += (p.ends[i] - (i ? p.ends[i - 1] : 0) + kWide - 1) / kWide;
    if (sorted.num_blocks * p.R * p.N * int64_t(sizeof(typename Words::Input)) < kSerialBytes) threads = 1;
    parallel_for(threads, sorted.num_blocks * parts, [&](int64_t task) {
        int64_t part = task % parts, slice = 0, begin = 0;
        for (;; begin = p.ends[slice++]) {
            const int64_t inside = (p.ends[slice] - begin + kWide - 1) / kWide;
            if (part < inside) break;
            part -= inside;
        }
        const int64_t first = begin + part * kWide, last = first + kWide < p.ends[slice] ? first + kWide : p.ends[slice];
        expand<Words>(p, sorted, sorted.blocks[task / parts], slice, first, last);
    });
    return 0;
}

// Calls run with words of a dtype, 0 float32, 1 bfloat16, and with the rows' adapters as they are.
template <class Run>
int64_t with_types(int64_t dtype, int64_t wide_index, const void* adapter, Run run) {
    const auto with = [&](auto w) { return wide_index ? run(w, (const int64_t*)adapter) : run(w, (const int32_t*)adapter); };
    return dtype ? with(Words16{}) : with(Words32{});
}

}  // namespace

// s (T, R) = x (T, D) a[adapter]ᵀ for a (L, R, D); zeros where the adapter is below 0. dtype: 0 float32, 1 bfloat16.
// Returns 0, or 1 + the first row whose adapter is not below L. x's row stride is in bytes.
extern "C" int64_t seamwise_lora_shrink(int64_t dtype, int64_t wide_index, const char* x, const char* a, const void* adapter,
                                        char* s, int64_t T, int64_t D, int64_t R, int64_t L, int64_t x_stride,
                                        int64_t num_threads) {
    const Problem p{x, a, nullptr, s, nullptr, nullptr, T, D, R, 0, L, 1, x_stride, 0, R * (dtype ? 2 : 4)};
    return with_types(dtype, wide_index, adapter,
                      [&](auto words, auto* at) { return run_shrink<decltype(words)>(p, at, num_threads); });
}

// out (T, N) = y + scaling[adapter, slice] · (s[:, slice] b[adapter]) for s (T, P R) and b (L, R, N), whose columns lie
// in P slices that end at `ends`; y where the adapter is below 0. Otherwise as above.
extern "C" int64_t seamwise_lora_expand(int64_t dtype, int64_t wide_index, const char* y, const char* s, const char* b,
                                        const void* adapter, const float* scaling, const int64_t* ends, char* out, int64_t T,
                                        int64_t R, int64_t N, int64_t L, int64_t P, int64_t y_stride, int64_t s_stride,
                                        int64_t num_threads) {
    const Problem p{s, b, y, out, scaling, ends, T, 0, R, N, L, P, s_stride, y_stride, N * (dtype ? 2 : 4)};
    return with_types(dtype, wide_index, adapter,
                      [&](auto words, auto* at) { return run_expand<decltype(words)>(p, at, num_threads); });
}
