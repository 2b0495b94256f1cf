// Dropout that can be told again: one number for each (seed, batch, head, query, key), whatever the tile or thread.
// Enters: a seed drawn from torch's generator. Leaves: weights zeroed, or divided by 1 - p; the backward asks for the
// same numbers. Floor: above scores.h. Mixing steps: the finalizer of MurmurHash3 (Appleby 2011) in 32 bits, SplitMix64
// (Steele et al. 2014) for a row's two keys.
#pragma once
#include "scores.h"

namespace regard::REGARD_TARGET {

template <class X>
REGARD_INLINE X mix(X x) {
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

struct DropRow {
    u32 first, second;
    DropRow() = default;
    DropRow(u64 seed, i64 batch, i64 head, i64 row) {
        u64 x = seed;
        const i64 parts[] = {batch, head, row};
        for (i64 part : parts) {
            x += 0x9e3779b97f4a7c15u * (static_cast<u64>(part) + 1);
            x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
            x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
            x ^= x >> 31;
        }
        first = static_cast<u32>(x), second = static_cast<u32>(x >> 32);
    }
    u32 number(u32 key) const { return mix(mix(key + first) ^ second); }
};

// Numbers below the limit are dropped.
REGARD_INLINE u32 drop_limit(double probability) {
    const double limit = probability * 4294967296.0;
    return limit >= 4294967295.0 ? ~u32{0} : static_cast<u32>(limit);
}

// The weights of `lanes` queries from `first_lane` on; all of them where nothing is said.
template <class C, int Stride = kLanes>
REGARD_INLINE void drop(u64 seed, const Queries& queries, i64 first_row, i64 first_key, i64 keys, double probability,
                        C* weights, int first_lane = 0, int lanes = -1) {
    if (lanes < 0) lanes = queries.count;
    const C kept = static_cast<C>(1 / (1 - probability));
    const u32 limit = drop_limit(probability);
    DropRow rows[kLanes];
    for (int lane = 0; lane < lanes; ++lane)
        rows[lane] =
            DropRow(seed, queries.batch, queries.head[first_lane + lane], first_row + queries.row[first_lane + lane]);
    for (i64 j = 0; j < keys; ++j)
        for (int lane = 0; lane < lanes; ++lane) {
            C& weight = weights[j * Stride + lane];
            weight = rows[lane].number(static_cast<u32>(first_key + j)) >= limit ? weight * kept : C(0);
        }
}

}  // namespace regard::REGARD_TARGET
