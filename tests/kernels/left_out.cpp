// Stands in for attention.cpp and model.cpp, which take minutes to compile with sanitizers: a library of the other kernels
// links and loads; whoever calls what is left out is told.
#include <cstdio>
#include <cstdlib>

#include "attention.h"
#include "model.h"

namespace mgk {
namespace MGK_ISA {

namespace {
[[noreturn]] void left_out(const char* name) {
    std::fprintf(stderr, "%s is left out of this library\n", name);
    std::abort();
}
}  // namespace

void check_rows(const RaggedRows&, int64_t, int64_t, bool) { left_out("attention"); }
void append_paged_kv(const KVPages&, const RaggedRows&, const float*, const float*, int64_t, int64_t, int64_t, int64_t, int) {
    left_out("append_paged_kv");
}
void paged_attention(const KVPages&, const RaggedRows&, bool, const float*, int64_t, int64_t, float, float*, int) {
    left_out("paged_attention");
}
void Model::step(const StepInput&, int) { left_out("Model::step"); }
void Model::write_cross(const float*, int64_t, const RaggedRows&, const LayeredPages&, int) { left_out("Model::write_cross"); }

}  // namespace MGK_ISA
}  // namespace mgk
