// A small GEMM for the CPU kernels, and the operands it reads: packed panels, and rows behind pointers (a paged cache).
//
// A "word" is 32 bits of an operand: one float, or two consecutive bfloat16 where the machine multiplies such pairs
// (AVX-512 BF16). Both kinds share the packings and the GEMM; elements of other types are widened to float first.
#pragma once
#include "cpu_simd.h"

// The rows of a square of kLanes x kLanes words become its columns.
inline void transpose(Vec* rows) {
#if defined(__AVX512F__)
    __m512i *const r = (__m512i*)rows, *const column = r, t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {  // u[4 i + j] holds column 4 L + j of rows 4 i .. 4 i + 3 in its 128-bit lane L
        const __m512i a = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
        column[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        column[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        column[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        column[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
#elif defined(__AVX__)
    __m256 *const r = (__m256*)rows, t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; ++i) {  // u[i] holds columns i and 4 + i of rows 0 … 3, u[4 + i] of rows 4 … 7
        r[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
        r[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
    }
#else
    Vec columns[kLanes];
    for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < kLanes; ++j) columns[i][j] = rows[j][i];
    for (int i = 0; i < kLanes; ++i) rows[i] = columns[i];
#endif
}

// The first `count` words at p, then zeros.
inline Vec load_words(const float* p, int count) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_loadu_epi32((1u << count) - 1, p);
#else
    if (count == kLanes) return load(p);
    Vec v = {};
    std::memcpy(&v, p, count * sizeof(float));
    return v;
#endif
}

// panel[w * stride + j] = word w of keys[j], for kLanes keys.
inline void pack_words(const float* const* keys, int words, float* panel, int64_t stride) {
    for (int w = 0; w < words; w += kLanes) {
        const int columns = words - w < kLanes ? words - w : kLanes;
        Vec square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = load_words(keys[i] + w, columns);
        transpose(square);
        for (int i = 0; i < columns; ++i) store(panel + (w + i) * stride, square[i]);
    }
}

struct FloatWords {
    using Element = float;
    static constexpr int kPerWord = 1;
    static constexpr float kUnit = 1.f;  // what products are to be multiplied with, exactly: a power of two
    static constexpr int kChunk = 16;  // terms summed before their sum joins the whole: half the error of one long sum
    static Vec multiply_add(Vec acc, Vec a, Vec b) { return accumulate(acc, a, b); }
    static void narrow_store(float* to, Vec v) { store(to, v); }
    static void pack_keys(const float* const* keys, int words, float* panel, int64_t stride) {
        pack_words(keys, words, panel, stride);
    }

    // row[n] = word k, for kLanes dimensions from `first + n kLanes`, of values given as pointers to their rows.
    template <int N>
    static void fill(Vec* row, const float* const* values, int k, int first) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) row[n] = in_register(load(values[k] + first + n * kLanes));
    }
};

// kLanes elements of 16 bits as floats.
inline Vec widened(const BFloat16* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    float wide[kLanes];
    widen(p, wide, kLanes);
    return load(wide);
#endif
}
#if defined(SEAMWISE_FLOAT16)
inline Vec widened(const Float16* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = (float)((const __fp16*)p)[i];
    return v;
#endif
}
#endif

// Words are floats, and operands elements of 16 bits, widened where they are read or packed.
template <class T>
struct WidenedWords : FloatWords {
    using Element = T;

    template <int N>
    static void fill(Vec* row, const float* const* values, int k, int first) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) row[n] = widened((const T*)values[k] + first + n * kLanes);
    }

    static void pack_keys(const float* const* keys, int words, float* panel, int64_t stride) {
        for (int w = 0; w < words; w += kLanes) {  // words: a multiple of 16
            Vec square[kLanes];
            for (int i = 0; i < kLanes; ++i) square[i] = widened((const T*)keys[i] + w);
            transpose(square);
            for (int i = 0; i < kLanes; ++i) store(panel + (w + i) * stride, square[i]);
        }
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SEAMWISE_PAIRS  // the machine multiplies pairs of bfloat16
struct BFloat16Words {
    using Element = BFloat16;
    static constexpr int kPerWord = 2;
    static constexpr float kUnit = 1.f;
    static constexpr int kChunk = 0;  // one sum: its error is far below the operands'
    static Vec multiply_add(Vec acc, Vec a, Vec b) {
        return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
    }
    static void pack_keys(const float* const* keys, int words, float* panel, int64_t stride) {
        pack_words(keys, words, panel, stride);
    }
    static void narrow_store(float* to, Vec v) {
        _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)v));
    }

    template <int N>
    static void fill(Vec* row, const float* const* values, int k, int first) {
        const uint16_t* low = (const uint16_t*)values[2 * k] + first;
        const uint16_t* high = (const uint16_t*)values[2 * k + 1] + first;
        if constexpr (N == 1) {
            const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)low));
            const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)high));
            row[0] = (Vec)_mm512_or_si512(a, _mm512_slli_epi32(b, 16));
        } else {
            const __m512i zip = _mm512_set_epi32(0x2f000f, 0x2e000e, 0x2d000d, 0x2c000c, 0x2b000b, 0x2a000a, 0x290009,
                                                 0x280008, 0x270007, 0x260006, 0x250005, 0x240004, 0x230003, 0x220002,
                                                 0x210001, 0x200000);
            const __m512i zip_second = _mm512_add_epi16(zip, _mm512_set1_epi16(16));
#pragma GCC unroll 4
            for (int n = 0; n < N; n += 2) {
                const __m512i a = _mm512_loadu_si512(low + n * 16), b = _mm512_loadu_si512(high + n * 16);
                row[n] = (Vec)_mm512_permutex2var_epi16(a, zip, b);
                row[n + 1] = (Vec)_mm512_permutex2var_epi16(a, zip_second, b);
            }
        }
    }
};
#endif

// ---- operands ----
// Rows that are asked for while a GEMM runs, a few at each step of its depth, into the second cache level: there a
// request does not hold up the core. All at once they do, as soon as they are more than the core has in flight.
struct Ahead {
    const float* const* rows = nullptr;
    int count = 0, per_step = 0;
    int64_t bytes = 0;

    Ahead() = default;
    Ahead(const float* const* rows, int count, int64_t bytes, int depth)
        : rows(rows), count(count), per_step((count + depth - 1) / depth), bytes(bytes) {}

    // Always inlined: GCC takes a function that only prefetches for one without effect, and drops its calls.
    __attribute__((always_inline)) inline void ask(int step) const {
        const int begin = step * per_step, end = begin + per_step < count ? begin + per_step : count;
        for (int i = begin; i < end; ++i)
            for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch((const char*)rows[i] + b, 0, 2);
    }
};

struct Panel {
    const float* data;
    int64_t stride;
    Ahead ahead = {};

    template <class Words, int N>
    void fill(Vec* row, int k, int first) const {
        if (first == 0) ahead.ask(k);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) row[n] = in_register(load(data + k * stride + first + n * kLanes));
    }
};

struct ValueRows {
    const float* const* rows;
    Ahead ahead = {};

    template <class Words, int N>
    void fill(Vec* row, int k, int first) const {
        if (first == 0) ahead.ask(k);
        Words::template fill<N>(row, rows, k, first);
    }
};

template <class Words>
void pack_values(const float* const* values, int depth, int dim, float* panel) {
    for (int k = 0; k < depth; ++k, panel += dim) {
        int d = 0;
        Vec row[kColumns];
        for (; d + kColumns * kLanes <= dim; d += kColumns * kLanes) {
            Words::template fill<kColumns>(row, values, k, d);
            for (int n = 0; n < kColumns; ++n) store(panel + d + n * kLanes, row[n]);
        }
        for (; d < dim; d += kLanes) {
            Words::template fill<1>(row, values, k, d);
            store(panel + d, row[0]);
        }
    }
}

// ---- c[M, N kLanes] = a[M, depth] b[depth, N kLanes] ----
// An output is one sum over depth in a fixed order: it has the same bits in whatever block it is computed. The unroll
// pragmas make GCC split the accumulators into registers early; without them it copies the whole array at the end.
template <class Words, int M, int N, class B>
inline void gemm_chunk(const float* a, int64_t lda, const B& b, int first, int begin, int end, bool add, float* c,
                       int64_t ldc) {
    Vec acc[M][N];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[m][n] = Vec{};
    for (int k = begin; k < end; ++k) {
        Vec row[N];
        b.template fill<Words, N>(row, k, first);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            const Vec scale = splat(a[m * lda + k]);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) acc[m][n] = Words::multiply_add(acc[m][n], scale, row[n]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            float* const to = c + m * ldc + first + n * kLanes;
            store(to, add ? load(to) + acc[m][n] : acc[m][n]);
        }
}

template <class Words, int M, int N, class B>
void gemm_block(const float* a, int64_t lda, const B& b, int first, int depth, float* c, int64_t ldc) {
    if constexpr (Words::kChunk == 0) return gemm_chunk<Words, M, N>(a, lda, b, first, 0, depth, false, c, ldc);
    for (int begin = 0; begin < depth; begin += Words::kChunk) {
        const int end = begin + Words::kChunk < depth ? begin + Words::kChunk : depth;
        gemm_chunk<Words, M, N>(a, lda, b, first, begin, end, begin > 0, c, ldc);
    }
}

template <class Words, int M, class B>
void gemm_rows(int vecs, const float* a, int64_t lda, const B& b, int depth, float* c, int64_t ldc) {
    int v = 0;
    for (; v + kColumns <= vecs; v += kColumns) gemm_block<Words, M, kColumns>(a, lda, b, v * kLanes, depth, c, ldc);
    for (; v < vecs; ++v) gemm_block<Words, M, 1>(a, lda, b, v * kLanes, depth, c, ldc);
}

template <class Words, class B>
void gemm(int rows, int vecs, const float* a, int64_t lda, const B& b, int depth, float* c, int64_t ldc) {
    switch (rows) {
        case 1: return gemm_rows<Words, 1>(vecs, a, lda, b, depth, c, ldc);
        case 2: return gemm_rows<Words, 2>(vecs, a, lda, b, depth, c, ldc);
        case 3: return gemm_rows<Words, 3>(vecs, a, lda, b, depth, c, ldc);
        case 4: return gemm_rows<Words, 4>(vecs, a, lda, b, depth, c, ldc);
        case 5: return gemm_rows<Words, 5>(vecs, a, lda, b, depth, c, ldc);
        default: return gemm_rows<Words, kRows>(vecs, a, lda, b, depth, c, ldc);
    }
}
