// Linear layer over weights packed once: y (M, N) = x (M, K) wᵀ + bias, bfloat16 in and out, float32 sums.
//
// Packed weight: panels of 32 output columns; within a panel, for each pair of inputs (2i, 2i + 1), 32 x 2 values:
// exactly what VDPBF16PS multiplies. Columns beyond N and an odd last input are zeros.
// Every output is one chain of sums in the order of K, whatever M, the threads or the block: batch invariant in bits.
// So K is never split over threads; panels are narrow instead, and 576 columns make 18 of them.
//
// One panel at a time, because it is one stream: a core's prefetchers then read weights as fast as a plain loop does.
// Measured on Zen 4, one row, weights in DRAM: 62 GB/s; two panels side by side 57, with software prefetch 52.
#include "cpu_gemm.h"
#include "cpu_threads.h"

namespace {

constexpr int kPanel = 32, kVecs = kPanel / kLanes;
constexpr int kBlockRows = kLanes == 16 ? 8 : 2;    // x kVecs sums, in registers
constexpr int64_t kChunkBytes = 384 << 10;          // of x, which stays in the L2 cache while panels pass
constexpr int64_t kSerialBytes = 96 << 10;          // of weights, times passes, below which one thread is faster

struct Linear {
    const uint16_t *x, *packed, *bias;
    uint16_t* y;
    int64_t M, N, K, x_stride, y_stride;

    int64_t pairs() const { return (K + 1) / 2; }
    const uint16_t* panel(int64_t p) const { return packed + p * pairs() * 2 * kPanel; }
};

inline Vec low_half(IntVec pair) { return (Vec)(pair << 16); }
inline Vec high_half(IntVec pair) { return (Vec)(pair & (int32_t)0xffff0000); }

inline Vec dot(Vec sum, Vec w, Vec x) {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
#else
    sum += low_half((IntVec)w) * low_half((IntVec)x);
    return sum + high_half((IntVec)w) * high_half((IntVec)x);
#endif
}

inline Vec splat_pair(const uint16_t* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return (Vec)(pair - IntVec{});
}

// y of R rows and one panel. `ahead` is asked for, half a panel, unless it is null.
template <int R>
void block(const Linear& c, int64_t m, int64_t panel, const char* ahead) {
    const uint16_t *x = c.x + m * c.x_stride, *w = c.panel(panel);
    const int columns = int(c.N - panel * kPanel < kPanel ? c.N - panel * kPanel : kPanel);
    float row[kPanel] = {};
    if (c.bias) widen((const BFloat16*)c.bias + panel * kPanel, row, columns);
    Vec sum[R][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sum[r][v] = load(row + v * kLanes);
    const auto add = [&](int64_t i, auto pair_of) __attribute__((always_inline)) {
        Vec weight[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) weight[v] = in_register(load(w + (i * kPanel + v * kLanes) * 2));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec pair = pair_of(x + r * c.x_stride + 2 * i);
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) sum[r][v] = dot(sum[r][v], weight[v], pair);
        }
    };
    const int64_t whole = c.K / 2;
    if (ahead)
        for (int64_t i = 0; i < whole; ++i) {
            __builtin_prefetch(ahead + 64 * i, 0, 2);
            add(i, splat_pair);
        }
    else
        for (int64_t i = 0; i < whole; ++i) add(i, splat_pair);
    if (c.K & 1) add(whole, [](const uint16_t* last) { return (Vec)((int32_t)*last - IntVec{}); });
    uint16_t* y = c.y + m * c.y_stride + panel * kPanel;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r, y += c.y_stride) {
#if defined(__AVX512BF16__)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
            const int left = columns - v * kLanes;
            const __mmask16 mask = left >= kLanes ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
            _mm256_mask_storeu_epi16(y + v * kLanes, mask, (__m256i)_mm512_cvtneps_pbh((__m512)sum[r][v]));
        }
#else
        for (int v = 0; v < kVecs; ++v) store(row + v * kLanes, sum[r][v]);
        narrow(row, (BFloat16*)y, columns);
#endif
    }
}

template <int R>
inline void block_of(int rows, const Linear& c, int64_t m, int64_t panel, const char* ahead) {
    if (rows == R) return block<R>(c, m, panel, ahead);
    if constexpr (R > 1) block_of<R - 1>(rows, c, m, panel, ahead);
}

// Rows [m0, m1) of one panel, in blocks of equal height. While they share it, the next panel comes from memory.
void sweep(const Linear& c, int64_t m0, int64_t m1, int64_t panel, bool more) {
    const int64_t rows = m1 - m0, blocks = (rows + kBlockRows - 1) / kBlockRows;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = m0 + rows * b / blocks, last = m0 + rows * (b + 1) / blocks;
        const bool fetch = more && blocks > 1 && b < 2;
        const char* ahead = fetch ? (const char*)c.panel(panel + 1) + b * c.pairs() * 2 * kPanel : nullptr;
        block_of<kBlockRows>(int(last - first), c, first, panel, ahead);
    }
}

}  // namespace

// Packs w (N, K; row stride in elements) into panels; `packed` has (N + 31) / 32 * ((K + 1) / 2) * 64 elements.
extern "C" int64_t seamwise_pack_linear(const uint16_t* w, uint16_t* packed, int64_t N, int64_t K, int64_t stride,
                                        int64_t num_threads) {
    const int64_t pairs = (K + 1) / 2;
    parallel_for(num_threads, (N + kPanel - 1) / kPanel, [&](int64_t panel) {
        uint16_t* to = packed + panel * pairs * 2 * kPanel;
        const int64_t columns = N - panel * kPanel < kPanel ? N - panel * kPanel : kPanel;
        int64_t done = 0;  // pairs
        if (columns == kPanel) {
            for (int v = 0; v < kPanel; v += kLanes) {
                const float* columns_of[kLanes];
                for (int j = 0; j < kLanes; ++j) columns_of[j] = (const float*)(w + (panel * kPanel + v + j) * stride);
                pack_keys(columns_of, int(K / 2), (float*)to + v, kPanel);
            }
            done = K / 2;
        }
        for (int64_t i = done; i < pairs; ++i)
            for (int64_t n = 0; n < kPanel; ++n)
                for (int64_t k = 2 * i; k < 2 * i + 2; ++k)
                    to[(i * kPanel + n) * 2 + k % 2] = n < columns && k < K ? w[(panel * kPanel + n) * stride + k] : 0;
    });
    return 0;
}

// y = x wᵀ + bias. x (M, K) and y (M, N) have row strides in elements; bias may be null.
extern "C" int64_t seamwise_linear(const uint16_t* x, const uint16_t* packed, const uint16_t* bias, uint16_t* y,
                                   int64_t M, int64_t N, int64_t K, int64_t x_stride, int64_t y_stride,
                                   int64_t num_threads) {
    const Linear c{x, packed, bias, y, M, N, K, x_stride, y_stride};
    const int64_t panels = (N + kPanel - 1) / kPanel, blocks = (M + kBlockRows - 1) / kBlockRows;
    if (panels * c.pairs() * 4 * kPanel * blocks < kSerialBytes) num_threads = 1;
    // A thread streams one contiguous share of the panels: handing out smaller ones cost 5 to 13 % at 32 and 128 rows.
    // Where there are fewer panels than threads, rows are shared out too.
    const int64_t shares = panels < num_threads ? panels : num_threads;
    const int64_t resident = kChunkBytes / (2 * K + 1) / kBlockRows * kBlockRows;
    const int64_t height = resident < kBlockRows ? kBlockRows : resident;
    int64_t chunks = (M + height - 1) / height;
    if (chunks * shares < num_threads) chunks = num_threads / shares < blocks ? num_threads / shares : blocks;
    parallel_for(num_threads, chunks * shares, [&](int64_t task) {
        const int64_t chunk = task / shares, share = task % shares;
        const int64_t m0 = M * chunk / chunks, m1 = M * (chunk + 1) / chunks;
        const int64_t last = panels * (share + 1) / shares;
        for (int64_t p = panels * share / shares; p < last; ++p) sweep(c, m0, m1, p, p + 1 < last);
    });
    return 0;
}
