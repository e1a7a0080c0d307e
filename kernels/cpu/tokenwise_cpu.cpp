// Row-wise ops on the CPU: rms_norm, add_rms_norm, quantize, rope, silu_mul, gather_rows, rope_table, argmax; float32
// and bfloat16.
//
// Arithmetic is float32; a result is rounded where the op's meaning rounds it, so this file is compiled with
// -ffp-contract=off: rope, and all of a norm but its sum, then have the meaning's bits. Rows never share work, so a
// row's result does not depend on its batch.
#include <algorithm>
#include <type_traits>

#include "cpu_float8.h"
#include "cpu_threads.h"

namespace {

// Bytes of traffic, some 2 us of work, that pay for waking a thread; measured on Zen 4.
constexpr int64_t kBytesPerThread = 64 << 10;

template <class Body>
void over_rows(int64_t rows, int64_t bytes_per_row, int64_t num_threads, Body body) {
    const int64_t parts = std::min({num_threads, rows, 1 + rows * bytes_per_row / kBytesPerThread});
    parallel_for(num_threads, parts, [&](int64_t part) {
        for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) body(r);
    });
}

// ---- vectors of a row: whole ones, and the last part of one ----
struct Whole {};
struct Part {
    int count;
};

template <class T>
inline Vec get(const T* p, Whole) { return widened(p); }
inline void put(float* p, Vec v, Whole) { store(p, v); }

#if defined(__AVX512BF16__)  // its conversion takes a subnormal for 0
inline Vec widened(__m256i bits) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16); }
inline __m256i narrowed(Vec v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }
inline void put(BFloat16* p, Vec v, Whole) { _mm256_storeu_si256((__m256i*)p, narrowed(v)); }
inline Vec round_as(const BFloat16*, Vec v) { return widened(narrowed(v)); }
#elif defined(__AVX2__)  // in registers: through memory a norm takes 3 to 5 times as long
inline Vec rounded(Vec v) {  // the upper half of each lane is the nearest bfloat16, ties to even
    const IntVec bits = (IntVec)v;
    return (Vec)(v == v ? bits + 0x7fff + ((bits >> 16) & 1) : IntVec{} + 0x7fc00000);
}
inline Vec round_as(const BFloat16*, Vec v) { return (Vec)((IntVec)rounded(v) & int32_t(0xffff0000)); }
#if defined(__AVX512F__)
inline void put(BFloat16* p, Vec v, Whole) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)rounded(v), 16)));
}
#else
inline void put(BFloat16* p, Vec v, Whole) {
    const __m256i upper = _mm256_srli_epi32((__m256i)rounded(v), 16);
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(both));
}
#endif
#else
inline void put(BFloat16* p, Vec v, Whole) {
    float wide[kLanes];
    store(wide, v);
    narrow(wide, p, kLanes);
}
inline Vec round_as(const BFloat16*, Vec v) {
    BFloat16 bits[kLanes];
    put(bits, v, Whole{});
    return get(bits, Whole{});
}
#endif
inline Vec round_as(const float*, Vec v) { return v; }
inline void put(Float8* p, Vec v, Whole) { narrow(v, p); }
inline void put(int8_t* p, Vec v, Whole) {  // to nearest even, saturated at 127; NaN is 0
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    const Vec held = max(splat(-127.f), -max(splat(-127.f), -v)), magic = splat(12582912.f);  // 1.5 * 2^23
    const Bytes bytes = __builtin_convertvector((IntVec)(held + magic) & (v == v), Bytes);
    std::memcpy(p, &bytes, sizeof(bytes));
}

template <class T>
inline Vec get(const T* p, Part part) {
    T buffer[kLanes] = {};
    std::memcpy(buffer, p, part.count * sizeof(T));
    return get(buffer, Whole{});
}
template <class T>
inline void put(T* p, Vec v, Part part) {
    T buffer[kLanes];
    put(buffer, v, Whole{});
    std::memcpy(p, buffer, part.count * sizeof(T));
}

template <class Body>
inline void over_vectors(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
    if (i < n) body(i, Part{int(n - i)});
}

// ---- RMSNorm, of x or of x + residual ----
template <bool kAdd, class T>
void norm_row(const T* x, const T* residual, const T* weight, T* out, T* total, int64_t D, float eps) {
    Vec sums[4] = {};  // a single one would wait for each addition
    const auto add = [&](Vec& sum, int64_t i, auto size) {
        Vec v = get(x + i, size);
        if (kAdd) {
            v = round_as(x, v + get(residual + i, size));
            put(total + i, v, size);
        }
        sum += v * v;
    };
    int64_t i = 0;
    for (; i + 4 * kLanes <= D; i += 4 * kLanes)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) add(sums[j], i + j * kLanes, Whole{});
    for (; i + kLanes <= D; i += kLanes) add(sums[0], i, Whole{});
    if (i < D) add(sums[1], i, Part{int(D - i)});
    const float sum = horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    const Vec scale = splat(1.f / __builtin_sqrtf(sum / float(D) + eps));
    const T* source = kAdd ? total : x;
    over_vectors(D, [&](int64_t i, auto size) {
        put(out + i, round_as(x, get(source + i, size) * scale) * get(weight + i, size), size);
    });
}

// ---- quantization, each group by its largest magnitude, NaN above all, or by a given scale ----
template <class T, class Q>
float quantize_group(const T* x, Q* out, int64_t n, const float* given) {
    IntVec most = {};  // magnitudes are ordered as integers are
    over_vectors(n, [&](int64_t i, auto size) {
        const IntVec bits = (IntVec)get(x + i, size) & 0x7fffffff;
        most = bits > most ? bits : most;
    });
    int32_t largest = 0;
    for (int j = 0; j < kLanes; ++j) largest = std::max(largest, most[j]);
    float scale;
    std::memcpy(&scale, &largest, sizeof(scale));
    constexpr bool kInt8 = std::is_same_v<Q, int8_t>;  // which has no NaN, so that the scale tells of one
    scale = (scale < 1e-10f ? 1e-10f : scale) / (kInt8 ? 127.f : 448.f);
    if (given && !(kInt8 && scale != scale)) scale = *given;
    over_vectors(n, [&](int64_t i, auto size) { put(out + i, get(x + i, size) / splat(scale), size); });
    return scale;
}

// ---- silu(gate) * up ----
// x / (1 + e^-x). The exponential is Cephes' expf: its polynomial, and ln 2 in two parts of which the first is short.
inline Vec silu(Vec x) {
    const Vec y = max(splat(-87.f), -max(splat(-89.f), x));  // e^89 is infinite; NaN stays
    const Vec magic = splat(12582912.f);  // 1.5 * 2^23: a sum with it holds the nearest integer in its low bits
    const Vec shifted = fused(magic, y, splat(1.44269504088896341f)), n = shifted - magic;
    const Vec r = fused(fused(y, n, splat(-0.693359375f)), n, splat(2.12194440e-4f));
    Vec p = splat(1.9875691500e-4f);
    p = fused(splat(1.3981999507e-3f), p, r);
    p = fused(splat(8.3334519073e-3f), p, r);
    p = fused(splat(4.1665795894e-2f), p, r);
    p = fused(splat(1.6666665459e-1f), p, r);
    p = fused(splat(5.0000001201e-1f), p, r);
    p = fused(r, p, r * r) + 1.f;
    const Vec half_power = (Vec)(((IntVec)shifted + 126) << 23);  // 2^(n - 1): n may be 128
    return x / fused(splat(1.f), p + p, half_power);
}

// The first greatest of n elements, a NaN above all: each lane's own first, then the first of those.
inline bool above(float a, float b) { return a > b || (a != a && b == b); }

template <class T>
int64_t first_greatest(const T* x, int64_t n) {
    Vec best = splat(get(x, Part{1})[0]);
    IntVec at = {};  // of each lane, the number of vectors before its best one
    for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
        const Vec v = get(x + i, Whole{});
        const IntVec more = (v > best) | ((v != v) & (best == best));
        best = more ? v : best;
        at = more ? IntVec{} + int32_t(i / kLanes) : at;
    }
    int64_t found = 0;
    float greatest = get(x, Part{1})[0];
    const auto take = [&](float value, int64_t i) {
        const bool equal = !above(greatest, value) && i < found;
        if (above(value, greatest) || equal) greatest = value, found = i;
    };
    for (int j = 0; j < kLanes && n >= kLanes; ++j) take(best[j], int64_t(at[j]) * kLanes + j);
    for (int64_t i = n / kLanes * kLanes; i < n; ++i) take(get(x + i, Part{1})[0], i);
    return found;
}

// Calls body(T{}) for the type of a dtype: 0 float32, 1 bfloat16.
template <class Body>
int64_t with_type(int64_t dtype, Body body) {
    dtype == 0 ? body(float{}) : body(BFloat16{});
    return 0;
}

}  // namespace

// dtype: 0 float32, 1 bfloat16. Strides and sizes in elements; the last dimension is contiguous.
extern "C" int64_t seamwise_norm(int64_t dtype, const void* x, const void* residual, const void* weight, void* out,
                                 void* total, int64_t rows, int64_t D, int64_t ldx, int64_t ldr, double eps,
                                 int64_t threads) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        over_rows(rows, int64_t(sizeof(T)) * D * (residual ? 4 : 2), threads, [&](int64_t r) {
            const T *from = (const T*)x + r * ldx, *w = (const T*)weight;
            T *to = (T*)out + r * D, *sum = (T*)total + r * D;
            if (residual) norm_row<true>(from, (const T*)residual + r * ldr, w, to, sum, D, float(eps));
            else norm_row<false>(from, from, w, to, to, D, float(eps));
        });
    });
}

// out (rows, D) and scales (rows, ceil(D / group)) of x; int8: out holds those, else float8. given: one scale, or null.
extern "C" int64_t seamwise_quantize(int64_t dtype, int64_t int8, const void* x, char* out, float* scales,
                                     const float* given, int64_t rows, int64_t D, int64_t group, int64_t ldx,
                                     int64_t threads) {
    const int64_t groups = (D + group - 1) / group;
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        over_rows(rows, int64_t(sizeof(T)) * D * 3, threads, [&](int64_t r) {
            for (int64_t g = 0, d = 0; g < groups; ++g, d += group) {
                const T* from = (const T*)x + r * ldx + d;
                char* to = out + r * D + d;
                const int64_t n = std::min(group, D - d);
                scales[r * groups + g] = int8 ? quantize_group(from, (int8_t*)to, n, given)
                                              : quantize_group(from, (Float8*)to, n, given);
            }
        });
    });
}

// Rotary position embedding.
extern "C" int64_t seamwise_rope(int64_t dtype, const void* x, const void* cos, const void* sin, void* out,
                                 int64_t tokens, int64_t heads, int64_t D, int64_t x_token, int64_t x_head,
                                 int64_t cos_token, int64_t sin_token, int64_t threads) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t half = D / 2;
        over_rows(tokens, int64_t(sizeof(T)) * heads * D * 2, threads, [&](int64_t t) {
            const T *c = (const T*)cos + t * cos_token, *s = (const T*)sin + t * sin_token, *from = (const T*)x + t * x_token;
            T* to = (T*)out + t * heads * D;
            over_vectors(half, [&](int64_t i, auto size) {
                const Vec c0 = get(c + i, size), c1 = get(c + half + i, size);
                const Vec s0 = get(s + i, size), s1 = get(s + half + i, size);
                for (int64_t h = 0; h < heads; ++h) {
                    const Vec low = get(from + h * x_head + i, size), high = get(from + h * x_head + half + i, size);
                    put(to + h * D + i, low * c0 - high * s0, size);
                    put(to + h * D + half + i, high * c1 + low * s1, size);
                }
            });
        });
    });
}

// cos and sin, of `dtype`, of position * speed, in both halves of a row (2 F), times `scaling`; speeds (F).
extern "C" int64_t seamwise_rope_table(int64_t dtype, const int64_t* positions, const float* speeds, void* cos,
                                       void* sin, int64_t tokens, int64_t F, double scaling, int64_t threads) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        over_rows(tokens, 64 * F * 4, threads, [&](int64_t t) {  // a sine takes as long as 64 bytes of traffic
            const float position = float(positions[t]);
            for (int64_t f = 0; f < F; ++f) {
                const float angle = position * speeds[f];
                const float values[2] = {__builtin_cosf(angle) * float(scaling), __builtin_sinf(angle) * float(scaling)};
                T *c = (T*)cos + 2 * t * F + f, *s = (T*)sin + 2 * t * F + f;
                narrow(values, c, 1), narrow(values + 1, s, 1);
                c[F] = *c, s[F] = *s;
            }
        });
    });
}

extern "C" int64_t seamwise_silu_mul(int64_t dtype, const void* x, void* out, int64_t rows, int64_t I, int64_t ldx,
                                     int64_t threads) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        over_rows(rows, int64_t(sizeof(T)) * I * 3, threads, [&](int64_t r) {
            const T *gate = (const T*)x + r * ldx, *up = gate + I;
            over_vectors(I, [&](int64_t i, auto size) {
                put((T*)out + r * I + i, silu(get(gate + i, size)) * get(up + i, size), size);
            });
        });
    });
}

// Copies rows of `row_bytes`; returns 1 + the position of an index outside 0..table_rows-1.
extern "C" int64_t seamwise_gather(const int64_t* index, const char* table, char* out, int64_t rows, int64_t table_rows,
                                   int64_t row_bytes, int64_t table_stride, int64_t threads) {
    for (int64_t r = 0; r < rows; ++r)
        if (index[r] < 0 || index[r] >= table_rows) return 1 + r;
    over_rows(rows, 2 * row_bytes, threads, [&](int64_t r) {
        std::memcpy(out + r * row_bytes, table + index[r] * table_stride, row_bytes);
    });
    return 0;
}

// out (rows) = the first greatest of each row of x (rows, n), n > 0, whose rows are `stride` elements apart.
extern "C" int64_t seamwise_argmax(int64_t dtype, const void* x, int64_t* out, int64_t rows, int64_t n, int64_t stride,
                                   int64_t threads) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        over_rows(rows, n * sizeof(T), threads, [&](int64_t r) { out[r] = first_greatest((const T*)x + r * stride, n); });
    });
}
