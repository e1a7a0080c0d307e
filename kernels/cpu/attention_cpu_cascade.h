// Which requests begin with the same blocks: their queries are rows of one task on these tiles, read and packed once for
// all, and each goes on alone from the state that its rows have there. A row's tiles are merged in the same order as
// without it, so its bits are the same.
#pragma once
#include "attention_cpu_plan.h"

constexpr int kMostRows = 24;  // of a request that shares tiles: of more, packing is a small part of the work
static_assert(kMostRows <= kMinTaskRows, "its queries are one task");

// Keys' columns, of all KV heads, that a group must spare in tiles: for less, with two threads, another turn of theirs
// costs as much (Zen 4, 3 KV heads of 64 columns: 0.94-0.99 of the speed where 1 to 4 tiles are spared, 1.00-1.02 at 8 to
// 15, 1.07 at 30, 1.5 at 480; one thread gains from 1 on).
constexpr int64_t kLeastSpared = 24 * 64;

// How the requests of a call are grouped, and for each one the tiles that it shares and where its queries stand among
// those of all groups.
struct Cascade {
    std::vector<int> order, tiles, place, tokens, alike, spared, first;
    Scratch states;  // (KV head, place of the query, head of the group, state), after the shared tiles

    float* state(const Call& c, int kv_head, int64_t at) const {
        return states.data + (kv_head * int64_t(tokens.size()) + at) * c.group() * c.state();
    }
};

// Sorts the requests that may share tiles, those that begin alike side by side, and counts in `alike` the tiles that each
// has in common with the one before: of those that lie before all of its queries.
inline void sort_requests(const Call& c, Cascade& found) {
    std::vector<int>&order = found.order, &tiles = found.tiles, &alike = found.alike;
    order.clear();
    tiles.assign(c.requests, 0);
    for (int r = 0; r < c.requests; ++r) {
        const int n = c.num_queries(r);
        if (n < 1 || n * c.group() > kMostRows || c.seq_lens[r] - n < kTile) continue;
        tiles[r] = (c.seq_lens[r] - n) / kTile;
        order.push_back(r);
    }
    const auto blocks = [&](int r) { return (int64_t(tiles[r]) * kTile + c.block_size - 1) / c.block_size; };
    const auto table = [&](int r) { return c.block_table + r * c.table_stride; };
    std::sort(order.begin(), order.end(), [&](int a, int b) {
        const int differ = std::memcmp(table(a), table(b), std::min(blocks(a), blocks(b)) * sizeof(int32_t));
        return differ ? differ < 0 : blocks(a) < blocks(b);
    });
    alike.assign(order.size(), 0);
    for (size_t i = 1; i < order.size(); ++i) {
        const int32_t *a = table(order[i - 1]), *b = table(order[i]);
        const int64_t least = std::min(blocks(order[i - 1]), blocks(order[i]));
        const int64_t same = std::mismatch(a, a + least, b).first - a;
        alike[i] = int(std::min<int64_t>({tiles[order[i - 1]], tiles[order[i]], same * c.block_size / kTile}));
    }
}

// Groups the requests so that most tiles are spared, and makes the tasks on the shared ones.
inline void plan_shared(const Call& c, int64_t num_threads, Cascade& found, Plan& plan) {
    auto& [order, tiles, place, tokens, alike, spared, first, states] = found;
    plan.tasks.clear();
    tokens.clear();
    place.assign(c.requests, 0);
    tiles.assign(c.requests, 0);
    if (!c.spared || c.window || c.requests < 2) return;
    sort_requests(c, found);
    const int count = int(order.size());
    spared.assign(count + 1, 0), first.assign(count + 1, 0);  // of the first i requests, and where their last group begins
    for (int i = 1; i <= count; ++i) {
        spared[i] = spared[i - 1], first[i] = i - 1;
        int common = c.table_width * c.block_size / kTile;
        for (int begin = i - 2; begin >= 0 && (common = std::min(common, alike[begin + 1])) > 0; --begin) {
            const int more = (i - 1 - begin) * common;
            if (more * c.kv_heads * c.dim < kLeastSpared || spared[begin] + more <= spared[i]) continue;
            spared[i] = spared[begin] + more, first[i] = begin;
        }
    }
    for (int end = count; end > 0; end = first[end]) {
        const int begin = first[end], leader = order[begin], before = int(tokens.size());
        const int common = begin + 1 == end ? 0 : *std::min_element(&alike[begin + 1], &alike[end]);
        for (int i = begin; i < end; ++i) {
            tiles[order[i]] = common, place[order[i]] = int(tokens.size());
            for (int n = 0; common && n < c.num_queries(order[i]); ++n) tokens.push_back(c.query_starts[order[i]] + n);
        }
        const int queries = std::max(1, kTaskRows / c.group()), all = int(tokens.size());
        for (int at = before; at < all; at += queries)
            for (int h = 0; h < c.kv_heads; ++h)
                plan.tasks.push_back(Task::of(leader, h, at, std::min(queries, all - at), 0, common));
    }
    states.reserve(c.kv_heads * int64_t(tokens.size()) * c.group() * c.state());
    for (Task& t : plan.tasks) {
        t.tokens = tokens.data() + t.first_query;
        t.states = found.state(c, t.kv_head, t.first_query);
        t.first_query = 0;
    }
    *c.spared += spared[count];
    if (num_threads > 1 && int64_t(plan.tasks.size()) < 4 * num_threads) split(c, num_threads, plan);
}

// Cuts the rest of the call into tasks by request, KV head and queries, and by tiles where that leaves threads idle.
inline void plan_own(const Call& c, int64_t num_threads, const Cascade& found, Plan& plan) {
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
        const int n = c.num_queries(r), before = found.tiles[r];
        most = std::max(most, n);
        for (int first = 0; first < n; first += queries)
            for (int h = 0; h < c.kv_heads; ++h) {
                const int count = std::min(queries, n - first);
                const int begin = before ? before : c.first_seen(r, first) / kTile;
                const int end = (c.visible(r, first + count - 1) + kTile - 1) / kTile;
                tasks.push_back(Task::of(r, h, first, count, begin, end));
                if (before) tasks.back().states = found.state(c, h, found.place[r]);
            }
    }
    if (num_threads > 1 && int64_t(tasks.size()) < wanted) split(c, num_threads, plan);
    if (most > 1)  // the largest first, so that the threads end together
        std::sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work() > b.work(); });
}
