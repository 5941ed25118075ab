// Drives the thread pool under ThreadSanitizer: many regions, members that come late, callers at the same time. Shared
// memory is written and read without atomics across every point where the team meets, so that a missing edge is a race.
// With WHOLE_STEP also whole steps of a small model. Prints how many regions ran; aborts at a wrong result.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "team.h"
#if defined(WHOLE_STEP)
#include "model.h"
#endif

using namespace mgk::MGK_ISA;

namespace {

void require(bool fine, const char* what) {
    if (fine) return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::exit(3);
}

// Three phases: every item of one reads items that other members wrote in the one before. `late` members sleep first, so
// that the others wait in the kernel and no longer spin.
void phases(ThreadPool& pool, int threads, int64_t items, int late) {
    std::vector<int64_t> a(items), b(items), by_member(threads);
    int64_t seed = threads + items;
    auto body = [&](Team& team, int member) {
        if (member == late) usleep(3000);
        team.for_each(member, items, [&](int64_t i) { a[i] = seed + i; });
        team.for_each(member, items, [&](int64_t i) { b[i] = a[items - 1 - i] + a[(i + 7) % items]; });
        by_member[member] = std::accumulate(b.begin(), b.end(), int64_t(0));
        team.barrier();
        if (member == threads - 1) seed = std::accumulate(by_member.begin(), by_member.end(), int64_t(0));
    };
    pool.run(threads, [](void* context, Team& team, int member) { (*static_cast<decltype(body)*>(context))(team, member); },
             &body);
    const int64_t sum = 2 * ((threads + items) * items + items * (items - 1) / 2);
    require(seed == threads * sum, "the sum over three phases");
}

int pool_regions() {
    int regions = 0;
    for (int threads : {2, 3, 8}) {
        ThreadPool pool;  // workers of its own, joined at the end
        for (int round = 0; round < 60; ++round) {
            const int used = round % 3 == 1 ? 2 : threads;  // some workers stay out
            phases(pool, used, 1 + round * 5 % 97, round % 10 == 0 ? round / 10 % used : -1);
            ++regions;
            if (round % 20 == 19) usleep(2000);  // long enough that the workers fall asleep
        }
    }
    return regions;
}

int concurrent_callers() {
    constexpr int kCallers = 3, kRounds = 25;
    std::vector<std::thread> callers;
    for (int caller = 0; caller < kCallers; ++caller)
        callers.emplace_back([caller] {
            for (int round = 0; round < kRounds; ++round) phases(thread_pool(), 2 + (caller + round) % 3, 40 + caller, -1);
        });
    for (std::thread& thread : callers) thread.join();
    return kCallers * kRounds;
}

#if defined(WHOLE_STEP)

constexpr int kDim = 64, kHeads = 1, kFfn = 128, kBooks = 2, kCodes = 32, kLayers = 2, kRows = 3, kPages = 4;

uint32_t state = 1;
uint32_t next() { return state = state * 1664525u + 1013904223u; }
float real() { return (float(next() >> 9) * 0x1p-23f - 0.5f) * 0.2f; }

struct Matrix {  // kept alive beside the model
    std::vector<uint8_t> codes;
    std::vector<uint16_t> scales;
};
std::vector<Matrix*> matrices;

PackedMatrix matrix(WeightKind kind, int n, int k) {
    auto* m = new Matrix;
    matrices.push_back(m);
    const int group = kind == WeightKind::int8 || kind == WeightKind::int4 ? 32 : 0;
    const int64_t bits = kind == WeightKind::fp32 ? 32 : kind == WeightKind::int8 ? 8 : 4;
    m->codes.resize(int64_t(n) * k * bits / 8);
    if (kind == WeightKind::fp32)
        for (int64_t i = 0; i < int64_t(n) * k; ++i) {
            const float x = real();
            std::memcpy(&m->codes[4 * i], &x, 4);
        }
    else
        for (uint8_t& code : m->codes) code = uint8_t(next() >> 24);
    if (kind == WeightKind::int8)
        for (uint8_t& code : m->codes)
            if (code == 0x80) code = 0x81;
    if (group) m->scales.assign(int64_t(n) * k / group, 0x3a80);  // bf16, 2^-10
    return {m->codes.data(), m->scales.data(), kind, n, k, group};
}

struct Store {
    std::vector<char> k, v;
    std::vector<float> k_scales, v_scales;
    LayeredPages pages;
    explicit Store(KVKind kind) {
        KVPages first{nullptr, nullptr, nullptr, nullptr, kind, kPages, kHeads, kDim / kHeads};
        const int64_t bytes = first.offset(kPages, 0), scales = int64_t(kPages) * kHeads * kPage;
        k.resize(bytes * kLayers);
        v.resize(bytes * kLayers);
        k_scales.resize(scales * kLayers);
        v_scales.resize(scales * kLayers);
        first.k = k.data();
        first.v = v.data();
        first.k_scales = k_scales.data();
        first.v_scales = v_scales.data();
        pages = {first, bytes, int64_t(scales * sizeof(float))};
    }
};

// Two steps (a ragged prefill, then decode); the logits of both.
std::vector<float> steps(WeightKind kind, KVKind kv, int threads) {
    state = 1;
    std::vector<float> table(kBooks * (kCodes + 1) * kDim), sinusoids(64 * kDim), norm(kDim, 1.0f), bias(kDim, 0.0f);
    for (float& x : table) x = real();
    for (float& x : sinusoids) x = real();
    Model model;
    model.dim = kDim;
    model.num_heads = kHeads;
    model.ffn_dim = kFfn;
    model.embedding = {reinterpret_cast<const char*>(table.data()), sinusoids.data(), TableKind::fp32, kBooks, kCodes, kDim, 64};
    for (int i = 0; i < kLayers; ++i) {
        LayerWeights w{};
        w.self_norm = w.ffn_norm = {norm.data(), bias.data()};
        w.qkv = matrix(kind, 3 * kDim, kDim);
        w.self_out = matrix(kind, kDim, kDim);
        w.fc1 = matrix(kind, kFfn, kDim);
        w.fc2 = matrix(kind, kDim, kFfn);
        model.layers.push_back(w);
    }
    model.final_norm = {norm.data(), bias.data()};
    model.heads = matrix(kind, kBooks * kCodes, kDim);
    Store store(kv);
    const int32_t page_table[kRows * 2] = {2, 9, 0, 3, 1, 9};
    const int32_t prefill[kRows + 1] = {0, 5, 21, 22}, decode[kRows + 1] = {0, 1, 2, 3};
    const int32_t lens[2][kRows] = {{5, 16, 1}, {6, 17, 2}};
    std::vector<float> logits;
    for (int i = 0; i < 2; ++i) {
        const int32_t* offsets = i == 0 ? prefill : decode;
        std::vector<int32_t> codes(offsets[kRows] * kBooks), wanted(offsets[kRows]);
        for (int32_t& code : codes) code = int32_t(next() >> 20) % kCodes;
        std::iota(wanted.begin(), wanted.end(), 0);
        std::vector<float> out(wanted.size() * kBooks * kCodes);
        StepInput in{};
        in.num_tokens = offsets[kRows];
        in.codes = codes.data();
        in.rows = {page_table, offsets, lens[i], kRows, 2};
        in.pages = store.pages;
        in.logit_tokens = wanted.data();
        in.num_logits = int64_t(wanted.size());
        in.logits = out.data();
        model.step(in, threads);
        logits.insert(logits.end(), out.begin(), out.end());
    }
    for (Matrix* m : matrices) delete m;
    matrices.clear();
    return logits;
}

int whole_steps() {
    int count = 0;
    for (WeightKind kind : {WeightKind::fp32, WeightKind::int8, WeightKind::int4})
        for (KVKind kv : {KVKind::fp32, KVKind::fp16, KVKind::int8}) {
            const std::vector<float> alone = steps(kind, kv, 1);
            for (float x : alone) require(x == x && x != alone[0] / 0.0f, "finite logits");
            for (int threads : {2, 5}) {
                const std::vector<float> together = steps(kind, kv, threads);
                require(std::memcmp(alone.data(), together.data(), alone.size() * sizeof(float)) == 0,
                        "logits that do not depend on the number of threads");
                count += 2;
            }
        }
    return count;
}

#endif

}  // namespace

int main() {
    int regions = pool_regions() + concurrent_callers();
#if defined(WHOLE_STEP)
    regions += whole_steps();
#endif
    std::printf("%d regions\n", regions);
    return 0;
}
