// What attention did, told in a second pass: top keys, mass received, entropy, largest score, block mass and maximum;
// and exact tiles of the scores or weights. Enters: a StatsCall or TileCall, with the lse of the forward pass. Leaves:
// numbers of size O(seq_len), or the tile asked for.
//
// For each batch row, head and chunk of query rows (one task), for each 64 queries, for each tile of 64 keys that the
// mask keeps:
//   S (scores.h);  p = e^(s - lse);  every statistic gathers from the tile while it is in L1.
// Bytes: q and lse once, k once for each 64 queries; received is gathered in double, per chunk, so that no order is
// left to chance.
#include "scores.h"
#include "softmax.h"
#include "threads.h"

namespace regard::REGARD_TARGET {
namespace {

// Weights from scores, in place.
template <class C>
void weights_of(C* scores, i64 keys, int lanes, const C* lse) {
    for (i64 j = 0; j < keys; ++j)
        for (int lane = 0; lane < lanes; lane += kWidth<C>) {
            C* at = scores + j * kLanes + lane;
            store(at, exp_of<C>(load(at) - load(lse + lane)));
        }
}

// An empty row's lse of -inf becomes 0, so that its weights are e^-inf = 0.
template <class C>
void load_lse(const View& view, const Queries& queries, C* to) {
    for (int lane = 0; lane < kLanes; ++lane) {
        const C lse = lane < queries.count ? *queries.at<C>(view, lane) : C(0);
        to[lane] = lse == -kInfinity<C> ? C(0) : lse;
    }
}

// The largest k so far of one lane, descending; of equals, the earlier key.
template <class C>
void insert(C weight, i64 key, i64 k, C* weights, i64* keys) {
    i64 at = k - 1;
    for (; at > 0 && weights[at - 1] < weight; --at) weights[at] = weights[at - 1], keys[at] = keys[at - 1];
    weights[at] = weight, keys[at] = key;
}

template <class C>
struct Gather {
    const StatsCall& call;
    const Queries& queries;
    C entropy[kLanes], top_score[kLanes];
    C* best;  // (kLanes, top_k)
    i64* best_keys;
    double* received;

    // Scores become weights, and the two statistics of scores are taken on the way.
    void weigh(C* tile, i64 keys, const C* lse) {
        const Vector<C> minus_infinity = splat(-kInfinity<C>);
        for (int lane = 0; lane < queries.count; lane += kWidth<C>) {
            Vector<C> top = load(top_score + lane), sum = load(entropy + lane);
            const Vector<C> shift = load(lse + lane);
            for (i64 j = 0; j < keys; ++j) {
                C* at = tile + j * kLanes + lane;
                const Vector<C> s = load(at), surprise = shift - s, p = exp_of<C>(-surprise);
                top = larger(s, top);
                top = s != s ? s : top;
                sum += s == minus_infinity ? Vector<C>{} : p * surprise;
                store(at, p);
            }
            store(top_score + lane, top);
            store(entropy + lane, sum);
        }
    }

    // Sixteen keys at a time: only where their largest weight beats a lane's last are they looked at one by one.
    void best_of(const C* tile, i64 first, i64 keys, const u64* words) {
        constexpr int W = kWidth<C>;
        alignas(64) C top[kLanes];
        for (i64 start = 0; start < keys; start += 16) {
            const i64 end = start + 16 < keys ? start + 16 : keys;
            for (int lane = 0; lane < queries.count; lane += W) {
                Vector<C> high = load(tile + start * kLanes + lane);
                for (i64 j = start + 1; j < end; ++j) high = larger(load(tile + j * kLanes + lane), high);
                store(top + lane, high);
            }
            for (int lane = 0; lane < queries.count; ++lane) {
                C* weights = best + lane * call.top_k;
                if (!(top[lane] > weights[call.top_k - 1])) continue;
                for (i64 j = start; j < end; ++j) {
                    const C weight = tile[j * kLanes + lane];
                    if (weight > weights[call.top_k - 1] && (words == nullptr || ((words[lane] >> j) & 1)))
                        insert(weight, first + j, call.top_k, weights, best_keys + lane * call.top_k);
                }
            }
        }
    }

    void column_sums(const C* tile, i64 first, i64 keys) {
        constexpr int W = kWidth<C>;
        for (i64 j = 0; j < keys; j += W) {
            Vector<C> rows[W];
            for (int i = 0; i < W; ++i) {
                rows[i] = Vector<C>{};
                if (j + i < keys)
                    for (int lane = 0; lane < kLanes; lane += W) rows[i] += load(tile + (j + i) * kLanes + lane);
            }
            const Vector<C> total = sums<C>(rows);
            for (int i = 0; i < W && j + i < keys; ++i) received[first + j + i] += total[i];
        }
    }

    void blocks(const C* tile, i64 first, i64 keys) {
        constexpr int W = kWidth<C>;
        for (i64 j = 0; j < keys;) {
            const i64 column = (first + j) / call.block_cols, end = (column + 1) * call.block_cols - first;
            const i64 last = end < keys ? end : keys;
            alignas(64) C mass[kLanes], top[kLanes];
            for (int lane = 0; lane < kLanes; lane += W) {
                Vector<C> sum = {}, high = {};
                for (i64 i = j; i < last; ++i) {
                    const Vector<C> p = load(tile + i * kLanes + lane);
                    sum += p;
                    high = larger(p, high);
                }
                store(mass + lane, sum);
                store(top + lane, high);
            }
            for (int lane = 0; lane < queries.count; ++lane) {
                C* total = cell(call.block_mass, lane, column);
                C* highest = cell(call.block_max, lane, column);
                *total += mass[lane];
                if (top[lane] > *highest) *highest = top[lane];
            }
            j = last;
        }
    }

  private:
    C* cell(const View& view, int lane, i64 column) const {
        return static_cast<C*>(view.data) + queries.batch * view.batch + queries.head[lane] * view.head +
               queries.row[lane] / call.block_rows * view.row + column * view.col;
    }
};

template <class C>
i64 stats_scratch(const StatsCall& call) {
    return TileScratch<C>::size(call.scores) * i64{sizeof(C)} + kLanes * call.top_k * (i64{sizeof(C)} + 8) + 64;
}

template <class T, class C>
void stats_task(const void* context, i64 index, void* memory) {
    const StatsCall& call = *static_cast<const StatsCall*>(context);
    const Scores& s = call.scores;
    const i64 chunks = (s.seq_len_q + call.chunk_rows - 1) / call.chunk_rows;
    const i64 chunk = chunks - 1 - index % chunks, batch = index / chunks / s.num_heads,
              head = index / chunks % s.num_heads;
    const i64 group = s.num_heads / s.num_kv_heads, of_group = head % group * s.seq_len_q;
    const i64 end = (chunk + 1) * call.chunk_rows < s.seq_len_q ? (chunk + 1) * call.chunk_rows : s.seq_len_q;

    const TileScratch<C> scratch(s, static_cast<C*>(memory));
    i64* best_keys = reinterpret_cast<i64*>(static_cast<C*>(memory) + TileScratch<C>::size(s));
    Queries queries;
    alignas(64) C lse[kLanes];
    Gather<C> gather{
        call,
        queries,
        {},
        {},
        reinterpret_cast<C*>(best_keys + kLanes * call.top_k),
        best_keys,
        call.received ? call.received + ((chunk * s.batch + batch) * s.num_heads + head) * s.seq_len_kv : nullptr};
    const bool of_weights = call.top_k > 0 || call.received != nullptr || call.block_rows > 0;

    for (i64 row = chunk * call.chunk_rows; row < end; row += kLanes) {
        queries.place(s, batch, head / group, of_group + row, of_group + (row + kLanes < end ? row + kLanes : end));
        load_columns<T, C>(s.q, queries, s.head_dim, scratch.queries, scratch.keys);
        load_lse(call.lse, queries, lse);
        for (int lane = 0; lane < kLanes; ++lane) gather.entropy[lane] = 0, gather.top_score[lane] = -kInfinity<C>;
        for (i64 i = 0; i < kLanes * call.top_k; ++i) gather.best[i] = -1, best_keys[i] = -1;
        Visible visible;
        visible.look(s, queries);
        for (i64 j = visible.first_tile; j < visible.last_tile; ++j) {
            const Cover cover = visible.cover(j);
            if (cover == Cover::none) continue;
            const u64* words = cover == Cover::some ? visible.words : nullptr;
            const i64 first = j * kKeys, count = s.seq_len_kv - first < kKeys ? s.seq_len_kv - first : kKeys;
            score_tile<T, C>(s, queries, first, count, kBiased, words, scratch);
            gather.weigh(scratch.scores, count, lse);
            if (!of_weights) continue;
            for (i64 k = 0; k < count; ++k)
                for (int lane = queries.count; lane < kLanes; ++lane) scratch.scores[k * kLanes + lane] = 0;
            if (call.top_k > 0) gather.best_of(scratch.scores, first, count, words);
            if (call.received != nullptr) gather.column_sums(scratch.scores, first, count);
            if (call.block_rows > 0) gather.blocks(scratch.scores, first, count);
        }
        for (int lane = 0; lane < queries.count; ++lane) {
            if (call.entropy.data != nullptr) *queries.at<C>(call.entropy, lane) = gather.entropy[lane];
            if (call.max_score.data != nullptr) *queries.at<C>(call.max_score, lane) = gather.top_score[lane];
            const i64 to = ((batch * s.num_heads + head) * s.seq_len_q + queries.row[lane]) * call.top_k;
            for (i64 i = 0; i < call.top_k; ++i) {
                const bool found = best_keys[lane * call.top_k + i] >= 0;
                call.top_keys[to + i] = best_keys[lane * call.top_k + i];
                static_cast<C*>(call.top_weights)[to + i] = found ? gather.best[lane * call.top_k + i] : C(0);
            }
        }
    }
}

template <class T, class C>
void tile_task(const void* context, i64 index, void* memory) {
    const TileCall& call = *static_cast<const TileCall*>(context);
    const Scores& s = call.scores;
    const i64 rows = s.num_heads / s.num_kv_heads * s.seq_len_q, tiles = (rows + kLanes - 1) / kLanes,
              first_row = index % tiles * kLanes;
    const TileScratch<C> scratch(s, static_cast<C*>(memory));
    Queries queries;
    queries.place(s, index / tiles / s.num_kv_heads, index / tiles % s.num_kv_heads, first_row,
                  first_row + kLanes < rows ? first_row + kLanes : rows);
    load_columns<T, C>(s.q, queries, s.head_dim, scratch.queries, scratch.keys);
    alignas(64) C lse[kLanes];
    if (call.stage == kWeights) load_lse(call.lse, queries, lse);
    Visible visible;
    visible.look(s, queries);
    const i64 end = call.first_key + call.keys;
    for (i64 j = call.first_key / kKeys; j * kKeys < end; ++j) {  // mask words begin at multiples of 64
        const i64 first = j * kKeys, last = first + kKeys < s.seq_len_kv ? first + kKeys : s.seq_len_kv;
        const Cover cover = call.stage < kBiased ? Cover::all : visible.cover(j);
        score_tile<T, C>(s, queries, first, last - first, call.stage, cover == Cover::all ? nullptr : visible.words,
                         scratch);
        if (call.stage == kWeights) weights_of(scratch.scores, last - first, queries.count, lse);
        for (i64 key = first < call.first_key ? call.first_key : first; key < last && key < end; ++key)
            for (int lane = 0; lane < queries.count; ++lane)
                queries.at<C>(call.out, lane)[(key - call.first_key) * call.out.col] =
                    scratch.scores[(key - first) * kLanes + lane];
    }
}

template <class T, class C>
void run_stats(const StatsCall& call) {
    const Scores& s = call.scores;
    const i64 chunks = (s.seq_len_q + call.chunk_rows - 1) / call.chunk_rows;
    parallel(s.batch * s.num_heads * chunks, call.threads, stats_scratch<C>(call), stats_task<T, C>, &call);
}

template <class T, class C>
void run_tile(const TileCall& call) {
    const Scores& s = call.scores;
    const i64 tiles = (s.num_heads / s.num_kv_heads * s.seq_len_q + kLanes - 1) / kLanes;
    parallel(s.batch * s.num_kv_heads * tiles, call.threads, TileScratch<C>::size(s) * i64{sizeof(C)}, tile_task<T, C>,
             &call);
}

}  // namespace

void stats(const StatsCall& call) {
    by_dtype(call.scores.dtype, [&call]<class T, class C>() { run_stats<T, C>(call); });
}

void tile(const TileCall& call) {
    by_dtype(call.scores.dtype, [&call]<class T, class C>() { run_tile<T, C>(call); });
}

}  // namespace regard::REGARD_TARGET
