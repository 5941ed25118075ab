// Stands in for NVIDIA's header of this name where the kernels of csrc/cuda are compiled by a C++ compiler, for tests: the
// same sources run on the host, one fiber a CUDA thread, and sanitizers see them. host_cuda.cpp says how, and what it
// cannot show. Only what those kernels use is here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

namespace host_cuda {

struct Place {  // of the running thread
    dim3 thread, block;
};
const Place& place();

// Runs a kernel to its end: every block of the grid, one after another. `body` is what one thread does.
void launch(const char* operation, dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body);

unsigned char* shared_memory();  // the block's dynamic shared memory, filled with NaN when the block starts
void block_barrier();

// Gives `size` ≤ 8 bytes, takes those that lane `from` of the warp gave. All lanes of the warp must meet here.
void exchange(const void* give, void* take, size_t size, int from);
unsigned ballot(bool vote);

// The destination is NaN until `wait_copies` completes the copy, so a read that does not wait shows.
void copy_async(void* shared, const void* global, int bytes, bool valid);
void commit_copies();
void wait_copies(int still_in_flight);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);      // nearest even
uint16_t float_to_bfloat16(float x);  // nearest even

}  // namespace host_cuda

#define threadIdx (host_cuda::place().thread)
#define blockIdx (host_cuda::place().block)

inline void __syncthreads() { host_cuda::block_barrier(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
    (void)mask;  // always the whole warp here
    T result;
    host_cuda::exchange(&value, &result, sizeof(T), int(threadIdx.x % 32) ^ lane_mask);
    return result;
}
inline unsigned __ballot_sync(unsigned, bool vote) { return host_cuda::ballot(vote); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T>
T atomicAdd(T* at, T value) {
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
using std::min;
