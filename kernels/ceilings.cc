// What this processor can do at best, so that a kernel's time has something to be measured against.
// peak:  each chain is x <- x * a + b (or x + pairs of bfloat16 multiplied), kChains of them side by side: as many as
//        hide the latency of two units. Nothing is read or written, so nothing but the arithmetic can hold it up.
// read:  a sum over all bytes, each read once. copy: each byte read and written once, through the cache as any
// kernel's. Loop: 4 MiB or a share of the rounds a task, to all threads. Source: Williams et al. 2009 (roofline).
#include "simd.h"
#include "threads.h"

namespace regard::REGARD_TARGET {
namespace {

constexpr int kChains = 12, kUnroll = 4;
constexpr i64 kTasks = 16, kTaskBytes = i64{1} << 22;

template <class E>
REGARD_INLINE Vector<Sum<E>> step(Vector<Sum<E>> x, Vector<E> a, Vector<E> b) {
    if constexpr (__is_same(E, Pair))
        return Term<Pair>::add(x, a, b);
    else
        return x * a + b;
}

// One task of a peak: rounds * kUnroll * kChains vectors; what they add up to, so that no compiler drops them.
template <class E>
double chains(i64 rounds, const E* factors) {
    Vector<Sum<E>> x[kChains];
    const Vector<E> a = load(factors), b = load(factors + kWidth<E>);
    for (int i = 0; i < kChains; ++i) x[i] = splat(static_cast<Sum<E>>(i));
    for (i64 round = 0; round < rounds; ++round)
#pragma GCC unroll 4
        for (int u = 0; u < kUnroll; ++u)
#pragma GCC unroll 12
            for (int i = 0; i < kChains; ++i) x[i] = step<E>(x[i], a, b);
    Vector<Sum<E>> total = x[0];
    for (int i = 1; i < kChains; ++i) total += x[i];
    return static_cast<double>(total[0]);
}

struct Peak {
    i64 rounds;
    const void* factors;
    double* sums;  // one a task
};

template <class E>
i64 peak(const CeilingCall& call) {
    alignas(64) E factors[2 * kWidth<E>];
    for (int i = 0; i < 2 * kWidth<E>; ++i) {
        if constexpr (__is_same(E, Pair))
            factors[i] = {0x3f00, 0xbf00};  // 0.5 · 0.5 and -0.5 · -0.5, over and over
        else
            factors[i] = static_cast<E>(0.5);
    }
    double sums[kTasks] = {};
    const Peak shared{call.rounds, factors, sums};
    parallel(
        kTasks, call.threads, 0,
        [](const void* context, i64 task, void*) {
            const Peak& p = *static_cast<const Peak*>(context);
            p.sums[task] = chains<E>(p.rounds, static_cast<const E*>(p.factors));
        },
        &shared);
    for (i64 i = 0; i < kTasks; ++i)
        if (sums[i] < 0) return -1;  // never: every number above is positive
    constexpr i64 per_vector = kWidth<E> * (__is_same(E, Pair) ? 4 : 2);
    return kTasks * call.rounds * kUnroll * kChains * per_vector;
}

void read_task(const void* context, i64 task, void*) {
    const CeilingCall& call = *static_cast<const CeilingCall*>(context);
    constexpr int W = kWidth<float>;
    const i64 count = (call.bytes - task * kTaskBytes < kTaskBytes ? call.bytes - task * kTaskBytes : kTaskBytes) / 4;
    const float* from = static_cast<const float*>(call.from) + task * (kTaskBytes / 4);
    Vector<float> sum[8] = {};
    i64 i = 0;
    for (; i + 8 * W <= count; i += 8 * W)
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) sum[j] += load(from + i + j * W);
    for (int j = 1; j < 8; ++j) sum[0] += sum[j];
    float total = 0;
    for (int lane = 0; lane < W; ++lane) total += sum[0][lane];
    for (; i < count; ++i) total += from[i];
    static_cast<float*>(call.to)[task] = total;
}

void copy_task(const void* context, i64 task, void*) {
    const CeilingCall& call = *static_cast<const CeilingCall*>(context);
    const i64 start = task * kTaskBytes;
    const i64 count = call.bytes - start < kTaskBytes ? call.bytes - start : kTaskBytes;
    __builtin_memcpy(static_cast<char*>(call.to) + start, static_cast<const char*>(call.from) + start,
                     static_cast<std::size_t>(count));
}

}  // namespace

// Operations done (peaks) or bytes moved (read, copy); 0 where this target has no such instruction.
i64 ceiling(const CeilingCall& call) {
    const i64 tasks = (call.bytes + kTaskBytes - 1) / kTaskBytes;
    switch (call.kind) {
        case kFloat32Peak:
            return peak<float>(call);
        case kFloat64Peak:
            return peak<double>(call);
        case kPairsPeak:
            if constexpr (kHasPairs) return peak<Pair>(call);
            return 0;
        case kRead:
            parallel(tasks, call.threads, 0, read_task, &call);
            return call.bytes;
        case kCopy:
            parallel(tasks, call.threads, 0, copy_task, &call);
            return 2 * call.bytes;
        default:
            return 0;
    }
}

}  // namespace regard::REGARD_TARGET
