// Threads of the CPU kernels: those of the OpenMP runtime that torch loaded, called by its own entry point (see cpp.py);
// and scratch memory of a thread.
//
// A kernel called alone makes a parallel region of its own. While a tape is replayed there is one region for all its
// kernels: its threads form a team, which takes tasks of one kernel after the other. So the runtime's barriers, at which
// each thread waits for all others to be running, are passed once a replay and not twice a kernel; and a thread whose core
// another process has taken is not waited for, unless it was in the middle of a task.
#pragma once
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <new>

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A number that threads sleep on until it changes; who changes it wakes them. Waiting spins for some 30 us first.
class Signal {
    std::atomic<uint32_t> value{0}, sleepers{0};
    static constexpr int kSpins = 1000;

   public:
    template <class Ready>
    void wait(Ready ready) {
        for (int i = 0; i < kSpins; ++i, relax())
            if (ready()) return;
        sleepers.fetch_add(1);
        for (;;) {
            const uint32_t seen = value.load();
            if (ready()) break;
#if defined(__linux__)
            syscall(SYS_futex, (uint32_t*)&value, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
            if (value.load() == seen) sched_yield();
#endif
        }
        sleepers.fetch_sub(1);
    }

    void changed() {  // after the change, which must be sequentially consistent
        if (sleepers.load() == 0) return;
        value.fetch_add(1);
#if defined(__linux__)
        syscall(SYS_futex, (uint32_t*)&value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
    }
};

// The threads of one replay. Their leader runs the kernels; the others take part in each that has tasks left when they
// see it. `state` counts kernels in its high half, then whether the last one is open, then who is in it.
class Team {
    static constexpr uint64_t kOpen = 1 << 16, kNext = uint64_t(1) << 32, kInside = kOpen - 1;
    void (*body)(void*, int64_t) = nullptr;
    void* data = nullptr;
    int64_t count = 0;
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<uint64_t> state{0};
    std::atomic<bool> finished{false};
    Signal opened, left;

    void take() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(data, i);
    }

   public:
    // Calls body(data, i) for every i < n, in order of taking; the leader calls this.
    void run(void (*call)(void*, int64_t), void* argument, int64_t n) {
        body = call, data = argument, count = n;
        next.store(0, std::memory_order_relaxed);
        state.store((state.load() / kNext + 1) * kNext + kOpen);
        opened.changed();
        take();
        if (state.fetch_and(~kOpen) & kInside) left.wait([this] { return (state.load() & kInside) == 0; });
    }

    void finish() {
        finished.store(true);
        opened.changed();
    }

    // What the other threads do until finish().
    void serve() {
        for (uint64_t seen = state.load() / kNext;;) {
            opened.wait([&] { return state.load() / kNext != seen || finished.load(); });
            if (finished.load()) return;
            uint64_t now = state.load();
            seen = now / kNext;
            while (now & kOpen && now / kNext == seen)
                if (state.compare_exchange_weak(now, now + 1)) {
                    take();
                    state.fetch_sub(1);
                    left.changed();
                    break;
                }
        }
    }
};

// The team that the calling thread leads, or null. It stands in tape.cpp, of whose library others are told when loaded.
static Team* (*current_team)() = nullptr;
extern "C" void seamwise_use_team(Team* (*current)()) { current_team = current; }

// Calls body(i) for every i < count, handed out one by one in order to num_threads threads.
template <class Body>
void parallel_for(int64_t num_threads, int64_t count, Body body) {
    if (num_threads <= 1 || count <= 1) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
    if (Team* team = current_team ? current_team() : nullptr)
        return team->run([](void* data, int64_t i) { (*(Body*)data)(i); }, &body, count);
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
