// The words of packed linear layers: how a panel stores them, and how they become vectors to multiply with.
//
// A word is 32 bits: one float, or the two bfloat16 of inputs (2i, 2i + 1), exactly what VDPBF16PS multiplies.
// An int4 word is a byte of four bits of each: inputs (2i, 2i + 1) of columns 0 … 15 in the low halves of its 32 bytes,
// of columns 16 … 31 in the high ones. Tables in registers make them bfloat16, exactly.
// An int8 or float8 word is two bytes, inputs (2i, 2i + 1), a column after the other. bfloat16 holds every one of them.
//
// Where the machine multiplies pairs of bfloat16 (kPairs), weights<V, kFirst>(w, out) gives V vectors of columns from
// vector kFirst of a panel as such pairs; elsewhere widen<V, kFirst>(w, kept, input, out) gives the floats of the word's
// first or second input, from what read<V, kFirst>(w, kept) kept.
#pragma once
#include "cpu_float8.h"

constexpr int kPanel = 32, kVecs = kPanel / kLanes;
#if defined(SEAMWISE_PAIRS)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

struct Singles {  // a word is a float
    using Input = float;
    static constexpr int kPerWord = 1, kWordBytes = 4;
    static constexpr bool kScaled = false;
    template <int V, int kFirst>
    static void weights(const char* w, Vec* out) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) out[v] = in_register(load(w + (kFirst + v) * kLanes * 4));
    }
    static Vec multiply_add(Vec sum, Vec w, Vec x) { return fused(sum, w, x); }
    static void put(float* y, Vec v, int columns) {
        if (columns == kLanes) store(y, v);
        else std::memcpy(y, &v, columns * sizeof(float));
    }
};

struct Pairs {  // a word is two bfloat16
    using Input = BFloat16;
    static constexpr int kPerWord = 2, kWordBytes = 4;
    static constexpr bool kScaled = false;
    template <int V, int kFirst>
    static void weights(const char* w, Vec* out) {
        Singles::weights<V, kFirst>(w, out);
    }
    static Vec widened(Vec pair, int input) {
        if (input == 0) return (Vec)((IntVec)pair << 16);
#if defined(__AVX2__) && !defined(__AVX512F__)
        alignas(32) static constexpr uint32_t kHigh[8] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                                          0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};
        asm("vandps %1, %0, %0" : "+x"(pair) : "m"(kHigh));  // a mask in a register would put a block's sum in memory
        return pair;
#else
        return (Vec)((IntVec)pair & (int32_t)0xffff0000);
#endif
    }
    template <int V, int kFirst>
    static void read(const char* w, Vec*) {}  // nothing to keep: read anew for each input, its floats need the registers
    template <int V, int kFirst>
    static void widen(const char* w, const Vec*, int input, Vec* out) {
        Vec pairs[V];
        weights<V, kFirst>(w, pairs);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) out[v] = widened(pairs[v], input);
    }
    static Vec multiply_add(Vec sum, Vec w, Vec x) {
#if defined(__AVX512BF16__)
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
#else
        return sum + w * x;
#endif
    }
    static void put(BFloat16* y, Vec v, int columns) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
        _mm256_mask_storeu_epi16(y, 0xffffu >> (kLanes - columns), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
        float row[kLanes];
        store(row, v);
        if (columns == kLanes) narrow(row, y, kLanes);  // of a constant number: vectors
        else narrow(row, y, columns);
#endif
    }
};

// The bfloat16 of -8 … 7, twice, so that an index needs no mask.
alignas(64) constexpr uint16_t kInt4[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

struct Nibbles : Pairs {  // a word is two int4, made bfloat16
    static constexpr int kWordBytes = 1;
    static constexpr bool kScaled = true;
    template <int V, int kFirst>
    static void weights(const char* w, Vec* out) {
#if defined(__AVX512BW__)
        static_assert(V == 2 && kFirst == 0);
        const __m512i table = _mm512_load_si512(kInt4), bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)w));
        out[0] = in_register((Vec)_mm512_permutexvar_epi16(bytes, table));
        out[1] = in_register((Vec)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table));
#elif defined(__AVX2__)
        // Tables of the 16 values' low and high bytes; what they give is interleaved, within halves of 128 bits.
        static_assert(V % 2 == 0 && kFirst % 2 == 0);
        const __m256i low_bytes = _mm256_setr_epi8(0, -32, -64, -96, -128, 64, 0, -128, 0, -128, 0, 64, -128, -96, -64, -32,
                                                   0, -32, -64, -96, -128, 64, 0, -128, 0, -128, 0, 64, -128, -96, -64, -32);
        const __m256i high_bytes = _mm256_setr_epi8(-63, -64, -64, -64, -64, -64, -64, -65, 0, 63, 64, 64, 64, 64, 64, 64,
                                                    -63, -64, -64, -64, -64, -64, -64, -65, 0, 63, 64, 64, 64, 64, 64, 64);
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i*)w), 0xd8);
#pragma GCC unroll 2
        for (int v = 0; v < V; v += 2) {
            const __m256i at = kFirst + v < 2 ? bytes : _mm256_srli_epi16(bytes, 4);
            const __m256i index = _mm256_and_si256(at, _mm256_set1_epi8(15));
            const __m256i low = _mm256_shuffle_epi8(low_bytes, index), high = _mm256_shuffle_epi8(high_bytes, index);
            out[v] = (Vec)_mm256_unpacklo_epi8(low, high);
            out[v + 1] = (Vec)_mm256_unpackhi_epi8(low, high);
        }
#else
        uint16_t wide[V * kLanes * 2];
        for (int j = 0; j < V * kLanes * 2; ++j) {
            const int at = kFirst * kLanes * 2 + j;  // of the word's 64 values
            wide[j] = kInt4[((uint8_t)w[at % 32] >> at / 32 * 4) & 15];
        }
        std::memcpy(out, wide, sizeof(wide));
#endif
    }
    template <int V, int kFirst>
    static void read(const char* w, Vec* kept) {
        weights<V, kFirst>(w, kept);
    }
    template <int V, int kFirst>
    static void widen(const char*, const Vec* kept, int input, Vec* out) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) out[v] = widened(kept[v], input);
    }
};

struct Bytes : Pairs {  // a word is two int8
    static constexpr int kWordBytes = 2;
    static constexpr bool kScaled = true;
#if defined(__AVX512BF16__)
    static __m512 floats(const char* w) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)w))); }
    template <int V, int kFirst>
    static void weights(const char* w, Vec* out) {
        for (int v = 0; v < V; ++v, w += 32) out[v] = in_register((Vec)_mm512_cvtne2ps_pbh(floats(w + 16), floats(w)));
    }
#endif
    static IntVec as_int16(const char* w) {
#if defined(__AVX512BW__)
        return (IntVec)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w));
#elif defined(__AVX2__)
        return (IntVec)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w));
#else
        int16_t wide[2 * kLanes];
        for (int j = 0; j < 2 * kLanes; ++j) wide[j] = (signed char)w[j];
        IntVec v;
        std::memcpy(&v, wide, sizeof(v));
        return v;
#endif
    }
    template <int V, int kFirst>
    static void read(const char* w, Vec* kept) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) kept[v] = (Vec)as_int16(w + (kFirst + v) * kLanes * 2);
    }
    template <int V, int kFirst>
    static void widen(const char*, const Vec* kept, int input, Vec* out) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            const IntVec both = (IntVec)kept[v];
            out[v] = __builtin_convertvector(input == 0 ? both << 16 >> 16 : both >> 16, Vec);
        }
    }
};

struct Floats8 : Pairs {  // a word is two float8; where those are widened by way of float16, they count in kFloat8Unit
    using Input = Float8;
    static constexpr int kWordBytes = 2;
    static constexpr bool kScaled = true;
#if defined(SEAMWISE_PAIRS)
    template <int V, int kFirst>
    static void weights(const char* w, Vec* out) {
        static_assert(V == 2 && kFirst == 0);
        Float8Pairs::paired(w, out);
    }
#endif
    template <int V, int kFirst>
    static void widen(const char* w, const Vec*, int input, Vec* out) {
        w += kFirst * kLanes * 2;
#if defined(__F16C__) && defined(__AVX2__)
        constexpr int kParts = 16 / kLanes;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const __m256i both = _mm256_loadu_si256((const __m256i*)w + v / kParts);
            const __m256i lanes = _mm256_srai_epi16(input == 0 ? _mm256_slli_epi16(both, 8) : both, 1);
            out[v] = floats_of(float16_of(lanes), v % kParts);
        }
#else
        typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
        for (int v = 0; v < V; ++v) {
            Shorts both;
            std::memcpy(&both, w + v * sizeof(both), sizeof(both));
            const IntVec bits = __builtin_convertvector(both, IntVec);
            out[v] = float8_of(input == 0 ? bits & 0xff : bits >> 8);
        }
#endif
    }
};

// Writes a row of K float8 as blocks read it: floats, their unit and the weights' put right, or pairs of bfloat16. Behind
// it are up to 2 kLanes elements of zeros.
inline void widen_row(const Float8* x, float* row, int64_t K) {
    constexpr int kStep = kPairs ? 2 * kLanes : kLanes;
    for (int64_t k = 0; k < K; k += kStep) {
        Float8 part[kStep] = {};
        std::memcpy(part, x + k, K - k < kStep ? K - k : kStep);
#if defined(SEAMWISE_PAIRS)
        store(row + k / 2, Float8Pairs::paired(_mm256_loadu_si256((const __m256i*)part)));
#else
        store(row + k, widened(part) * splat(kFloat8Unit * kFloat8Unit));
#endif
    }
}

struct Unpacked : Pairs {  // made bfloat16 before, or floats: the first inputs' of 32 columns, then the second ones'
    static constexpr bool kScaled = true;
    static constexpr int kWordBytes = kPairs ? 4 : 8;
    template <int V, int kFirst>
    static void widen(const char* w, const Vec*, int input, Vec* out) {
        Singles::weights<V, kFirst>(w + input * kPanel * 4, out);
    }
};
