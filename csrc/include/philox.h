// Philox4x32-10, counter-based random numbers (Salmon, Moraes, Dror, Shaw, SC 2011). Shared by the CPU and GPU code.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MGK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MGK_HOST_DEVICE inline
#endif

namespace mgk {

struct Philox4 {
    uint32_t word[4];
};

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

MGK_HOST_DEVICE Philox4 philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t p0 = uint64_t(kPhiloxMultiplier0) * c0, p1 = uint64_t(kPhiloxMultiplier1) * c2;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c1 = uint32_t(p1);
        c3 = uint32_t(p0);
        k0 += kPhiloxWeyl0;
        k1 += kPhiloxWeyl1;
    }
    return {{c0, c1, c2, c3}};
}

// A number in (0, 1), exact in fp32: never 0 or 1, so that two logarithms of it are finite.
MGK_HOST_DEVICE float philox_uniform(uint32_t word) { return (float(word >> 9) + 0.5f) * 0x1p-23f; }

}  // namespace mgk
