// A tile of scores: 64 keys down, up to 64 queries across, and which of them the mask keeps.
// Enters: q, k, bias and mask of a call. Leaves: softcap · tanh(scale · K Qᵀ / softcap) + bias, -inf where excluded.
// Floor: above simd.h. Forward, statistics and exact tiles all come through here, so they agree to the
// bit.
//
// Sᵀ = K Qᵀ rather than Q Kᵀ: the maximum and sum over keys run down the vectors, and k is read where it lies.
#pragma once
#include "simd.h"

namespace regard::REGARD_TARGET {

// Rows of a matrix as C, side by side: in place where they are so already, else copied to `buffer`.
template <class T, class C>
REGARD_INLINE const C* rows_of(const T* from, i64 row_stride, i64 col_stride, i64 rows, i64 cols, C* buffer,
                               i64* leading) {
    if constexpr (__is_same(T, C)) {
        if (col_stride == 1) {
            *leading = row_stride;
            return from;
        }
    }
    for (i64 r = 0; r < rows; ++r) {
        const T* source = from + r * row_stride;
        C* target = buffer + r * cols;
        i64 c = 0;
        if (col_stride == 1)
            for (; c + kWidth<C> <= cols; c += kWidth<C>) store(target + c, widen_vector(source + c));
        for (; c < cols; ++c) target[c] = widen(source[c * col_stride]);
    }
    *leading = cols;
    return buffer;
}

template <class C>
REGARD_INLINE bool all_finite(const C* rows, i64 leading, i64 count, i64 cols) {
    Vector<C> zero = {};
    C rest = 0;
    for (i64 r = 0; r < count; ++r) {
        const C* row = rows + r * leading;
        i64 c = 0;
        for (; c + kWidth<C> <= cols; c += kWidth<C>) zero += load(row + c) * C(0);  // inf · 0 is NaN
        for (; c < cols; ++c) rest += row[c] * C(0);
    }
    for (int i = 0; i < kWidth<C>; ++i) rest += zero[i];
    return rest == C(0);
}

// lanes[column][lane] from one row pointer a lane: a transpose. Null pointers give zeros.
template <class T, class C, int Stride = kLanes>
REGARD_INLINE void columns_of(const T* const* rows, int lanes, i64 col_stride, i64 cols, C* to) {
    constexpr int W = kWidth<C>;
    for (int lane = 0; lane < lanes; lane += W) {
        i64 c = 0;
        if (col_stride == 1) {
            for (; c + W <= cols; c += W) {
                Vector<C> square[W];
                for (int i = 0; i < W; ++i) square[i] = rows[lane + i] ? widen_vector(rows[lane + i] + c) : Vector<C>{};
                transpose<C>(square);
                for (int i = 0; i < W; ++i) store(to + (c + i) * Stride + lane, square[i]);
            }
        }
        for (; c < cols; ++c)
            for (int i = 0; i < W; ++i)
                to[c * Stride + lane + i] = rows[lane + i] ? widen(peek(rows[lane + i] + c * col_stride)) : C(0);
    }
}

// Which query stands in which lane: rows of one head, or of several heads of one group, so that they read each key
// once.
struct Queries {
    int count, padded;  // padded: up to the next multiple of 16, the widest vector
    i64 batch, kv_head;
    i64 head[kLanes], row[kLanes];

    void place(const Scores& s, i64 batch_index, i64 kv_head_index, i64 first,
               i64 last) {  // rows of the group, head by head
        const i64 group = s.num_heads / s.num_kv_heads;
        batch = batch_index, kv_head = kv_head_index;
        count = static_cast<int>(last - first);
        padded = (count + 15) / 16 * 16;
        for (int lane = 0; lane < count; ++lane) {
            head[lane] = kv_head * group + (first + lane) / s.seq_len_q;
            row[lane] = (first + lane) % s.seq_len_q;
        }
    }
    // Row `first` of the k/v head that these queries read.
    template <class T>
    const T* of_head(const View& view, i64 first) const {
        return static_cast<const T*>(view.data) + batch * view.batch + kv_head * view.head + first * view.row;
    }
    template <class T>
    T* at(const View& view, int lane) const {
        return static_cast<T*>(view.data) + batch * view.batch + head[lane] * view.head + row[lane] * view.row;
    }
};

enum class Cover { none, some, all };

REGARD_INLINE u64 bits_between(i64 low, i64 high) {
    low = low < 0 ? 0 : low;
    high = high > kKeys ? kKeys : high;
    if (low >= high) return 0;
    return (~u64{0} >> (kKeys - (high - low))) << low;
}

// What the mask leaves of each key tile, for the queries at hand.
struct Visible {
    i64 first_tile, last_tile;  // tiles outside are not looked at
    u64 words[kLanes];

    void look(const Scores& s, const Queries& queries) {
        mask_ = &s.mask, queries_ = &queries, keys_ = s.seq_len_kv;
        first_tile = 0, last_tile = (keys_ + kKeys - 1) / kKeys;
        common_low_ = 0, common_high_ = keys_;
        if (s.mask.kind == kBits) {  // the span of each row, looked at from outside: tiles beyond cost nothing later
            i64 low = s.mask.count, high = 0;
            for (int lane = 0; lane < queries.count; ++lane) {
                const u64* row = static_cast<const u64*>(s.mask.data) + at(lane);
                for (i64 w = 0; w < low; ++w)
                    if (row[w] != 0) low = w;
                for (i64 w = s.mask.count; w > high; --w)
                    if (row[w - 1] != 0) high = w;
            }
            first_tile = low < high ? low : 0, last_tile = high;
        }
        if (s.mask.kind != kIntervals) return;
        if (s.mask.count == 0) {  // no row has a range
            last_tile = 0;
            return;
        }
        i64 low = keys_, high = 0;
        for (int lane = 0; lane < queries.count; ++lane) {
            const std::int32_t* pairs = intervals(lane);
            for (i64 n = 0; n < s.mask.count; ++n) {
                if (pairs[2 * n] >= pairs[2 * n + 1]) continue;
                low = pairs[2 * n] < low ? pairs[2 * n] : low;
                high = pairs[2 * n + 1] > high ? pairs[2 * n + 1] : high;
            }
            common_low_ = pairs[0] > common_low_ ? pairs[0] : common_low_;
            common_high_ = pairs[1] < common_high_ ? pairs[1] : common_high_;
        }
        if (low >= high) low = high = 0;
        first_tile = low / kKeys, last_tile = (high + kKeys - 1) / kKeys;
    }

    Cover cover(i64 tile) {
        if (mask_->kind == kNoMask) return Cover::all;
        const i64 first = tile * kKeys, last = first + kKeys < keys_ ? first + kKeys : keys_;
        if (mask_->kind == kIntervals && first >= common_low_ && last <= common_high_) return Cover::all;
        u64 any = 0, every = ~u64{0};
        for (int lane = 0; lane < queries_->count; ++lane) {
            words[lane] = word(lane, tile, first);
            any |= words[lane];
            every &= words[lane];
        }
        for (int lane = queries_->count; lane < kLanes; ++lane) words[lane] = 0;
        if (any == 0) return Cover::none;
        const u64 whole = bits_between(0, last - first);
        return (every & whole) == whole ? Cover::all : Cover::some;
    }

  private:
    const std::int32_t* intervals(int lane) const {
        return static_cast<const std::int32_t*>(mask_->data) + 2 * at(lane);
    }
    i64 at(int lane) const {
        return queries_->batch * mask_->batch + queries_->head[lane] * mask_->head + queries_->row[lane] * mask_->row;
    }
    u64 word(int lane, i64 tile, i64 first) const {
        if (mask_->kind == kBits) return static_cast<const u64*>(mask_->data)[at(lane) + tile];
        const std::int32_t* pairs = intervals(lane);
        u64 bits = 0;
        for (i64 n = 0; n < mask_->count; ++n) bits |= bits_between(pairs[2 * n] - first, pairs[2 * n + 1] - first);
        return bits;
    }

    const Mask* mask_;
    const Queries* queries_;
    i64 keys_, common_low_, common_high_;
};

// keep ? x : -inf, key by key, for one tile.
template <class C, int Stride = kLanes>
REGARD_INLINE void exclude(const u64* words, i64 keys, int lanes, C* scores) {
    constexpr int W = kWidth<C>;
    using U = typename LanesOf<C>::U;
    using I = typename LanesOf<C>::I;
    const Vector<C> minus_infinity = splat(-kInfinity<C>);
    for (int lane = 0; lane < lanes; lane += W)
        for (i64 half = 0; half < keys; half += 32) {
            U bits;
            for (int i = 0; i < W; ++i) bits[i] = static_cast<u32>(words[lane + i] >> half);
            const i64 last = keys < half + 32 ? keys : half + 32;
            for (i64 j = half; j < last; ++j) {
                C* at = scores + j * Stride + lane;
                store(at, (I)((bits >> (j - half)) & 1) != 0 ? load(at) : minus_infinity);
            }
        }
}

// Scratch of a score tile: element counts of C.
template <class C>
struct TileScratch {
    C *queries, *scores, *keys, *bias;
    static i64 size(const Scores& s) { return s.head_dim * (kLanes + kKeys) + 2 * kLanes * kKeys; }
    explicit TileScratch(const Scores& s, C* from)
        : queries(from),
          scores(queries + s.head_dim * kLanes),
          keys(scores + kLanes * kKeys),
          bias(keys + s.head_dim * kKeys) {}
};

// Rows of bfloat16 as pairs: in place where they are so already, else copied with an odd end filled by a zero.
REGARD_INLINE const BFloat16* paired_rows(const BFloat16* from, i64 row_stride, i64 col_stride, i64 rows, i64 cols,
                                          BFloat16* buffer, i64* leading) {
    if (col_stride == 1 && cols % 2 == 0) {
        *leading = row_stride;
        return from;
    }
    *leading = (cols + 1) / 2 * 2;
    for (i64 r = 0; r < rows; ++r)
        for (i64 c = 0; c < *leading; ++c)
            buffer[r * *leading + c] = c < cols ? from[r * row_stride + c * col_stride] : BFloat16{0};
    return buffer;
}

// to[j / 2][c] = (row(j)[c], row(j + 1)[c]): rows in pairs; a null row, and a missing last one, as zeros.
template <class T, class Row>
REGARD_INLINE void pairs_of_rows(Row row, i64 col_stride, i64 rows, i64 cols, Pair* to, i64 leading) {
    using L = LanesOf<float>;
    for (i64 j = 0; j < rows; j += 2) {
        const T* first = row(j);
        const T* second = j + 1 == rows ? nullptr : row(j + 1);
        Pair* pairs = to + j / 2 * leading;
        i64 c = 0;
        if (col_stride == 1 && first != nullptr && second != nullptr)
            for (; c + L::width <= cols; c += L::width) {
                const auto low = __builtin_convertvector(*reinterpret_cast<const L::Half*>(first + c), L::U);
                const auto high = __builtin_convertvector(*reinterpret_cast<const L::Half*>(second + c), L::U);
                *reinterpret_cast<L::LooseU*>(pairs + c) = low | (high << 16);
            }
        for (; c < cols; ++c)
            pairs[c] = {first == nullptr ? std::uint16_t{0} : first[c * col_stride].bits,
                        second == nullptr ? std::uint16_t{0} : second[c * col_stride].bits};
    }
}

// Whether a row of bfloat16 holds NaN or inf.
REGARD_INLINE bool has_non_finite(const BFloat16* row, i64 col_stride, i64 cols) {
    using L = LanesOf<float>;
    L::U found = {};
    i64 c = 0;
    if (col_stride == 1)
        for (; c + L::width <= cols; c += L::width) {
            const auto bits = __builtin_convertvector(*reinterpret_cast<const L::Half*>(row + c), L::U) & 0x7f80;
            found |= reinterpret_cast<L::U>(bits == 0x7f80);
        }
    u32 any = 0;
    for (; c < cols; ++c) any |= (row[c * col_stride].bits & 0x7f80) == 0x7f80;
    for (int i = 0; i < L::width; ++i) any |= found[i];
    return any != 0;
}

// Numbers rounded to bfloat16, in the upper halves; NaN stays NaN.
REGARD_INLINE LanesOf<float>::U rounded_to_half(const float* p) {
    using L = LanesOf<float>;
    const L::V x = load(p);
    const L::U bits = reinterpret_cast<L::U>(x);
    return x != x ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
}

// A tile rounded to bfloat16, (keys, kLanes): two keys to a pair in `pairs`, two queries to a pair in `halves`; either
// may be null.
REGARD_INLINE void round_tile(const float* tile, i64 keys, int lanes, Pair* pairs, BFloat16* halves) {
    using L = LanesOf<float>;
    for (i64 j = 0; j < keys; j += 2)
        for (int lane = 0; lane < lanes; lane += L::width) {
            const i64 at = j * kLanes + lane;
            const L::U low = rounded_to_half(tile + at) >> 16;
            const L::U high = j + 1 < keys ? rounded_to_half(tile + at + kLanes) : L::U{};
            if (pairs != nullptr)
                *reinterpret_cast<L::LooseU*>(pairs + j / 2 * kLanes + lane) = low | (high & 0xffff0000u);
            if (halves == nullptr) continue;
            *reinterpret_cast<L::Half*>(halves + at) = __builtin_convertvector(low, L::Half);
            if (j + 1 < keys)
                *reinterpret_cast<L::Half*>(halves + at + kLanes) = __builtin_convertvector(high >> 16, L::Half);
        }
}

// One row a query as columns: Qᵀ, or pairs of its rows. `spare` holds kLanes (cols + 1) numbers of T meanwhile.
template <class T, class C>
REGARD_INLINE void load_columns(const View& view, const Queries& queries, i64 cols, C* to, C* spare) {
    const T* rows[kLanes] = {};
    for (int lane = 0; lane < queries.count; ++lane) rows[lane] = queries.at<T>(view, lane);
    if constexpr (kPaired<T>) {  // a pair has the size of a float, and moves as one
        const float* pairs[kLanes] = {};
        i64 leading = 0;
        T* copies = reinterpret_cast<T*>(spare);
        for (int lane = 0; lane < queries.count; ++lane)
            pairs[lane] = reinterpret_cast<const float*>(
                paired_rows(rows[lane], 0, view.col, 1, cols, copies + lane * (cols + 1), &leading));
        columns_of(pairs, kLanes, 1, (cols + 1) / 2, to);
    } else {
        columns_of(rows, kLanes, view.col, cols, to);
    }
}

// The rows of one k/v head from key `first` on, as C.
template <class T, class C>
REGARD_INLINE const C* head_rows(const View& view, const Queries& queries, i64 first, i64 count, i64 cols, C* buffer,
                                 i64* leading) {
    return rows_of<T, C>(queries.of_head<T>(view, first), view.row, view.col, count, cols, buffer, leading);
}

template <class T, class C>
REGARD_INLINE void load_bias(const Scores& s, const Queries& queries, i64 first, i64 count, C* to) {
    const T* rows[kLanes] = {};
    for (int lane = 0; lane < queries.count; ++lane) rows[lane] = queries.at<T>(s.bias, lane) + first * s.bias.col;
    columns_of(rows, queries.padded, s.bias.col, count, to);
}

// The scores of `count` keys from `first` on, up to `stage`.
// `slope` receives 1 - tanh^2, the derivative of the cap, where there is one and the backward asks.
template <class T, class C, class E>
REGARD_INLINE void score_keys(const Scores& s, const Queries& queries, const Left<E>* keys, i64 leading, i64 first,
                              i64 count, int stage, const u64* words, const TileScratch<C>& scratch,
                              C* slope = nullptr) {
    C* scores = scratch.scores;
    const bool capped = s.softcap != 0 && stage >= kCapped;
    const C scale = static_cast<C>(capped ? s.scale / s.softcap : s.scale);
    constexpr bool pairs = __is_same(E, Pair);
    product<E>(keys, leading, pairs ? 2 : 1, count, reinterpret_cast<const E*>(scratch.queries), kLanes,
               pairs ? (s.head_dim + 1) / 2 : s.head_dim, queries.count,
               [scores, scale](i64 row, int lane, Vector<C> sum) { store(scores + row * kLanes + lane, sum * scale); });
    constexpr int W = kWidth<C>;
    const bool biased = s.bias.data != nullptr && stage >= kBiased;
    if (capped || biased) {
        if (biased) {
            s.wide_bias ? load_bias<C, C>(s, queries, first, count, scratch.bias)
                        : load_bias<T, C>(s, queries, first, count, scratch.bias);
        }
        const C cap = static_cast<C>(s.softcap);
        for (i64 j = 0; j < count; ++j)
            for (int lane = 0; lane < queries.count; lane += W) {
                const i64 at = j * kLanes + lane;
                Vector<C> x = load(scores + at);
                if (capped) {
                    x = tanh(x);
                    if (slope != nullptr) store(slope + at, C(1) - x * x);
                    x = cap * x;
                }
                if (biased) x += load(scratch.bias + at);
                store(scores + at, x);
            }
    }
    if (words != nullptr && stage >= kBiased) exclude<C>(words, count, queries.count, scores);
}

template <class T, class C>
REGARD_INLINE void score_tile(const Scores& s, const Queries& queries, i64 first, i64 count, int stage,
                              const u64* words, const TileScratch<C>& scratch) {
    i64 leading;
    if constexpr (kPaired<T>) {
        const T* keys = paired_rows(queries.of_head<T>(s.k, first), s.k.row, s.k.col, count, s.head_dim,
                                    reinterpret_cast<T*>(scratch.keys), &leading);
        score_keys<T, C, Pair>(s, queries, keys, leading, first, count, stage, words, scratch);
    } else {
        const C* keys = head_rows<T, C>(s.k, queries, first, count, s.head_dim, scratch.keys, &leading);
        score_keys<T, C, C>(s, queries, keys, leading, first, count, stage, words, scratch);
    }
}

}  // namespace regard::REGARD_TARGET
