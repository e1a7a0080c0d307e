// Replays recorded kernel calls: the CPU's analogue of launching a CUDA graph.
#include <chrono>
#include <cstdint>

#include "cpu_threads.h"

struct Entry {
    void* function;
    double number;     // the one floating-point argument, if the kernel has one
    int64_t args[32];  // its integer and pointer arguments, in order
};

// On x86-64 (System V) and AArch64, integers and doubles are passed in separate sequences and the caller removes what
// it passed, so one call with 32 integers and one double serves every kernel with at most as many.
typedef int64_t (*Kernel)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t, double);

namespace {

thread_local Team* led = nullptr;

// Calls every entry in order; returns 0, or 1 + the index of the first that reports an error (in *error).
int64_t run(const Entry* entries, int64_t count, int64_t* error, double* seconds) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t* a = entries[i].args;
        const auto began = seconds ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point();
        *error = ((Kernel)entries[i].function)(
            a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16],
            a[17], a[18], a[19], a[20], a[21], a[22], a[23], a[24], a[25], a[26], a[27], a[28], a[29], a[30], a[31],
            entries[i].number);
        if (*error) return 1 + i;
        if (seconds) seconds[i] = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    }
    return 0;
}

struct Replay {
    const Entry* entries;
    int64_t count, *error;
    double* seconds;
    Team team;
    int64_t failed = 0;
};

}  // namespace

extern "C" Team* seamwise_current_team() { return led; }

// Calls every entry in order with a team of num_threads; returns 0, or 1 + the index of the first that reports an error
// (in *error). seconds, where not null, receives what each took.
extern "C" int64_t seamwise_replay(const Entry* entries, int64_t count, int64_t* error, double* seconds,
                                   int64_t num_threads) {
    if (num_threads <= 1 || count <= 1) return run(entries, count, error, seconds);
    Replay replay{entries, count, error, seconds};
    led = &replay.team;
    GOMP_parallel(
        [](void* data) {
            Replay& r = *(Replay*)data;
            if (led != &r.team) return r.team.serve();
            r.failed = run(r.entries, r.count, r.error, r.seconds);
            r.team.finish();
        },
        &replay, unsigned(num_threads), 0);
    led = nullptr;
    return replay.failed;
}
