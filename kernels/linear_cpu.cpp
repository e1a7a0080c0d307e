// Linear layer over weights packed once: y (M, N) = x (M, K) wᵀ + bias, bfloat16 in and out, float32 sums.
//
// Packed weight: panels of 32 output columns; within a panel, for each pair of inputs (2i, 2i + 1), 32 x 2 values:
// exactly what one VDPBF16PS pair of registers reads. Columns beyond N and an odd last input are zeros.
// Every output is one chain of sums in the order of K, whatever M, the threads or the tile: batch invariant in bits.
#include "cpu_simd.h"
#include "cpu_threads.h"

namespace {

constexpr int kPanel = 32;  // columns: two registers

#if defined(__AVX512BF16__)
typedef __m512 Acc;
inline Acc zero() { return _mm512_setzero_ps(); }
inline Acc dot_pairs(Acc sum, const uint16_t* w, __m512i x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(w), (__m512bh)x);
}
inline __m512i pair(const uint16_t* x) {
    int32_t both;
    std::memcpy(&both, x, 4);
    return _mm512_set1_epi32(both);
}
inline __m512i last_of_odd(const uint16_t* x) { return _mm512_set1_epi32(*x); }

// Adds R rows x P panels over the inputs [k0, k1), both even but for the last odd input.
template <int R, int P>
inline void tile(const uint16_t* x, int64_t ldx, const uint16_t* w, int64_t panel_stride, int64_t pairs, bool odd,
                 Acc (&sum)[R][2 * P]) {
    for (int64_t i = 0; i < pairs; ++i) {
        // 1 KiB ahead: a panel is a stream of its own, and the hardware prefetcher stops at each page.
        for (int p = 0; p < P; ++p)
            for (int h = 0; h < 2; ++h) _mm_prefetch((const char*)(w + p * panel_stride + i * 64 + h * 32) + 1024, _MM_HINT_T0);
        for (int r = 0; r < R; ++r) {
            const __m512i xs = pair(x + r * ldx + 2 * i);
            for (int p = 0; p < P; ++p)
                for (int h = 0; h < 2; ++h)
                    sum[r][2 * p + h] = dot_pairs(sum[r][2 * p + h], w + p * panel_stride + i * 64 + h * 32, xs);
        }
    }
    if (odd)
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p)
                for (int h = 0; h < 2; ++h)
                    sum[r][2 * p + h] = dot_pairs(sum[r][2 * p + h], w + p * panel_stride + pairs * 64 + h * 32,
                                                  last_of_odd(x + r * ldx + 2 * pairs));
}

inline Acc bias_of(const uint16_t* bias, int64_t n, int64_t left) {
    const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
    const __m256i bits = bias ? _mm256_maskz_loadu_epi16(mask, bias + n) : _mm256_setzero_si256();
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void put(uint16_t* y, Acc sum, int64_t left) {
    const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
    _mm256_mask_storeu_epi16(y, mask, (__m256i)_mm512_cvtneps_pbh(sum));
}
#else
// Plain vectors: the same layout and the same order of sums, pairs widened to float32.
struct Acc {
    float v[16];
};
inline Acc zero() { return Acc{}; }
inline float wide(uint16_t bits) {
    const uint32_t u = (uint32_t)bits << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
template <int R, int P>
inline void tile(const uint16_t* x, int64_t ldx, const uint16_t* w, int64_t panel_stride, int64_t pairs, bool odd,
                 Acc (&sum)[R][2 * P]) {
    for (int64_t i = 0; i < pairs + odd; ++i)
        for (int r = 0; r < R; ++r) {
            const float a = wide(x[r * ldx + 2 * i]), b = i < pairs ? wide(x[r * ldx + 2 * i + 1]) : 0.f;
            for (int p = 0; p < P; ++p)
                for (int h = 0; h < 2; ++h)
                    for (int c = 0; c < 16; ++c) {
                        const uint16_t* at = w + p * panel_stride + i * 64 + h * 32 + 2 * c;
                        sum[r][2 * p + h].v[c] += a * wide(at[0]) + b * wide(at[1]);
                    }
        }
}
inline Acc bias_of(const uint16_t* bias, int64_t n, int64_t left) {
    Acc acc{};
    for (int c = 0; c < 16 && c < left && bias; ++c) acc.v[c] = wide(bias[n + c]);
    return acc;
}
inline void put(uint16_t* y, Acc sum, int64_t left) {
    narrow(sum.v, (BFloat16*)y, int(left < 16 ? (left < 0 ? 0 : left) : 16));
}
#endif

struct Call {
    const uint16_t *x, *w, *bias;
    uint16_t* y;
    int64_t M, N, K, ldx, ldy, panel_stride;
};

template <int R, int P>
void block(const Call& c, int64_t m, int64_t panel) {
    Acc sum[R][2 * P];
    for (int p = 0; p < P; ++p)
        for (int h = 0; h < 2; ++h) {
            const int64_t n = (panel + p) * kPanel + 16 * h;
            const Acc start = bias_of(c.bias, n, c.N - n);
            for (int r = 0; r < R; ++r) sum[r][2 * p + h] = start;
        }
    tile<R, P>(c.x + m * c.ldx, c.ldx, c.w + panel * c.panel_stride, c.panel_stride, c.K / 2, c.K & 1, sum);
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p)
            for (int h = 0; h < 2; ++h) {
                const int64_t n = (panel + p) * kPanel + 16 * h;
                put(c.y + (m + r) * c.ldy + n, sum[r][2 * p + h], c.N - n);
            }
}

template <int P>
void rows(const Call& c, int64_t m0, int64_t m1, int64_t panel) {
    int64_t m = m0;
    for (; m + 6 <= m1; m += 6) block<6, P>(c, m, panel);
    switch (m1 - m) {
        case 5: return block<5, P>(c, m, panel);
        case 4: return block<4, P>(c, m, panel);
        case 3: return block<3, P>(c, m, panel);
        case 2: return block<2, P>(c, m, panel);
        case 1: return block<1, P>(c, m, panel);
    }
}

}  // namespace

// Packs w (N, K; row stride in elements) into panels; `packed` has (N + 31) / 32 * ((K + 1) / 2) * 64 elements.
extern "C" int64_t seamwise_pack_linear(const uint16_t* w, uint16_t* packed, int64_t N, int64_t K, int64_t stride,
                                        int64_t num_threads) {
    const int64_t pairs = (K + 1) / 2;
    parallel_for(num_threads, (N + kPanel - 1) / kPanel, [&](int64_t panel) {
        uint16_t* to = packed + panel * pairs * 64;
        for (int64_t i = 0; i < pairs; ++i)
            for (int64_t c = 0; c < kPanel; ++c)
                for (int64_t k = 2 * i; k < 2 * i + 2; ++k, ++to)
                    *to = panel * kPanel + c < N && k < K ? w[(panel * kPanel + c) * stride + k] : 0;
    });
    return 0;
}

// y = x wᵀ + bias. x (M, K) and y (M, N) have row strides in elements; bias may be null.
extern "C" int64_t seamwise_linear(const uint16_t* x, const uint16_t* packed, const uint16_t* bias, uint16_t* y,
                                   int64_t M, int64_t N, int64_t K, int64_t ldx, int64_t ldy, int64_t num_threads) {
    const Call c{x, packed, bias, y, M, N, K, ldx, ldy, (K + 1) / 2 * 64};
    const int64_t panels = (N + kPanel - 1) / kPanel;
    // Few rows: each thread streams one contiguous share of the weight. Many: tasks of 96 rows x 8 panels, so that
    // the rows stay in the L1 or L2 cache while the panels pass, and the threads end together.
    const bool few = M <= 48;
    const int64_t share = few ? (panels + num_threads - 1) / num_threads : 8, height = few ? M : 96;
    const int64_t across = (panels + share - 1) / share, down = (M + height - 1) / height;
    parallel_for(num_threads, across * down, [&](int64_t task) {
        const int64_t p0 = task % across * share, p1 = p0 + share < panels ? p0 + share : panels;
        const int64_t m0 = task / across * height, m1 = m0 + height < M ? m0 + height : M;
        int64_t panel = p0;
        for (; panel + 2 <= p1; panel += 2) rows<2>(c, m0, m1, panel);
        if (panel < p1) rows<1>(c, m0, m1, panel);
    });
    return 0;
}
