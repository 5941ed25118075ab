// Runs CUDA kernels on the host: one fiber per CUDA thread, blocks sequentially on one operating-system thread.
//
// It detects: a wrong index (shared memory is an allocation of the exact size, so AddressSanitizer sees its ends),
// shared memory read before it was written (NaN), a copy that was not waited for (NaN), a misaligned vector access
// (UndefinedBehaviorSanitizer), a missing barrier (ThreadSanitizer, which is told of fibers and barriers; exchanges
// within a warp order nothing, as in CUDA), two blocks that touch the same memory (also ThreadSanitizer, as blocks
// have no order), a barrier that not all threads reach (an abort with a message). MGK_HOST_CUDA_ORDER=reverse runs
// blocks and threads in descending order: a result that changes depends on the order.
// It cannot detect anything about time, registers or tensor cores, or memory ordering weaker than a barrier's.
//
// Where marked, accesses in this file are excluded from sanitizer instrumentation, because the emulation itself is not
// under test.
#include "cuda_runtime.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

#if !defined(__x86_64__)
#error "the fiber switch is written for x86-64"
#endif

#if defined(__SANITIZE_THREAD__)
#define MGK_TSAN 1
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* token);
void __tsan_release(void* token);
}
#define MGK_UNSEEN __attribute__((no_sanitize("thread")))
#else
#define MGK_UNSEEN
#endif
#if defined(__SANITIZE_ADDRESS__)
#define MGK_ASAN 1
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}
#endif

// Saves what the calling convention asks to keep, stores the stack pointer to *from, continues where `to` was saved.
extern "C" void mgk_switch_stack(void** from, void* to);
asm(R"(
.text
.globl mgk_switch_stack
.type mgk_switch_stack,@function
mgk_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size mgk_switch_stack,.-mgk_switch_stack
)");

namespace host_cuda {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kNoOrder = 1;  // a switch of fibers orders nothing

struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool valid;
};

struct Barrier {  // two tokens in turn: an arrival at the next barrier must not count for this one
    int arrived = 0;
    unsigned generation = 0;
    char tokens[2];
};

struct Fiber {
    unsigned char* stack = nullptr;
    void* saved = nullptr;
    void* tsan = nullptr;
    void* fake_stack = nullptr;
    Place place;
    bool done = true;
    const Barrier* waits_for = nullptr;
    unsigned waits_generation = 0;
    std::deque<std::vector<Copy>> committed;
    std::vector<Copy> open;
    unsigned exchanges = 0;
};

struct Warp {
    Barrier barrier;
    uint64_t cells[2][kWarp];
};

struct Machine {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    Barrier barrier;
    Fiber* running = nullptr;
    void* scheduler = nullptr;  // its stack pointer while a fiber runs
    void* scheduler_tsan = nullptr;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_bottom = nullptr;
    size_t scheduler_size = 0;
    unsigned char* shared = nullptr;
    const std::function<void()>* body = nullptr;
    const char* operation = "";
    int threads = 0;
    char begin_token, end_token;
};

Machine& machine() {
    static Machine the_machine;
    return the_machine;
}

[[noreturn]] MGK_UNSEEN void fail(const char* what) {
    std::fprintf(stderr, "host_cuda: %s: %s\n", machine().operation, what);
    std::abort();
}

MGK_UNSEEN void acquire(void* token) {
#if MGK_TSAN
    __tsan_acquire(token);
#else
    (void)token;
#endif
}

MGK_UNSEEN void release(void* token) {
#if MGK_TSAN
    __tsan_release(token);
#else
    (void)token;
#endif
}

MGK_UNSEEN void to_scheduler(bool for_ever) {
    Machine& m = machine();
    Fiber& self = *m.running;
#if MGK_TSAN
    __tsan_switch_to_fiber(m.scheduler_tsan, kNoOrder);
#endif
#if MGK_ASAN
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &self.fake_stack, m.scheduler_bottom, m.scheduler_size);
#endif
    (void)for_ever;
    mgk_switch_stack(&self.saved, m.scheduler);
#if MGK_ASAN
    __sanitizer_finish_switch_fiber(self.fake_stack, &m.scheduler_bottom, &m.scheduler_size);
#endif
}

MGK_UNSEEN void to_fiber(Fiber& fiber) {
    Machine& m = machine();
    m.running = &fiber;
#if MGK_TSAN
    __tsan_switch_to_fiber(fiber.tsan, kNoOrder);
#endif
#if MGK_ASAN
    __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
    mgk_switch_stack(&m.scheduler, fiber.saved);
#if MGK_ASAN
    __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
    m.running = nullptr;
}

extern "C" MGK_UNSEEN void mgk_fiber_main() {
    Machine& m = machine();
#if MGK_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_bottom, &m.scheduler_size);
#endif
    acquire(&m.begin_token);
    (*m.body)();
    wait_copies(0);
    release(&m.end_token);
    m.running->done = true;
    to_scheduler(true);
    fail("a finished thread was resumed");
}

MGK_UNSEEN void prepare(Fiber& fiber, int index, dim3 block) {
    if (!fiber.stack) {
        void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) fail("no memory for a fiber's stack");
        fiber.stack = static_cast<unsigned char*>(stack);
#if MGK_TSAN
        fiber.tsan = __tsan_create_fiber(0);
#endif
    }
    fiber.place = {dim3(unsigned(index), 0, 0), block};
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.exchanges = 0;
    // As if called at the top of the stack: six saved registers, the entry as return address, and above it a return address
    // of zero, 8 bytes off a multiple of 16 as the calling convention wants it.
    void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 3;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(&mgk_fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.saved = top;
}

MGK_UNSEEN bool can_run(const Fiber& fiber) {
    return !fiber.done && (!fiber.waits_for || fiber.waits_for->generation != fiber.waits_generation);
}

MGK_UNSEEN void arrive(Barrier& barrier, int expected, bool orders) {
    Fiber& self = *machine().running;
    const unsigned generation = barrier.generation;
    char* token = &barrier.tokens[generation & 1];
    if (orders) release(token);
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
    } else {
        self.waits_for = &barrier;
        self.waits_generation = generation;
        to_scheduler(false);
        self.waits_for = nullptr;
    }
    if (orders) acquire(token);
}

MGK_UNSEEN void run_block(bool reverse) {
    Machine& m = machine();
    for (int left = m.threads; left > 0;) {
        bool progress = false;
        for (int i = 0; i < m.threads; ++i) {
            Fiber& fiber = *m.fibers[size_t(reverse ? m.threads - 1 - i : i)];
            if (!can_run(fiber)) continue;
            progress = true;
            to_fiber(fiber);
            left -= fiber.done;
        }
        if (!progress) fail("threads wait at a barrier or an exchange that others never reach");
    }
}

}  // namespace

MGK_UNSEEN const Place& place() { return machine().running->place; }
MGK_UNSEEN unsigned char* shared_memory() { return machine().shared; }
MGK_UNSEEN void block_barrier() { arrive(machine().barrier, machine().threads, true); }

MGK_UNSEEN void exchange(const void* give, void* take, size_t size, int from) {
    Machine& m = machine();
    Fiber& self = *m.running;
    const int index = int(self.place.thread.x);
    Warp& warp = m.warps[size_t(index / kWarp)];
    uint64_t(&cells)[kWarp] = warp.cells[self.exchanges++ & 1];  // in turn: a lane may be one exchange ahead, not two
    uint64_t cell = 0;
    __builtin_memcpy(&cell, give, size);
    cells[index % kWarp] = cell;
    arrive(warp.barrier, std::min(kWarp, m.threads - index / kWarp * kWarp), false);
    cell = cells[from];
    __builtin_memcpy(take, &cell, size);
}

MGK_UNSEEN unsigned ballot(bool vote) {
    Machine& m = machine();
    Fiber& self = *m.running;
    const int index = int(self.place.thread.x), lanes = std::min(kWarp, m.threads - index / kWarp * kWarp);
    Warp& warp = m.warps[size_t(index / kWarp)];
    uint64_t(&cells)[kWarp] = warp.cells[self.exchanges++ & 1];
    cells[index % kWarp] = vote;
    arrive(warp.barrier, lanes, false);
    unsigned result = 0;
    for (int lane = 0; lane < lanes; ++lane) result |= unsigned(cells[lane]) << lane;
    return result;
}

void copy_async(void* shared, const void* global, int bytes, bool valid) {
    if (reinterpret_cast<uintptr_t>(shared) % size_t(bytes) || reinterpret_cast<uintptr_t>(global) % size_t(bytes)) {
        fail("a misaligned asynchronous copy");
    }
    std::memset(shared, 0xFF, size_t(bytes));
    machine().running->open.push_back({shared, global, bytes, valid});
}

void commit_copies() {
    Fiber& self = *machine().running;
    self.committed.push_back(std::move(self.open));
    self.open.clear();
}

void wait_copies(int still_in_flight) {
    Fiber& self = *machine().running;
    while (int(self.committed.size()) > still_in_flight) {
        for (const Copy& copy : self.committed.front()) {
            if (copy.valid) {
                std::memcpy(copy.to, copy.from, size_t(copy.bytes));
            } else {
                std::memset(copy.to, 0, size_t(copy.bytes));
            }
        }
        self.committed.pop_front();
    }
}

MGK_UNSEEN void launch(const char* operation, dim3 grid, int threads, size_t shared_bytes,
                       const std::function<void()>& body) {
    Machine& m = machine();
    const char* order = std::getenv("MGK_HOST_CUDA_ORDER");
    const bool reverse = order && std::strcmp(order, "reverse") == 0;
    m.operation = operation;
    m.body = &body;
    m.threads = threads;
    m.warps.assign(size_t((threads + kWarp - 1) / kWarp), Warp{});
    while (int(m.fibers.size()) < threads) m.fibers.push_back(std::make_unique<Fiber>());
#if MGK_TSAN
    m.scheduler_tsan = __tsan_get_current_fiber();
#endif
    release(&m.begin_token);
    std::vector<unsigned char*> arenas;  // one a block, kept to the end: blocks have no order, not even through the allocator
    const uint64_t num_blocks = uint64_t(grid.x) * grid.y * grid.z;
    for (uint64_t i = 0; i < num_blocks; ++i) {
        const uint64_t b = reverse ? num_blocks - 1 - i : i;
        const dim3 block(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
        if (shared_bytes) {
            arenas.push_back(static_cast<unsigned char*>(std::malloc(shared_bytes)));
            m.shared = arenas.back();
            for (size_t j = 0; j < shared_bytes; ++j) const_cast<volatile unsigned char*>(m.shared)[j] = 0xFF;
        } else {
            m.shared = nullptr;
        }
        release(&m.begin_token);
        for (int t = 0; t < threads; ++t) prepare(*m.fibers[size_t(t)], t, block);
        run_block(reverse);
    }
    acquire(&m.end_token);
    for (unsigned char* arena : arenas) std::free(arena);
}

float half_to_float(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, mantissa = bits & 0x3FFu;
    if (exponent == 0) return __uint_as_float(sign) + (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000u | mantissa << 13);
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t float_to_half(float x) {
    const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7FFFFFFFu;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
    if (magnitude > 0x7F800000u) return uint16_t(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // 65520 and above round to infinity
    if (magnitude < 0x38800000u) {                                  // subnormal: the sum's rounding is the wanted one
        return uint16_t(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3F000000u));
    }
    const uint32_t rebased = magnitude - 0x38000000u;
    return uint16_t(sign | (rebased + 0xFFFu + (rebased >> 13 & 1u)) >> 13);
}

uint16_t float_to_bfloat16(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFFu;
    return uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace host_cuda
