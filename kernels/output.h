// What 64 queries take home: values, gathered tile by tile, and out and lse in the end.
// Enters: a ForwardCall, the weights of one tile after another, m and l of the online softmax. Leaves: rows of out and
// lse. Floor: above scores.h. The forward pass and the statistics come through here, so they give the same bits.
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

// out = O / l, lse = m + log l, a sink joined to the denominator.
template <class T, class C>
inline void finish_rows(const ForwardCall& call, const Queries& queries, const C* m, const C* l, const C* out) {
    const i64 dim = call.head_dim_v;
    alignas(64) C share[kLanes] = {};
    for (int lane = 0; lane < queries.count; ++lane) {
        double top = m[lane], sum = l[lane], of_sum = 1;
        if (call.sinks != nullptr) {
            const double sink = widen(static_cast<const T*>(call.sinks)[queries.head[lane]]);
            if (sink > top) {
                of_sum = top == -__builtin_inf() ? 0 : __builtin_exp(top - sink);
                sum = sum * of_sum + 1;
                top = sink;
            } else if (sink != -__builtin_inf()) {
                sum += __builtin_exp(sink - top);
            } else if (sink != sink) {
                sum = sink;
            }
        }
        share[lane] = sum == 0 ? C(0) : static_cast<C>(of_sum / sum);
        narrow(sum == 0 ? -kInfinity<C> : static_cast<C>(top + __builtin_log(sum)), queries.at<C>(call.lse, lane));
    }
    for (int lane = 0; lane < queries.count; lane += kWidth<C>) {
        i64 c = 0;
        for (; c < dim; c += kWidth<C>) {
            Vector<C> square[kWidth<C>];
            for (int i = 0; i < kWidth<C>; ++i)
                square[i] = c + i < dim ? load(out + (c + i) * kLanes + lane) * load(share + lane) : Vector<C>{};
            transpose<C>(square);
            const i64 cols = dim - c < kWidth<C> ? dim - c : kWidth<C>;
            for (int i = 0; i < kWidth<C> && lane + i < queries.count; ++i) {
                T* to = queries.at<T>(call.out, lane + i) + c * call.out.col;
                for (i64 n = 0; n < cols; ++n) narrow(square[i][n], to + n * call.out.col);
            }
        }
    }
}

}  // namespace regard::REGARD_TARGET
