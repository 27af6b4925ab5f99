// Loops that threads share.

#pragma once

#include <algorithm>
#include <cstdint>

// Calls run(state, i) for i in [0, tasks), by up to `threads` threads, this one included; returns when all are done.
// Other threads join if they are awake in time: one whose core is busy is not waited for, unless it has begun a task.
void share(int64_t tasks, int threads, void (*run)(const void*, int64_t), const void* state);

// run(begin, end) for parts of [0, count) of at least `least`: a few per thread, so that slow ones take fewer.
template <class F> void parallel(int64_t count, int64_t least, int threads, F run) {
    const int64_t part = std::max((count + 8 * threads - 1) / (8 * threads), least), tasks = (count + part - 1) / part;
    if (threads < 2 || tasks < 2) {
        if (count) run(0, count);
        return;
    }
    auto task = [&](int64_t i) { run(i * part, std::min(count, (i + 1) * part)); };
    share(tasks, threads, [](const void* state, int64_t i) { (*(const decltype(task)*)state)(i); }, &task);
}
