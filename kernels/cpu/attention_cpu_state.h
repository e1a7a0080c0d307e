// The state of a query row after some keys, o[dim], l in kLanes parts and m, and what attention does to it.
#pragma once
#include "cpu_simd.h"

constexpr float kFloor = -1e30f;  // m of a tile in which a row sees no key: merging it changes nothing
constexpr float kLog2e = 1.4426950408889634f;

// Within 4 ulp: the series below 1/4, where 1 - 2^-x would lose digits.
inline Vec tanh(Vec x) {
    const Vec size = max(x, -x), square = x * x, shrunk = exp2_nonpositive(size * splat(-2 * kLog2e));
    const Vec high = (splat(1.f) - shrunk) / (splat(1.f) + shrunk);
    Vec p = splat(62.f / 2835);
    p = p * square + splat(-17.f / 315);
    p = p * square + splat(2.f / 15);
    p = p * square + splat(-1.f / 3);
    p = p * square + splat(1.f);
    return size < splat(0.25f) ? x * p : x < Vec{} ? -high : high;
}

// into = into and then from, for `rows` rows. Never inlined: every path must merge with the same instructions.
__attribute__((noinline)) inline void merge(float* into, const float* from, int rows, int64_t state) {
    const int64_t m = state - kLanes;
    alignas(64) float shrink[kRows + kLanes] = {};
    for (int i = 0; i < rows; ++i) shrink[i] = -__builtin_fabsf(into[i * state + m] - from[i * state + m]);
    for (int i = 0; i < rows; i += kLanes) store(shrink + i, exp2_nonpositive(load(shrink + i)));
    for (int i = 0; i < rows; ++i, into += state, from += state) {
        const bool grows = into[m] < from[m];
        const Vec old_scale = splat(grows ? shrink[i] : 1.f), new_scale = splat(grows ? 1.f : shrink[i]);
        for (int64_t d = 0; d < m; d += kLanes)
            store(into + d, load(into + d) * old_scale + load(from + d) * new_scale);
        into[m] = grows ? from[m] : into[m];
    }
}

// The states of rows that have seen no key: merging any into them gives that one.
inline void forget(float* into, int rows, int64_t state) {
    for (int i = 0; i < rows; ++i, into += state) {
        for (int64_t d = 0; d < state; ++d) into[d] = 0;
        into[state - kLanes] = kFloor;
    }
}
