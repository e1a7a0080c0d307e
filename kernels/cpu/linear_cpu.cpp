// Linear layer over weights packed once: y (M, N) = x (M, K) wᵀ + bias, float32 or bfloat16, float32 sums; and, for
// bfloat16 rows, over int4 and int8 weights with scales; or of float8 rows and weights, both with scales. Each of them for
// the experts of a mixture, too.
//
// Packed weight: panels of 32 output columns; a panel holds, one after the other, the words of its columns, as
// linear_words.h has them. Columns beyond N and an odd last input are zeros.
// Every output is summed in the order of K, whatever M, the threads or the block: batch invariant in bits. So K is
// never split over threads; panels are narrow instead, and 576 columns make 18 of them.
//
// One panel at a time, because it is one stream: a core's prefetchers then read weights as fast as a plain loop does.
// Measured on Zen 4, one row, weights in DRAM: 62 GB/s; two panels side by side 57, with software prefetch 52.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "linear_block.h"

namespace {

constexpr int64_t kChunkBytes = 384 << 10;   // of x, which stays in the L2 cache while panels pass
constexpr int64_t kSerialBytes = 96 << 10;   // of weights, times passes, below which one thread is faster

// Some rows of one panel, in blocks of equal height.
template <class Words>
void sweep(const Linear& c, Rows x, int64_t rows, int64_t panel, const char* w, bool more) {
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = rows * b / blocks, last = rows * (b + 1) / blocks;
        const NextPanel next{more ? c.panel(panel + 1) : nullptr, blocks, b};
        rows_of<Words>(int(last - first), c, {x.at(first), x.stride}, first, panel, w, next);
    }
}

// Whether blocks read rows in another form than x has.
template <class Words>
constexpr bool kWiden = std::is_same_v<typename Words::Input, Float8> || (!kPairs && Words::kPerWord == 2);

// Returns `count` rows of x, of which row_at(i) is the i-th, as blocks read them, in memory of this thread: floats where
// pairs are not multiplied.
template <class Words, class RowAt>
Rows gathered(const Linear& c, int64_t count, RowAt row_at) {
    using Input = typename Words::Input;
    static thread_local Scratch scratch;
    const int64_t width = c.words * (!kPairs && kWiden<Words> ? 2 : 1) + 16;  // rows a power of two apart would share sets of the cache
    float* to = scratch.reserve(count * width);
    for (int64_t i = 0; i < count; ++i) {
        float* row = to + i * width;
        if constexpr (std::is_same_v<Input, Float8>) {
            widen_row((const Float8*)row_at(i), row, c.K);
        } else if constexpr (kWiden<Words>) {
            widen((const BFloat16*)row_at(i), row, int(c.K));
            if (c.K < 2 * c.words) row[c.K] = 0;
        } else {
            std::memcpy(row, row_at(i), c.K * sizeof(Input));
        }
    }
    return {(const char*)to, int64_t(width * sizeof(float))};
}

// Returns a panel in memory of this thread: as bfloat16 words where those are multiplied, else as floats.
template <class Words>
const char* unpack(const Linear& c, int64_t panel) {
    static thread_local Scratch scratch;
    constexpr int kTerms = kPairs ? 1 : 2;
    float* to = scratch.reserve(c.words * kPanel * kTerms);
    const char* w = c.panel(panel);
    for (int64_t i = 0; i < c.words; ++i, w += kPanel * Words::kWordBytes, to += kPanel * kTerms) {
        Vec kept[kVecs], out[kVecs];
        if constexpr (!kPairs) Words::template read<kVecs, 0>(w, kept);
        for (int t = 0; t < kTerms; ++t) {
            if constexpr (kPairs) Words::template weights<kVecs, 0>(w, out);
            else Words::template widen<kVecs, 0>(w, kept, t, out);
            for (int v = 0; v < kVecs; ++v) store(to + t * kPanel + v * kLanes, out[v]);
        }
    }
    return (const char*)(to - c.words * kPanel * kTerms);
}

// Some rows of one panel; what several blocks of rows read is unpacked once.
template <class Words>
void sweep_panel(const Linear& c, Rows x, int64_t rows, int64_t panel, bool more) {
    if constexpr (Words::kScaled)
        if (rows > kBlockRows) return sweep<Unpacked>(c, x, rows, panel, unpack<Words>(c, panel), more);
    sweep<Words>(c, x, rows, panel, c.panel(panel), more);
}

float sum(const BFloat16* x, int64_t count) {
    constexpr int kStep = 2 * kLanes;
    Vec total{};
    for (int64_t k = 0; k < count; k += kStep) {
        BFloat16 part[kStep] = {};
        if (count - k < kStep) std::memcpy(part, x + k, (count - k) * sizeof(BFloat16));
        const Vec pairs = load(count - k < kStep ? part : x + k);
        if constexpr (kPairs) total = Pairs::multiply_add(total, (Vec)(0x3f803f80 - IntVec{}), pairs);
        else total = total + Pairs::widened(pairs, 0) + Pairs::widened(pairs, 1);
    }
    return horizontal_sum(total);
}

// Sums of a row's groups, which an offset is multiplied by.
void sum_groups(const Linear& c, const char* row, float* to) {
    for (int64_t g = 0, k = 0; g < c.groups; ++g, k += 2 * c.terms)
        to[g] = sum((const BFloat16*)row + k, std::min(c.K - k, 2 * c.terms));
}

// Returns how many rows of x, in whole blocks, stay in the L2 cache.
template <class Words>
int64_t resident_rows(const Linear& c) {
    const int64_t x_bytes = c.words * (kPairs || Words::kPerWord == 1 ? 4 : 8);
    return std::max<int64_t>(kChunkBytes / x_bytes / kBlockRows, 1) * kBlockRows;
}

// y[s] = x[s / top_k] w[e]ᵀ + bias[e] for the slots s in order[starts[e] … starts[e + 1]) of each expert e, whose panels
// follow those of the one before; N is a multiple of 32. The other slots, from starts[experts] on, are zeros.
// Without an order it is one layer, of all rows as they stand.
// A task is some rows of one expert by a share of its panels; each expert is a linear layer of its own.
template <class Words>
int64_t run(const Linear& all, const int32_t* order, const int32_t* starts, int64_t experts, int64_t top_k,
            int64_t num_threads) {
    struct Task {
        int64_t expert, first, count;
    };
    const int32_t whole[2] = {0, int32_t(all.M)};
    if (!order) starts = whole, experts = 1;
    for (int64_t s = starts[experts]; s < all.M; ++s) std::memset(all.y + order[s] * all.y_stride, 0, all.y_stride);
    const int64_t panels = (all.N + kPanel - 1) / kPanel, height = resident_rows<Words>(all);
    const auto blocks = [&](int64_t e) -> int64_t { return (starts[e + 1] - starts[e] + kBlockRows - 1) / kBlockRows; };
    int64_t passes = 0;
    for (int64_t e = 0; e < experts; ++e) passes += blocks(e);
    if (panels * all.panel_bytes * passes < kSerialBytes) num_threads = 1;
    // A thread streams one contiguous share of the panels: handing out smaller ones cost 5 to 13 % at 32 and 128 rows.
    // Where there are fewer panels than threads, rows are shared out too.
    const int64_t shares = std::max<int64_t>(std::min(panels, num_threads), 1);
    static thread_local std::vector<Task> tasks;
    tasks.clear();
    for (int64_t e = 0; e < experts; ++e) {
        const int64_t rows = starts[e + 1] - starts[e];
        int64_t chunks = (rows + height - 1) / height;
        if (chunks * shares < num_threads) chunks = std::min(num_threads / shares, blocks(e));
        for (int64_t i = 0; i < chunks; ++i)
            tasks.push_back({e, starts[e] + rows * i / chunks, rows * (i + 1) / chunks - rows * i / chunks});
    }
    const Task* task_at = tasks.data();  // another thread has another `tasks`
    parallel_for(num_threads, tasks.size() * shares, [&](int64_t i) {
        const Task task = task_at[i / shares];
        const int64_t share = i % shares, last = panels * (share + 1) / shares;
        const int64_t first_panel = task.expert * panels;
        Linear c = all;
        c.packed += first_panel * c.panel_bytes;
        if (c.bias) c.bias = (const char*)c.bias + task.expert * c.y_stride;
        if (order) c.places = order + task.first;
        else c.y += task.first * c.y_stride;
        const auto row = [&](int64_t m) { return order ? c.places[m] / top_k : task.first + m; };
        const auto row_at = [&](int64_t m) { return c.x + row(m) * c.x_stride; };
        if constexpr (Words::kScaled) {
            static thread_local Scratch sums;
            float* own = sums.reserve(task.count * c.groups);
            c.scale += first_panel * c.groups * c.scale_columns;
            if (c.offset) {
                c.offset += first_panel * c.groups * kPanel;
                for (int64_t m = 0; m < task.count; ++m) sum_groups(c, row_at(m), own + m * c.groups);
                c.x_sums = own;
            } else if (c.x_scale) {
                for (int64_t m = 0; m < task.count; ++m)
                    std::memcpy(own + m * c.groups, c.x_scale + row(m) * c.groups, c.groups * sizeof(float));
                c.x_scale = own;
            }
        }
        Rows x{row_at(0), c.x_stride};
        if (order || kWiden<Words>) x = gathered<Words>(c, task.count, row_at);
        for (int64_t p = panels * share / shares; p < last; ++p) sweep_panel<Words>(c, x, task.count, p, p + 1 < last);
    });
    return 0;
}

}  // namespace

// Packs w (N, K; row stride in bytes) of `element` bytes, 4 or 2, into panels: 32 columns of ceil(K / (4 / element))
// words each.
extern "C" int64_t seamwise_pack_linear(const char* w, uint32_t* packed, int64_t element, int64_t N, int64_t K,
                                        int64_t stride, int64_t num_threads) {
    const int64_t whole = K * element / 4, words = (K * element + 3) / 4;
    parallel_for(num_threads, (N + kPanel - 1) / kPanel, [&](int64_t panel) {
        const char* rows = w + panel * kPanel * stride;
        uint32_t* to = packed + panel * words * kPanel;
        const int64_t columns = N - panel * kPanel < kPanel ? N - panel * kPanel : kPanel;
        if (columns == kPanel)
            for (int v = 0; v < kPanel; v += kLanes) {
                const float* row_of[kLanes];
                for (int j = 0; j < kLanes; ++j) row_of[j] = (const float*)(rows + (v + j) * stride);
                pack_words(row_of, int(whole), (float*)to + v, kPanel);
            }
        for (int64_t i = columns == kPanel ? whole : 0; i < words; ++i)
            for (int64_t n = 0; n < kPanel; ++n) {
                to[i * kPanel + n] = 0;
                if (n < columns) std::memcpy(to + i * kPanel + n, rows + n * stride + 4 * i, i < whole ? 4 : 2);
            }
    });
    return 0;
}

// y = x wᵀ + bias, or y[s] = x[s / top_k] w[e]ᵀ + bias[e] for experts' slots, where `order` is not null: see run.
//
// kind        of the words: 0 float32, 1 bfloat16, 2 int4, 3 int8, 4 float8. x is float32, bfloat16 or, for 4, float8
// bias, y     float32 where `floats`, else bfloat16, for kinds from 2 on; else as x. bias may be null
// M           rows of y; strides are in bytes
// group       inputs that share a scale and an offset, for kinds from 2 on: w = value · scale + offset
// scale       (panels, groups, scale_columns): 32, a column's own, or 1, a panel's
// x_scale     of each group of each of x's rows, for float8; offset and x_scale may be null
extern "C" int64_t seamwise_linear(int64_t kind, const char* x, const char* packed, const void* bias, char* y, int64_t M,
                                   int64_t N, int64_t K, int64_t x_stride, int64_t y_stride, int64_t floats, int64_t group,
                                   const float* scale, int64_t scale_columns, const float* offset, const float* x_scale,
                                   const int32_t* order,
                                   const int32_t* starts, int64_t experts, int64_t top_k, int64_t num_threads) {
    const auto call = [&](auto word) {
        using Words = decltype(word);
        const int64_t words = (K + Words::kPerWord - 1) / Words::kPerWord, panel_bytes = words * kPanel * Words::kWordBytes;
        // bfloat16: one sum, its error is far below the operands'
        const int64_t terms = Words::kScaled ? group / 2 : Words::kPerWord == 1 ? 64 : INT64_MAX;
        Linear c{x, packed, bias, y, M, N, K, words, x_stride, y_stride, panel_bytes, terms};
        if (Words::kScaled)
            c.scale = scale, c.scale_columns = scale_columns, c.offset = offset, c.x_scale = x_scale, c.groups = (K + group - 1) / group, c.floats = floats;
        return run<Words>(c, order, starts, experts, top_k, num_threads);
    };
    if (kind == 0) return call(Singles{});
    if (kind == 1) return call(Pairs{});
    if (kind == 2) return call(Nibbles{});
    return kind == 3 ? call(Bytes{}) : call(Floats8{});
}

// out (tokens, K) = rows of w (N, K) at `index`, from its panels. Returns 0, or 1 + the first token whose index lies
// outside 0 … N - 1, and then has written nothing.
extern "C" int64_t seamwise_gather_packed(const uint32_t* packed, const int64_t* index, char* out, int64_t element,
                                          int64_t tokens, int64_t N, int64_t K, int64_t num_threads) {
    for (int64_t t = 0; t < tokens; ++t)
        if (index[t] < 0 || index[t] >= N) return 1 + t;
    const int64_t words = (K * element + 3) / 4, bytes = K * element;
    if (tokens * words * 64 < kSerialBytes) num_threads = 1;  // each word is a cache line
    parallel_for(num_threads, tokens, [&](int64_t t) {
        const uint32_t* from = packed + index[t] / kPanel * words * kPanel + index[t] % kPanel;
        for (int64_t i = 0; i < words; ++i, from += kPanel)
            std::memcpy(out + t * bytes + 4 * i, from, 4 * i + 4 <= bytes ? 4 : 2);
    });
    return 0;
}
