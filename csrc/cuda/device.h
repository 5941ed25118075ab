// What the kernels need from a GPU, in one place: element types, 16-byte loads, asynchronous copies, reductions, the
// launch. With MGK_HOST_CUDA the same sources are compiled by a C++ compiler against csrc/host_cuda, which runs every
// thread as a fiber; what has no C++ meaning (inline PTX, <<<>>>) has its substitute here and in that folder only.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "launch.h"

#if !defined(MGK_HOST_CUDA)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MGK_DEVICE __device__ __forceinline__
#define MGK_UNROLL _Pragma("unroll")
#else
#define MGK_DEVICE inline
#define MGK_UNROLL
#endif

namespace mgk {
namespace cuda {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;
constexpr int kWarp = 32;

// Storage types. Arithmetic is always in float.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

MGK_DEVICE float to_float(float x) { return x; }
MGK_DEVICE float to_float(int8_t x) { return float(x); }
MGK_DEVICE float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
#if !defined(MGK_HOST_CUDA)
MGK_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
MGK_DEVICE void from_float(float x, Half& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }
MGK_DEVICE void from_float(float x, BFloat16& y) { y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
#else
inline float to_float(Half x) { return host_cuda::half_to_float(x.bits); }
inline void from_float(float x, Half& y) { y.bits = host_cuda::float_to_half(x); }
inline void from_float(float x, BFloat16& y) { y.bits = host_cuda::float_to_bfloat16(x); }
#endif
MGK_DEVICE void from_float(float x, float& y) { y = x; }

// N consecutive elements in the widest loads their size allows, at most 16 bytes each; `from` is aligned to that.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
    T element[N];
};

template <int N, class T>
MGK_DEVICE void load(const T* from, float (&to)[N]) {
    constexpr int kStep = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
    MGK_UNROLL
    for (int i = 0; i < N; i += kStep) {
        const Pack<T, kStep> pack = *reinterpret_cast<const Pack<T, kStep>*>(from + i);
        MGK_UNROLL
        for (int j = 0; j < kStep; ++j) to[i + j] = to_float(pack.element[j]);
    }
}

template <int N, class T>
MGK_DEVICE void store(const float (&from)[N], T* to) {
    constexpr int kStep = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
    MGK_UNROLL
    for (int i = 0; i < N; i += kStep) {
        Pack<T, kStep> pack;
        MGK_UNROLL
        for (int j = 0; j < kStep; ++j) from_float(from[i + j], pack.element[j]);
        *reinterpret_cast<Pack<T, kStep>*>(to + i) = pack;
    }
}

// Asynchronous copies from global to shared memory. A thread sees only its own copies, and those only after wait.
// `valid` false writes zeros and reads nothing.
#if !defined(MGK_HOST_CUDA)
template <int kBytes>
MGK_DEVICE void copy_async(void* shared, const void* global, bool valid) {
    static_assert(kBytes == 16 || kBytes == 4, "the sizes that are used here");
    const unsigned to = unsigned(__cvta_generic_to_shared(shared));
    const int bytes = valid ? kBytes : 0;
    if (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
    }
}
MGK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kStillInFlight>
MGK_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStillInFlight) : "memory");
}
MGK_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return bytes;
}
#else
template <int kBytes>
void copy_async(void* shared, const void* global, bool valid) {
    host_cuda::copy_async(shared, global, kBytes, valid);
}
inline void commit_copies() { host_cuda::commit_copies(); }
template <int kStillInFlight>
void wait_copies() {
    host_cuda::wait_copies(kStillInFlight);
}
inline unsigned char* shared_memory() { return host_cuda::shared_memory(); }
#endif

// Access to a word that several blocks may write concurrently, all with the same value: never torn or elided.
#if !defined(MGK_HOST_CUDA)
MGK_DEVICE int32_t load_contended(const int32_t* p) { return *static_cast<const volatile int32_t*>(p); }
MGK_DEVICE void store_contended(int32_t* p, int32_t x) { *static_cast<volatile int32_t*>(p) = x; }
#else
inline int32_t load_contended(const int32_t* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline void store_contended(int32_t* p, int32_t x) { __atomic_store_n(p, x, __ATOMIC_RELAXED); }
#endif

struct Add {
    template <class T>
    MGK_DEVICE T operator()(T a, T b) const {
        return a + b;
    }
};
struct Max {
    MGK_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Min {
    MGK_DEVICE int operator()(int a, int b) const { return a < b ? a : b; }
};

// Over lanes that differ in the bits of kFrom … 2·kFrom, …, kTo/2. The operation commutes, so all of them get the same bits.
template <int kFrom, int kTo, class T, class Op>
MGK_DEVICE T reduce_lanes(T x, Op op) {
    MGK_UNROLL
    for (int offset = kFrom; offset < kTo; offset *= 2) x = op(x, __shfl_xor_sync(kFullWarp, x, offset));
    return x;
}

// Reductions over a block of kThreads, with one barrier each: two scratch areas take turns, and a thread that writes one
// has passed the barrier of the other, which all had reached after reading the one.
template <int kThreads>
class BlockReducer {
public:
    static constexpr int kBytes = 2 * (kThreads / kWarp) * 8;
    MGK_DEVICE explicit BlockReducer(void* scratch) : scratch_(static_cast<unsigned char*>(scratch)) {}

    template <class T, class Op>
    MGK_DEVICE T operator()(T x, Op op) {
        static_assert(sizeof(T) <= 8, "a scratch cell holds 8 bytes");
        constexpr int kWarps = kThreads / kWarp;
        x = reduce_lanes<1, kWarp>(x, op);
        T* cells = reinterpret_cast<T*>(scratch_ + phase_ * kWarps * 8);
        phase_ ^= 1;
        if (threadIdx.x % kWarp == 0) cells[threadIdx.x / kWarp] = x;
        __syncthreads();
        T total = cells[0];
        MGK_UNROLL
        for (int i = 1; i < kWarps; ++i) total = op(total, cells[i]);
        return total;
    }

private:
    unsigned char* scratch_;
    int phase_ = 0;
};

// The row that owns item `item`, where row b's items begin at offsets[b] / kTile + b · kGap: with kTile = 1 and kGap = 0
// tokens, else tiles of kTile tokens (their numbers leave gaps but never overlap). A warp looks at 32 rows at a time.
template <int kTile, int kGap>
MGK_DEVICE int find_row(const int32_t* offsets, int num_rows, int item) {
    int row = 0;
    for (int first = 1; first < num_rows; first += kWarp) {
        const int i = first + int(threadIdx.x % kWarp);
        const bool begun = i < num_rows && offsets[i] / kTile + i * kGap <= item;
        row += __popc(__ballot_sync(kFullWarp, begun));
    }
    return row;
}

inline void check_launch(const char* operation) {
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) throw LaunchError(std::string(operation) + ": " + cudaGetErrorString(status));
}

#if !defined(MGK_HOST_CUDA)
template <class Kernel, class Arguments>
void launch(const char* operation, Kernel kernel, dim3 grid, int threads, size_t shared_bytes, void* stream,
            const Arguments& arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
    check_launch(operation);
}
#else
template <class Kernel, class Arguments>
void launch(const char* operation, Kernel kernel, dim3 grid, int threads, size_t shared_bytes, void* stream,
            const Arguments& arguments) {
    (void)stream;
    host_cuda::launch(operation, grid, threads, shared_bytes, [&] { kernel(arguments); });
}
#endif

// Calls f with a value of the storage type.
template <class F>
void with_float_type(Type type, F f) {
    switch (type) {
        case Type::fp32: return f(float{});
        case Type::bf16: return f(BFloat16{});
        case Type::fp16: return f(Half{});
        default: throw LaunchError("expected fp32, bf16 or fp16");
    }
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace cuda
}  // namespace mgk
