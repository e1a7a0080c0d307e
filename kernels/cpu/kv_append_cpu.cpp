// Scatter of a step's keys and values into the paged cache, for any element size.
#include <cstring>

#include "cpu_threads.h"

namespace {

constexpr int64_t kBytesPerTask = 64 << 10;  // below this, a copy is shorter than waking a thread

struct Side {
    const char* from;
    char* to;
    int64_t token_stride, head_stride, block_stride, cache_head_stride;
};

}  // namespace

// Copies row t of k and v (tokens, kv_heads, row) into slot slots[t] = block * block_size + offset of the caches; a
// negative slot stores nothing. Sizes and strides count bytes. Returns 0, or 1 + the first token whose slot lies
// outside the cache, and then has written nothing.
extern "C" int64_t seamwise_kv_append(const void* k, const void* v, void* k_cache, void* v_cache, const int64_t* slots,
                                      int64_t tokens, int64_t kv_heads, int64_t row, int64_t num_blocks,
                                      int64_t block_size, int64_t k_token_stride, int64_t k_head_stride,
                                      int64_t v_token_stride, int64_t v_head_stride, int64_t k_block_stride,
                                      int64_t k_cache_head_stride, int64_t v_block_stride, int64_t v_cache_head_stride,
                                      int64_t num_threads) {
    for (int64_t t = 0; t < tokens; ++t)
        if (slots[t] >= num_blocks * block_size) return 1 + t;
    const Side sides[2] = {
        {(const char*)k, (char*)k_cache, k_token_stride, k_head_stride, k_block_stride, k_cache_head_stride},
        {(const char*)v, (char*)v_cache, v_token_stride, v_head_stride, v_block_stride, v_cache_head_stride}};
    const int64_t per_task = 1 + kBytesPerTask / (2 * kv_heads * row);
    parallel_for(num_threads, (tokens + per_task - 1) / per_task, [&](int64_t task) {
        const int64_t end = (task + 1) * per_task < tokens ? (task + 1) * per_task : tokens;
        for (int64_t t = task * per_task; t < end; ++t) {
            if (slots[t] < 0) continue;
            const int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
            for (const Side& s : sides)
                for (int64_t h = 0; h < kv_heads; ++h)
                    std::memcpy(s.to + block * s.block_stride + h * s.cache_head_stride + offset * row,
                                s.from + t * s.token_stride + h * s.head_stride, row);
        }
    });
    return 0;
}
