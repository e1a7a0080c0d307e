// Scatter of a step's keys and values into the paged cache: copied, for any element size, or made float8.
#include "cpu_float8.h"
#include "cpu_threads.h"

namespace {

constexpr int64_t kBytesPerTask = 64 << 10;  // below this, a copy is shorter than waking a thread

struct Side {
    const char* from;
    char* to;
    int64_t token_stride, head_stride, block_stride, cache_head_stride;
    const float* scale;
    int64_t scale_step;
};

// Calls put(side, head, to, from) for every row that is stored; `row` is its bytes in a cache. Returns 0, or 1 + the
// first token whose slot lies outside the cache, and then has called nothing.
template <class Put>
int64_t scatter(const Side (&sides)[2], const int64_t* slots, int64_t tokens, int64_t kv_heads, int64_t row,
                int64_t num_blocks, int64_t block_size, int64_t num_threads, Put put) {
    for (int64_t t = 0; t < tokens; ++t)
        if (slots[t] >= num_blocks * block_size) return 1 + t;
    const int64_t per_task = 1 + kBytesPerTask / (2 * kv_heads * row);
    parallel_for(num_threads, (tokens + per_task - 1) / per_task, [&](int64_t task) {
        const int64_t end = (task + 1) * per_task < tokens ? (task + 1) * per_task : tokens;
        for (int64_t t = task * per_task; t < end; ++t) {
            if (slots[t] < 0) continue;
            const int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
            for (const Side& s : sides)
                for (int64_t h = 0; h < kv_heads; ++h)
                    put(s, h, s.to + block * s.block_stride + h * s.cache_head_stride + offset * row,
                        s.from + t * s.token_stride + h * s.head_stride);
        }
    });
    return 0;
}

template <class Element>
void quantize(const Side& s, int64_t head, char* to, const char* from, int64_t dim) {
    const Vec scale = splat(s.scale ? s.scale[head * s.scale_step] : 1.f);
    for (int64_t d = 0; d < dim; d += kLanes) narrow(widened((const Element*)from + d) / scale, (Float8*)to + d);
}

}  // namespace

// Stores row t of k and v (tokens, kv_heads, row) in slot slots[t] = block * block_size + offset of the caches; a negative
// slot stores nothing. dtype -1: rows are copied, and sizes and strides count bytes. Else that of k and v: 0 float32,
// 1 bfloat16, 2 float16; the caches are float8_e4m3fn, each row over its cache's scale, of one float or one a head (scale
// step 1), or null; row, a multiple of 16, counts elements, and so bytes of a cache.
// Returns what scatter does, or -1 for a dtype that this machine cannot convert.
extern "C" int64_t seamwise_kv_append(int64_t dtype, const void* k, const void* v, void* k_cache, void* v_cache,
                                      const int64_t* slots, int64_t tokens, int64_t kv_heads, int64_t row,
                                      int64_t num_blocks, int64_t block_size, int64_t k_token_stride,
                                      int64_t k_head_stride, int64_t v_token_stride, int64_t v_head_stride,
                                      int64_t k_block_stride, int64_t k_cache_head_stride, int64_t v_block_stride,
                                      int64_t v_cache_head_stride, const float* k_scale, int64_t k_scale_step,
                                      const float* v_scale, int64_t v_scale_step, int64_t num_threads) {
    const Side sides[2] = {{(const char*)k, (char*)k_cache, k_token_stride, k_head_stride, k_block_stride,
                            k_cache_head_stride, k_scale, k_scale_step},
                           {(const char*)v, (char*)v_cache, v_token_stride, v_head_stride, v_block_stride,
                            v_cache_head_stride, v_scale, v_scale_step}};
    const auto append = [&](auto put) {
        return scatter(sides, slots, tokens, kv_heads, row, num_blocks, block_size, num_threads, put);
    };
    const auto narrowed = [&](auto element) {
        return append([row](const Side& s, int64_t head, char* to, const char* from) {
            quantize<decltype(element)>(s, head, to, from, row);
        });
    };
    if (dtype == -1) return append([row](const Side&, int64_t, char* to, const char* from) { std::memcpy(to, from, row); });
    if (dtype == 0) return narrowed(float{});
    if (dtype == 1) return narrowed(BFloat16{});
#if defined(SEAMWISE_FLOAT16)
    if (dtype == 2) return narrowed(Float16{});
#endif
    return -1;
}
