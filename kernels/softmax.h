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
// Where entropy is asked for, also tilt = sum_j p_j (s_j - m'): tilt' = (tilt + l (m - m')) e^(m - m') + the new terms.
template <class C, bool kTilted = false>
REGARD_INLINE void softmax_step(C* scores, i64 keys, int lanes, C* m, C* l, C* factor, C* tilt = nullptr) {
    using V = Vector<C>;
    const V minus_infinity = splat(-kInfinity<C>);
    const V lowest = splat(C(-1000));  // e^-1000 is 0, and 0 · -1000 no NaN
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
        V sum[2] = {}, tilted[2] = {};
        for (j = 0; j + 2 <= keys; j += 2)
            for (int i = 0; i < 2; ++i) {
                const V x = load(scores + (j + i) * kLanes + lane) - shift, p = exp_of<C>(x);
                store(scores + (j + i) * kLanes + lane, p);
                sum[i] += p;
                if constexpr (kTilted) tilted[i] += p * larger(x, lowest);
            }
        if (j < keys) {
            const V x = load(scores + j * kLanes + lane) - shift, p = exp_of<C>(x);
            store(scores + j * kLanes + lane, p);
            sum[0] += p;
            if constexpr (kTilted) tilted[0] += p * larger(x, lowest);
        }
        if constexpr (kTilted)
            store(tilt + lane, (load(tilt + lane) + load(l + lane) * larger(before - shift, lowest)) * scale +
                                   (tilted[0] + tilted[1]));
        store(m + lane, now);
        store(l + lane, load(l + lane) * scale + (sum[0] + sum[1]));
        store(factor + lane, scale);
    }
}

}  // namespace regard::REGARD_TARGET
