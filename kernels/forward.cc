// Attention forward: out = softmax(scores) v, lse = log sum exp(scores).
// Enters: a ForwardCall. Leaves: out and lse, one pass over the key tiles that the mask keeps.
//
// For each batch row, k/v head and 64 queries of its group (one task):
//   for each tile of 64 keys with anything to see:
//     Sᵀ = K Qᵀ (scores.h);  m, l, P = softmax step (softmax.h);  Oᵀ = Oᵀ · e^(m - m') + Vᵀ Pᵀ
//   out = O / l, lse = m + log l, a sink joined to the denominator.
// Bytes: q and out once; k and v once for each 64 queries, from L2 or L3; nothing of size seq_len_q · seq_len_kv.
// Online softmax: Milakov & Gimelshein 2018. Tiling: FlashAttention-2 (Dao 2023), Alg. 1.
#include "dropout.h"
#include "output.h"
#include "rows.h"
#include "softmax.h"
#include "threads.h"

namespace regard::REGARD_TARGET {
namespace {

template <class C>
i64 scratch_size(const ForwardCall& call) {
    return TileScratch<C>::size(call.scores) + call.head_dim_v * (kLanes + kKeys);
}

template <class T, class C>
void task(const void* context, i64 index, void* memory) {
    const ForwardCall& call = *static_cast<const ForwardCall*>(context);
    const Scores& s = call.scores;
    const i64 rows = s.num_heads / s.num_kv_heads * s.seq_len_q, tiles = (rows + kLanes - 1) / kLanes;
    const i64 tile = tiles - 1 - index % tiles;  // the last rows of a causal mask cost the most: they go first
    const i64 dim = call.head_dim_v;

    Queries queries;
    queries.place(s, index / tiles / s.num_kv_heads, index / tiles % s.num_kv_heads, tile * kLanes,
                  rows < (tile + 1) * kLanes ? rows : (tile + 1) * kLanes);
    Visible visible;
    visible.look(s, queries);

    const TileScratch<C> scratch(s, static_cast<C*>(memory));
    C* values = static_cast<C*>(memory) + TileScratch<C>::size(s);
    C* out = values + dim * kKeys;
    alignas(64) C m[kLanes], l[kLanes], factor[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) m[lane] = -kInfinity<C>, l[lane] = 0;
    for (i64 i = 0; i < dim * kLanes; ++i) out[i] = 0;
    load_columns<T, C>(s.q, queries, s.head_dim, scratch.queries, scratch.keys);

    const T* v = static_cast<const T*>(call.v.data) + queries.batch * call.v.batch + queries.kv_head * call.v.head;
    for (i64 j = visible.first_tile; j < visible.last_tile; ++j) {
        const Cover cover = visible.cover(j);
        if (cover == Cover::none) continue;
        const u64* words = cover == Cover::some ? visible.words : nullptr;
        const i64 first = j * kKeys, count = s.seq_len_kv - first < kKeys ? s.seq_len_kv - first : kKeys;
        score_tile<T, C>(s, queries, first, count, kBiased, words, scratch);
        softmax_step<C>(scratch.scores, count, queries.count, m, l, factor);
        if (call.dropout != 0) drop<C>(call.seed, queries, call.first_row, first, count, call.dropout, scratch.scores);

        add_values<T, C>(call, v + first * call.v.row, count, words, queries.count, factor, scratch, values, out);
    }

    finish_rows<T, C>(call, queries, 0, queries.count, 1.0, m, l, out);
}

template <class T, class C>
void run(const ForwardCall& call) {
    const Scores& s = call.scores;
    const i64 tiles = (s.num_heads / s.num_kv_heads * s.seq_len_q + kLanes - 1) / kLanes;
    parallel(s.batch * s.num_kv_heads * tiles, call.threads, scratch_size<C>(call) * i64{sizeof(C)}, task<T, C>, &call);
}

}  // namespace

void forward(const ForwardCall& call) {
    by_dtype(call.scores.dtype, [&call]<class T, class C>() { run<T, C>(call); });
}

void dropout(u64 seed, i64 batch, i64 head, i64 row, i64 keys, double probability, std::uint8_t* keep) {
    const DropRow of_row(seed, batch, head, row);
    const u32 limit = drop_limit(probability);
    for (i64 j = 0; j < keys; ++j) keep[j] = of_row.number(static_cast<u32>(j)) >= limit;
}

}  // namespace regard::REGARD_TARGET
