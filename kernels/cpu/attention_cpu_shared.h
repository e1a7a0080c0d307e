// Which requests begin with the same blocks: their queries are rows of one task on these tiles, read and packed once for
// all, and each goes on alone from the state that its rows have there. A row's tiles are merged in the same order as
// without it, so its bits are the same.
#pragma once
#include "attention_cpu_plan.h"

constexpr int kMostSharers = 8;  // queries of a request above which packing is a small part of its work
constexpr int kLeaders = 8;      // requests that others are compared with: the last ones that were like no other

// For each request, the tiles that it shares and where its queries stand among those that share any.
struct Shared {
    std::vector<int> tiles, leader, place, tokens;
    Scratch states;  // (KV head, place of the query, head of the group, state), after the shared tiles

    float* state(const Call& c, int kv_head, int64_t at) const {
        return states.data + (kv_head * int64_t(tokens.size()) + at) * c.group() * c.state();
    }
};

// The tiles of r that begin as `first` of request l do; all of them lie before r's queries.
inline int common_tiles(const Call& c, int r, int l, int most) {
    const int32_t *a = c.block_table + r * c.table_stride, *b = c.block_table + l * c.table_stride;
    const int64_t blocks = (int64_t(most) * kTile + c.block_size - 1) / c.block_size;
    int64_t same = 0;
    while (same < blocks && a[same] == b[same]) ++same;
    return int(std::min<int64_t>(most, same * c.block_size / kTile));
}

// Finds who shares tiles and makes the tasks on them: of a call without window, for requests of few queries.
inline void plan_shared(const Call& c, int64_t num_threads, Shared& shared, Plan& plan) {
    plan.tasks.clear();
    shared.tiles.assign(c.requests, 0), shared.leader.assign(c.requests, -1), shared.place.assign(c.requests, 0);
    shared.tokens.clear();
    if (c.window || c.requests < 2) return;
    int leaders[kLeaders], found = 0;
    for (int r = 0; r < c.requests; ++r) {
        const int own = (c.seq_lens[r] - c.num_queries(r)) / kTile;
        if (own < kSharedTiles || c.num_queries(r) < 1 || c.num_queries(r) > kMostSharers) continue;
        for (int i = found; i-- > std::max(0, found - kLeaders) && shared.leader[r] < 0;) {
            const int l = leaders[i % kLeaders], common = common_tiles(c, r, l, std::min(own, shared.tiles[l]));
            if (common >= kSharedTiles) shared.leader[r] = l, shared.tiles[l] = common;
        }
        if (shared.leader[r] < 0) leaders[found++ % kLeaders] = shared.leader[r] = r, shared.tiles[r] = own;
    }
    for (int l = 0; l < c.requests; ++l) {  // the members of each leader, itself the first, side by side
        if (shared.leader[l] != l) continue;
        const size_t first = shared.tokens.size();
        int members = 0;
        for (int r = l; r < c.requests; ++r) {
            if (shared.leader[r] != l) continue;
            ++members, shared.place[r] = int(shared.tokens.size()), shared.tiles[r] = shared.tiles[l];
            for (int i = 0; i < c.num_queries(r); ++i) shared.tokens.push_back(c.query_starts[r] + i);
        }
        if (members == 1) shared.tokens.resize(first), shared.tiles[l] = 0;
        const int queries = std::max(1, kTaskRows / c.group()), end = int(shared.tokens.size());
        for (int at = int(first); at < end; at += queries)
            for (int h = 0; h < c.kv_heads; ++h)
                plan.tasks.push_back(Task::of(l, h, at, std::min(queries, end - at), 0, shared.tiles[l]));
    }
    shared.states.reserve(c.kv_heads * int64_t(shared.tokens.size()) * c.group() * c.state());
    for (Task& t : plan.tasks) {
        t.tokens = shared.tokens.data() + t.first_query;
        t.states = shared.state(c, t.kv_head, t.first_query);
        t.first_query = 0;
    }
    if (num_threads > 1 && int64_t(plan.tasks.size()) < 4 * num_threads) split(c, num_threads, plan);
}

// Cuts the rest of the call into tasks by request, KV head and queries, and by tiles where that leaves threads idle.
inline void plan_own(const Call& c, int64_t num_threads, const Shared& shared, Plan& plan) {
    const int64_t wanted = 4 * num_threads;
    int queries = std::max(1, kTaskRows / c.group()), most = 0;
    const auto num_tasks = [&] {
        int64_t n = 0;
        for (int r = 0; r < c.requests; ++r) n += (c.num_queries(r) + queries - 1) / queries * c.kv_heads;
        return n;
    };
    while (num_tasks() < wanted && queries / 2 * c.group() >= kMinTaskRows) queries /= 2;
    auto& tasks = plan.tasks;
    tasks.clear();
    for (int r = 0; r < c.requests; ++r) {
        const int n = c.num_queries(r), before = shared.tiles[r];
        most = std::max(most, n);
        for (int first = 0; first < n; first += queries)
            for (int h = 0; h < c.kv_heads; ++h) {
                const int count = std::min(queries, n - first);
                const int begin = before ? before : c.first_seen(r, first) / kTile;
                tasks.push_back(Task::of(r, h, first, count, begin, (c.visible(r, first + count - 1) + kTile - 1) / kTile));
                if (before) tasks.back().states = shared.state(c, h, shared.place[r] + first);
            }
    }
    if (num_threads > 1 && int64_t(tasks.size()) < wanted) split(c, num_threads, plan);
    if (most > 1)  // the largest first, so that the threads end together
        std::sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work() > b.work(); });
}
