// What 64 queries take home: values, gathered tile by tile.
// Enters: a ForwardCall and the weights of one tile after another. Leaves: the output as columns of queries, before the
// division (rows.h). Floor: above scores.h. The forward pass and the statistics come through here: the same bits.
#pragma once
#include "scores.h"

namespace regard::REGARD_TARGET {

// Rows of v that hold NaN or inf, where only some of the queries may see them: 0 · NaN would reach the others. They are
// taken out of the tile, and added afterwards to the queries that see them alone. Returns a bit for each such row.
template <class C>
inline u64 take_out_non_finite(const C* v, i64 leading, i64 keys, i64 cols, C* clean) {
    u64 taken = 0;
    for (i64 j = 0; j < keys; ++j) {
        const bool finite = all_finite(v + j * leading, leading, 1, cols);
        for (i64 c = 0; c < cols; ++c) clean[j * cols + c] = finite ? v[j * leading + c] : C(0);
        taken |= u64{!finite} << j;
    }
    return taken;
}

template <class T, class C>
inline void add_taken_out(u64 taken, const T* v, const View& view, i64 keys, i64 cols, const u64* words, int lanes,
                          const C* p, C* out) {
    for (i64 j = 0; j < keys; ++j)
        for (int lane = 0; lane < lanes; ++lane)
            if ((taken & words[lane]) >> j & 1)
                for (i64 c = 0; c < cols; ++c)
                    out[c * kLanes + lane] += p[j * kLanes + lane] * widen(v[j * view.row + c * view.col]);
}

// Oᵀ = Oᵀ · factor + Vᵀ Pᵀ over one tile of keys; P rounded to bfloat16 where v goes in pairs of keys.
template <class T, class C>
inline void add_values(const ForwardCall& call, const T* v, i64 count, const u64* words, int lanes, const C* factor,
                       const TileScratch<C>& scratch, C* values, C* out) {
    const i64 dim = call.head_dim_v;
    const auto finish = [out, factor](i64 row, int lane, Vector<C> sum) {
        C* at = out + row * kLanes + lane;
        store(at, load(at) * load(factor + lane) + sum);
    };
    u64 taken = 0;
    if constexpr (kPaired<T>) {
        if (words != nullptr)
            for (i64 j = 0; j < count; ++j) taken |= u64{has_non_finite(v + j * call.v.row, call.v.col, dim)} << j;
        Pair* value_pairs = reinterpret_cast<Pair*>(values);
        Pair* weight_pairs = reinterpret_cast<Pair*>(scratch.bias);  // the bias is in the scores by now
        const auto kept = [=, &call](i64 j) { return (taken >> j) & 1 ? nullptr : v + j * call.v.row; };
        pairs_of_rows<T>(kept, call.v.col, count, dim, value_pairs, dim);
        round_tile(scratch.scores, count, lanes, weight_pairs, nullptr);
        product<Pair>(reinterpret_cast<const T*>(value_pairs), 2, 2 * dim, dim, weight_pairs, kLanes, (count + 1) / 2,
                      lanes, finish);
    } else {
        i64 leading;
        const C* rows = rows_of<T, C>(v, call.v.row, call.v.col, count, dim, values, &leading);
        if (words != nullptr && !all_finite(rows, leading, count, dim)) {
            taken = take_out_non_finite(rows, leading, count, dim, values);
            rows = values;
            leading = dim;
        }
        product<C>(rows, 1, leading, dim, scratch.scores, kLanes, count, lanes, finish);
    }
    if (taken != 0) add_taken_out(taken, v, call.v, count, dim, words, lanes, scratch.scores, out);
}

}  // namespace regard::REGARD_TARGET
