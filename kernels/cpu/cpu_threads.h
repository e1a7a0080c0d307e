// The OpenMP runtime that torch loaded, called by its own entry point (see cpp.py), and scratch memory of a thread.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

// Calls body(i) for every i < count, handed out one by one in order to num_threads threads.
template <class Body>
void parallel_for(int64_t num_threads, int64_t count, Body body) {
    if (num_threads <= 1 || count <= 1) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
    struct Job {
        Body& body;
        int64_t count, next;
    } job{body, count, 0};
    GOMP_parallel(
        [](void* data) {
            Job& job = *(Job*)data;
            for (int64_t i; (i = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED)) < job.count;) job.body(i);
        },
        &job, unsigned(num_threads), 0);
}

// Scratch of one thread; it only grows, so a steady call allocates nothing.
struct Scratch {
    float* data = nullptr;
    int64_t capacity = 0;
    ~Scratch() { std::free(data); }
    float* reserve(int64_t floats) {
        if (floats > capacity) {
            std::free(data);
            capacity = (floats + floats / 4 + 1023) / 1024 * 1024;
            data = (float*)std::aligned_alloc(64, capacity * sizeof(float));
            if (!data) throw std::bad_alloc();
        }
        return data;
    }
};
