// Linear layer over weights packed once: y (M, N) = x (M, K) wᵀ + bias, float32 or bfloat16, float32 sums; and, for
// bfloat16 rows, over int4 weights with scales.
//
// Packed weight: panels of 32 output columns; a panel holds, one after the other, the 32-bit words of its columns: one
// float, or the two bfloat16 of inputs (2i, 2i + 1), exactly what VDPBF16PS multiplies. Columns beyond N and an odd last
// input are zeros. An int4 word is a byte of four bits of each: inputs (2i, 2i + 1) of columns 0 … 15 in the low halves
// of its 32 bytes, of columns 16 … 31 in the high ones. A table in a register makes them bfloat16, exactly.
// Every output is summed in the order of K, whatever M, the threads or the block: batch invariant in bits. So K is
// never split over threads; panels are narrow instead, and 576 columns make 18 of them.
//
// One panel at a time, because it is one stream: a core's prefetchers then read weights as fast as a plain loop does.
// Measured on Zen 4, one row, weights in DRAM: 62 GB/s; two panels side by side 57, with software prefetch 52.
#include "cpu_gemm.h"
#include "cpu_threads.h"

namespace {

constexpr int kPanel = 32, kVecs = kPanel / kLanes;
constexpr int kBlockRows = kLanes == 16 ? 8 : 2;  // x kVecs sums, in registers
constexpr int64_t kChunkBytes = 384 << 10;        // of x, which stays in the L2 cache while panels pass
constexpr int64_t kSerialBytes = 96 << 10;        // of weights, times passes, below which one thread is faster

struct Linear {
    const char *x, *packed;
    const void* bias;
    char* y;
    int64_t M, N, K, words, x_stride, y_stride;  // strides in bytes
    int64_t panel_bytes, terms;                  // terms: words summed apart from the rest
    const float *scale = nullptr, *offset = nullptr;  // of int4: (panels, groups, 32), offset may be null
    float* x_sums = nullptr;                          // (M, groups), where there are offsets
    int64_t groups = 0;

    const char* panel(int64_t p) const { return packed + p * panel_bytes; }
};

struct Singles {  // a word is a float
    using Element = float;
    static constexpr int kPerWord = 1, kWordBytes = 4;
    static constexpr bool kScaled = false;
    static void weights(const char* w, Vec* out) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) out[v] = in_register(load(w + v * kLanes * 4));
    }
    static Vec multiply_add(Vec sum, Vec w, Vec x) { return sum + w * x; }
    static void put(float* y, Vec v, int columns) {
        if (columns == kLanes) store(y, v);
        else std::memcpy(y, &v, columns * sizeof(float));
    }
};

struct Pairs {  // a word is two bfloat16
    using Element = BFloat16;
    static constexpr int kPerWord = 2, kWordBytes = 4;
    static constexpr bool kScaled = false;
    static void weights(const char* w, Vec* out) { Singles::weights(w, out); }
#if defined(__AVX512BF16__)
    static Vec multiply_add(Vec sum, Vec w, Vec x) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
    }
    static void put(BFloat16* y, Vec v, int columns) {
        _mm256_mask_storeu_epi16(y, 0xffffu >> (kLanes - columns), (__m256i)_mm512_cvtneps_pbh((__m512)v));
    }
#else
    static Vec low(Vec pair) { return (Vec)((IntVec)pair << 16); }
    static Vec high(Vec pair) { return (Vec)((IntVec)pair & (int32_t)0xffff0000); }
    static Vec multiply_add(Vec sum, Vec w, Vec x) {
        sum += low(w) * low(x);
        return sum + high(w) * high(x);
    }
    static void put(BFloat16* y, Vec v, int columns) {
        float row[kLanes];
        store(row, v);
        narrow(row, y, columns);
    }
#endif
};

// The bfloat16 of -8 … 7, twice, so that an index needs no mask.
alignas(64) constexpr uint16_t kInt4[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

struct Nibbles : Pairs {  // a word is two int4, made bfloat16
    static constexpr int kWordBytes = 1;
    static constexpr bool kScaled = true;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    static void weights(const char* w, Vec* out) {
        const __m512i table = _mm512_load_si512(kInt4), bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)w));
        out[0] = in_register((Vec)_mm512_permutexvar_epi16(bytes, table));
        out[1] = in_register((Vec)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table));
    }
#else
    static void weights(const char* w, Vec* out) {
        uint16_t wide[2][kPanel];
        for (int j = 0; j < kPanel; ++j) {
            wide[0][j] = kInt4[(uint8_t)w[j] & 15];
            wide[1][j] = kInt4[(uint8_t)w[j] >> 4];
        }
        std::memcpy(out, wide, sizeof(wide));
    }
#endif
};

inline void widen(const float* in, float* out, int n) { std::memcpy(out, in, n * sizeof(float)); }

template <int kBytes>
inline Vec splat_word(const char* x) {
    int32_t word = 0;
    std::memcpy(&word, x, kBytes);
    return (Vec)(word - IntVec{});
}

// y of R rows and one panel. `ahead` is asked for, half a panel, unless it is null.
template <class Words, int R>
void block(const Linear& c, int64_t m, int64_t panel, const char* ahead) {
    using Element = typename Words::Element;
    const char *x = c.x + m * c.x_stride, *w = c.panel(panel);
    const int64_t first_column = panel * kPanel, whole = c.K / Words::kPerWord;
    const int columns = int(c.N - first_column < kPanel ? c.N - first_column : kPanel);
    alignas(64) float start[kPanel] = {}, total[R][kPanel];
    if (c.bias) widen((const Element*)c.bias + first_column, start, columns);
    Vec sum[R][kVecs];
    const bool parts = Words::kScaled || c.terms < c.words;
    for (int64_t begin = 0, group = 0; begin < c.words; begin += c.terms, ++group) {
        const int64_t end = c.words - begin > c.terms ? begin + c.terms : c.words;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) sum[r][v] = begin == 0 && !Words::kScaled ? load(start + v * kLanes) : Vec{};
        const auto add = [&](int64_t i, auto word_at) __attribute__((always_inline)) {
            Vec weight[kVecs];
            Words::weights(w + i * kPanel * Words::kWordBytes, weight);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec word = word_at(x + r * c.x_stride + 4 * i);
#pragma GCC unroll 8
                for (int v = 0; v < kVecs; ++v) sum[r][v] = Words::multiply_add(sum[r][v], weight[v], word);
            }
        };
        const int64_t last = end < whole ? end : whole;
        if (ahead)
            for (int64_t i = begin; i < last; ++i) {
                __builtin_prefetch(ahead + 16 * Words::kWordBytes * i, 0, 2);
                add(i, splat_word<4>);
            }
        else
            for (int64_t i = begin; i < last; ++i) add(i, splat_word<4>);
        if (last < end) add(last, splat_word<2>);
        if (!Words::kScaled && end == c.words) break;
        const int64_t at_group = (panel * c.groups + group) * kPanel;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) {
                float* at = total[r] + v * kLanes;
                if constexpr (Words::kScaled) {
                    Vec scaled = load(begin == 0 ? start + v * kLanes : at) + sum[r][v] * load(c.scale + at_group + v * kLanes);
                    if (c.offset) {
                        const float x_sum = c.x_sums[(m + r) * c.groups + group];
                        scaled += load(c.offset + at_group + v * kLanes) * splat(x_sum);
                    }
                    store(at, scaled);
                } else {
                    store(at, begin == 0 ? sum[r][v] : load(at) + sum[r][v]);
                }
            }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        Element* y = (Element*)(c.y + (m + r) * c.y_stride) + first_column;
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
            if (parts) sum[r][v] = (Words::kScaled ? Vec{} : sum[r][v]) + load(total[r] + v * kLanes);
            if (const int left = columns - v * kLanes; left > 0)
                Words::put(y + v * kLanes, sum[r][v], left < kLanes ? left : kLanes);
        }
    }
}

template <class Words, int R>
inline void block_of(int rows, const Linear& c, int64_t m, int64_t panel, const char* ahead) {
    if (rows == R) return block<Words, R>(c, m, panel, ahead);
    if constexpr (R > 1) block_of<Words, R - 1>(rows, c, m, panel, ahead);
}

// Rows [m0, m1) of one panel, in blocks of equal height. While they share it, the next panel comes from memory.
template <class Words>
void sweep(const Linear& c, int64_t m0, int64_t m1, int64_t panel, bool more) {
    const int64_t rows = m1 - m0, blocks = (rows + kBlockRows - 1) / kBlockRows;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = m0 + rows * b / blocks, last = m0 + rows * (b + 1) / blocks;
        const bool fetch = more && blocks > 1 && b < 2;
        const char* ahead = fetch ? c.panel(panel + 1) + b * c.panel_bytes / 2 : nullptr;
        block_of<Words, kBlockRows>(int(last - first), c, first, panel, ahead);
    }
}

template <class Words>
int64_t run(const Linear& c, int64_t num_threads) {
    const int64_t panels = (c.N + kPanel - 1) / kPanel, blocks = (c.M + kBlockRows - 1) / kBlockRows;
    if (panels * c.panel_bytes * blocks < kSerialBytes) num_threads = 1;
    // A thread streams one contiguous share of the panels: handing out smaller ones cost 5 to 13 % at 32 and 128 rows.
    // Where there are fewer panels than threads, rows are shared out too.
    const int64_t shares = panels < num_threads ? panels : num_threads;
    const int64_t resident = kChunkBytes / (4 * c.words) / kBlockRows * kBlockRows;
    const int64_t height = resident < kBlockRows ? kBlockRows : resident;
    int64_t chunks = (c.M + height - 1) / height;
    if (chunks * shares < num_threads) chunks = num_threads / shares < blocks ? num_threads / shares : blocks;
    parallel_for(num_threads, chunks * shares, [&](int64_t task) {
        const int64_t chunk = task / shares, share = task % shares;
        const int64_t m0 = c.M * chunk / chunks, m1 = c.M * (chunk + 1) / chunks;
        const int64_t last = panels * (share + 1) / shares;
        for (int64_t p = panels * share / shares; p < last; ++p) sweep<Words>(c, m0, m1, p, p + 1 < last);
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
                pack_keys(row_of, int(whole), (float*)to + v, kPanel);
            }
        for (int64_t i = columns == kPanel ? whole : 0; i < words; ++i)
            for (int64_t n = 0; n < kPanel; ++n) {
                to[i * kPanel + n] = 0;
                if (n < columns) std::memcpy(to + i * kPanel + n, rows + n * stride + 4 * i, i < whole ? 4 : 2);
            }
    });
    return 0;
}

// y = x wᵀ + bias. x (M, K) and y (M, N) have row strides in bytes; bias may be null. dtype: 0 float32, 1 bfloat16.
extern "C" int64_t seamwise_linear(int64_t dtype, const char* x, const char* packed, const void* bias, char* y,
                                   int64_t M, int64_t N, int64_t K, int64_t x_stride, int64_t y_stride,
                                   int64_t num_threads) {
    const int64_t words = dtype == 0 ? K : (K + 1) / 2;
    const int64_t terms = dtype == 0 ? 64 : INT64_MAX;  // bfloat16: one sum, its error is far below the operands'
    const Linear c{x, packed, bias, y, M, N, K, words, x_stride, y_stride, words * 4 * kPanel, terms};
    return dtype == 0 ? run<Singles>(c, num_threads) : run<Pairs>(c, num_threads);
}

// y = x wᵀ + bias for bfloat16 x and w = int4 · scale + offset, groups of `group` inputs sharing both. x_sums (M, groups)
// is scratch, used where offset is not null.
extern "C" int64_t seamwise_linear_int4(const char* x, const char* packed, const float* scale, const float* offset,
                                        float* x_sums, const void* bias, char* y, int64_t M, int64_t N, int64_t K,
                                        int64_t group, int64_t x_stride, int64_t y_stride, int64_t num_threads) {
    const int64_t words = (K + 1) / 2, groups = (K + group - 1) / group;
    if (offset)
        for (int64_t i = 0; i < M * groups; ++i) {
            float sum = 0;
            const int64_t first = i % groups * group, last = first + group < K ? first + group : K;
            for (int64_t k = first; k < last; ++k) {
                float value;
                widen((const BFloat16*)(x + i / groups * x_stride) + k, &value, 1);
                sum += value;
            }
            x_sums[i] = sum;
        }
    const Linear c{x, packed, bias, y, M, N, K, words, x_stride, y_stride, words * kPanel, group / 2, scale, offset, x_sums, groups};
    return run<Nibbles>(c, num_threads);
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
