// Row-wise ops on the CPU: rms_norm, add_rms_norm, rope, silu_mul, embedding; float32 and bfloat16.
// Sums and products are float32; a result is rounded where the op's meaning rounds it. Rows never share work, so a
// row's result does not depend on its batch.
#include "cpu_simd.h"
#include "cpu_threads.h"

namespace {

// A row op pays for a second thread from about 32 KiB of traffic on (two barriers are about 2 us); measured on Zen 4.
constexpr int64_t kBytesPerTask = 32 << 10;
constexpr int kChunk = 64;  // elements widened at a time; row lengths need be no multiple of it

template <class Body>
void over_rows(int64_t rows, int64_t bytes_per_row, int64_t num_threads, Body body) {
    const int64_t per_task = 1 + kBytesPerTask / (bytes_per_row + 1);
    parallel_for(num_threads, (rows + per_task - 1) / per_task, [&](int64_t task) {
        const int64_t end = (task + 1) * per_task < rows ? (task + 1) * per_task : rows;
        for (int64_t r = task * per_task; r < end; ++r) body(r);
    });
}

inline void widen(const float* in, float* out, int n) { std::memcpy(out, in, sizeof(float) * n); }

// Rounds to the element type and back: what storing and loading would do.
inline void round_as(const float*, float*, int) {}
inline void round_as(const BFloat16*, float* v, int n) {
    BFloat16 bits[kChunk];
    narrow(v, bits, n);
    ::widen(bits, v, n);
}

template <class Body>
inline void chunks(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + kChunk <= n; i += kChunk) body(i, kChunk);
    if (i < n) body(i, int(n - i));
}

template <class T>
void norm_row(const T* x, const T* residual, const T* weight, T* out, T* total, int64_t D, float eps) {
    float a[kChunk], b[kChunk], sums[kChunk] = {};
    const T* source = residual ? total : x;
    chunks(D, [&](int64_t i, int n) {
        widen(x + i, a, n);
        if (residual) {
            widen(residual + i, b, n);
            for (int j = 0; j < n; ++j) a[j] += b[j];
            narrow(a, total + i, n);
            widen(total + i, a, n);
        }
        for (int j = 0; j < n; ++j) sums[j] += a[j] * a[j];
    });
    float sum = 0;
    for (int j = 0; j < kChunk; ++j) sum += sums[j];
    const float scale = 1.f / __builtin_sqrtf(sum / float(D) + eps);
    chunks(D, [&](int64_t i, int n) {
        widen(source + i, a, n);
        widen(weight + i, b, n);
        for (int j = 0; j < n; ++j) a[j] *= scale;
        round_as(x, a, n);
        for (int j = 0; j < n; ++j) a[j] *= b[j];
        narrow(a, out + i, n);
    });
}

// One head: both halves rotate together.
template <class T>
void rope_head(const T* x, const T* cos, const T* sin, T* out, int64_t half) {
    float lo[kChunk], hi[kChunk], c0[kChunk], c1[kChunk], s0[kChunk], s1[kChunk];
    chunks(half, [&](int64_t i, int n) {
        widen(x + i, lo, n), widen(x + half + i, hi, n);
        widen(cos + i, c0, n), widen(cos + half + i, c1, n);
        widen(sin + i, s0, n), widen(sin + half + i, s1, n);
        for (int j = 0; j < n; ++j) {
            const float low = lo[j] * c0[j] - hi[j] * s0[j];
            hi[j] = hi[j] * c1[j] + lo[j] * s1[j];
            lo[j] = low;
        }
        narrow(lo, out + i, n), narrow(hi, out + half + i, n);
    });
}

// silu(g) = g / (1 + 2^(-g log2 e)), for either sign through 2 to a power that is at most 0.
inline void silu_times(float* gate, const float* up, int n) {
    for (int j = 0; j < kChunk; j += kLanes) {
        if (j >= n) break;
        const Vec g = load(gate + j), magnitude = g < 0.f ? g : -g;
        const Vec power = exp2_nonpositive(magnitude * 1.44269504088896341f);
        const Vec sigmoid = (g < 0.f ? power : splat(1.f)) / (power + 1.f);
        store(gate + j, g * sigmoid * load(up + j));
    }
}

template <class T>
int64_t norm(const T* x, const T* residual, const T* weight, T* out, T* total, int64_t rows, int64_t D, int64_t ldx,
             int64_t ldr, double eps, int64_t threads) {
    over_rows(rows, int64_t(sizeof(T)) * D * (residual ? 4 : 2), threads, [&](int64_t r) {
        norm_row(x + r * ldx, residual ? residual + r * ldr : nullptr, weight, out + r * D,
                 residual ? total + r * D : nullptr, D, float(eps));
    });
    return 0;
}

template <class T>
int64_t rope(const T* x, const T* cos, const T* sin, T* out, int64_t tokens, int64_t heads, int64_t D, int64_t xt,
             int64_t xh, int64_t ct, int64_t st, int64_t threads) {
    over_rows(tokens, int64_t(sizeof(T)) * heads * D * 2, threads, [&](int64_t t) {
        for (int64_t h = 0; h < heads; ++h)
            rope_head(x + t * xt + h * xh, cos + t * ct, sin + t * st, out + (t * heads + h) * D, D / 2);
    });
    return 0;
}

template <class T>
int64_t silu_mul(const T* x, T* out, int64_t rows, int64_t I, int64_t ldx, int64_t threads) {
    over_rows(rows, int64_t(sizeof(T)) * I * 3, threads, [&](int64_t r) {
        float gate[kChunk] = {}, up[kChunk] = {};
        chunks(I, [&](int64_t i, int n) {
            widen(x + r * ldx + i, gate, n), widen(x + r * ldx + I + i, up, n);
            silu_times(gate, up, n);
            narrow(gate, out + r * I + i, n);
        });
    });
    return 0;
}

}  // namespace

// dtype: 0 float32, 1 bfloat16. Strides and sizes in elements; the last dimension is contiguous.
extern "C" int64_t seamwise_norm(int64_t dtype, const void* x, const void* residual, const void* weight, void* out,
                                 void* total, int64_t rows, int64_t D, int64_t ldx, int64_t ldr, double eps,
                                 int64_t threads) {
    return dtype == 0 ? norm<float>((const float*)x, (const float*)residual, (const float*)weight, (float*)out,
                                    (float*)total, rows, D, ldx, ldr, eps, threads)
                      : norm<BFloat16>((const BFloat16*)x, (const BFloat16*)residual, (const BFloat16*)weight,
                                       (BFloat16*)out, (BFloat16*)total, rows, D, ldx, ldr, eps, threads);
}

extern "C" int64_t seamwise_rope(int64_t dtype, const void* x, const void* cos, const void* sin, void* out,
                                 int64_t tokens, int64_t heads, int64_t D, int64_t x_token, int64_t x_head,
                                 int64_t cos_token, int64_t sin_token, int64_t threads) {
    return dtype == 0 ? rope<float>((const float*)x, (const float*)cos, (const float*)sin, (float*)out, tokens, heads, D,
                                    x_token, x_head, cos_token, sin_token, threads)
                      : rope<BFloat16>((const BFloat16*)x, (const BFloat16*)cos, (const BFloat16*)sin, (BFloat16*)out,
                                       tokens, heads, D, x_token, x_head, cos_token, sin_token, threads);
}

extern "C" int64_t seamwise_silu_mul(int64_t dtype, const void* x, void* out, int64_t rows, int64_t I, int64_t ldx,
                                     int64_t threads) {
    return dtype == 0 ? silu_mul<float>((const float*)x, (float*)out, rows, I, ldx, threads)
                      : silu_mul<BFloat16>((const BFloat16*)x, (BFloat16*)out, rows, I, ldx, threads);
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
