// Additive attention, forward and backward: out = softmax(weightᵀ tanh(q_i + k_j)) v.
// Enters: an AdditiveCall or AdditiveBackwardCall; one head. Leaves: out and lse, or the gradients of q, k, v, weight.
//
// Forward, for each batch row and 64 queries (one task), for each tile of 64 keys with anything to see:
//   s_j = sum_a weight_a tanh(q_a + k_ja), queries in the lanes;  the online softmax and V as in forward.cc.
// Backward, for each batch row and part of the keys (one task), for each tile of its keys and each 64 queries:
//   dP = V dOᵀ; then key by key, t_a = tanh(q_a + k_ja) kept in L1:  p = e^(s - lse),  ds = p (dP - do . out + dlse)
//   dweight_a += ds t_a;  dq_a += weight_a ds (1 - t_a^2);  dk_ja likewise, summed over the lanes;  dV += P dO.
// The parts depend on the number of keys alone, and are added up in order: the bits do not depend on the threads.
// Bytes: as in forward.cc; the seq_len_q x seq_len_kv x dim values of tanh exist 64 x dim at a time.
// Bahdanau et al. 2015, appendix A.1.2. Online softmax: Milakov & Gimelshein 2018.
#include "scores.h"
#include "softmax.h"
#include "threads.h"

namespace regard::REGARD_TARGET {
namespace {

REGARD_INLINE i64 padded(i64 n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <class T, class C>
void load_weight(const AdditiveCall& call, C* to) {
    for (i64 a = 0; a < call.scores.head_dim; ++a) to[a] = widen(static_cast<const T*>(call.weight)[a]);
}

// Queries as columns: lanes[column][lane].
template <class T, class C>
void load_lanes(const Scores& s, const Queries& queries, C* to) {
    const T* rows[kLanes] = {};
    for (int lane = 0; lane < queries.count; ++lane) rows[lane] = queries.at<T>(s.q, lane);
    columns_of(rows, kLanes, s.q.col, s.head_dim, to);
}

// Scores, J keys at a time: one chain of sums each.
template <class C, int J>
REGARD_INLINE void score_rows(const C* weight, const C* keys, i64 leading, const C* queries, i64 dim, int lane,
                              C* scores) {
    Vector<C> sum[J] = {};
    for (i64 a = 0; a < dim; ++a) {
        const Vector<C> x = load(queries + a * kLanes + lane);
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) sum[j] += weight[a] * tanh(x + keys[j * leading + a]);
    }
    for (int j = 0; j < J; ++j) store(scores + j * kLanes + lane, sum[j]);
}

// ---- forward ----

template <class C>
struct Buffers {
    C *weight, *queries, *keys, *values, *scores, *out;
    static i64 size(const AdditiveCall& call) {
        return padded(call.scores.head_dim) + (2 * call.scores.head_dim + 2 * call.head_dim_v + kKeys) * kLanes;
    }
    Buffers(const AdditiveCall& call, C* from) {
        const i64 dim = call.scores.head_dim;
        weight = from;
        queries = weight + padded(dim);
        keys = queries + dim * kLanes;
        scores = keys + dim * kKeys;
        out = scores + kKeys * kLanes;
        values = out + call.head_dim_v * kLanes;
    }
};

template <class T, class C>
void forward_task(const void* context, i64 index, void* memory) {
    const AdditiveCall& call = *static_cast<const AdditiveCall*>(context);
    const Scores& s = call.scores;
    const i64 tiles = (s.seq_len_q + kLanes - 1) / kLanes, tile = tiles - 1 - index % tiles;
    const i64 dim = s.head_dim, cols = call.head_dim_v;
    const Buffers<C> b(call, static_cast<C*>(memory));
    Queries queries;
    queries.place(s, index / tiles, 0, tile * kLanes,
                  s.seq_len_q < (tile + 1) * kLanes ? s.seq_len_q : (tile + 1) * kLanes);
    Visible visible;
    visible.look(s, queries);
    load_weight<T>(call, b.weight);
    load_lanes<T, C>(s, queries, b.queries);
    alignas(64) C m[kLanes], l[kLanes], factor[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) m[lane] = -kInfinity<C>, l[lane] = 0;
    for (i64 i = 0; i < cols * kLanes; ++i) b.out[i] = 0;

    for (i64 j = visible.first_tile; j < visible.last_tile; ++j) {
        const Cover cover = visible.cover(j);
        if (cover == Cover::none) continue;
        const i64 first = j * kKeys, count = s.seq_len_kv - first < kKeys ? s.seq_len_kv - first : kKeys;
        i64 leading, values_leading;
        const C* keys = head_rows<T, C>(s.k, queries, first, count, dim, b.keys, &leading);
        for (int lane = 0; lane < queries.count; lane += kWidth<C>) {
            i64 r = 0;
            for (; r + 4 <= count; r += 4)
                score_rows<C, 4>(b.weight, keys + r * leading, leading, b.queries, dim, lane, b.scores + r * kLanes);
            for (; r < count; ++r)
                score_rows<C, 1>(b.weight, keys + r * leading, leading, b.queries, dim, lane, b.scores + r * kLanes);
        }
        if (cover == Cover::some) exclude<C>(visible.words, count, queries.count, b.scores);
        softmax_step<C>(b.scores, count, queries.count, m, l, factor);

        const C* values = head_rows<T, C>(call.v, queries, first, count, cols, b.values, &values_leading);
        C *out = b.out, *scale = factor;
        if (cover == Cover::some && !all_finite(values, values_leading, count, cols)) {  // 0 · NaN would pass the mask
            for (i64 c = 0; c < cols; ++c)
                for (int lane = 0; lane < queries.count; ++lane) {
                    C sum = out[c * kLanes + lane] * factor[lane];
                    for (i64 r = 0; r < count; ++r)
                        if (visible.words[lane] >> r & 1)
                            sum += b.scores[r * kLanes + lane] * values[r * values_leading + c];
                    out[c * kLanes + lane] = sum;
                }
            continue;
        }
        product<C>(values, 1, values_leading, cols, b.scores, kLanes, count, queries.count,
                   [out, scale](i64 row, int lane, Vector<C> sum) {
                       C* at = out + row * kLanes + lane;
                       store(at, load(at) * load(scale + lane) + sum);
                   });
    }

    for (int lane = 0; lane < queries.count; ++lane) {
        const C share = l[lane] == 0 ? C(0) : 1 / l[lane];
        const double lse = m[lane] + __builtin_log(static_cast<double>(l[lane]));
        narrow(l[lane] == 0 ? -kInfinity<C> : static_cast<C>(lse), queries.at<C>(call.lse, lane));
        T* to = queries.at<T>(call.out, lane);
        for (i64 c = 0; c < cols; ++c) narrow(b.out[c * kLanes + lane] * share, to + c * call.out.col);
    }
}

template <class T, class C>
void run_forward(const AdditiveCall& call) {
    const i64 tiles = (call.scores.seq_len_q + kLanes - 1) / kLanes;
    parallel(call.scores.batch * tiles, call.threads, Buffers<C>::size(call) * i64{sizeof(C)}, forward_task<T, C>,
             &call);
}

// ---- backward ----

template <class C>
struct BackwardBuffers {
    C *weight, *queries, *tanhs, *grad_q;               // (dim, kLanes) but for the first
    C *keys, *values;                                   // (kKeys, dim or head_dim_v)
    C *scores, *grads, *grad_rows, *grad_columns;       // (kKeys, kLanes); (kLanes, wide), (head_dim_v, kLanes)
    C *grad_keys, *grad_values, *grad_weight, *of_key;  // (kKeys, dim), (kKeys, wide); a vector for each column
    double* weight_sum;                                 // (dim,)
    i64 wide;

    static i64 size(const AdditiveBackwardCall& call) {
        const i64 d = padded(call.forward.scores.head_dim), e = padded(call.forward.head_dim_v);
        return d + 5 * d * kLanes + 4 * e * kLanes + 2 * kKeys * kLanes + 2 * d * kWidth<C> + 2 * d;
    }
    BackwardBuffers(const AdditiveBackwardCall& call, C* from) {
        const i64 d = padded(call.forward.scores.head_dim);
        wide = padded(call.forward.head_dim_v);
        weight_sum = reinterpret_cast<double*>(from);
        weight = from + 2 * d;
        queries = weight + d;
        tanhs = queries + d * kLanes;
        grad_q = tanhs + d * kLanes;
        keys = grad_q + d * kLanes;
        grad_keys = keys + d * kKeys;
        values = grad_keys + d * kKeys;
        grad_values = values + wide * kKeys;
        grad_rows = grad_values + wide * kKeys;
        grad_columns = grad_rows + wide * kLanes;
        scores = grad_columns + wide * kLanes;
        grads = scores + kKeys * kLanes;
        grad_weight = grads + kKeys * kLanes;
        of_key = grad_weight + d * kWidth<C>;
    }
};

// One key against all the lanes: its score gradients, and what they give to weight, q and this key.
template <class C>
void key_gradients(const BackwardBuffers<C>& b, const C* key, i64 dim, int lanes, bool hidden_some, u64 bit,
                   const u64* words, const C* lse, const C* common, C* scores, C* grads, C* grad_key) {
    constexpr int W = kWidth<C>;
    for (int lane = 0; lane < lanes; lane += W) {
        Vector<C> sum = {};
        for (i64 a = 0; a < dim; ++a) {
            const Vector<C> t = tanh(load(b.queries + a * kLanes + lane) + key[a]);
            store(b.tanhs + a * kLanes + lane, t);
            sum += b.weight[a] * t;
        }
        Vector<C> p = exp_of<C>(sum - load(lse + lane));
        Vector<C> grad = p * (load(grads + lane) - load(common + lane));
        if (hidden_some)
            for (int i = 0; i < W; ++i)
                if ((words[lane + i] & bit) == 0) p[i] = 0, grad[i] = 0;  // both may be NaN
        store(scores + lane, p);
        store(grads + lane, grad);
    }
    for (i64 a = 0; a < dim; ++a) {
        Vector<C> of_weight = load(b.grad_weight + a * W), of_key = {};
        for (int lane = 0; lane < lanes; lane += W) {
            const Vector<C> grad = load(grads + lane), found = load(b.tanhs + a * kLanes + lane);
            const Vector<C> t = grad == Vector<C>{} ? Vector<C>{} : found;  // of a hidden key it may be NaN
            const Vector<C> slope = grad - grad * t * t;
            of_weight += grad * t;
            of_key += slope;
            store(b.grad_q + a * kLanes + lane, load(b.grad_q + a * kLanes + lane) + slope);
        }
        store(b.grad_weight + a * W, of_weight);
        store(b.of_key + a * W, of_key);
    }
    for (i64 a = 0; a < dim; a += W) {
        Vector<C> square[W];
        for (int i = 0; i < W; ++i) square[i] = a + i < dim ? load(b.of_key + (a + i) * W) : Vector<C>{};
        const Vector<C> total = sums<C>(square);
        for (int i = 0; i < W && a + i < dim; ++i) grad_key[a + i] += b.weight[a + i] * total[i];
    }
}

template <class T, class C>
void part_task(const void* context, i64 index, void* memory) {
    const AdditiveBackwardCall& call = *static_cast<const AdditiveBackwardCall*>(context);
    const Scores& s = call.forward.scores;
    const BackwardBuffers<C> b(call, static_cast<C*>(memory));
    const i64 part = index / s.batch, batch = index % s.batch, dim = s.head_dim, cols = call.forward.head_dim_v;
    const i64 begin = part * call.part_keys;
    const i64 end = begin + call.part_keys < s.seq_len_kv ? begin + call.part_keys : s.seq_len_kv;
    load_weight<T>(call.forward, b.weight);
    for (i64 a = 0; a < dim; ++a) b.weight_sum[a] = 0;
    alignas(64) C lse[kLanes], common[kLanes];
    Queries queries;
    Visible visible;

    for (i64 first = begin; first < end; first += kKeys) {
        const i64 count = end - first < kKeys ? end - first : kKeys;
        const C *keys = nullptr, *values = nullptr;
        i64 leading = 0, values_leading = 0;
        for (i64 row = 0; row < s.seq_len_q; row += kLanes) {
            queries.place(s, batch, 0, row, s.seq_len_q < row + kLanes ? s.seq_len_q : row + kLanes);
            visible.look(s, queries);
            const i64 tile = first / kKeys;
            const Cover cover =
                tile < visible.first_tile || tile >= visible.last_tile ? Cover::none : visible.cover(tile);
            if (cover == Cover::none) continue;
            if (keys == nullptr) {
                keys = head_rows<T, C>(s.k, queries, first, count, dim, b.keys, &leading);
                values = head_rows<T, C>(call.forward.v, queries, first, count, cols, b.values, &values_leading);
                for (i64 i = 0; i < count * dim; ++i) b.grad_keys[i] = 0;
                for (i64 i = 0; i < count * b.wide; ++i) b.grad_values[i] = 0;
            }
            load_lanes<T, C>(s, queries, b.queries);
            const C* rows[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                C* to = b.grad_rows + lane * b.wide;
                rows[lane] = to;
                lse[lane] = kInfinity<C>, common[lane] = 0;  // of no query: its weights are 0
                for (i64 c = 0; c < b.wide; ++c) to[c] = 0;
                if (lane >= queries.count || *queries.at<C>(call.forward.lse, lane) == -kInfinity<C>) continue;
                const T* out = queries.at<T>(call.forward.out, lane);
                const T* grad = queries.at<T>(call.grad_out, lane);
                for (i64 c = 0; c < cols; ++c) {
                    to[c] = widen(grad[c * call.grad_out.col]);
                    common[lane] += to[c] * widen(out[c * call.forward.out.col]);
                }
                common[lane] -= *queries.at<C>(call.grad_lse, lane);
                lse[lane] = *queries.at<C>(call.forward.lse, lane);
            }
            columns_of(rows, kLanes, 1, cols, b.grad_columns);
            for (i64 i = 0; i < dim * kLanes; ++i) b.grad_q[i] = 0;
            for (i64 i = 0; i < dim * kWidth<C>; ++i) b.grad_weight[i] = 0;
            C *grads = b.grads, *grad_values = b.grad_values;
            const i64 wide = b.wide;
            product<C>(values, values_leading, 1, count, b.grad_columns, kLanes, cols, queries.count,
                       [grads](i64 r, int lane, Vector<C> sum) { store(grads + r * kLanes + lane, sum); });
            for (i64 r = 0; r < count; ++r)
                key_gradients(b, keys + r * leading, dim, queries.count, cover == Cover::some, u64{1} << r,
                              visible.words, lse, common, b.scores + r * kLanes, grads + r * kLanes,
                              b.grad_keys + r * dim);
            product<C>(b.scores, kLanes, 1, count, b.grad_rows, wide, queries.count, cols,
                       [grad_values, wide](i64 r, int lane, Vector<C> sum) {
                           C* at = grad_values + r * wide + lane;
                           store(at, load(at) + sum);
                       });
            for (i64 a = 0; a < dim; ++a)
                for (int i = 0; i < kWidth<C>; ++i) b.weight_sum[a] += b.grad_weight[a * kWidth<C> + i];
            for (int lane = 0; lane < queries.count; ++lane) {
                C* to = static_cast<C*>(call.grad_q.data) + part * call.grad_q.batch + batch * call.grad_q.head +
                        (row + lane) * call.grad_q.row;
                for (i64 a = 0; a < dim; ++a) to[a] += b.weight[a] * b.grad_q[a * kLanes + lane];
            }
        }
        if (keys == nullptr) continue;
        C* of_k = static_cast<C*>(call.grad_k) + (batch * s.seq_len_kv + first) * dim;
        C* of_v = static_cast<C*>(call.grad_v) + (batch * s.seq_len_kv + first) * cols;
        for (i64 i = 0; i < count * dim; ++i) of_k[i] += b.grad_keys[i];
        for (i64 r = 0; r < count; ++r)
            for (i64 c = 0; c < cols; ++c) of_v[r * cols + c] += b.grad_values[r * b.wide + c];
    }
    for (i64 a = 0; a < dim; ++a) call.weight_parts[index * dim + a] += b.weight_sum[a];
}

template <class T, class C>
void run_backward(const AdditiveBackwardCall& call) {
    const i64 parts = (call.forward.scores.seq_len_kv + call.part_keys - 1) / call.part_keys;
    parallel(parts * call.forward.scores.batch, call.forward.threads, BackwardBuffers<C>::size(call) * i64{sizeof(C)},
             part_task<T, C>, &call);
}

}  // namespace

void additive_forward(const AdditiveCall& call) {
    by_dtype(call.scores.dtype, [&call]<class T, class C>() { run_forward<T, C>(call); });
}

void additive_backward(const AdditiveBackwardCall& call) {
    by_dtype(call.forward.scores.dtype, [&call]<class T, class C>() { run_backward<T, C>(call); });
}

}  // namespace regard::REGARD_TARGET
