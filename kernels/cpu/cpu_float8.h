// float8_e4m3fn: a sign, four bits of exponent (bias 7), three of mantissa; 0x7f is NaN, and nothing is infinite.
// Widened exactly, to a float that counts in kFloat8Unit or to bfloat16, and narrowed from float to nearest even.
#pragma once
#include "cpu_gemm.h"

struct Float8 {
    uint8_t bits;
};

inline Vec widened(const float* p) { return load(p); }

#if defined(__F16C__) && defined(__AVX2__)  // by way of the float16 of the same fields: 2^-8 of it, an exponent's bit more
constexpr float kFloat8Unit = 256.f;

// Sixteen float16, of lanes that begin with an element's sign twice, exponent and fraction; as if there were no NaN.
inline __m256i float16_fields(__m256i lanes) { return _mm256_and_si256(lanes, _mm256_set1_epi16((short)0xbf80)); }

inline __m256i float16_of(__m256i lanes) {
    const __m256i half = float16_fields(lanes), size = _mm256_and_si256(half, _mm256_set1_epi16(0x3fff));
    return _mm256_or_si256(half, _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x3f80)));
}

// The floats of a vector: of all, or of the first or the last eight of them.
inline Vec floats_of(__m256i half, int part) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(half);
#else
    return (Vec)_mm256_cvtph_ps(part == 0 ? _mm256_castsi256_si128(half) : _mm256_extracti128_si256(half, 1));
#endif
}
#else
constexpr float kFloat8Unit = 1.f;

// Those that have these bits, 0 … 255. Without exponent bits one is m 2^-9: 2^-6 (1 + m / 8) less 2^-6, for which no
// float need be denormal.
inline Vec float8_of(IntVec bits) {
    const IntVec size = bits & 0x7f, small = size < 8;
    const Vec wide = (Vec)(((size + (small & 8)) << 20) + (120 << 23)) - (Vec)(small & (121 << 23));
    return (Vec)((IntVec)wide | ((size == 0x7f) & 0x7fc00000) | ((bits & 0x80) << 24));
}
#endif

// kLanes of them as floats.
inline Vec widened(const Float8* p) {
#if defined(__F16C__) && defined(__AVX2__)
    const __m128i bytes = kLanes == 16 ? _mm_loadu_si128((const __m128i*)p) : _mm_loadl_epi64((const __m128i*)p);
    return floats_of(float16_of(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7)), 0);
#else
    IntVec bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = p[i].bits;
    return float8_of(bits);
#endif
}

// kLanes floats, saturated at 448; NaN stays NaN.
inline void narrow(Vec x, Float8* out) {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
    const IntVec sign = ((IntVec)x >> 24) & 0x80, nan = x != x;
    Vec size = (Vec)((IntVec)x & 0x7fffffff);
    size = size > splat(448.f) ? splat(448.f) : size;
    const IntVec bits = (IntVec)size, rounded = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
    const IntVec tiny = (IntVec)(size + splat(16384.f)) - 0x46800000;  // 2^14: the sum's last bit counts 2^-9
    const IntVec code = size < splat(0.015625f) ? tiny : rounded;
    const Bytes bytes = __builtin_convertvector((nan ? IntVec{} + 0x7f : code) | sign, Bytes);
    std::memcpy(out, &bytes, sizeof(bytes));
}

// Words are floats, of a cache of float8.
struct Float8Words : WidenedWords<Float8> {
    static constexpr float kUnit = kFloat8Unit;
#if defined(__F16C__) && defined(__AVX2__) && !defined(__AVX512F__)
    // Sixteen elements are made float16 at once, and keys are turned into columns before they are widened, in pairs.
    static void pack_keys(const float* const* keys, int words, float* panel, int64_t stride) {
        for (int w = 0; w < words; w += 32) {  // words: a multiple of 16
            const bool whole = words - w >= 32;
            __m256i x[8], y[8], most = _mm256_setzero_si256();
            for (int i = 0; i < 8; ++i) {
                const __m128i* from = (const __m128i*)((const Float8*)keys[i] + w);
                x[i] = _mm256_zextsi128_si256(_mm_loadu_si128(from));
                if (whole) x[i] = _mm256_loadu_si256((const __m256i*)from);
                most = _mm256_max_epu8(most, _mm256_and_si256(x[i], _mm256_set1_epi8(0x7f)));
            }
            if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(most, _mm256_set1_epi8(0x7f))))  // a NaN
                return WidenedWords<Float8>::pack_keys(keys, words, panel, stride);
#pragma GCC unroll 3
            for (int turn = 0; turn < 3; ++turn) {  // the bits of a pair's place turn by one: after three, rows are columns
                for (int i = 0; i < 4; ++i) {
                    y[2 * i] = _mm256_unpacklo_epi16(x[i], x[i + 4]);
                    y[2 * i + 1] = _mm256_unpackhi_epi16(x[i], x[i + 4]);
                }
                for (int i = 0; i < 8; ++i) x[i] = y[i];
            }
            float* to = panel + w * stride;
            for (int i = 0; i < 8; ++i, to += 2 * stride) {  // two words of eight keys, and those 16 further on
                const __m256i even = float16_fields(_mm256_srai_epi16(_mm256_slli_epi16(x[i], 8), 1));
                const __m256i odd = float16_fields(_mm256_srai_epi16(x[i], 1));
                store(to, floats_of(even, 0)), store(to + stride, floats_of(odd, 0));
                if (whole) store(to + 16 * stride, floats_of(even, 1)), store(to + 17 * stride, floats_of(odd, 1));
            }
        }
    }

    template <int N>
    static void fill(Vec* row, const float* const* values, int k, int first) {
        if constexpr (N == 1) return WidenedWords<Float8>::fill<1>(row, values, k, first);
        const __m128i bytes = _mm_loadu_si128((const __m128i*)((const Float8*)values[k] + first));
        const __m256i half = float16_of(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7));
        row[0] = floats_of(half, 0), row[N - 1] = floats_of(half, 1);
    }
#endif
};

#if defined(SEAMWISE_PAIRS)
struct Float8Table {  // the bfloat16 of every magnitude
    alignas(64) uint16_t of[128] = {};
    alignas(64) uint8_t bytes[256] = {};  // the low ones, then the high ones
    constexpr Float8Table() {
        for (int m = 1; m < 127; ++m) {
            const int top = m < 2 ? 0 : m < 4 ? 1 : 2;  // without exponent bits m counts 2^-9
            of[m] = uint16_t(m < 8 ? ((118 + top) << 7) + (((m << (3 - top)) & 7) << 4) : (120 << 7) + (m << 4));
        }
        of[127] = 0x7fc0;
        for (int m = 0; m < 128; ++m) bytes[m] = of[m] & 255, bytes[128 + m] = of[m] >> 8;
    }
};
inline constexpr Float8Table kFloat8;

// Words are pairs of bfloat16, of a cache of float8.
struct Float8Pairs : BFloat16Words {
    using Element = Float8;

    static Vec paired(__m256i bytes) {
        const __m512i wide = _mm512_cvtepu8_epi16(bytes);
        const __m512i *const table = (const __m512i*)kFloat8.of;
        const __m512i low = _mm512_permutex2var_epi16(table[0], wide, table[1]);
        const __m512i high = _mm512_permutex2var_epi16(table[2], wide, table[3]);
        const __m512i size = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(wide, _mm512_set1_epi16(0x40)), low, high);
        const __m512i sign = _mm512_set1_epi16((short)0x8000);
        return (Vec)_mm512_ternarylogic_epi32(size, _mm512_slli_epi16(wide, 8), sign, 0xf8);  // size | (shifted & sign)
    }

    // 64 of them, half as many instructions each where tables have 128 bytes.
    static void paired(const char* bytes, Vec* out) {
#if defined(__AVX512VBMI__)
        const __m512i *const table = (const __m512i*)kFloat8.bytes;
        // eights in the order that is unpacked to theirs
        const __m512i all = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_loadu_si512(bytes));
        const __m512i low = _mm512_permutex2var_epi8(table[0], all, table[1]);
        const __m512i size = _mm512_permutex2var_epi8(table[2], all, table[3]);
        const __m512i high = _mm512_ternarylogic_epi32(size, all, _mm512_set1_epi8((char)0x80), 0xf8);
        out[0] = in_register((Vec)_mm512_unpacklo_epi8(low, high)), out[1] = in_register((Vec)_mm512_unpackhi_epi8(low, high));
#else
        for (int v = 0; v < 2; ++v) out[v] = in_register(paired(_mm256_loadu_si256((const __m256i*)bytes + v)));
#endif
    }

    static void pack_keys(const float* const* keys, int words, float* panel, int64_t stride) {
        for (int w = 0; w < words; w += kLanes) {  // words: a multiple of 8
            const int columns = words - w < kLanes ? words - w : kLanes;
            Vec square[kLanes];
            for (int i = 0; i < kLanes; ++i)
                square[i] = paired(_mm256_maskz_loadu_epi8(~0u >> (32 - 2 * columns), (const Float8*)keys[i] + 2 * w));
            transpose(square);
            for (int i = 0; i < columns; ++i) store(panel + (w + i) * stride, square[i]);
        }
    }

    template <int N>
    static void fill(Vec* row, const float* const* values, int k, int first) {
        const Float8 *low = (const Float8*)values[2 * k] + first, *high = (const Float8*)values[2 * k + 1] + first;
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n, low += kLanes, high += kLanes) {
            const __m128i a = _mm_loadu_si128((const __m128i*)low), b = _mm_loadu_si128((const __m128i*)high);
            row[n] = paired(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b)));
        }
    }
};
#endif
