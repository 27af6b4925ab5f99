// Threads that wait for the next loop awake: a decode step is a few hundred loops of some microseconds each, with as
// little between them, and waking a thread takes as long; a core that was idle between steps takes milliseconds to come
// back. At first they spin, then they yield, so that others may have the core, then they sleep. A loop's own thread
// sleeps if others are late: their core may have been taken, and the scheduler moves them to one that is idle.

#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE _mm_pause()
#else
#define PAUSE std::atomic_signal_fence(std::memory_order_seq_cst)
#endif

namespace {

constexpr auto HOT = std::chrono::microseconds(50), AWAKE = std::chrono::microseconds(5000);

template <class F> inline bool spin(F done, std::chrono::microseconds limit) {
    const auto begin = std::chrono::steady_clock::now();
    for (auto spent = begin - begin; spent < limit; spent = std::chrono::steady_clock::now() - begin) {
        for (int i = 0; i < 64; i++) {
            if (done()) return true;
            PAUSE;
        }
        if (spent > HOT) sched_yield();
    }
    return done();
}

class Pool {
    std::mutex busy, sleep;  // busy: one loop at a time
    std::condition_variable wake, empty;
    std::atomic<uint64_t> loops{0};
    std::atomic<int64_t> next{0};
    std::atomic<bool> waiting{false};
    std::atomic<int> open{0}, inside{0}, sleeping{0};  // open: how many more threads may join
    int started = 0;
    // Of the loop; read by threads that are inside, written while none is.
    int64_t tasks = 0;
    void (*run)(const void*, int64_t) = nullptr;
    const void* state = nullptr;

    void work() {
        for (int64_t i; (i = next.fetch_add(1)) < tasks;) run(state, i);
    }

    void serve(int number) {
        for (uint64_t seen = 0;;) {
            if (!spin([&] { return loops.load() != seen; }, AWAKE)) {
                std::unique_lock<std::mutex> lock(sleep);
                sleeping++;
                wake.wait(lock, [&] { return loops.load() != seen; });
                sleeping--;
            }
            seen = loops.load();
            inside++;  // before `open` is read: the loop's thread closes it first, then waits for those inside
            if (number < open.load()) work();
            if (--inside == 0 && waiting.load()) {
                std::lock_guard<std::mutex> lock(sleep);
                empty.notify_all();
            }
        }
    }

public:
    void share(int64_t count, int threads, void (*function)(const void*, int64_t), const void* argument) {
        std::unique_lock<std::mutex> mine(busy, std::try_to_lock);
        if (!mine) {  // another thread's loop is under way
            for (int64_t i = 0; i < count; i++) function(argument, i);
            return;
        }
        for (; started < threads - 1; started++) std::thread([this, n = started] { serve(n); }).detach();
        tasks = count, run = function, state = argument;
        next = 0, open = threads - 1;
        loops++;
        if (sleeping.load()) {
            std::lock_guard<std::mutex> lock(sleep);
            wake.notify_all();
        }
        work();
        open = 0;
        if (spin([&] { return inside.load() == 0; }, HOT)) return;
        std::unique_lock<std::mutex> lock(sleep);
        waiting = true;
        empty.wait(lock, [&] { return inside.load() == 0; });
        waiting = false;
    }
};

Pool* pool = [] {
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });  // a child has none of the threads
    return new Pool;
}();

}  // namespace

void share(int64_t tasks, int threads, void (*run)(const void*, int64_t), const void* state) {
    pool->share(tasks, threads, run, state);
}
