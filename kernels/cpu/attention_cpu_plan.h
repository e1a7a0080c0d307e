// What one attention call is, and how it is cut into tasks. No task's bits depend on the cut: see attention_cpu.cpp.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu_simd.h"
#include "cpu_threads.h"

constexpr int kTile = 64;         // keys of one softmax tile: part of the arithmetic
constexpr int kTaskRows = 192;    // query rows that share one packed tile; packing is then 2 % of a prefill's time
constexpr int kMinTaskRows = 24;  // queries are not cut below this many rows to keep threads busy
constexpr int64_t kMaxKept = int64_t(4) << 20;  // floats of kept states above which only a single query is split

// What a cache's keys or values are to be multiplied with: one for all KV heads, one for each (step 1), or none (null).
struct Scales {
    const float* data;
    int64_t step;
    float of(int kv_head) const { return data ? data[kv_head * step] : 1.f; }
};

struct Call {
    void* out;
    const void *q, *k_cache, *v_cache;
    const int32_t *block_table, *seq_lens, *query_starts;
    int64_t tokens, heads, kv_heads, num_blocks, block_size, dim, value_dim, requests, table_width, table_stride;
    int64_t q_strides[2], k_strides[2], v_strides[2];  // of token and head; of block and head
    float scale, softcap;
    int64_t window;
    const void* sinks;  // of each head, or null
    bool narrow_sinks;  // bfloat16, else float
    Scales k_scale, v_scale;
    int64_t* spared;  // gains the tiles that requests share and need not read again; null: they share none

    int group() const { return int(heads / kv_heads); }  // query heads that share a KV head
    int64_t state() const { return value_dim + 2 * kLanes; }  // floats of a row's state: o, l in kLanes parts, m
    int num_queries(int r) const { return query_starts[r + 1] - query_starts[r]; }
    int visible(int r, int i) const { return seq_lens[r] - num_queries(r) + i + 1; }  // the end of the keys that query i of r sees
    int first_seen(int r, int i) const {  // window < 0: chunks of as many keys
        if (window < 0) return int((visible(r, i) - 1) / -window * -window);
        return window ? int(std::max<int64_t>(0, visible(r, i) - window)) : 0;
    }
};

// Consecutive queries of one request, for the heads of one KV head, on some tiles of its keys; or queries of several
// requests whose first tiles are those of `request`, all of which they see.
struct Task {
    int request, kv_head, first_query, num_queries, tile_begin, tile_end;
    int first_tile, last_tile;    // tile_begin of the first part, tile_end of the last
    int parts;                    // tasks over which these tiles are spread; if more than one, they keep their tiles
    int* unfinished;              // parts still at work
    float* kept;                  // the states of every tile and row
    const int* tokens = nullptr;  // the queries' rows, where they are of several requests
    float* states = nullptr;      // where these leave their states, and the requests' own tasks begin from; or null

    static Task of(int request, int kv_head, int first, int count, int begin, int end) {
        return {request, kv_head, first, count, begin, end, begin, end, 1, nullptr, nullptr};
    }
    int64_t work() const { return int64_t(num_queries) * (tile_end - tile_begin); }
};

// 0, or 2^32 * (1 query_starts, 2 seq_lens, 3 block_table) + the request at which that input is wrong.
inline int64_t first_error(const Call& c) {
    const int64_t code = int64_t(1) << 32;
    if (c.query_starts[0] != 0) return code;
    for (int r = 0; r < c.requests; ++r) {
        const int64_t n = c.num_queries(r), length = c.seq_lens[r];  // blocks before the window may be any
        if (n < 0 || c.query_starts[r + 1] > c.tokens) return code + r;
        if (n == 0) continue;
        if (length < n || length > c.table_width * c.block_size) return 2 * code + r;
        bool wrong = false;
        for (int64_t j = c.first_seen(r, 0) / c.block_size; j < (length + c.block_size - 1) / c.block_size; ++j)
            wrong |= uint64_t(c.block_table[r * c.table_stride + j]) >= uint64_t(c.num_blocks);
        if (wrong) return 3 * code + r;
    }
    return 0;
}

struct Plan {
    std::vector<Task> tasks;
    std::vector<int> unfinished;
    Scratch kept;
};

// Spreads the tiles of each task over several: a long context in a small batch.
inline void split(const Call& c, int64_t num_threads, Plan& plan) {
    auto& [tasks, unfinished, kept] = plan;
    const size_t num_groups = tasks.size();
    const auto kept_size = [&c](const Task& t) {
        const int64_t floats = int64_t(t.tile_end - t.first_tile) * t.num_queries * c.group() * c.state();
        return t.num_queries == 1 || floats <= kMaxKept ? floats : 0;
    };
    int64_t tiles = 0, floats = 0;
    for (const Task& t : tasks) tiles += t.tile_end - t.first_tile, floats += kept_size(t);
    const int part_tiles = int(std::max<int64_t>(1, tiles / (8 * num_threads)));
    float* next = kept.reserve(floats);
    unfinished.resize(num_groups);
    for (size_t i = 0; i < num_groups; ++i) {
        Task t = tasks[i];
        const int all = t.tile_end;
        if (kept_size(t) == 0) continue;
        t.parts = unfinished[i] = (all - t.first_tile + part_tiles - 1) / part_tiles;
        t.unfinished = &unfinished[i];
        t.kept = next;
        next += kept_size(t);
        for (; t.tile_begin < all; t.tile_begin = t.tile_end) {
            t.tile_end = std::min(all, t.tile_begin + part_tiles);
            if (t.tile_begin == t.first_tile) tasks[i] = t;
            else tasks.push_back(t);
        }
    }
}
