// One panel of a packed linear layer times a few rows, in registers. Every output is one chain of sums in the order of
// K (for scaled words: one a group; for floats: one for 64 inputs), whatever the block: so it has the same bits.
//
// Where pairs of bfloat16 are multiplied, a block is 8 rows x 32 columns. Elsewhere rows are floats, widened before,
// and a block has 12 sums: 6 rows x 2 vectors of columns, fewer rows x more.
#pragma once
#include "cpu_threads.h"
#include "linear_words.h"

constexpr int kBlockRows = kPairs ? 8 : 6;

struct Linear {
    const char *x, *packed;
    const void* bias;
    char* y;
    int64_t M, N, K, words, x_stride, y_stride;  // strides in bytes
    int64_t panel_bytes, terms;                  // terms: words summed apart from the rest
    const float *scale = nullptr, *offset = nullptr;  // (panels, groups, scale_columns), (panels, groups, 32) or null
    int64_t scale_columns = kPanel;                   // or 1, which serves a panel
    float* x_sums = nullptr;                          // (M, groups), where there are offsets
    int64_t groups = 0;
    const float* x_scale = nullptr;  // (M, groups), of float8 rows
    bool floats = false;             // whether y and bias of scaled words are float32, else bfloat16
    const int32_t* places = nullptr;  // of rows in y; null: a row's own number

    const char* panel(int64_t p) const { return packed + p * panel_bytes; }
};

// Rows of x as blocks read them: row m at data + (m - first) * stride.
struct Rows {
    const char* data;
    int64_t stride;
    const char* at(int64_t row) const { return data + row * stride; }
};

template <int kBytes>
inline Vec splat_word(const char* x) {
    int32_t word = 0;
    std::memcpy(&word, x, kBytes);
    return (Vec)(word - IntVec{});
}

// sum += the words [begin, end) of a panel, at w, times R rows of x; `ahead`, unless null, is asked for meanwhile.
template <class Words, int R, int V, int kFirst>
__attribute__((always_inline)) inline void multiply(const Linear& c, Rows x, const char* w, int64_t begin, int64_t end,
                                                    const char* ahead, Vec (&sum)[R][V]) {
    const int64_t ahead_bytes = c.panel_bytes / c.words / 2;
    constexpr int kStep = kPanel * Words::kWordBytes;
    // A block of few columns reads every second line of a panel, which no hardware prefetcher takes for a stream.
    constexpr bool kSkips = V < kVecs && kStep > 64 && kFirst == 0;
    const auto ask = [&](int64_t i) __attribute__((always_inline)) {
        if (ahead) __builtin_prefetch(ahead + ahead_bytes * i, 0, 2);
        else
            for (int line = 0; line < kStep; line += 64) __builtin_prefetch(w + (i + 12) * kStep + line);
    };
    if constexpr (kPairs || Words::kPerWord == 1) {
        const auto add = [&](int64_t i, auto word_at) __attribute__((always_inline)) {
            Vec weight[V];
            Words::template weights<V, kFirst>(w + i * kStep, weight);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec word = word_at(x.at(r) + 4 * i);
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) sum[r][v] = Words::multiply_add(sum[r][v], weight[v], word);
            }
        };
        const int64_t whole = c.K / Words::kPerWord, last = end < whole ? end : whole;
        if (ahead || kSkips)
            for (int64_t i = begin; i < last; ++i) ask(i), add(i, splat_word<4>);
        else
            for (int64_t i = begin; i < last; ++i) add(i, splat_word<4>);
        if (last < end) add(last, splat_word<2>);
    } else {
        const auto add = [&](int64_t i) __attribute__((always_inline)) {
            Vec kept[V], weight[V];
            Words::template read<V, kFirst>(w + i * kStep, kept);
#pragma GCC unroll 2
            for (int t = 0; t < 2; ++t) {
                asm volatile("" ::: "memory");  // else both inputs are widened at once
                Words::template widen<V, kFirst>(w + i * kStep, kept, t, weight);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const Vec one = splat(*(const float*)(x.at(r) + 8 * i + 4 * t));
#pragma GCC unroll 8
                    for (int v = 0; v < V; ++v) sum[r][v] = accumulate(sum[r][v], weight[v], one);
                }
            }
        };
        if (ahead || kSkips)
            for (int64_t i = begin; i < end; ++i) ask(i), add(i);
        else
            for (int64_t i = begin; i < end; ++i) add(i);
    }
}

// y of R rows from m on, at x, and V vectors of columns from vector kFirst of one panel, whose words are at w.
template <class Words, int R, int V, int kFirst>
void block(const Linear& c, Rows x, int64_t m, int64_t panel, const char* w, const char* ahead) {
    const bool floats = Words::kScaled ? c.floats : Words::kPerWord == 1;
    const int64_t first_column = panel * kPanel + kFirst * kLanes;
    const int columns = int(c.N - first_column < V * kLanes ? c.N - first_column : V * kLanes);
    if (columns <= 0) return;
    alignas(64) float start[V * kLanes] = {}, total[R][V * kLanes];
    if (c.bias && floats) widen((const float*)c.bias + first_column, start, columns);
    else if (c.bias) widen((const BFloat16*)c.bias + first_column, start, columns);
    Vec sum[R][V];
    const bool parts = Words::kScaled || c.terms < c.words;
    for (int64_t begin = 0, group = 0; begin < c.words; begin += c.terms, ++group) {
        const int64_t end = c.words - begin > c.terms ? begin + c.terms : c.words;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[r][v] = begin == 0 && !Words::kScaled ? load(start + v * kLanes) : Vec{};
        multiply<Words, R, V, kFirst>(c, x, w, begin, end, ahead, sum);
        if (!Words::kScaled && end == c.words) break;
        const int64_t at_group = (panel * c.groups + group) * kPanel + kFirst * kLanes;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                float* at = total[r] + v * kLanes;
                if constexpr (Words::kScaled) {
                    const Vec before = load(begin == 0 ? start + v * kLanes : at);
                    if (c.x_scale) sum[r][v] = sum[r][v] * splat(c.x_scale[(m + r) * c.groups + group]);
                    const float* scales = c.scale + (panel * c.groups + group) * c.scale_columns;
                    const Vec scale = c.scale_columns == 1 ? splat(*scales) : load(scales + (kFirst + v) * kLanes);
                    Vec scaled = fused(before, sum[r][v], scale);
                    if (c.offset) {
                        const float x_sum = c.x_sums[(m + r) * c.groups + group];
                        scaled = fused(scaled, load(c.offset + at_group + v * kLanes), splat(x_sum));
                    }
                    store(at, scaled);
                } else {
                    store(at, begin == 0 ? sum[r][v] : load(at) + sum[r][v]);
                }
            }
    }
    const auto put = [&](int r, int v, Vec value) __attribute__((always_inline)) {
        const int64_t row = c.places ? c.places[m + r] : m + r;
        char* y = c.y + row * c.y_stride;
        const int64_t column = first_column + v * kLanes;
        const int left = columns - v * kLanes, count = left < kLanes ? left : kLanes;
        if (left > 0 && floats) Singles::put((float*)y + column, value, count);
        else if (left > 0) Pairs::put((BFloat16*)y + column, value, count);
    };
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            float* at = total[r] + v * kLanes;
            if (parts) sum[r][v] = (Words::kScaled ? Vec{} : sum[r][v]) + load(at);
            if constexpr (kPairs) put(r, v, sum[r][v]);
            else store(at, sum[r][v]);
        }
    if constexpr (!kPairs)  // narrowing takes many instructions: inlined 12 times, it doubled the time to compile
#pragma GCC unroll 1
        for (int i = 0; i < R * V; ++i) put(i / V, i % V, load(total[i / V] + i % V * kLanes));
}

// Vectors of columns that a block of R rows takes at once.
constexpr int vecs_of(int rows) {
    int vecs = kVecs;
    while (!kPairs && vecs > 2 && rows * vecs > 12) vecs /= 2;
    return vecs;
}

// While blocks share a panel, the next one comes from memory, half of it in each of the first two passes over the panel.
struct NextPanel {
    const char* data;  // or null
    int64_t blocks, block;
};

template <class Words, int R, int kFirst = 0>
void columns_of(const Linear& c, Rows x, int64_t m, int64_t panel, const char* w, const NextPanel& next) {
    constexpr int kWide = vecs_of(R), kParts = kVecs / kWide;
    const int64_t pass = next.block * kParts + kFirst / kWide;
    const bool ask = next.data && next.blocks * kParts > 1 && pass < 2;
    block<Words, R, kWide, kFirst>(c, x, m, panel, w, ask ? next.data + pass * (c.panel_bytes / 2) : nullptr);
    if constexpr (kFirst + kWide < kVecs) columns_of<Words, R, kFirst + kWide>(c, x, m, panel, w, next);
}

template <class Words, int R = kBlockRows>
inline void rows_of(int rows, const Linear& c, Rows x, int64_t m, int64_t panel, const char* w, const NextPanel& next) {
    if (rows == R) return columns_of<Words, R>(c, x, m, panel, w, next);
    if constexpr (R > 1) rows_of<Words, R - 1>(rows, c, x, m, panel, w, next);
}
