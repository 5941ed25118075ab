// Measures this machine's peak read bandwidth and arithmetic throughput, for benchmarks.
#pragma once

#include <cstdint>

#include "simd.h"

namespace mgk {
namespace MGK_ISA {

// Seconds to read `bytes` (a multiple of 4096) once, all threads together, each through pieces of its own.
double stream_read_seconds(const char* data, int64_t bytes, int num_threads);
// fp32 multiply-adds a second (one a lane), of all threads.
double fma_per_second(int num_threads);
// 8-bit multiply-adds a second, with the instructions that int8 and int4 linears use, of all threads.
double int8_per_second(int num_threads);

}  // namespace MGK_ISA
}  // namespace mgk
