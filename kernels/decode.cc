// Attention of few queries over many keys: out = softmax(scores) v, as forward.cc, read at the speed of memory.
// Enters: a DecodeCall; keys and values one behind the other, or in pages; as they are, or as int8 with a scale a row.
// Leaves: out and lse; on request the weight of every key.
//
// For each batch row, k/v head and part of `part_keys` keys (one task):
//   for each tile of 64 keys with anything to see:
//     S = Q Kᵀ: vectors run along head_dim, so that each key is read once, where it lies, for all queries of its group;
//     m, l, P = softmax step, vectors along the keys;  O = O · e^(m - m') + P V, vectors along head_dim_v.
// The task that ends last for its k/v head joins the parts, always in their order (merge_attention's formula).
// Bytes: k and v once, a few KB ahead by prefetch; q, out and a partial (O, m, l) for each part.
// Split over keys: Flash-Decoding (Dao et al. 2023). Sums: FlashAttention-2 (Dao 2023), Alg. 1.
#include "dropout.h"
#include "scores.h"
#include "softmax.h"
#include "threads.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace regard::REGARD_TARGET {
namespace {

constexpr i64 kAhead = 8192;  // bytes that the prefetch runs ahead

struct Int8 {
    std::int8_t code;
};
using REGARD_TARGET::widen;
REGARD_INLINE float widen(Int8 x) { return x.code; }

// A vector of numbers that lie side by side, as C. GCC 12 widens in halves, and int8 one by one: where there is one
// instruction, it is asked for by name (one Zen 5 core, in its cache: float16 15 -> 31 GB/s, int8 3 -> 14).
template <class C, class K>
REGARD_INLINE Vector<C> wide(const K* p) {
#if defined(__AVX512F__)
    if constexpr (__is_same(C, float) && __is_same(K, Float16))
        return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    if constexpr (__is_same(C, float) && __is_same(K, BFloat16))
        return (Vector<float>)_mm512_maskz_slli_epi32(
            0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
    if constexpr (__is_same(C, float) && __is_same(K, Int8))
        return (Vector<float>)_mm512_maskz_cvtepi32_ps(
            0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    if constexpr (__is_same(C, float) && __is_same(K, Float16))
        return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    if constexpr (__is_same(C, float) && __is_same(K, BFloat16))
        return (Vector<float>)_mm256_slli_epi32(
            _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
    if constexpr (__is_same(C, float) && __is_same(K, Int8))
        return (Vector<float>)_mm256_cvtepi32_ps(
            _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#endif
    if constexpr (__is_same(K, Int8)) {
        Vector<C> x;
        for (int i = 0; i < kWidth<C>; ++i) x[i] = p[i].code;
        return x;
    } else {
        return widen_vector(p);
    }
}

// Lane n of the result is the sum of rows[n]: a transpose whose halves are added up as soon as they meet.
template <int S, class C>
REGARD_INLINE void fold_from(Vector<C>* rows) {
    constexpr int W = kWidth<C>;
    if constexpr (S < W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; i += 2 * S) {
            exchange_by<S>(rows[i], rows[i + S], Indices<W>{});
            rows[i] += rows[i + S];
        }
        fold_from<2 * S, C>(rows);
    }
}
template <class C>
REGARD_INLINE Vector<C> fold(Vector<C> (&rows)[kWidth<C>]) {
    fold_from<1, C>(rows);
    return rows[0];
}

template <class C>
REGARD_INLINE C highest(Vector<C> x) {
    typename LanesOf<C>::I index;
    for (int i = 0; i < kWidth<C>; ++i) index[i] = i;
#pragma GCC unroll 4
    for (int step = kWidth<C> / 2; step > 0; step /= 2) x = larger(__builtin_shuffle(x, index ^ step), x);
    return x[0];
}

// How one kind of call stores a query: bfloat16 beside bfloat16 keys where pairs are multiplied, else as computed.
template <class T, class C, class K>
constexpr bool kByPairs = kPaired<T> && __is_same(T, K);
template <class T, class C, class K>
struct QueryOf {
    using Type = C;
};
template <>
struct QueryOf<BFloat16, float, BFloat16> {
#if defined(__AVX512BF16__)
    using Type = BFloat16;
#else
    using Type = float;
#endif
};

// Rows that the prefetch runs ahead, into the next tile at most.
constexpr i64 rows_ahead(i64 bytes_of_row) {
    const i64 rows = 1 + kAhead / (bytes_of_row + 1);
    return rows < kKeys ? rows : kKeys;
}

constexpr i64 up_to(i64 n, i64 multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T, class C, class K>
constexpr i64 kDepth = kByPairs<T, C, K> ? 2 * kWidth<C> : kWidth<C>;  // numbers of a row that one vector takes in

// The sizes of one call, and where its memory is cut.
template <class T, class C, class K>
struct Layout {
    using Q = typename QueryOf<T, C, K>::Type;
    i64 rows, padded, depth, width;  // queries of a group, in fours; head_dim and head_dim_v in whole vectors
    i64 parts, tiles;
    i64 partial, of_head;  // elements of C: one part's O, m and l; all of a k/v head, and the tiles' maxima

    explicit Layout(const DecodeCall& call) {
        const Scores& s = call.forward.scores;
        rows = s.num_heads / s.num_kv_heads * s.seq_len_q;
        padded = rows < 3 ? rows : up_to(rows, 4);
        depth = up_to(s.head_dim, kDepth<T, C, K>);
        width = up_to(call.forward.head_dim_v, kWidth<C>);
        tiles = (s.seq_len_kv + kKeys - 1) / kKeys;
        parts = (s.seq_len_kv + call.part_keys - 1) / call.part_keys;
        if (parts < 1) parts = 1;
        partial = up_to(padded * width + 2 * rows, 16);
        of_head = parts * partial + up_to(call.received != nullptr ? rows * tiles : 0, 16);
    }
    C* of(const DecodeCall& call, i64 kv_head) const { return static_cast<C*>(call.memory) + kv_head * of_head; }
    // In bytes: queries, weights of a tile, and one tile each of keys and values where they cannot be read in place.
    i64 scratch() const {
        return up_to(padded * depth * i64{sizeof(Q)}, 64) + 2 * padded * kKeys * i64{sizeof(C)} +
               up_to(kKeys * depth * i64{sizeof(K)}, 64) + up_to(kKeys * width * i64{sizeof(K)}, 64);
    }
};

// One tile's rows: where they begin, and the row that follows the last of them, to be fetched early.
template <class K>
struct Rows {
    const K* first;
    const K* next;  // of the tile after this one, or null
    i64 stride;
    i64 bytes;  // of a row
    i64 ahead;  // rows

    REGARD_INLINE void fetch(i64 row) const {
        row += ahead;
        const K* from = row < kKeys ? first + row * stride : next == nullptr ? nullptr : next + (row - kKeys) * stride;
        if (from == nullptr) return;
        for (i64 line = 0; line < bytes; line += 64) __builtin_prefetch(reinterpret_cast<const char*>(from) + line);
    }
};

// Rows of `count` numbers as they are stored, padded with zeros to `width`, where they are not so in memory.
template <class K>
const K* in_place(const K* from, i64 row, i64 col, i64 count, i64 cols, i64 width, K* copy, i64* leading) {
    if (col == 1 && cols == width) {
        *leading = row;
        return from;
    }
    for (i64 j = 0; j < count; ++j) {
        for (i64 c = 0; c < cols; ++c) copy[j * width + c] = from[j * row + c * col];
        for (i64 c = cols; c < width; ++c) copy[j * width + c] = K{};
    }
    *leading = width;
    return copy;
}

// scores[q][j] = q · k_j for R queries: blocks of as many sums as a vector is wide, transposed and added up downwards.
template <class T, class C, class K, int R>
REGARD_INLINE void dot(const typename QueryOf<T, C, K>::Type* queries, i64 depth, const K* keys, i64 leading, i64 count,
                       const Rows<K>* ahead, C* scores) {
    constexpr int W = kWidth<C>, N = W / R;
    for (i64 j = 0; j < count; j += N) {
        const K* rows[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            rows[n] = keys + (j + n < count ? j + n : count - 1) * leading;
            if (ahead != nullptr) ahead->fetch(j + n);
        }
        Vector<C> sum[W] = {};
        for (i64 d = 0; d < depth; d += kDepth<T, C, K>) {
            if constexpr (kByPairs<T, C, K>) {
                Vector<Pair> left[N];
#pragma GCC unroll 16
                for (int n = 0; n < N; ++n) left[n] = load(reinterpret_cast<const Pair*>(rows[n] + d));
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const Vector<Pair> right = load(reinterpret_cast<const Pair*>(queries + r * depth + d));
#pragma GCC unroll 16
                    for (int n = 0; n < N; ++n) sum[r * N + n] = Term<Pair>::add(sum[r * N + n], left[n], right);
                }
            } else {
                Vector<C> left[N];
#pragma GCC unroll 16
                for (int n = 0; n < N; ++n) left[n] = wide<C>(rows[n] + d);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const Vector<C> right = load(queries + r * depth + d);
#pragma GCC unroll 16
                    for (int n = 0; n < N; ++n) sum[r * N + n] += left[n] * right;
                }
            }
        }
        typedef C Few __attribute__((vector_size(N * sizeof(C)), aligned(sizeof(C)), may_alias));
        alignas(64) C total[W];
        store(total, fold<C>(sum));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            *reinterpret_cast<Few*>(scores + r * kKeys + j) = *reinterpret_cast<const Few*>(total + r * N);
    }
}

// O[q] += sum over the keys listed of p[q][j] v_j, for R queries and N vectors of head_dim_v.
template <class C, class K, int R, int N>
REGARD_INLINE void weigh(const C* p, const std::uint8_t* listed, i64 count, const K* values, i64 leading, i64 width,
                         const C* factor, const Rows<K>* ahead, C* out) {
    constexpr int W = kWidth<C>;
    Vector<C> sum[R][N] = {};
    for (i64 n = 0; n < count; ++n) {
        const i64 j = listed[n];
        if (ahead != nullptr) ahead->fetch(j);
        Vector<C> right[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) right[i] = wide<C>(values + j * leading + i * W);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Vector<C> left = splat(p[r * kKeys + j]);
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) sum[r][i] += left * right[i];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            C* at = out + r * width + i * W;
            store(at, load(at) * factor[r] + sum[r][i]);
        }
}

template <class C, class K, int R>
void weigh_rows(const C* p, const std::uint8_t* listed, i64 count, const K* values, i64 leading, i64 width,
                const C* factor, const Rows<K>& ahead, C* out) {
    constexpr int W = kWidth<C>, N = R == 4 ? kBlockVectors : 8;
    i64 c = 0;
    for (; c + N * W <= width; c += N * W)
        weigh<C, K, R, N>(p, listed, count, values + c, leading, width, factor, c == 0 ? &ahead : nullptr, out + c);
    for (; c < width; c += W)
        weigh<C, K, R, 1>(p, listed, count, values + c, leading, width, factor, c == 0 ? &ahead : nullptr, out + c);
}

// One query's weights of a tile, in place; m, l (W partial sums) and the factor of what came before.
template <class C>
REGARD_INLINE void softmax_row(C* p, C* m, Vector<C>* l, C* factor) {
    constexpr int W = kWidth<C>;
    Vector<C> top = splat(*m);
    for (int j = 0; j < kKeys; j += W) top = larger(load(p + j), top);
    const C now = highest<C>(top), shift = now == -kInfinity<C> ? C(0) : now;
    const Vector<C> scale = exp_of<C>(splat(*m) - shift);
    Vector<C> sum = {};
    for (int j = 0; j < kKeys; j += W) {
        const Vector<C> e = exp_of<C>(load(p + j) - shift);
        store(p + j, e);
        sum += e;
    }
    *l = *l * scale + sum;
    *m = now;
    *factor = scale[0];
}

// scores of one query: scale, int8's scales, cap, bias, mask; those past `count` excluded.
template <class T, class C>
void finish_row(const Scores& s, const Queries& queries, int lane, i64 first, i64 count, const float* scales, i64 step,
                const u64* words, C* scores) {
    constexpr int W = kWidth<C>;
    const bool capped = s.softcap != 0;
    const C scale = static_cast<C>(capped ? s.scale / s.softcap : s.scale), cap = static_cast<C>(s.softcap);
    for (i64 j = 0; j < count; j += W) {
        Vector<C> x = load(scores + j) * scale;
        if (scales != nullptr) {
            Vector<C> own = {};
            for (int i = 0; i < W && j + i < count; ++i) own[i] = scales[(j + i) * step];
            x *= own;
        }
        if (capped) x = cap * tanh(x);
        store(scores + j, x);
    }
    if (s.bias.data != nullptr) {
        const auto add = [&]<class B>(const B* bias) {
            for (i64 j = 0; j < count; ++j) scores[j] += widen(bias[j * s.bias.col]);
        };
        s.wide_bias ? add(queries.at<C>(s.bias, lane) + first * s.bias.col)
                    : add(queries.at<T>(s.bias, lane) + first * s.bias.col);
    }
    if (words != nullptr)
        for (i64 j = 0; j < count; ++j)
            if (!((words[lane] >> j) & 1)) scores[j] = -kInfinity<C>;
    for (i64 j = count; j < kKeys; ++j) scores[j] = -kInfinity<C>;
}

// Weights dropped, as dropout.h does it to a tile that lies the other way round.
template <class C>
void drop_row(const ForwardCall& call, const Queries& queries, int lane, i64 first, i64 count, C* weights) {
    const DropRow row(call.seed, queries.batch, queries.head[lane], call.first_row + queries.row[lane]);
    const C kept = static_cast<C>(1 / (1 - call.dropout));
    const u32 limit = drop_limit(call.dropout);
    for (i64 j = 0; j < count; ++j)
        weights[j] = row.number(static_cast<u32>(first + j)) >= limit ? weights[j] * kept : C(0);
}

template <class C, class K>
REGARD_INLINE bool finite(const K* row, i64 col, i64 cols) {
    C rest = 0;
    for (i64 c = 0; c < cols; ++c) rest += static_cast<C>(widen(row[c * col])) * C(0);
    return rest == C(0);
}

template <class T, class C>
void join(const DecodeCall& call, const Queries& queries, i64 rows, i64 padded, i64 width, i64 parts, i64 partial,
          i64 tiles, C* memory) {
    const ForwardCall& f = call.forward;
    const Scores& s = f.scores;
    for (i64 row = 0; row < rows; ++row) {
        C* first = memory + row * width;  // the sum gathers in the first part's O
        const auto m_of = [&](i64 part) -> C& { return memory[part * partial + padded * width + row]; };
        const auto l_of = [&](i64 part) -> C& { return memory[part * partial + padded * width + rows + row]; };
        C m = -kInfinity<C>;
        for (i64 part = 0; part < parts; ++part) m = larger(m_of(part), m);
        double sum = 0;
        const C shift = m == -kInfinity<C> ? C(0) : m;
        for (i64 part = 0; part < parts; ++part) {
            const C factor = exp_of<C>(splat(m_of(part) - shift))[0];
            if (m_of(part) == -kInfinity<C> && part > 0 && l_of(part) == C(0)) continue;
            sum += static_cast<double>(l_of(part)) * factor;
            const C* of_part = memory + part * partial + row * width;
            for (i64 c = 0; c < width; c += kWidth<C>) {
                const Vector<C> before = part == 0 ? Vector<C>{} : load(first + c);
                store(first + c, before + load(of_part + c) * factor);
            }
        }
        double top = m, of_sum = 1;
        if (f.sinks != nullptr) {
            const double sink = widen(static_cast<const T*>(f.sinks)[queries.head[row]]);
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
        const C share = sum == 0 ? C(0) : static_cast<C>(of_sum / sum);
        const C lse = sum == 0 ? -kInfinity<C> : static_cast<C>(top + __builtin_log(sum));
        const int lane = static_cast<int>(row);
        narrow(lse, queries.at<C>(f.lse, lane));
        T* out = queries.at<T>(f.out, lane);
        for (i64 c = 0; c < f.head_dim_v; ++c) narrow(sum == 0 ? C(0) : first[c] * share, out + c * f.out.col);

        if (call.received == nullptr) continue;
        C* weights = static_cast<C*>(call.received) + (queries.batch * s.num_heads + queries.head[row]) * s.seq_len_kv;
        const C* tile_m = memory + parts * partial + row * tiles;
        for (i64 tile = 0; tile < tiles; ++tile) {  // e^(s - m) so far: m was the maximum when the tile was read
            const i64 begin = tile * kKeys, end = begin + kKeys < s.seq_len_kv ? begin + kKeys : s.seq_len_kv;
            const bool none = tile_m[tile] == -kInfinity<C> || sum == 0;
            const C factor = none ? C(0) : exp_of<C>(splat(tile_m[tile] - lse))[0];
            for (i64 j = begin; j < end; ++j) weights[j] = none ? C(0) : weights[j] * factor;
        }
    }
}

template <class T, class C, class K>
void task(const void* context, i64 index, void* memory) {
    const DecodeCall& call = *static_cast<const DecodeCall*>(context);
    const ForwardCall& f = call.forward;
    const Scores& s = f.scores;
    const Layout<T, C, K> layout(call);
    using Q = typename Layout<T, C, K>::Q;
    const i64 of_head = index / layout.parts, part = index % layout.parts;
    const i64 rows = layout.rows, padded = layout.padded, depth = layout.depth, width = layout.width;

    Queries queries;
    queries.place(s, of_head / s.num_kv_heads, of_head % s.num_kv_heads, 0, rows);
    Visible visible;
    visible.look(s, queries);

    char* from = static_cast<char*>(memory);
    const auto take = [&from](i64 bytes) {
        char* taken = from;
        from += up_to(bytes, 64);
        return taken;
    };
    Q* q = reinterpret_cast<Q*>(take(padded * depth * i64{sizeof(Q)}));
    C* scores = reinterpret_cast<C*>(take(padded * kKeys * i64{sizeof(C)}));
    C* scaled = reinterpret_cast<C*>(take(padded * kKeys * i64{sizeof(C)}));
    K* key_copy = reinterpret_cast<K*>(take(kKeys * depth * i64{sizeof(K)}));
    K* value_copy = reinterpret_cast<K*>(take(kKeys * width * i64{sizeof(K)}));
    for (i64 r = 0; r < padded; ++r)
        for (i64 d = 0; d < depth; ++d) {
            Q& to = q[r * depth + d];
            to = Q{};
            if (r < rows && d < s.head_dim) {
                const T number = queries.at<T>(s.q, static_cast<int>(r))[d * s.q.col];
                if constexpr (__is_same(Q, T))
                    to = number;
                else
                    to = widen(number);
            }
        }

    C* all = layout.of(call, of_head);
    C* out = all + part * layout.partial;
    alignas(64) C m[kLanes], factor[kLanes];
    Vector<C> l[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) m[lane] = -kInfinity<C>, factor[lane] = 0, l[lane] = Vector<C>{};
    for (i64 i = 0; i < padded * width; ++i) out[i] = 0;
    for (i64 i = rows * kKeys; i < padded * kKeys; ++i) scores[i] = scaled[i] = 0;

    const i64 first_tile = part * (call.part_keys / kKeys), until = first_tile + call.part_keys / kKeys;
    const i64 last_tile = until < layout.tiles ? until : layout.tiles;
    C* tile_m = all + layout.parts * layout.partial;
    if (call.received != nullptr)
        for (i64 row = 0; row < rows; ++row)
            for (i64 tile = first_tile; tile < last_tile; ++tile) tile_m[row * layout.tiles + tile] = -kInfinity<C>;

    const auto rows_of_tile = [&call, &queries, &s](const View& view, i64 tile, auto* type) {
        using P = decltype(type);
        const i64 row = tile * kKeys;
        P base = static_cast<P>(view.data) + queries.kv_head * view.head;
        if (call.pages == nullptr) return base + queries.batch * view.batch + row * view.row;
        const i64 page = call.pages[queries.batch * call.pages_of_row + row / call.page_keys];
        return base + page * view.batch + row % call.page_keys * view.row;
    };
    const K* type = nullptr;
    const float* scale_type = nullptr;
    Cover cover = Cover::none;
    for (i64 j = first_tile > visible.first_tile ? first_tile : visible.first_tile;
         j < last_tile && j < visible.last_tile; ++j) {
        cover = visible.cover(j);
        if (cover == Cover::none) continue;
        const u64* words = cover == Cover::some ? visible.words : nullptr;
        const i64 first = j * kKeys, count = s.seq_len_kv - first < kKeys ? s.seq_len_kv - first : kKeys;
        const bool more = j + 1 < last_tile && j + 1 < visible.last_tile;

        const K* keys = rows_of_tile(s.k, j, type);
        const Rows<K> next_keys{keys, more ? rows_of_tile(s.k, j + 1, type) : nullptr, s.k.row,
                                s.head_dim * i64{sizeof(K)}, rows_ahead(s.head_dim * i64{sizeof(K)})};
        i64 leading;
        const K* read = in_place(keys, s.k.row, s.k.col, count, s.head_dim, depth, key_copy, &leading);
        const auto* scales = call.key_scales.data ? rows_of_tile(call.key_scales, j, scale_type) : nullptr;
        constexpr int together = kWidth<C> < 4 ? kWidth<C> : 4;  // a block has as many sums as a vector has lanes
        for (i64 r = 0; r < padded; r += together) {
            const Rows<K>* ahead = r == 0 ? &next_keys : nullptr;
            if (padded == 1)
                dot<T, C, K, 1>(q, depth, read, leading, count, ahead, scores);
            else if (padded == 2)
                dot<T, C, K, 2>(q, depth, read, leading, count, ahead, scores);
            else
                dot<T, C, K, together>(q + r * depth, depth, read, leading, count, ahead, scores + r * kKeys);
        }
        for (i64 r = 0; r < rows; ++r) {
            const int lane = static_cast<int>(r);
            finish_row<T, C>(s, queries, lane, first, count, scales, call.key_scales.row, words, scores + r * kKeys);
            softmax_row<C>(scores + r * kKeys, m + r, l + r, factor + r);
            if (call.received != nullptr) {
                C* to = static_cast<C*>(call.received) + (queries.batch * s.num_heads + queries.head[r]) * s.seq_len_kv;
                for (i64 i = 0; i < count; ++i) to[first + i] = scores[r * kKeys + i];
                tile_m[r * layout.tiles + j] = m[r];
            }
            if (f.dropout != 0) drop_row(f, queries, lane, first, count, scores + r * kKeys);
        }

        const K* values = rows_of_tile(f.v, j, type);
        const Rows<K> next_values{values, more ? rows_of_tile(f.v, j + 1, type) : nullptr, f.v.row,
                                  f.head_dim_v * i64{sizeof(K)}, rows_ahead(f.head_dim_v * i64{sizeof(K)})};
        const auto* value_scales = call.value_scales.data ? rows_of_tile(call.value_scales, j, scale_type) : nullptr;
        std::uint8_t listed[kKeys];
        i64 used = 0;
        u64 apart = 0;  // rows with NaN or inf that some of the queries may not see: 0 · NaN would reach them
        for (i64 i = 0; i < count; ++i) {
            if (words != nullptr) {
                bool any = false, every = true;
                for (i64 r = 0; r < rows; ++r) {
                    const bool sees = (words[r] >> i) & 1;
                    any |= sees, every &= sees;
                }
                if (!any) continue;
                const bool whole =
                    value_scales == nullptr ||
                    value_scales[i * call.value_scales.row] - value_scales[i * call.value_scales.row] == 0.0f;
                if (!every && !(whole && finite<C, K>(values + i * f.v.row, f.v.col, f.head_dim_v))) {
                    apart |= u64{1} << i;
                    continue;
                }
            }
            listed[used++] = static_cast<std::uint8_t>(i);
        }
        C* weights = scores;
        if (value_scales != nullptr) {
            weights = scaled;
            for (i64 n = 0; n < used; ++n)
                for (i64 r = 0; r < rows; ++r)
                    scaled[r * kKeys + listed[n]] =
                        scores[r * kKeys + listed[n]] * value_scales[listed[n] * call.value_scales.row];
        }
        read = in_place(values, f.v.row, f.v.col, count, f.head_dim_v, width, value_copy, &leading);
        for (i64 r = 0; r < padded; r += 4) {
            const auto at = [&](auto rows_at_once) {
                weigh_rows<C, K, rows_at_once()>(weights + r * kKeys, listed, used, read, leading, width, factor + r,
                                                 next_values, out + r * width);
            };
            if (padded == 1)
                at([] { return 1; });
            else if (padded == 2)
                at([] { return 2; });
            else
                at([] { return 4; });
        }
        for (i64 i = 0; apart != 0 && i < count; ++i)
            for (i64 r = 0; ((apart >> i) & 1) && r < rows; ++r)
                if ((words[r] >> i) & 1) {
                    C weight = scores[r * kKeys + i];
                    if (value_scales != nullptr) weight *= value_scales[i * call.value_scales.row];
                    for (i64 c = 0; c < f.head_dim_v; ++c)
                        out[r * width + c] += weight * static_cast<C>(widen(values[i * f.v.row + c * f.v.col]));
                }
    }
    for (i64 r = 0; r < rows; ++r) {
        C sum = 0;
        for (int i = 0; i < kWidth<C>; ++i) sum += l[r][i];
        out[padded * width + r] = m[r];
        out[padded * width + rows + r] = sum;
    }
    if (__atomic_add_fetch(call.done + of_head, 1, __ATOMIC_ACQ_REL) == layout.parts)
        join<T, C>(call, queries, rows, padded, width, layout.parts, layout.partial, layout.tiles, all);
}

template <class T, class C, class K>
void run(const DecodeCall& call) {
    const Scores& s = call.forward.scores;
    const Layout<T, C, K> layout(call);
    for (i64 i = 0; i < s.batch * s.num_kv_heads; ++i) call.done[i] = 0;
    parallel(s.batch * s.num_kv_heads * layout.parts, call.forward.threads, layout.scratch(), task<T, C, K>, &call);
}

}  // namespace

i64 decode_memory(const DecodeCall& call) {
    const Scores& s = call.forward.scores;
    i64 bytes = 0;
    by_dtype(s.dtype, [&]<class T, class C>() {
        bytes = s.batch * s.num_kv_heads * Layout<T, C, C>(call).of_head * i64{sizeof(C)};
    });
    return bytes;
}

void decode(const DecodeCall& call) {
    by_dtype(call.forward.scores.dtype,
             [&call]<class T, class C>() { call.coded ? run<T, C, Int8>(call) : run<T, C, T>(call); });
}

}  // namespace regard::REGARD_TARGET
