// The running maximum and sum of the online softmax.
// Enters: a score tile, keys down and queries across. Leaves: weights in its place, m and l moved on, and the factor
// for the output. Floor: above simd.h. Milakov & Gimelshein 2018; FlashAttention-2 (Dao 2023), Alg. 1, lines 8 to 10.
#pragma once
#include "simd.h"

namespace regard::REGARD_TARGET {

constexpr double kLog2E = 1.44269504088896340736;

// e^x, for differences of scores: the factor comes after the subtraction, so that large scores round no more than
// small.
template <class C>
REGARD_INLINE Vector<C> exp_of(Vector<C> x) {
    return exp2(x * static_cast<C>(kLog2E));
}

// The maximum to subtract: a row that has seen no key yet has -inf, and -inf - -inf must not make a NaN of its zero
// weights.
template <class V>
REGARD_INLINE V finite_or_zero(V m, V minus_infinity) {
    return m == minus_infinity ? V{} : m;
}

// m' = max(m, max_j s_j);  p_j = e^(s_j - m');  l' = l e^(m - m') + sum_j p_j;  factor = e^(m - m').
template <class C>
REGARD_INLINE void softmax_step(C* scores, i64 keys, int lanes, C* m, C* l, C* factor) {
    using V = Vector<C>;
    const V minus_infinity = splat(-kInfinity<C>);
    for (int lane = 0; lane < lanes; lane += kWidth<C>) {
        const V before = load(m + lane);
        V top[2] = {before, minus_infinity};  // two chains: one maximum waits for the last
        i64 j = 0;
        for (; j + 2 <= keys; j += 2)
            for (int i = 0; i < 2; ++i) top[i] = larger(load(scores + (j + i) * kLanes + lane), top[i]);
        if (j < keys) top[0] = larger(load(scores + j * kLanes + lane), top[0]);
        const V now = larger(top[1], top[0]);
        const V shift = finite_or_zero(now, minus_infinity);
        const V scale = exp_of<C>(before - shift);
        V sum[2] = {};
        for (j = 0; j + 2 <= keys; j += 2)
            for (int i = 0; i < 2; ++i) {
                const V p = exp_of<C>(load(scores + (j + i) * kLanes + lane) - shift);
                store(scores + (j + i) * kLanes + lane, p);
                sum[i] += p;
            }
        if (j < keys) {
            const V p = exp_of<C>(load(scores + j * kLanes + lane) - shift);
            store(scores + j * kLanes + lane, p);
            sum[0] += p;
        }
        store(m + lane, now);
        store(l + lane, load(l + lane) * scale + (sum[0] + sum[1]));
        store(factor + lane, scale);
    }
}

}  // namespace regard::REGARD_TARGET
