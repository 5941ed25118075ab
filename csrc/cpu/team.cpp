// The thread pool behind team.h.
#include "team.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace mgk {
namespace MGK_ISA {

namespace {
constexpr int kIdleSpins = 5000;  // some 50 to 200 microseconds: about the time between two steps of a busy engine
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
    static_assert(sizeof(word) == sizeof(uint32_t));
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }

void ThreadPool::start(int num_threads) {
    while (int(threads_.size()) < num_threads - 1) {
        const int member = int(threads_.size()) + 1;
        threads_.emplace_back(&ThreadPool::work, this, member, generation_.load());
    }
}

void ThreadPool::run(int num_threads, Function function, void* context) {
    std::lock_guard<std::mutex> only(one_call_);
    Team team(num_threads);
    start(team.num_threads());
    call_ = {function, context, &team};
    running_.store(uint32_t(threads_.size()), std::memory_order_relaxed);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    function(context, team, 0);
    // Workers still running hold references to `team` and to the caller's frame.
    for (int spin = 0; spin < kSpins && running_.load(std::memory_order_acquire) != 0; ++spin) _mm_pause();
    for (uint32_t left = running_.load(std::memory_order_acquire); left != 0; left = running_.load(std::memory_order_acquire))
        sleep_while(running_, left);
}

void ThreadPool::work(int member, uint64_t seen) {
    for (;;) {
        for (int spin = 0; spin < kIdleSpins && generation_.load(std::memory_order_acquire) == seen; ++spin) _mm_pause();
        if (generation_.load(std::memory_order_acquire) == seen) {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return stop_ || generation_.load(std::memory_order_relaxed) != seen; });
            if (stop_) return;
        }
        seen = generation_.load(std::memory_order_acquire);
        if (member < call_.team->num_threads()) call_.function(call_.context, *call_.team, member);
        if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) wake_all(running_);
    }
}

ThreadPool::~ThreadPool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

ThreadPool& thread_pool() {
    // Never destroyed: at exit the workers sleep in wait() and end with the process. A forked child inherits none of
    // them and creates its own pool.
    static std::mutex mutex;
    static ThreadPool* pool = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(mutex);
    if (pool == nullptr || owner != getpid()) {
        pool = new ThreadPool;
        owner = getpid();
    }
    return *pool;
}

}  // namespace MGK_ISA
}  // namespace mgk
