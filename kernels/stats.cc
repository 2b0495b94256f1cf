// What attention did: top keys, entropy, largest score, mass received, block mass and maximum; and exact tiles.
// Statistics come with out and lse in the same pass, or of a call whose lse is known.
// Enters: a StatsCall or TileCall. Leaves: numbers of size O(seq_len), or the tile asked for.
//
// For each batch row, head and chunk of query rows (one task), for each 64 queries:
//   for each tile of 64 keys that the mask keeps:
//     S (scores.h);  top keys from S;  m, l, P = softmax step, P kept;  where there are values, O as in forward.cc
//   lse, out;  entropy = sum w (lse - m) - sum w (s - m), where the last sum ran along with l (softmax.h)
//   for each of these tiles again:  weights = P e^(m_then - lse);  received and blocks add them up.
// A row too long for its P to stay in the caches computes S again instead, and weights = e^(S - lse).
// Bytes: those of the forward pass, and P once written and read, from L2 or L3; received is gathered in double, per
// chunk, so that no order is left to chance.
// Online softmax and its rescaling: Milakov & Gimelshein 2018; FlashAttention-2 (Dao 2023), Alg. 1.
#include "output.h"
#include "rows.h"
#include "scores.h"
#include "softmax.h"
#include "threads.h"

namespace regard::REGARD_TARGET {
namespace {

// Tiles of P that a worker keeps: 4 MiB, so that two workers fit a small L3.
template <class C>
constexpr i64 kKeptTiles = (i64{1} << 22) / (kLanes * kKeys * i64{sizeof(C)});

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

// The k largest scores of each lane and their keys, descending; of equals, the earlier key first.
template <class C>
struct TopKeys {
    using Keys = typename LanesOf<C>::I;
    using Bits = typename LanesOf<C>::U;
    using Key = __typeof__(Keys{}[0] + 0);
    i64 k;
    C* scores;  // (k, kLanes)
    Key* keys;

    static i64 size(i64 k) { return 2 * k * kLanes; }
    TopKeys(i64 count, C* memory) : k(count), scores(memory), keys(reinterpret_cast<Key*>(memory + count * kLanes)) {}

    void clear() {
        for (i64 i = 0; i < k * kLanes; ++i) scores[i] = -kInfinity<C>, keys[i] = -1;
    }

    // Most scores are too small for any lane: 32 keys at a time, a bit for each that is not; those are inserted.
    void look(const C* tile, i64 first, i64 count, int lanes) {
        constexpr int W = kWidth<C>;
        for (int lane = 0; lane < lanes; lane += W)
            for (i64 start = 0; start < count; start += 32) {
                const i64 end = start + 32 < count ? start + 32 : count;
                const Vector<C> least = load(scores + (k - 1) * kLanes + lane);
                Bits larger_than_least = {};
                for (i64 j = start; j < end; ++j)
                    larger_than_least |= (Bits)(load(tile + j * kLanes + lane) > least) & (u32{1} << (j - start));
                u32 any = 0;
                for (int i = 0; i < W; ++i) any |= static_cast<u32>(larger_than_least[i]);
                for (; any != 0; any &= any - 1) {
                    const i64 j = start + __builtin_ctz(any);
                    insert(load(tile + j * kLanes + lane), Keys{} + static_cast<Key>(first + j), lane);
                }
            }
    }

  private:
    Keys& keys_at(i64 rank, int lane) const { return *reinterpret_cast<Keys*>(keys + rank * kLanes + lane); }

    // From the last rank up, each takes the new score, its upper neighbour, or stays: no rank waits for another.
    void insert(Vector<C> score, Keys key, int lane) {
        Vector<C> own = load(scores + (k - 1) * kLanes + lane);
        Keys own_key = keys_at(k - 1, lane), beaten = score > own;
        for (i64 rank = k - 1; rank > 0; --rank) {
            const Vector<C> above = load(scores + (rank - 1) * kLanes + lane);
            const Keys above_key = keys_at(rank - 1, lane), above_beaten = score > above;
            store(scores + rank * kLanes + lane, above_beaten ? above : beaten ? score : own);
            keys_at(rank, lane) = above_beaten ? above_key : beaten ? key : own_key;
            own = above, own_key = above_key, beaten = above_beaten;
        }
        store(scores + lane, beaten ? score : own);
        keys_at(0, lane) = beaten ? key : own_key;
    }
};

// to[j] += sum over lanes of tile[j][lane] · share[lane].
template <class C>
void add_columns(const C* tile, i64 keys, int lanes, const C* share, double* to) {
    constexpr int W = kWidth<C>;
    for (i64 j = 0; j < keys; j += W) {
        Vector<C> rows[W];
        for (int i = 0; i < W; ++i) {
            rows[i] = Vector<C>{};
            if (j + i < keys)
                for (int lane = 0; lane < lanes; lane += W)
                    rows[i] += load(tile + (j + i) * kLanes + lane) * load(share + lane);
        }
        const Vector<C> total = sums<C>(rows);
        for (int i = 0; i < W && j + i < keys; ++i) to[j + i] += total[i];
    }
}

// Sum and maximum of tile · share, added to the blocks that the tile lies in.
template <class C>
void add_blocks(const StatsCall& call, const Queries& queries, const C* tile, i64 first, i64 keys, const C* share) {
    const auto cell = [&queries](const View& view, i64 row, i64 column) {
        return static_cast<C*>(view.data) + queries.batch * view.batch + queries.head[0] * view.head + row * view.row +
               column * view.col;
    };
    for (i64 j = 0; j < keys;) {
        const i64 column = (first + j) / call.block_cols, end = (column + 1) * call.block_cols - first;
        const i64 last = end < keys ? end : keys;
        alignas(64) C mass[kLanes], top[kLanes];
        for (int lane = 0; lane < queries.count; lane += kWidth<C>) {
            Vector<C> sum = {}, high = {};
            for (i64 i = j; i < last; ++i) {
                const Vector<C> p = load(tile + i * kLanes + lane);
                sum += p;
                high = larger(p, high);
            }
            store(mass + lane, sum * load(share + lane));
            store(top + lane, high * load(share + lane));
        }
        for (int lane = 0; lane < queries.count;) {
            const i64 row = queries.row[lane] / call.block_rows;
            C total = 0, highest = 0;
            for (; lane < queries.count && queries.row[lane] < (row + 1) * call.block_rows; ++lane) {
                total += mass[lane];
                highest = top[lane] > highest ? top[lane] : highest;
            }
            *cell(call.block_mass, row, column) += total;
            C* block_max = cell(call.block_max, row, column);
            *block_max = highest > *block_max ? highest : *block_max;
        }
        j = last;
    }
}

// What a task works in.
template <class C>
struct Room {
    bool valued, swept;  // whether there are values; whether weights are added up once lse is known
    i64 capacity;        // tiles of P
    TileScratch<C> tile;
    C *values, *out, *kept, *kept_m;
    TopKeys<C> top;

    static bool sweeps(const StatsCall& call) { return call.received != nullptr || call.block_rows > 0; }
    static i64 tiles(const StatsCall& call) {
        const i64 all = (call.forward.scores.seq_len_kv + kKeys - 1) / kKeys;
        return !sweeps(call) ? 0 : all < kKeptTiles<C> ? all : kKeptTiles<C>;
    }
    static i64 wide(const StatsCall& call) { return call.forward.v.data == nullptr ? 0 : call.forward.head_dim_v; }
    static i64 size(const StatsCall& call) {
        return TileScratch<C>::size(call.forward.scores) + wide(call) * (kKeys + kLanes) +
               tiles(call) * (kKeys + 1) * kLanes + TopKeys<C>::size(call.top_k);
    }
    Room(const StatsCall& call, C* memory)
        : valued(call.forward.v.data != nullptr),
          swept(sweeps(call)),
          capacity(tiles(call)),
          tile(call.forward.scores, memory),
          values(memory + TileScratch<C>::size(call.forward.scores)),
          out(values + wide(call) * kKeys),
          kept(out + wide(call) * kLanes),
          kept_m(kept + capacity * kKeys * kLanes),
          top(call.top_k, kept_m + capacity * kLanes) {}
    TileScratch<C> keeping(i64 slot) const {  // the scratch of a tile whose scores lie among the kept ones
        TileScratch<C> scratch = tile;
        scratch.scores = kept + slot * kKeys * kLanes;
        return scratch;
    }
};

// The tiles that the mask keeps of the queries' keys: visit(slot, first key, count, words).
template <class Visit>
void each_tile(const Scores& s, Visible& visible, Visit visit) {
    i64 slot = 0;
    for (i64 j = visible.first_tile; j < visible.last_tile; ++j) {
        const Cover cover = visible.cover(j);
        if (cover == Cover::none) continue;
        const i64 first = j * kKeys, count = s.seq_len_kv - first < kKeys ? s.seq_len_kv - first : kKeys;
        visit(slot++, first, count, cover == Cover::some ? visible.words : nullptr);
    }
}

template <class T, class C>
void stats_of_rows(const StatsCall& call, const Queries& queries, Room<C>& room, double* received) {
    constexpr int W = kWidth<C>;
    const ForwardCall& forward = call.forward;
    const Scores& s = forward.scores;
    Visible visible;
    visible.look(s, queries);
    load_columns<T, C>(s.q, queries, s.head_dim, room.tile.queries, room.tile.keys);
    const bool keep = room.swept && visible.last_tile - visible.first_tile <= room.capacity;
    const bool tilted = call.entropy.data != nullptr;

    alignas(64) C m[kLanes], l[kLanes], tilt[kLanes], factor[kLanes], lse[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) m[lane] = -kInfinity<C>, l[lane] = 0, tilt[lane] = 0;
    room.top.clear();
    if (room.valued)
        for (i64 i = 0; i < forward.head_dim_v * kLanes; ++i) room.out[i] = 0;
    if (room.valued || keep || tilted || call.top_k > 0 || call.max_score.data != nullptr)
        each_tile(s, visible, [&](i64 slot, i64 first, i64 count, const u64* words) {
            const TileScratch<C> scratch = keep ? room.keeping(slot) : room.tile;
            score_tile<T, C>(s, queries, first, count, kBiased, words, scratch);
            if (call.top_k > 0) room.top.look(scratch.scores, first, count, queries.count);
            if (tilted)
                softmax_step<C, true>(scratch.scores, count, queries.count, m, l, factor, tilt);
            else
                softmax_step<C>(scratch.scores, count, queries.count, m, l, factor);
            if (keep)
                for (int lane = 0; lane < kLanes; lane += W) store(room.kept_m + slot * kLanes + lane, load(m + lane));
            if (room.valued)
                add_values<T, C>(forward, queries.of_head<T>(forward.v, first), count, words, queries.count, factor,
                                 scratch, room.values, room.out);
        });
    if (room.valued) finish_rows<T, C>(forward, queries, 0, queries.count, 1.0, m, l, room.out);
    load_lse(forward.lse, queries, lse);

    for (int lane = 0; lane < queries.count; lane += W) {
        const Vector<C> top = load(m + lane), sum = load(l + lane), log_sum = load(lse + lane);
        const Vector<C> above = log_sum - finite_or_zero(top, splat(-kInfinity<C>));
        store(tilt + lane, exp_of<C>(top - log_sum) * (sum * above - load(tilt + lane)));
        store(m + lane,
              sum != sum && top < kInfinity<C> ? sum : top);  // the maximum passes over a NaN, the sum does not
        for (i64 rank = 0; rank < call.top_k; ++rank) {
            C* at = room.top.scores + rank * kLanes + lane;
            store(at, exp_of<C>(load(at) - log_sum));
        }
    }
    for (int lane = 0; lane < queries.count; ++lane) {
        if (tilted) *queries.at<C>(call.entropy, lane) = tilt[lane];
        if (call.max_score.data != nullptr) *queries.at<C>(call.max_score, lane) = m[lane];
        const i64 to =
            ((queries.batch * s.num_heads + queries.head[lane]) * s.seq_len_q + queries.row[lane]) * call.top_k;
        for (i64 rank = 0; rank < call.top_k; ++rank) {
            const i64 key = room.top.keys[rank * kLanes + lane];
            call.top_keys[to + rank] = key;
            static_cast<C*>(call.top_weights)[to + rank] = key < 0 ? C(0) : room.top.scores[rank * kLanes + lane];
        }
    }
    if (!room.swept) return;

    alignas(64) C share[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) share[lane] = 1;
    each_tile(s, visible, [&](i64 slot, i64 first, i64 count, const u64* words) {
        C* tile = room.tile.scores;
        if (keep) {
            tile = room.keeping(slot).scores;
            for (int lane = 0; lane < queries.count; lane += W)
                store(share + lane, exp_of<C>(load(room.kept_m + slot * kLanes + lane) - load(lse + lane)));
        } else {
            score_tile<T, C>(s, queries, first, count, kBiased, words, room.tile);
            weights_of(tile, count, queries.count, lse);
        }
        for (int lane = queries.count; lane % W != 0; ++lane) {  // no query stands there
            share[lane] = 0;
            for (i64 j = 0; j < count; ++j) tile[j * kLanes + lane] = 0;
        }
        if (received != nullptr) add_columns(tile, count, queries.count, share, received + first);
        if (call.block_rows > 0) add_blocks(call, queries, tile, first, count, share);
    });
}

i64 chunks_of(const StatsCall& call) { return (call.forward.scores.seq_len_q + call.chunk_rows - 1) / call.chunk_rows; }

template <class T, class C>
void stats_task(const void* context, i64 index, void* memory) {
    const StatsCall& call = *static_cast<const StatsCall*>(context);
    const Scores& s = call.forward.scores;
    const i64 chunks = chunks_of(call), batch = index / chunks / s.num_heads, head = index / chunks % s.num_heads;
    const i64 chunk = chunks - 1 - index % chunks;  // the last rows of a causal mask cost the most: they go first
    const i64 group = s.num_heads / s.num_kv_heads, of_group = head % group * s.seq_len_q;
    const i64 end = (chunk + 1) * call.chunk_rows < s.seq_len_q ? (chunk + 1) * call.chunk_rows : s.seq_len_q;
    double* received =
        call.received ? call.received + ((chunk * s.batch + batch) * s.num_heads + head) * s.seq_len_kv : nullptr;
    Room<C> room(call, static_cast<C*>(memory));
    for (i64 row = chunk * call.chunk_rows; row < end; row += kLanes) {
        Queries queries;
        queries.place(s, batch, head / group, of_group + row, of_group + (row + kLanes < end ? row + kLanes : end));
        stats_of_rows<T>(call, queries, room, received);
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
    const Scores& s = call.forward.scores;
    parallel(s.batch * s.num_heads * chunks_of(call), call.forward.threads, Room<C>::size(call) * i64{sizeof(C)},
             stats_task<T, C>, &call);
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
    by_dtype(call.forward.scores.dtype, [&call]<class T, class C>() { run_stats<T, C>(call); });
}

void tile(const TileCall& call) {
    by_dtype(call.scores.dtype, [&call]<class T, class C>() { run_tile<T, C>(call); });
}

}  // namespace regard::REGARD_TARGET
