// A team of threads that runs one function in parallel, with its synchronisation primitives.
//
// The calling thread is member 0. Shared counters distribute work in small items, so a core that is busy with other work
// takes fewer of them; the result of an item never depends on the thread that computes it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "simd.h"

namespace mgk {
namespace MGK_ISA {

constexpr int kMaxThreads = 64;
constexpr int kSpins = 1000;  // some 10 to 40 microseconds, as long as `pause` takes

// Futex: sleep while the word still holds `value` (may return early); wake all who sleep on it.
void sleep_while(std::atomic<uint32_t>& word, uint32_t value);
void wake_all(std::atomic<uint32_t>& word);

class Team {
public:
    explicit Team(int num_threads) : num_threads_(num_threads < kMaxThreads ? num_threads : kMaxThreads) {}
    int num_threads() const { return num_threads_; }

    // Returns when every member has called it. Spins for a moment, because the next phase is microseconds away; then
    // sleeps, so that the core is free for a member that lost its own to other work.
    void barrier() {
        if (num_threads_ == 1) {
            reset();
            return;
        }
        const uint32_t phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            reset();
            phase_.store(phase + 1, std::memory_order_seq_cst);
            if (sleepers_.load(std::memory_order_seq_cst) > 0) wake_all(phase_);
            return;
        }
        for (int spin = 0; spin < kSpins; ++spin) {
            if (phase_.load(std::memory_order_acquire) != phase) return;
            _mm_pause();
        }
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        while (phase_.load(std::memory_order_seq_cst) == phase) sleep_while(phase_, phase);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }

    // Calls work(i) exactly once for every i in [0, count), then waits at a barrier. Each member processes its own range
    // in order (for sequential memory access), and then helps the others with theirs.
    template <class Work> void for_each(int member, int64_t count, Work&& work) {
        for (int turn = 0; turn < num_threads_; ++turn) {
            const int owner = (member + turn) % num_threads_;
            const int64_t begin = count * owner / num_threads_, end = count * (owner + 1) / num_threads_;
            for (;;) {
                const int64_t i = begin + done_[owner].count.fetch_add(1, std::memory_order_relaxed);
                if (i >= end) break;
                work(i);
            }
        }
        barrier();
    }

private:
    const int num_threads_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    std::atomic<int> sleepers_{0};
    struct alignas(64) Counter {
        std::atomic<int64_t> count{0};
    };
    void reset() {
        for (int i = 0; i < num_threads_; ++i) done_[i].count.store(0, std::memory_order_relaxed);
    }
    Counter done_[kMaxThreads];
};

// Threads that wait for the next call: they spin briefly, then sleep.
class ThreadPool {
public:
    using Function = void (*)(void* context, Team& team, int member);

    // Runs function(context, team, member) on num_threads members; returns when all are done. One call at a time.
    void run(int num_threads, Function function, void* context);
    ~ThreadPool();

private:
    struct Call {
        Function function = nullptr;
        void* context = nullptr;
        Team* team = nullptr;
    };
    void work(int member, uint64_t seen);
    void start(int num_threads);

    std::mutex one_call_, mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<uint32_t> running_{0};
    bool stop_ = false;
    Call call_;
};

// The pool of this process; created at the first parallel call, and again in a forked child.
ThreadPool& thread_pool();

template <class Body> void parallel(int num_threads, Body&& body) {
    if (num_threads <= 1) {
        Team team(1);
        body(team, 0);
        return;
    }
    thread_pool().run(
        num_threads, [](void* context, Team& team, int member) { (*static_cast<Body*>(context))(team, member); }, &body);
}

}  // namespace MGK_ISA
}  // namespace mgk
