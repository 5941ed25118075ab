// One delayed sampling step for all requests: musicgen_kernels.sampling says what it computes.
#pragma once

#include <cstdint>

#include "simd.h"

namespace mgk {
namespace MGK_ISA {

struct SampleArguments {
    const float* logits;         // [num_rows, num_codebooks, num_codes]
    const int32_t* row_offsets;  // [num_requests + 1]
    const int32_t* slots;        // [num_requests], and so on
    const int32_t* steps;
    const int32_t* num_frames;
    const int64_t* seeds;
    const float* guidance;
    const float* guidance_beta;
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const int32_t* delays;  // [num_codebooks]
    int32_t* sequences;     // [num_slots, num_codebooks, num_steps]
    int32_t* out;           // [num_requests, num_codebooks]
    int64_t num_requests, num_rows, num_slots, num_steps;
    int32_t num_codebooks, num_codes;
};

// Throws ArgumentError, before anything is written, if a value is out of range.
void delayed_sample_step(const SampleArguments& arguments, int num_threads);

// The uniforms of one draw, for tests: u[v] for v in [0, num_codes).
void sample_uniforms(int64_t seed, int32_t step, int32_t codebook, int32_t num_codes, float* u);

}  // namespace MGK_ISA
}  // namespace mgk
