// Threads that wait for the next loop awake, for a while: a decode step is a few hundred loops of some microseconds
// each, with as little between them, and waking a thread takes as long. While they wait they yield.

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

constexpr auto AWAKE = std::chrono::microseconds(200);

template <class F> inline bool spin(F done, std::chrono::microseconds limit) {
    const auto end = std::chrono::steady_clock::now() + limit;
    do {
        for (int i = 0; i < 64; i++) {
            if (done()) return true;
            PAUSE;
        }
        sched_yield();
    } while (std::chrono::steady_clock::now() < end);
    return done();
}

class Pool {
    std::mutex busy, sleep;  // busy: one loop at a time
    std::condition_variable wake;
    std::atomic<uint64_t> loops{0};
    std::atomic<int64_t> next{0};
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
            inside--;
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
        while (!spin([&] { return inside.load() == 0; }, AWAKE)) {}
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
