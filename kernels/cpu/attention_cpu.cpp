// Paged attention on a CPU; the plain C interface stands at the end of the file.
//
// The softmax of a query row is defined per tile of kTile keys: scores s, their maximum m, l = sum of 2^(s - m) and
// o = sum of 2^(s - m) v are those of the tile alone, and a row's tiles are merged in order. So it does not matter who
// computes a tile: results have the same bits for any number of threads, any other requests in the step, a prompt cut
// anyhow into steps, and a long context spread over threads (which keep its tiles; the last to finish merges them).
//
// Query heads of one KV head are rows of the same GEMM, so a tile is packed once for all of them. Meanwhile the next
// one is asked for, its keys during the packing and its values during the scores' GEMM, a few at a time: the cache's
// blocks lie anywhere, which hardware prefetching cannot follow. Measured on a Zen 4 core, K and V in DRAM: 890 us
// without, 350 us with each asked for at once (32 requests of 256 tokens); 285 and 264 us (of 192, at once and so).
#include <cmath>
#include <type_traits>

#include "attention_cpu_cascade.h"
#include "attention_cpu_state.h"
#include "cpu_float8.h"

namespace {

constexpr int64_t kSerialWork = 3;  // tiles times queries up to which one thread is faster than waking the others

// The addresses of a tile's keys and values.
struct Rows {
    const float *keys[kTile], *values[kTile];
    int count = 0;
};

// Element: of queries and results; Words: what the cache's elements, Words::Element, are multiplied as.
template <class Element, class Words>
class Worker {
    using Cached = typename Words::Element;
    static_assert(Words::kPerWord == 1 || std::is_same<Element, BFloat16>::value, "pairs are of bfloat16");
    static constexpr int kWeightWords = kTile / Words::kPerWord;
    const Call& c;
    const int group, words;
    const int64_t dim, value_dim, state;
    float *queries, *keys, *values, *scores, *weights, *fresh, *merged, *zeros;
    Rows buffers[2], *now = &buffers[0], *ahead = &buffers[1];

   public:
    Worker(const Call& call, Scratch& scratch)
        : c(call), group(call.group()), words(int(call.dim) / Words::kPerWord), dim(call.dim), value_dim(call.value_dim),
          state(call.state()) {
        const int64_t rows = std::max(kTaskRows, group);
        float** const parts[] = {&queries, &keys, &values, &scores, &weights, &fresh, &merged, &zeros};
        const int64_t sizes[] = {rows * dim,    kTile * dim,  kTile * value_dim, kRows * kTile, kRows * kTile,
                                 kRows * state, rows * state, dim};
        int64_t total = 0;
        for (int64_t size : sizes) total += size;
        float* at = scratch.reserve(total);
        for (int i = 0; i < 8; at += sizes[i++]) *parts[i] = at;
        std::fill(zeros, zeros + dim, 0.f);
    }

    // `next` is the task that this thread will probably run after t, or null.
    void run(const Task& t, const Task* next) {
        const int rows = t.num_queries * group;
        pack_queries(t);
        if (begun(t)) std::memcpy(merged, t.states, rows * state * sizeof(float));
        locate(t, t.tile_begin, *ahead);
        for (int tile = t.tile_begin; tile < t.tile_end; ++tile) {
            std::swap(now, ahead);
            ahead->count = 0;
            if (tile + 1 < t.tile_end) locate(t, tile + 1, *ahead);
            else if (next) locate(*next, next->tile_begin, *ahead);
            pack_tile(rows > kRows);
            for (int row = 0; row < rows; row += kRows) {
                const int block = std::min(kRows, rows - row);
                float* const so_far = merged + row * state;
                if (t.parts > 1) attend(t, tile, row, block, rows, kept(t, tile, rows, row));
                else if (tile == t.first_tile && !begun(t)) attend(t, tile, row, block, rows, so_far);
                else if (attend(t, tile, row, block, rows, fresh)) merge(so_far, fresh, block, state);
            }
        }
        if (t.parts == 1 || __atomic_sub_fetch(t.unfinished, 1, __ATOMIC_ACQ_REL) == 0) write(t, rows);
    }

   private:
    // Whether the rows have a state already, of the tiles that their request shares.
    static bool begun(const Task& t) { return t.states && !t.tokens; }

    // Keys of the tile that this row sees; may be negative, or more than there are.
    int visible_in(const Task& t, int tile, int row) const {
        return c.visible(t.request, t.first_query + row / group) - tile * kTile;
    }

    // The first key of the tile that this row sees; may be negative, or beyond the tile.
    int first_in(const Task& t, int tile, int row) const {
        return c.first_seen(t.request, t.first_query + row / group) - tile * kTile;
    }

    bool sees(const Task& t, int tile, int row, int block) const {
        return visible_in(t, tile, row + block - 1) > 0 && first_in(t, tile, row) < kTile;
    }

    float* kept(const Task& t, int tile, int rows, int row) const {
        return t.kept + (int64_t(tile - t.first_tile) * rows + row) * state;
    }

    void pack_queries(const Task& t) {
        for (int i = 0; i < t.num_queries; ++i)
            for (int h = 0; h < group; ++h) {
                float* to = queries + (i * group + h) * words;
                const int64_t token = t.tokens ? t.tokens[i] : c.query_starts[t.request] + t.first_query + i;
                const Element* from =
                    (const Element*)c.q + token * c.q_strides[0] + (t.kv_head * group + h) * c.q_strides[1];
                if constexpr (Words::kPerWord == 1) widen(from, to, int(dim));
                else std::memcpy(to, from, words * sizeof(float));
            }
    }

    // Slots that no query of the task sees read as zeros: they may hold a NaN, and 0 * NaN is one.
    void locate(const Task& t, int tile, Rows& rows) const {
        const int32_t* table = c.block_table + t.request * c.table_stride;
        const Cached* const first_key = (const Cached*)c.k_cache + t.kv_head * c.k_strides[1];
        const Cached* const first_value = (const Cached*)c.v_cache + t.kv_head * c.v_strides[1];
        const int count = std::min(kTile, visible_in(t, tile, t.num_queries * group - 1)), size = int(c.block_size);
        const int begin = std::max(0, first_in(t, tile, 0));
        int slot = (tile * kTile + begin) / size, offset = (tile * kTile + begin) % size;
        for (int j = 0; j < begin; ++j) rows.keys[j] = rows.values[j] = zeros;
        for (int j = begin; j < count; offset = 0, ++slot) {
            const Cached* k = first_key + table[slot] * c.k_strides[0] + offset * dim;
            const Cached* v = first_value + table[slot] * c.v_strides[0] + offset * dim;
            for (const int end = std::min(count, j + size - offset); j < end; ++j, k += dim, v += dim) {
                rows.keys[j] = (const float*)k;
                rows.values[j] = (const float*)v;
            }
        }
        for (int j = count; j < kTile; ++j) rows.keys[j] = rows.values[j] = zeros;
        rows.count = count;
    }

    void pack_tile(bool pack_values_too) {
        const int64_t bytes = dim * sizeof(Cached);
        const Ahead wanted{ahead->keys, ahead->count, bytes, (now->count + kLanes - 1) / kLanes};
        for (int j = 0; j < now->count; j += kLanes) {
            wanted.ask(j / kLanes);
            Words::pack_keys(now->keys + j, words, keys + j, kTile);
        }
        const int depth = (now->count + Words::kPerWord - 1) / Words::kPerWord;
        if (pack_values_too) pack_values<Words>(now->values, depth, int(value_dim), values);
    }

    // Computes the states of `block` rows on the packed tile. Returns false when none of them sees a key there: then
    // only their first tile, into which others are merged, has a state.
    bool attend(const Task& t, int tile, int row, int block, int rows, float* into) {
        if (!sees(t, tile, row, block)) {
            if (tile == t.first_tile) forget(into, block, state);
            return false;
        }
        const int most = std::min(kTile, visible_in(t, tile, row + block - 1));
        const int depth = (most + Words::kPerWord - 1) / Words::kPerWord, vecs = int(value_dim) / kLanes;
        Panel key_panel{keys, kTile}, value_panel{values, value_dim};
        ValueRows value_rows{now->values};
        if (row == 0) {
            const int64_t bytes = value_dim * sizeof(Cached);
            key_panel.ahead = {ahead->values, ahead->count, bytes, words};
        }
        gemm<Words>(block, (most + kLanes - 1) / kLanes, queries + row * words, words, key_panel, words, scores, kTile);
        soften(t, tile, row, block, into);
        if (rows > kRows) gemm<Words>(block, vecs, weights, kWeightWords, value_panel, depth, into, state);
        else gemm<Words>(block, vecs, weights, kWeightWords, value_rows, depth, into, state);
        return true;
    }

    // weights = 2^(s - m) of `block` rows, with l and m into their states; keys that a row does not see weigh 0.
    // In two passes, so that the rows' maxima, long chains of dependent instructions, overlap each other.
    void soften(const Task& t, int tile, int row, int block, float* into) {
        constexpr int kVecs = kTile / kLanes;
        const float scale = c.scale * c.k_scale.of(t.kv_head) * Words::kUnit;
        const float factor = c.softcap > 0 ? kLog2e : scale * kLog2e;
        float *const l = into + value_dim, *const m = l + kLanes;
        for (int i = 0; i < block; ++i) {
            float* s = scores + i * kTile;
            const int visible = visible_in(t, tile, row + i), begin = first_in(t, tile, row + i);
            if (c.softcap > 0)
                for (int v = 0; v < kVecs; ++v)
                    store(s + v * kLanes, splat(c.softcap) * tanh(load(s + v * kLanes) * splat(scale / c.softcap)));
            if (visible < kTile || begin > 0) {
                IntVec lane;
                for (int j = 0; j < kLanes; ++j) lane[j] = j;
                for (int v = 0; v < kVecs; ++v) {
                    const Vec x = load(s + v * kLanes);
                    const IntVec seen = (lane < visible - v * kLanes) & (lane >= begin - v * kLanes);
                    store(s + v * kLanes, seen ? x : splat(-__builtin_inff()));
                }
            }
            Vec best = splat(kFloor);
#pragma GCC unroll 16
            for (int v = 0; v < kVecs; ++v) best = max(load(s + v * kLanes), best);
            m[i * state] = horizontal_max(best) * factor;
        }
        for (int i = 0; i < block; ++i) {
            const Vec minus_m = splat(-m[i * state]);
            Vec p[kVecs], sum = {};
#pragma GCC unroll 16
            for (int v = 0; v < kVecs; ++v)
                p[v] = exp2_nonpositive(load(scores + i * kTile + v * kLanes) * factor + minus_m);
#pragma GCC unroll 16
            for (int v = 0; v < kVecs; ++v) {
                sum += p[v];
                Words::narrow_store(weights + i * kWeightWords + v * kLanes / Words::kPerWord, p[v]);
            }
            store(l + i * state, sum);
        }
    }

    void write(const Task& t, int rows) {
        if (t.parts > 1) {
            if (!begun(t)) std::memcpy(merged, t.kept, rows * state * sizeof(float));
            for (int tile = t.first_tile + !begun(t); tile < t.last_tile; ++tile)
                for (int row = 0; row < rows; row += kRows) {
                    const int block = std::min(kRows, rows - row);
                    if (sees(t, tile, row, block))
                        merge(merged + row * state, kept(t, tile, rows, row), block, state);
                }
        }
        if (t.tokens) return (void)std::memcpy(t.states, merged, rows * state * sizeof(float));
        const float scale = c.v_scale.of(t.kv_head) * Words::kUnit;
        for (int i = 0; i < rows; ++i) {
            float *const o = merged + i * state, l = horizontal_sum(load(o + value_dim));
            const int64_t head = t.kv_head * group + i % group;
            if (c.sinks) l += std::exp2(sink(head) * kLog2e - o[value_dim + kLanes]);  // infinity: the sink takes it all
            for (int64_t d = 0; d < value_dim; d += kLanes) store(o + d, load(o + d) * splat(scale) / l);
            const int64_t token = c.query_starts[t.request] + t.first_query + i / group;
            narrow(o, (Element*)c.out + (token * c.heads + head) * value_dim, int(value_dim));
        }
    }

    float sink(int64_t head) const {
        float wide;
        if (c.narrow_sinks) widen((const BFloat16*)c.sinks + head, &wide, 1);
        else wide = ((const float*)c.sinks)[head];
        return wide;
    }
};

template <class Element, class Words>
void run_tasks(const Call& c, int64_t num_threads, const std::vector<Task>& tasks) {
    int64_t work = 0;
    for (const Task& t : tasks) work += t.work();
    if (work <= kSerialWork) num_threads = 1;
    const Task* const list = tasks.data();
    const int64_t count = tasks.size();
    parallel_for(num_threads, count, [&c, list, count, num_threads](int64_t i) {
        static thread_local Scratch scratch;
        Worker<Element, Words>(c, scratch).run(list[i], i + num_threads < count ? list + i + num_threads : nullptr);
    });
}

template <class Element, class Words>
int64_t run(const Call& c, int64_t num_threads) {
    static thread_local Plan first, rest;
    static thread_local Cascade found;
    plan_shared(c, num_threads, found, first);
    run_tasks<Element, Words>(c, num_threads, first.tasks);
    plan_own(c, num_threads, found, rest);
    run_tasks<Element, Words>(c, num_threads, rest.tasks);
    const int64_t row = c.heads * c.value_dim, used = c.query_starts[c.requests];
    std::memset((Element*)c.out + used * row, 0, (c.tokens - used) * row * sizeof(Element));
    return 0;
}

// Returns first_error, and then has written nothing; -1 for a dtype that this machine cannot convert.
int64_t compute(int64_t dtype, const Call& c, int64_t num_threads) {
    if (const int64_t error = first_error(c)) return error;
    if (dtype == 0) return run<float, FloatWords>(c, num_threads);
    if (dtype == 4) return run<float, Float8Words>(c, num_threads);
#if defined(SEAMWISE_PAIRS)
    if (dtype == 1) return run<BFloat16, BFloat16Words>(c, num_threads);
    if (dtype == 5) return run<BFloat16, Float8Pairs>(c, num_threads);
#else
    if (dtype == 1) return run<BFloat16, WidenedWords<BFloat16>>(c, num_threads);
    if (dtype == 5) return run<BFloat16, Float8Words>(c, num_threads);
#endif
#if defined(SEAMWISE_FLOAT16)
    if (dtype == 2) return run<Float16, WidenedWords<Float16>>(c, num_threads);
    if (dtype == 6) return run<Float16, Float8Words>(c, num_threads);
#endif
    return -1;
}

}  // namespace

// dtype: 0 float32, 1 bfloat16, 2 float16; 4 more where the caches hold float8_e4m3fn. Strides count elements; out and
// each (block, head) tile of a cache are contiguous, dim is a multiple of 16, scale > 0, num_threads is torch's; softcap
// is a float's bits; sinks and the caches' scales may be null; flags: 1 where each KV head has a scale of its own for
// keys, 2 for values, 4 where sinks are bfloat16; spared, where not null, gains the tiles that were read once for several requests, less one each.
// Returns first_error, and then has written nothing; -1 for a dtype that this machine cannot convert.
//
// Multi-head latent attention, absorbed, is attention over a cache (blocks, block_size, dim) with one row a token for all
// heads, which is the key, and whose first value_dim elements are the value: kv_heads is 1, and both caches are that one.
extern "C" int64_t seamwise_attention(int64_t dtype, void* out, const void* q, const void* k_cache, const void* v_cache,
                                      const int32_t* block_table, const int32_t* seq_lens, const int32_t* query_starts,
                                      int64_t tokens, int64_t heads, int64_t kv_heads, int64_t num_blocks,
                                      int64_t block_size, int64_t dim, int64_t value_dim, int64_t requests,
                                      int64_t table_width, int64_t table_stride, int64_t q_token_stride,
                                      int64_t q_head_stride, int64_t k_block_stride, int64_t k_head_stride,
                                      int64_t v_block_stride, int64_t v_head_stride, int64_t window, int64_t softcap,
                                      const void* sinks, const float* k_scale, const float* v_scale, int64_t flags,
                                      double scale, int64_t num_threads, int64_t* spared) {
    Call c{out, q, k_cache, v_cache, block_table, seq_lens, query_starts, tokens, heads, kv_heads, num_blocks,
           block_size, dim, value_dim, requests, table_width, table_stride, {q_token_stride, q_head_stride},
           {k_block_stride, k_head_stride}, {v_block_stride, v_head_stride}, float(scale), 0.f, window, sinks,
           (flags & 4) != 0, {k_scale, flags & 1}, {v_scale, flags >> 1 & 1}, spared};
    std::memcpy(&c.softcap, &softcap, sizeof(float));
    return compute(dtype, c, num_threads);
}

// The vector 2^x that attention uses, for its test: n is a multiple of 16.
extern "C" void seamwise_exp2_nonpositive(const float* in, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) store(out + i, exp2_nonpositive(load(in + i)));
}
