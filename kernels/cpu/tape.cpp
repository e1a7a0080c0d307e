// Replays recorded kernel calls: the CPU's analogue of launching a CUDA graph.
#include <cstdint>

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

// Calls every entry in order; returns 0, or 1 + the index of the first that reports an error (in *error).
extern "C" int64_t seamwise_replay(const Entry* entries, int64_t count, int64_t* error) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t* a = entries[i].args;
        *error = ((Kernel)entries[i].function)(
            a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16],
            a[17], a[18], a[19], a[20], a[21], a[22], a[23], a[24], a[25], a[26], a[27], a[28], a[29], a[30], a[31],
            entries[i].number);
        if (*error) return 1 + i;
    }
    return 0;
}
