// Calls of the other functions, one after another.

#include <cstdint>

struct Call {
    void (*function)(const void*, int32_t);
    const void* arguments;
};

extern "C" void llmrs_replay(const Call* calls, int64_t count, int32_t threads) {
    for (int64_t i = 0; i < count; i++) calls[i].function(calls[i].arguments, threads);
}
