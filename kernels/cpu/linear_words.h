// The words of packed linear layers (linear_cpu.cpp): how a panel stores them, and how 32 columns' words are multiplied.
//
// A word is 32 bits: one float, or the two bfloat16 of inputs (2i, 2i + 1), exactly what VDPBF16PS multiplies.
// An int4 word is a byte of four bits of each: inputs (2i, 2i + 1) of columns 0 … 15 in the low halves of its 32 bytes,
// of columns 16 … 31 in the high ones. A table in a register makes them bfloat16, exactly.
// An int8 word is two bytes, inputs (2i, 2i + 1), a column after the other. bfloat16 holds every int8.
#pragma once
#include "cpu_gemm.h"

constexpr int kPanel = 32, kVecs = kPanel / kLanes;

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

struct Bytes : Pairs {  // a word is two int8, made bfloat16
    static constexpr int kWordBytes = 2;
    static constexpr bool kScaled = true;
#if defined(__AVX512BF16__)
    static __m512 floats(const char* w) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)w))); }
    static void weights(const char* w, Vec* out) {
        for (int v = 0; v < 2; ++v, w += 32)
            out[v] = in_register((Vec)_mm512_cvtne2ps_pbh(floats(w + 16), floats(w)));
    }
#else
    static void weights(const char* w, Vec* out) {
        uint16_t wide[2 * kPanel];
        for (int j = 0; j < 2 * kPanel; ++j) {
            const float value = (signed char)w[j];
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            wide[j] = bits >> 16;
        }
        std::memcpy(out, wide, sizeof(wide));
    }
#endif
};

struct Unpacked : Pairs {  // integers made bfloat16 before: their scales are still to come
    static constexpr bool kScaled = true;
};
