// Attention backward: gradients of q, k, v and of a bias, weights recomputed from lse.
// Enters: a BackwardCall. Leaves: grad_q; grad_k, grad_v and grad_bias added to; diagonal sums by part.
//
// Three passes over tasks, each writing what no other task of its pass writes:
//   1. for each 64 queries: rows of (lse, do . out - dlse), and the key tiles that the mask keeps.
//   2. for each k/v head and part of the keys, for each 256 of its keys, for each 64 queries that see any:
//        for each of the 4 key tiles:  Sᵀ = K Qᵀ, P = e^(S - lse);  dPᵀ = V dOᵀ;  dS = P (dP - do . out + dlse)
//          dV += Pᵀ dO;  dK += dSᵀ Q;  dQ += dS K
//      dK and dV of the 256 keys stay in L2; dQ of a part goes to memory of its own.
//   3. for each 64 queries: the parts of dQ added up, in order.
// The parts depend on the number of keys alone, so the bits do not depend on the threads. Bytes: k and v once; q, do
// and dQ once for each 256 keys; parts x seq_len_q x head_dim floats of memory besides; nothing quadratic.
// FlashAttention-2 (Dao 2023), Alg. 2.
#include "dropout.h"
#include "scores.h"
#include "softmax.h"
#include "threads.h"

namespace regard::REGARD_TARGET {
namespace {

constexpr i64 kSpan = 4;  // key tiles for which 64 queries are packed once

// Rows of a scratch matrix that is the right side of a product: a multiple of the lanes.
REGARD_INLINE i64 padded(i64 dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

// What the passes leave each other: one entry for each (batch, k/v head, 64 queries of its group).
template <class C>
struct Workspace {
    i64 tiles, entries, parts, width;
    std::int32_t* tiles_seen;  // (entries, 2): first and last key tile
    std::uint8_t* touched;     // (parts, entries): whether grad_q has been begun
    C *lse, *common;           // (entries, kLanes)
    C* grad_q;                 // (parts, entries, kLanes, width)
    i64 bytes;

    explicit Workspace(const BackwardCall& call) {
        const Scores& s = call.scores;
        tiles = (s.num_heads / s.num_kv_heads * s.seq_len_q + kLanes - 1) / kLanes;
        entries = s.batch * s.num_kv_heads * tiles;
        parts = (s.seq_len_kv + call.part_keys - 1) / call.part_keys;
        width = padded(s.head_dim);
        char* at = static_cast<char*>(call.memory);
        const auto take = [&at](i64 size) {
            char* begin = at;
            at += (size + 63) / 64 * 64;
            return begin;
        };
        lse = reinterpret_cast<C*>(take(entries * kLanes * i64{sizeof(C)}));
        common = reinterpret_cast<C*>(take(entries * kLanes * i64{sizeof(C)}));
        grad_q = reinterpret_cast<C*>(take(parts * entries * kLanes * width * i64{sizeof(C)}));
        tiles_seen = reinterpret_cast<std::int32_t*>(take(entries * 8));
        touched = reinterpret_cast<std::uint8_t*>(take(parts * entries));
        bytes = at - static_cast<char*>(call.memory);
    }
};

REGARD_INLINE void place(const Scores& s, i64 tiles, i64 entry, Queries* queries) {
    const i64 rows = s.num_heads / s.num_kv_heads * s.seq_len_q, tile = entry % tiles;
    queries->place(s, entry / tiles / s.num_kv_heads, entry / tiles % s.num_kv_heads, tile * kLanes,
                   rows < (tile + 1) * kLanes ? rows : (tile + 1) * kLanes);
}

template <class T, class C>
void prepare(const void* context, i64 entry, void*) {
    const BackwardCall& call = *static_cast<const BackwardCall*>(context);
    const Workspace<C> work(call);
    Queries queries;
    place(call.scores, work.tiles, entry, &queries);
    Visible visible;
    visible.look(call.scores, queries);
    work.tiles_seen[2 * entry] = static_cast<std::int32_t>(visible.first_tile);
    work.tiles_seen[2 * entry + 1] = static_cast<std::int32_t>(visible.last_tile);
    for (i64 part = 0; part < work.parts; ++part) work.touched[part * work.entries + entry] = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        C lse = 0, common = 0;
        if (lane < queries.count && *queries.at<C>(call.lse, lane) != -kInfinity<C>) {  // a row without keys has none
            const T* out = queries.at<T>(call.out, lane);
            const T* grad = queries.at<T>(call.grad_out, lane);
            C sum[8] = {};
            for (i64 c = 0; c < call.head_dim_v; ++c)
                sum[c % 8] += widen(out[c * call.out.col]) * widen(grad[c * call.grad_out.col]);
            common = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
            common -= *queries.at<C>(call.grad_lse, lane);
            lse = *queries.at<C>(call.lse, lane);
        }
        work.lse[entry * kLanes + lane] = lse;
        work.common[entry * kLanes + lane] = common;
    }
}

// One row, padded with zeros to `width`; no row: zeros.
template <class T, class C>
REGARD_INLINE void load_row(const T* from, i64 col, i64 dim, i64 width, C* to) {
    i64 c = 0;
    if (from != nullptr) {
        if (col == 1)
            for (; c + kWidth<C> <= dim; c += kWidth<C>) store(to + c, widen_vector(from + c));
        for (; c < dim; ++c) to[c] = widen(from[c * col]);
    }
    for (; c < width; ++c) to[c] = 0;
}

// One row a query.
template <class T, class C>
void load_rows(const View& view, const Queries& queries, i64 dim, i64 width, C* to) {
    for (int lane = 0; lane < kLanes; ++lane)
        load_row(lane < queries.count ? queries.at<T>(view, lane) : nullptr, view.col, dim, width, to + lane * width);
}

template <class C>
void columns_of_rows(const C* rows, i64 width, i64 cols, C* to) {
    const C* pointers[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) pointers[lane] = rows + lane * width;
    columns_of(pointers, kLanes, 1, cols, to);
}

// Rows that hold NaN or inf, as zeros: 0 · NaN would carry them past the mask. A dS that may see such a row is NaN
// already, and NaN · 0 is NaN.
template <class C>
void finite_rows(const C* from, i64 rows, i64 width, C* to) {
    for (i64 r = 0; r < rows; ++r) {
        const bool finite = all_finite(from + r * width, width, 1, width);
        for (i64 c = 0; c < width; ++c) to[r * width + c] = finite ? from[r * width + c] : C(0);
    }
}

template <class C>
void zero(C* to, i64 count) {
    for (i64 i = 0; i < count; ++i) to[i] = 0;
}

template <class C>
void add(C* to, const C* from, i64 rows, i64 cols, i64 width) {
    for (i64 r = 0; r < rows; ++r)
        for (i64 c = 0; c < cols; ++c) to[r * cols + c] += from[r * width + c];
}

// What the products are made of: pairs of bfloat16 where the target multiplies them, else numbers of C.
template <class T, class C>
struct ElementOf {
    using E = C;
};
template <class T, class C>
    requires kPaired<T>
struct ElementOf<T, C> {
    using E = Pair;
};
template <class T, class C>
using Element = typename ElementOf<T, C>::E;

// out[row][lane] += sum_t a[row * a_row + t * a_step] b[t][lane]
template <class E>
REGARD_INLINE void product_onto(const Left<E>* a, i64 a_row, i64 a_step, i64 rows, const E* b, i64 width, i64 depth,
                                i64 cols, Sum<E>* out) {
    using C = Sum<E>;
    product<E>(a, a_row, a_step, rows, b, width, depth, cols, [out, width](i64 row, int lane, Vector<C> sum) {
        C* at = out + row * width + lane;
        store(at, load(at) + sum);
    });
}

// Sums of a tile of dS along its diagonals, entry (key - query + last_row) of the query's head.
template <class C>
void add_diagonals(const BackwardCall& call, const Queries& queries, i64 part, i64 first, i64 count, const C* grads) {
    const Scores& s = call.scores;
    for (int lane = 0; lane < queries.count; ++lane) {
        C* to = static_cast<C*>(call.grad_diagonal) +
                ((part * s.batch + queries.batch) * s.num_heads + queries.head[lane]) * call.diagonals +
                (first - queries.row[lane] + call.last_row - call.first_row);
        for (i64 j = 0; j < count; ++j) to[j] += grads[j * kLanes + lane];
    }
}

// A tile of dS added to a dense bias's gradient, whose rows go by queries: squares of dSᵀ are turned.
template <class C>
void add_to_bias(const BackwardCall& call, const Queries& queries, i64 first, i64 count, const C* grads) {
    constexpr int W = kWidth<C>;
    for (int lane = 0; lane < queries.count; lane += W) {
        C* rows[W];
        for (int i = 0; i < W; ++i)
            rows[i] = lane + i < queries.count ? queries.at<C>(call.grad_bias, lane + i) + first * call.grad_bias.col
                                               : nullptr;
        for (i64 j = 0; j < count; j += W) {
            Vector<C> square[W];
            for (int i = 0; i < W; ++i) square[i] = j + i < count ? load(grads + (j + i) * kLanes + lane) : Vector<C>{};
            transpose<C>(square);
            const i64 keys = count - j < W ? count - j : W;
            for (int i = 0; i < W && rows[i] != nullptr; ++i) {
                if (keys == W && call.grad_bias.col == 1) {
                    store(rows[i] + j, load(rows[i] + j) + square[i]);
                    continue;
                }
                for (i64 n = 0; n < keys; ++n) rows[i][(j + n) * call.grad_bias.col] += square[i][n];
            }
        }
    }
}

// In pairs of bfloat16 each of these needs half the room at most.
template <class C>
struct Buffers {
    TileScratch<C> tile;
    C *grads, *slope;               // (kKeys, kLanes): dP then dS; derivative of the cap
    C* rounded;                     // P, then dS, in pairs of queries
    C *rows, *grad_rows;            // Q and dO, a row a query (kLanes, width)
    C* grad_columns;                // dOᵀ (head_dim_v, kLanes)
    C *keys, *clean_keys, *values;  // (kSpan kKeys, width)
    C *grad_keys, *grad_values, *grad_q;

    static i64 size(const BackwardCall& call) {
        const i64 d = padded(call.scores.head_dim), e = padded(call.head_dim_v), span = kSpan * kKeys;
        return TileScratch<C>::size(call.scores) + 3 * kKeys * kLanes + 2 * kLanes * (d + e) + span * (3 * d + 2 * e);
    }
    Buffers(const BackwardCall& call, C* from) : tile(call.scores, from) {
        const i64 d = padded(call.scores.head_dim), e = padded(call.head_dim_v), span = kSpan * kKeys;
        grads = from + TileScratch<C>::size(call.scores);
        slope = grads + kKeys * kLanes;
        rounded = slope + kKeys * kLanes;
        rows = rounded + kKeys * kLanes;
        grad_rows = rows + kLanes * d;
        grad_columns = grad_rows + kLanes * e;
        grad_q = grad_columns + kLanes * e;
        keys = grad_q + kLanes * d;
        clean_keys = keys + span * d;
        values = clean_keys + span * d;
        grad_keys = values + span * e;
        grad_values = grad_keys + span * d;
    }
};

// The keys and values of one span, as the products want them.
template <class T, class C>
struct Span {
    const Left<Element<T, C>>*keys, *values;  // rows
    i64 keys_step, values_step;
    const Element<T, C>* clean;  // right side of dS K: rows without NaN and inf, in pairs of keys where T is paired
    i64 first, count;

    void load(const BackwardCall& call, const Queries& queries, i64 start, i64 keys_here, const Buffers<C>& b) {
        const Scores& s = call.scores;
        const i64 d = s.head_dim, wide = padded(d);
        first = start, count = keys_here;
        if constexpr (kPaired<T>) {
            const T* k = queries.of_head<T>(s.k, start);
            keys = paired_rows(k, s.k.row, s.k.col, count, d, reinterpret_cast<T*>(b.keys), &keys_step);
            values = paired_rows(queries.of_head<T>(call.v, start), call.v.row, call.v.col, count, call.head_dim_v,
                                 reinterpret_cast<T*>(b.values), &values_step);
            const auto finite = [&](i64 j) {
                return has_non_finite(k + j * s.k.row, s.k.col, d) ? nullptr : k + j * s.k.row;
            };
            pairs_of_rows<T>(finite, s.k.col, count, d, reinterpret_cast<Pair*>(b.clean_keys), wide);
            clean = reinterpret_cast<const Pair*>(b.clean_keys);
        } else {
            const T* k = queries.of_head<T>(s.k, start);
            for (i64 r = 0; r < count; ++r) load_row(k + r * s.k.row, s.k.col, d, wide, b.keys + r * wide);
            keys = b.keys, keys_step = wide;
            clean = all_finite(b.keys, wide, count, wide) ? b.keys : b.clean_keys;
            if (clean != b.keys) finite_rows(b.keys, count, wide, b.clean_keys);
            values = head_rows<T, C>(call.v, queries, start, count, call.head_dim_v, b.values, &values_step);
        }
        zero(b.grad_keys, count * wide);
        zero(b.grad_values, count * padded(call.head_dim_v));
    }
};

// The queries of one tile: columns for the scores and dP, rows for dK and dV.
template <class T, class C>
void load_tile(const BackwardCall& call, const Queries& queries, const Buffers<C>& b) {
    const Scores& s = call.scores;
    const i64 d = s.head_dim, e = call.head_dim_v, wide_d = padded(d), wide_e = padded(e);
    if constexpr (kPaired<T>) {
        load_columns<T, C>(s.q, queries, d, b.tile.queries, b.tile.keys);
        load_columns<T, C>(call.grad_out, queries, e, b.grad_columns, b.grad_rows);
        const auto finite = [&](i64 lane) {
            const T* row = queries.at<T>(s.q, static_cast<int>(lane));
            return has_non_finite(row, s.q.col, d) ? nullptr : row;
        };
        const auto any = [&](i64 lane) -> const T* { return queries.at<T>(call.grad_out, static_cast<int>(lane)); };
        pairs_of_rows<T>(finite, s.q.col, queries.count, d, reinterpret_cast<Pair*>(b.rows), wide_d);
        pairs_of_rows<T>(any, call.grad_out.col, queries.count, e, reinterpret_cast<Pair*>(b.grad_rows), wide_e);
    } else {
        load_rows<T, C>(s.q, queries, d, wide_d, b.rows);
        columns_of_rows(b.rows, wide_d, d, b.tile.queries);
        if (!all_finite(b.rows, wide_d, kLanes, wide_d)) finite_rows(b.rows, kLanes, wide_d, b.rows);
        load_rows<T, C>(call.grad_out, queries, e, wide_e, b.grad_rows);
        columns_of_rows(b.grad_rows, wide_e, e, b.grad_columns);
    }
    zero(b.grad_q, kLanes * wide_d);
}

// dS from the scores (in place of P) and dP: everything between the products.
template <class C>
void score_gradients(const BackwardCall& call, const Queries& queries, i64 first, i64 count, i64 part, const C* lse,
                     const C* common, const Buffers<C>& b) {
    constexpr int W = kWidth<C>;
    C *scores = b.tile.scores, *grads = b.grads;
    const Vector<C> minus_infinity = splat(-kInfinity<C>);
    if (call.dropout != 0) drop<C>(call.seed, queries, call.first_row, first, count, call.dropout, grads);
    const bool capped = call.scores.softcap != 0, diagonal = call.grad_diagonal != nullptr;
    const bool dense = call.grad_bias.data != nullptr, later = capped || diagonal || dense;
    const C scale = static_cast<C>(call.scores.scale), before = later ? C(1) : scale;
    for (int lane = 0; lane < queries.count; lane += W) {
        const Vector<C> shift = load(lse + lane), rest = load(common + lane);
        for (i64 j = 0; j < count; ++j) {
            const i64 at = j * kLanes + lane;
            const Vector<C> s = load(scores + at), p = exp_of<C>(s - shift);
            const Vector<C> grad = p * (load(grads + at) - rest) * before;
            store(scores + at, p);
            store(grads + at, s == minus_infinity ? Vector<C>{} : grad);  // dP of a hidden key may be anything
        }
    }
    if (diagonal) add_diagonals(call, queries, part, first, count, grads);
    if (dense) add_to_bias(call, queries, first, count, grads);
    if (later)
        for (i64 j = 0; j < count; ++j)
            for (int lane = 0; lane < queries.count; lane += W) {
                const i64 at = j * kLanes + lane;
                const Vector<C> grad = load(grads + at);
                const Vector<C> scaled = grad * scale * (capped ? load(b.slope + at) : splat(C(1)));
                store(grads + at, grad == C(0) ? grad : scaled);  // a hidden key's slope may be NaN
            }
    if (call.dropout != 0) drop<C>(call.seed, queries, call.first_row, first, count, call.dropout, scores);
}

// One tile: its part of dV, dK and dQ.
template <class T, class C>
void tile_gradients(const BackwardCall& call, const Queries& queries, const Span<T, C>& span, i64 first, i64 part,
                    const u64* words, const C* lse, const C* common, const Buffers<C>& b) {
    using E = Element<T, C>;
    constexpr bool kPairs = kPaired<T>;
    constexpr i64 kStep = kPairs ? 2 : 1;  // numbers that one term of a product takes
    const Scores& s = call.scores;
    const i64 d = s.head_dim, e = call.head_dim_v, wide_d = padded(d), wide_e = padded(e), at = first - span.first;
    const i64 count = span.count - at < kKeys ? span.count - at : kKeys;
    score_keys<T, C, E>(s, queries, span.keys + at * span.keys_step, span.keys_step, first, count, kBiased, words,
                        b.tile, b.slope);
    C* grads = b.grads;
    product<E>(span.values + at * span.values_step, span.values_step, kStep, count,
               reinterpret_cast<const E*>(b.grad_columns), kLanes, (e + kStep - 1) / kStep, queries.count,
               [grads](i64 row, int lane, Vector<C> sum) { store(grads + row * kLanes + lane, sum); });
    score_gradients<C>(call, queries, first, count, part, lse, common, b);

    const auto* rows = reinterpret_cast<const E*>(b.rows);
    const auto* grad_rows = reinterpret_cast<const E*>(b.grad_rows);
    C *grad_values = b.grad_values + at * wide_e, *grad_keys = b.grad_keys + at * wide_d;
    if constexpr (kPairs) {
        T* weights = reinterpret_cast<T*>(b.rounded);
        T* halves = weights + kKeys * kLanes;
        Pair* pairs = reinterpret_cast<Pair*>(b.tile.bias);  // the bias is in the scores by now
        round_tile(b.tile.scores, count, queries.count, nullptr, weights);
        round_tile(b.grads, count, queries.count, pairs, halves);
        const i64 depth = (queries.count + 1) / 2;
        if (queries.count % 2 != 0)
            for (i64 j = 0; j < count; ++j)
                weights[j * kLanes + queries.count] = halves[j * kLanes + queries.count] = T{0};
        product_onto<E>(weights, kLanes, 2, count, grad_rows, wide_e, depth, e, grad_values);
        product_onto<E>(halves, kLanes, 2, count, rows, wide_d, depth, d, grad_keys);
        product_onto<E>(reinterpret_cast<const T*>(pairs), 2, 2 * kLanes, queries.count, span.clean + at / 2 * wide_d,
                        wide_d, (count + 1) / 2, d, b.grad_q);
    } else {
        product_onto<E>(b.tile.scores, kLanes, 1, count, grad_rows, wide_e, queries.count, e, grad_values);
        product_onto<E>(b.grads, kLanes, 1, count, rows, wide_d, queries.count, d, grad_keys);
        product_onto<E>(b.grads, 1, kLanes, queries.count, span.clean + at * wide_d, wide_d, count, d, b.grad_q);
    }
}

// One k/v head and one part of the keys.
template <class T, class C>
void part_of_head(const BackwardCall& call, i64 part, i64 head, const Workspace<C>& work, const Buffers<C>& b) {
    const Scores& s = call.scores;
    const i64 d = s.head_dim, e = call.head_dim_v, wide_d = padded(d), wide_e = padded(e);
    const i64 end = (part + 1) * call.part_keys < s.seq_len_kv ? (part + 1) * call.part_keys : s.seq_len_kv;

    Queries queries;
    Visible visible;
    Span<T, C> span;
    for (i64 start = part * call.part_keys; start < end; start += kSpan * kKeys) {
        const i64 keys = end - start < kSpan * kKeys ? end - start : kSpan * kKeys;
        const i64 first_tile = start / kKeys, last_tile = (start + keys + kKeys - 1) / kKeys;
        bool loaded = false;
        for (i64 tile = 0; tile < work.tiles; ++tile) {
            const i64 entry = head * work.tiles + tile;
            const i64 from = work.tiles_seen[2 * entry] > first_tile ? work.tiles_seen[2 * entry] : first_tile;
            const i64 to = work.tiles_seen[2 * entry + 1] < last_tile ? work.tiles_seen[2 * entry + 1] : last_tile;
            if (from >= to) continue;
            place(s, work.tiles, entry, &queries);
            visible.look(s, queries);
            bool packed = false;
            for (i64 j = from; j < to; ++j) {
                const Cover cover = visible.cover(j);
                if (cover == Cover::none) continue;
                if (!loaded) span.load(call, queries, start, keys, b);
                if (!packed) load_tile<T, C>(call, queries, b);
                loaded = packed = true;
                tile_gradients<T, C>(call, queries, span, j * kKeys, part,
                                     cover == Cover::some ? visible.words : nullptr, work.lse + entry * kLanes,
                                     work.common + entry * kLanes, b);
            }
            if (!packed) continue;
            C* sum = work.grad_q + (part * work.entries + entry) * kLanes * wide_d;
            std::uint8_t& touched = work.touched[part * work.entries + entry];
            for (i64 i = 0; i < queries.count * wide_d; i += kWidth<C>)
                store(sum + i, touched ? load(sum + i) + load(b.grad_q + i) : load(b.grad_q + i));
            touched = 1;
        }
        if (!loaded) continue;
        add(static_cast<C*>(call.grad_k) + (head * s.seq_len_kv + start) * d, b.grad_keys, keys, d, wide_d);
        add(static_cast<C*>(call.grad_v) + (head * s.seq_len_kv + start) * e, b.grad_values, keys, e, wide_e);
    }
}

// What the tasks of the second pass are: no two may add to one number of grad_bias, so that where the bias broadcasts
// one task goes through all the batch rows, heads or parts that share it, in order.
struct Tasks {
    i64 parts, batch, heads;                  // tasks
    i64 part_steps, batch_steps, head_steps;  // what one goes through

    Tasks(const BackwardCall& call, i64 all_parts) {
        const View& bias = call.grad_bias;
        const bool dense = bias.data != nullptr;
        const auto split = [](bool shared, i64 size, i64* tasks, i64* steps) {
            *tasks = shared ? 1 : size, *steps = shared ? size : 1;
        };
        split(dense && bias.col == 0, all_parts, &parts, &part_steps);
        split(dense && bias.batch == 0, call.scores.batch, &batch, &batch_steps);
        split(dense && bias.head == 0, call.scores.num_kv_heads, &heads, &head_steps);
    }
};

template <class T, class C>
void part_task(const void* context, i64 index, void* memory) {
    const BackwardCall& call = *static_cast<const BackwardCall*>(context);
    const Workspace<C> work(call);
    const Buffers<C> b(call, static_cast<C*>(memory));
    const Tasks tasks(call, work.parts);
    const i64 part = index / (tasks.batch * tasks.heads), row = index / tasks.heads % tasks.batch,
              head = index % tasks.heads;
    for (i64 p = part; p < part + tasks.part_steps; ++p)
        for (i64 r = row; r < row + tasks.batch_steps; ++r)
            for (i64 h = head; h < head + tasks.head_steps; ++h)
                part_of_head<T, C>(call, p, r * call.scores.num_kv_heads + h, work, b);
}

template <class T, class C>
void join(const void* context, i64 entry, void* memory) {
    const BackwardCall& call = *static_cast<const BackwardCall*>(context);
    const Workspace<C> work(call);
    Queries queries;
    place(call.scores, work.tiles, entry, &queries);
    C* sum = static_cast<C*>(memory);
    zero(sum, kLanes * work.width);
    for (i64 part = 0; part < work.parts; ++part) {
        if (!work.touched[part * work.entries + entry]) continue;
        const C* from = work.grad_q + (part * work.entries + entry) * kLanes * work.width;
        for (i64 i = 0; i < queries.count * work.width; i += kWidth<C>) store(sum + i, load(sum + i) + load(from + i));
    }
    for (int lane = 0; lane < queries.count; ++lane) {
        T* to = queries.at<T>(call.grad_q, lane);
        for (i64 c = 0; c < call.scores.head_dim; ++c) narrow(sum[lane * work.width + c], to + c * call.grad_q.col);
    }
}

template <class T, class C>
void run(const BackwardCall& call) {
    const Workspace<C> work(call);
    const Tasks tasks(call, work.parts);
    parallel(work.entries, call.threads, 0, prepare<T, C>, &call);
    parallel(tasks.parts * tasks.batch * tasks.heads, call.threads, Buffers<C>::size(call) * i64{sizeof(C)},
             part_task<T, C>, &call);
    parallel(work.entries, call.threads, kLanes * work.width * i64{sizeof(C)}, join<T, C>, &call);
}

}  // namespace

i64 backward_memory(const BackwardCall& call) {
    return call.scores.dtype == kFloat64 ? Workspace<double>(call).bytes : Workspace<float>(call).bytes;
}

void backward(const BackwardCall& call) {
    by_dtype(call.scores.dtype, [&call]<class T, class C>() { run<T, C>(call); });
}

}  // namespace regard::REGARD_TARGET
