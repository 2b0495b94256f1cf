// What is left to do when the last key has been seen: sinks, the division by the sum, lse, and rows from columns.
// Enters: the running maximum and sum, and the output as columns of queries. Leaves: out and lse of the call.
// Floor: above scores.h. FlashAttention-2 (Dao 2023), Alg. 1, lines 12 to 15.
#pragma once
#include "scores.h"

namespace regard::REGARD_TARGET {

// out = O / l, lse = m + log l, for `lanes` queries from `first_lane` on; m counts in `unit`s. A sink joins the
// denominator. `out` is (head_dim_v, Stride); m and l begin at the first lane.
template <class T, class C, int Stride = kLanes>
REGARD_INLINE void finish_rows(const ForwardCall& call, const Queries& queries, int first_lane, int lanes, double unit,
                               const C* m, const C* l, const C* out) {
    const i64 dim = call.head_dim_v;
    alignas(64) C share[Stride] = {};
    for (int lane = 0; lane < lanes; ++lane) {
        double top = m[lane] * unit, sum = l[lane], of_sum = 1;
        if (call.sinks != nullptr) {
            const double sink = widen(static_cast<const T*>(call.sinks)[queries.head[first_lane + lane]]);
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
        narrow(sum == 0 ? -kInfinity<C> : static_cast<C>(top + __builtin_log(sum)),
               queries.at<C>(call.lse, first_lane + lane));
    }
    for (int lane = 0; lane < lanes; lane += kWidth<C>) {
        i64 c = 0;
        for (; c < dim; c += kWidth<C>) {
            Vector<C> square[kWidth<C>];
            for (int i = 0; i < kWidth<C>; ++i)
                square[i] = c + i < dim ? load(out + (c + i) * Stride + lane) * load(share + lane) : Vector<C>{};
            transpose<C>(square);
            const i64 cols = dim - c < kWidth<C> ? dim - c : kWidth<C>;
            for (int i = 0; i < kWidth<C> && lane + i < lanes; ++i) {
                T* to = queries.at<T>(call.out, first_lane + lane + i) + c * call.out.col;
                for (i64 n = 0; n < cols; ++n) narrow(square[i][n], to + n * call.out.col);
            }
        }
    }
}

}  // namespace regard::REGARD_TARGET
