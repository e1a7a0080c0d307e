// Vectors for the CPU kernels: one float vector type as wide as the machine has, exp2, and the element types.
// Plain vector extensions throughout (GCC and Clang); intrinsics only where those cannot say it.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16, kColumns = 4;  // a GEMM block of 6 x 4 accumulators, in 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8, kColumns = 2;  // 6 x 2, in 16
#elif defined(__aarch64__)
constexpr int kLanes = 4, kColumns = 4;
#else
constexpr int kLanes = 4, kColumns = 2;
#endif
constexpr int kRows = 6;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec load(const void* p) { return (Vec) * (const UnalignedVec*)p; }
inline void store(void* p, Vec v) { *(UnalignedVec*)p = v; }
inline Vec splat(float x) { return x - Vec{}; }

inline Vec max(Vec a, Vec b) {  // b where either is NaN
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline float horizontal_max(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX__)
    __m128 best = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    best = _mm_max_ps(best, _mm_movehl_ps(best, best));
    return _mm_cvtss_f32(_mm_max_ss(best, _mm_movehdup_ps(best)));
#else
    float best = v[0];
    for (int i = 1; i < kLanes; ++i) best = best < v[i] ? v[i] : best;
    return best;
#endif
}

inline float horizontal_sum(Vec v) {
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += v[i];
    return sum;
}

// GCC 12 else loads a vector again at each of its uses, and the GEMM is then bound by its loads.
inline Vec in_register(Vec v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#endif
    return v;
}

// sum + a b, rounded once where the machine can. Written with operators GCC fuses that in one block and not in another,
// where a branch stands between the two, and a row's bits would follow from how many rows stand beside it.
inline Vec fused(Vec sum, Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX__) && defined(__FMA__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

// sum + w x, in the order of the source and in the register of the sum: with AVX2, a block of 12 sums, two of weights and
// one of inputs takes 15 of 16 registers. Left to itself GCC keeps inputs of several rows, and sums in memory: of 6 rows
// of bfloat16, 64 GFLOP/s a core, not 105.
inline Vec accumulate(Vec sum, Vec w, Vec x) {
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
    asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
    return sum;
#else
    return fused(sum, w, x);
#endif
}

// 2^x for x <= 0, within 1 ulp (test_exp2 measures it): exactly 1 at 0, 0 below -126, NaN for NaN.
// The polynomial is the minimax one of degree 6 for the relative error of 2^f on [-1/2, 1/2], constant term 1.
inline Vec exp2_nonpositive(Vec x) {
    const Vec magic = splat(12582912.f);  // 1.5 * 2^23: a sum with it holds the nearest integer in its low bits
    const Vec clamped = max(splat(-127.f), x);
    const Vec shifted = clamped + magic;
    const Vec f = clamped - (shifted - magic);
    Vec p = splat(1.5353361959569156e-4f);
    p = p * f + splat(1.3398875016719103e-3f);
    p = p * f + splat(9.61843691766262e-3f);
    p = p * f + splat(5.5503323674201965e-2f);
    p = p * f + splat(2.4022647738456726e-1f);
    p = p * f + splat(6.931471824645996e-1f);
    p = p * f + splat(1.f);
    return p * (Vec)(((IntVec)shifted + 127) << 23);  // at -127 the second factor is the float 0
}

// ---- element types: float, and two of 16 bits that are widened to it and narrowed to nearest even ----
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline void widen(const float* in, float* out, int n) { std::memcpy(out, in, sizeof(float) * n); }
inline void widen(const BFloat16* in, float* out, int n) {
    for (int i = 0; i < n; ++i) {
        const uint32_t bits = (uint32_t)in[i].bits << 16;
        std::memcpy(out + i, &bits, 4);
    }
}
inline void narrow(const float* in, float* out, int n) { std::memcpy(out, in, sizeof(float) * n); }
inline void narrow(const float* in, BFloat16* out, int n) {
    for (int i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, in + i, 4);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        out[i].bits = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

#if defined(__F16C__) || defined(__aarch64__)
#define SEAMWISE_FLOAT16
inline void widen(const Float16* in, float* out, int n) {  // n: a multiple of 8
    for (int i = 0; i < n; i += 8) {
#if defined(__F16C__)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + i))));
#else
        for (int j = i; j < i + 8; ++j) out[j] = (float)((const __fp16*)in)[j];
#endif
    }
}
inline void narrow(const float* in, Float16* out, int n) {
    for (int i = 0; i < n; i += 8) {
#if defined(__F16C__)
        _mm_storeu_si128((__m128i*)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#else
        for (int j = i; j < i + 8; ++j) ((__fp16*)out)[j] = (__fp16)in[j];
#endif
    }
}
#endif
