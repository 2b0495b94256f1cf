// Attention forward on tile registers: the same function as forward.cc, by products of bfloat16 pairs.
// Enters: a ForwardCall. Leaves: out and lse.
//
// First k and v are laid out as tiles, once for all queries of their group (one task for each 64 keys). Then, for each
// batch row, k/v head and 64 queries of its group (one task), in units of 64 keys by 32 queries:
//   Sᵀ = K Qᵀ                       tiles of k, as its rows lie; of Qᵀ, pairs of head_dim
//   m, l, P = softmax step          in vectors, down the columns of Sᵀ; P comes out in pairs of keys
//   Oᵀ = Oᵀ · e^(m - m') + Vᵀ Pᵀ    tiles of Vᵀ and of P; the product of one unit is summed in tiles, and gathered
// While unit u is weighed in vectors, the tiles take the scores of u + 1 and the values of u - 1, a few products at a
// time between the vectors; the product of u - 2 is gathered meanwhile. An accumulator is stored when it is needed
// again.
//
// Numbers finer than bfloat16 go in as sums of bfloat16 pieces: a = a1 + a2 + a3, and the products that matter are
// added up, small ones first. bfloat16: 1 product. float16: 2 pieces, 4 products for scores (exact), 3 for values.
// float32: "highest" 3 pieces, 6 products; "high" 2 and 3; "medium" 1.
// Pieces of inf, of numbers near the largest or of very small ones are not the number: rows of q, k and v that hold
// such are found when they are laid out, and enter in float32, row by row.
//
// Bytes: as forward.cc, and k and v once more, laid out (1, 2 or 3 times 2 bytes a number). Tile work of a unit at
// head_dim 64, by the manual's 16 cycles a product and 8 a load from L1: 32 products, 512 cycles, 32 loads and 16
// stores beside them; vectors: 128 exponentials of some 5 cycles. The figures of this kernel are still to be taken on
// hardware. Tiling: FlashAttention-2 (Dao 2023), Alg. 1. Splitting: Henry, Tang, Heinecke 2019, "Leveraging the
// bfloat16 artificial intelligence datatype for higher-precision computations".
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms out of GCC 12's own intrinsics (PR 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "dropout.h"
#include "rows.h"
#include "softmax.h"
#include "threads.h"
#include "tiles.h"

namespace regard::avx512_bf16 {
void forward(const ForwardCall&);
}

namespace regard::REGARD_TARGET {
namespace {

#if defined(__AMX_BF16__)
using Tiles = ProcessorTiles;
#else
using Tiles = EmulatedTiles;
#endif

constexpr int kHalf = 32;                                       // queries of a unit: two tiles
constexpr i64 kTile = i64{kTileRows} * kTileBytes;              // bytes of a tile that lies by itself
constexpr i64 kPairRow = kHalf * 4, kPairTile = 16 * kPairRow;  // bytes of a row of pairs, and of 32 numbers down
constexpr i64 kFewRows = 16;                                    // queries that are not worth a tile

using V = Vector<float>;
using U = LanesOf<float>::U;

struct Piece {
    int a, b;
};
// Which pieces are multiplied: small products first, and each shares a side with the one before.
template <int N>
struct Pieces;
template <>
struct Pieces<1> {
    static constexpr int count = 1;
    static constexpr Piece list[] = {{0, 0}};
};
template <>
struct Pieces<3> {
    static constexpr int count = 2;
    static constexpr Piece list[] = {{1, 0}, {0, 0}, {0, 1}};
};
template <>
struct Pieces<4> {
    static constexpr int count = 2;
    static constexpr Piece list[] = {{1, 0}, {1, 1}, {0, 1}, {0, 0}};
};
template <>
struct Pieces<6> {
    static constexpr int count = 3;
    static constexpr Piece list[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};
};

// Magnitudes that a row may have for its pieces to be the number: 0, or its largest between these.
struct Range {
    float low, high;
};
constexpr float kLargest = 0x1.fffffep127f;
constexpr Range kAny{0.0f, kInfinity<float>}, kFinite{0.0f, kLargest}, kSplit{0x1p-90f, 0x1p60f};
constexpr double kLargestScale = 0x1p40;  // beyond, what the products flush to zero would count

// Storage, products of scores and of values, the ranges of q and k and of v, and terms of 2^x.
template <class Storage, int ScoreProducts, int ValueProducts, Range Keys, Range Values, int Degree>
struct Kind {
    using T = Storage;
    using ForScores = Pieces<ScoreProducts>;
    using ForValues = Pieces<ValueProducts>;
    static constexpr int pieces = ForScores::count;
    static constexpr Range keys = Keys, values = Values;
    static constexpr int degree = Degree;
    static_assert(ForScores::count == ForValues::count);
};

i64 up_to(i64 n, i64 multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- pieces ----

REGARD_INLINE U two_to_one(V low, V high) { return (U)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

// 32 numbers as pieces, in their order.
template <int N, class Store>
REGARD_INLINE void split(V low, V high, Store store_piece) {
#pragma GCC unroll 3
    for (int i = 0; i < N; ++i) {
        const U bits = two_to_one(low, high);
        store_piece(i, bits);
        low -= (V)((U)_mm512_cvtepu16_epi32(_mm512_castsi512_si256((__m512i)bits)) << 16);
        high -= (V)((U)_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64((__m512i)bits, 1)) << 16);
    }
}

// 16 pairs as pieces.
template <int N, class Store>
REGARD_INLINE void split_pairs(V first, V second, Store store_piece) {
    typedef std::int16_t Shorts __attribute__((vector_size(64)));
    constexpr Shorts kBySides = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#pragma GCC unroll 3
    for (int i = 0; i < N; ++i) {
        const U bits = (U)_mm512_permutexvar_epi16((__m512i)kBySides, (__m512i)two_to_one(first, second));
        store_piece(i, bits);
        first -= (V)(bits << 16);
        second -= (V)(bits & 0xffff0000u);
    }
}

REGARD_INLINE V size_of(V x) { return (V)((U)x & 0x7fffffffu); }

REGARD_INLINE bool in_range(V top, bool whole, Range range) {
    float most = 0;
    for (int i = 0; i < kWidth<float>; ++i) most = top[i] > most ? top[i] : most;
    return whole && (most == 0 || most >= range.low);
}

// ---- laying out k and v ----

// What the tasks share: the call, and the tiles of k and v for each k/v head of each batch row and each 64 keys.
struct Laid {
    const ForwardCall* call;
    i64 tiles, depth, width;  // key tiles; head_dim and head_dim_v in steps of 32
    bool in_place;            // k lies as tiles want it, but for a last tile that is not whole
    char *k, *v;
    u64 *bad_k, *bad_v;  // a bit for each row that goes in by itself
    i64 k_bytes, v_bytes, k_slots;

    char* k_at(i64 head, i64 tile) const { return k + (head * k_slots + (in_place ? 0 : tile)) * k_bytes; }
    char* v_at(i64 head, i64 tile) const { return v + (head * tiles + tile) * v_bytes; }
};

// Rows as float32, zeros around them; rows out of range as zeros, and a bit for each.
template <class T>
u64 widen_rows(const T* from, i64 row_stride, i64 col_stride, i64 count, i64 cols, i64 padded, Range range,
               float* rows) {
    constexpr int W = kWidth<float>;
    u64 bad = 0;
    for (i64 r = 0; r < kKeys; ++r) {
        float* row = rows + r * padded;
        V top = {};
        bool whole = true;
        for (i64 c = 0; c < padded; c += W) {
            V x = {};
            if (r < count && col_stride == 1 && c + W <= cols)
                x = widen_vector(from + r * row_stride + c);
            else if (r < count)
                for (i64 i = 0; i < W && c + i < cols; ++i) x[i] = widen(from[r * row_stride + (c + i) * col_stride]);
            store(row + c, x);
            const V size = size_of(x);
            whole &= _mm512_cmp_ps_mask((__m512)size, (__m512)splat(range.high), _CMP_NLE_UQ) == 0;
            top = larger(size, top);
        }
        if (range.high == kInfinity<float> || in_range(top, whole, range)) continue;
        bad |= u64{1} << r;
        for (i64 c = 0; c < padded; ++c) row[c] = 0;
    }
    return bad;
}

template <class K>
void lay_out(const void* context, i64 index, void* memory) {
    const Laid& laid = *static_cast<const Laid*>(context);
    const ForwardCall& call = *laid.call;
    const Scores& s = call.scores;
    using T = typename K::T;
    constexpr int N = K::pieces, W = kWidth<float>;
    const i64 head = index / laid.tiles, tile = index % laid.tiles, batch = head / s.num_kv_heads,
              kv_head = head % s.num_kv_heads, first = tile * kKeys;
    const i64 count = s.seq_len_kv - first < kKeys ? s.seq_len_kv - first : kKeys;
    const auto from = [&](const View& view) {
        return static_cast<const T*>(view.data) + batch * view.batch + kv_head * view.head + first * view.row;
    };
    float* rows = static_cast<float*>(memory);
    if (!laid.in_place || count < kKeys) {  // 16 rows by 32 numbers a tile
        const i64 padded = laid.depth * 32;
        laid.bad_k[index] = widen_rows(from(s.k), s.k.row, s.k.col, count, s.head_dim, padded, K::keys, rows);
        char* to = laid.k_at(head, tile);
        for (i64 r = 0; r < kKeys; ++r)
            for (i64 d = 0; d < laid.depth; ++d) {
                const float* at = rows + r * padded + d * 32;
                char* block = to + (r / 16 * laid.depth + d) * N * kTile + r % 16 * kTileBytes;
                split<N>(load(at), load(at + W),
                         [block](int i, U bits) { *reinterpret_cast<U*>(block + i * kTile) = bits; });
            }
    } else {
        laid.bad_k[index] = 0;
    }
    const i64 padded = laid.width * 32;  // 16 columns of v by 32 keys a tile
    laid.bad_v[index] =
        widen_rows(from(call.v), call.v.row, call.v.col, count, call.head_dim_v, padded, K::values, rows);
    char* to = laid.v_at(head, tile);
    for (i64 c = 0; c < padded; c += W)
        for (int half = 0; half < 2; ++half) {
            char* block = to + (c / 16 * 2 + half) * N * kTile;
            if constexpr (N == 1) {  // pairs of keys turn as one
                V pairs[W];
                for (int i = 0; i < W; ++i) {
                    const float* at = rows + (half * 32 + 2 * i) * padded + c;
                    split_pairs<1>(load(at), load(at + padded), [&pairs, i](int, U bits) { pairs[i] = (V)bits; });
                }
                transpose<float>(pairs);
                for (int i = 0; i < W; ++i) *reinterpret_cast<U*>(block + i * kTileBytes) = (U)pairs[i];
            } else {
                V low[W], high[W];
                for (int i = 0; i < W; ++i) {
                    low[i] = load(rows + (half * 32 + i) * padded + c);
                    high[i] = load(rows + (half * 32 + W + i) * padded + c);
                }
                transpose<float>(low);
                transpose<float>(high);
                for (int i = 0; i < W; ++i)
                    split<N>(low[i], high[i], [block, i](int piece, U bits) {
                        *reinterpret_cast<U*>(block + piece * kTile + i * kTileBytes) = bits;
                    });
            }
        }
}

// ---- products in steps ----

// Groups of 32 rows by 32 queries, c = a b, each over some steps of depth 32. Strides in bytes.
struct Product {
    const char* a;
    i64 a_row, a_block, a_depth, a_piece;  // a row, 16 rows, 32 numbers on, the next piece
    const char* b;
    i64 b_depth, b_piece;
    float* c;  // 32 queries a row
    i64 first_group, last_group, first_depth, last_depth;
    i64 steps() const { return (last_group - first_group) * (last_depth - first_depth); }
};

// The products that run beside the vectors: scores of the unit to come, then values of the unit before.
template <class K>
class Stream {
  public:
    explicit Stream(Tiles& tiles) : tiles_(tiles) {}

    void begin(const Product* scores, const Product* values) {
        work_[0] = scores, work_[1] = values;
        at_ = -1;
        credit_ = 0;
        next();
    }
    i64 steps() const { return (work_[0] ? work_[0]->steps() : 0) + (work_[1] ? work_[1]->steps() : 0); }
    void share_among(i64 slices) { rate_ = slices > 0 ? (steps() * 256 + slices - 1) / slices : 0; }

    // One group's products at one step of depth.
    REGARD_INLINE void step() { at_ == 0 ? step_of<typename K::ForScores>() : step_of<typename K::ForValues>(); }
    REGARD_INLINE bool has_scores() const { return at_ == 0; }
    // What falls due in one slice of the vectors' work.
    REGARD_INLINE void scores_due() {
        for (credit_ += rate_; credit_ >= 256 && at_ == 0; credit_ -= 256) step_of<typename K::ForScores>();
    }
    REGARD_INLINE void due() {
        for (credit_ += rate_; credit_ >= 256 && at_ < 2; credit_ -= 256) step();
    }
    __attribute__((noinline)) void finish() {
        while (at_ < 2) step();
    }
    __attribute__((noinline)) void flush() {
        if (pending_ == nullptr) return;
        put<0>(), put<1>(), put<2>(), put<3>();
        pending_ = nullptr;
    }

  private:
    void next() {
        do ++at_;
        while (at_ < 2 && work_[at_] == nullptr);
        if (at_ < 2) group_ = work_[at_]->first_group, depth_ = work_[at_]->first_depth;
    }
    template <int R>
    REGARD_INLINE void put() {
        tiles_.template store<R>(pending_ + (R >> 1) * 16 * kHalf + (R & 1) * 16, kPairRow);
    }
    // A tile store right behind its products waits for them: it is put off until the register is needed.
    template <int R>
    REGARD_INLINE void renew() {
        if (pending_ != nullptr) put<R>();
        tiles_.template zero<R>();
    }
    template <class List, int I>
    REGARD_INLINE void multiply(const Product& w, const char* a, const char* b, bool fresh) {
        if constexpr (I < static_cast<int>(sizeof List::list / sizeof(Piece))) {
            constexpr Piece now = List::list[I], before = I == 0 ? Piece{-1, -1} : List::list[I == 0 ? 0 : I - 1];
            const char *left = a + now.a * w.a_piece, *right = b + now.b * w.b_piece;
            if constexpr (now.a != before.a) tiles_.template load<4>(left, w.a_row);
            if constexpr (now.b != before.b) tiles_.template load<6>(right, kPairRow);
            if (I == 0 && fresh) renew<0>();
            tiles_.template multiply<0, 4, 6>();
            if constexpr (now.b != before.b) tiles_.template load<7>(right + 64, kPairRow);
            if (I == 0 && fresh) renew<1>();
            tiles_.template multiply<1, 4, 7>();
            if constexpr (now.a != before.a) tiles_.template load<5>(left + w.a_block, w.a_row);
            if (I == 0 && fresh) renew<2>();
            tiles_.template multiply<2, 5, 6>();
            if (I == 0 && fresh) renew<3>();
            tiles_.template multiply<3, 5, 7>();
            multiply<List, I + 1>(w, a, b, fresh);
        }
    }
    template <class List>
    REGARD_INLINE void step_of() {
        const Product& w = *work_[at_];
        const bool fresh = depth_ == w.first_depth;
        multiply<List, 0>(w, w.a + group_ * 2 * w.a_block + depth_ * w.a_depth, w.b + depth_ * w.b_depth, fresh);
        if (fresh) pending_ = w.c + group_ * 32 * kHalf;
        if (++depth_ < w.last_depth) return;
        depth_ = w.first_depth;
        if (++group_ == w.last_group) next();
    }

    Tiles& tiles_;
    const Product* work_[2] = {};
    int at_ = 2;
    i64 group_ = 0, depth_ = 0, rate_ = 0, credit_ = 0;
    float* pending_ = nullptr;
};

// ---- vectors ----

// 2^x, relative error below 9e-8 (degree 5) or 3e-9 (degree 6) before rounding; 2^0 is 1. -inf gives 0, NaN gives NaN.
template <int Degree>
REGARD_INLINE V power_of_two(V x) {
    const V f = (V)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor x
    V p;
    if constexpr (Degree == 5) {
        p = splat(0.00186713019f);
        p = p * f + 0.00901703006f;
        p = p * f + 0.0557999133f;
        p = p * f + 0.24016445f;
        p = p * f + 0.693151312f;
    } else {
        p = splat(0.000216129162f);
        p = p * f + 0.00124678461f;
        p = p * f + 0.0096754516f;
        p = p * f + 0.0554852806f;
        p = p * f + 0.240229306f;
        p = p * f + 0.693147044f;
    }
    return (V)_mm512_scalef_ps((__m512)(p * f + 1.0f), (__m512)x);
}

// 64 keys against 32 queries of the task.
struct Unit {
    i64 tile, first;
    int number, half, begin, end, count;  // keys begin to end have something to see; those from count on do not exist
    bool masked;
    u64 bad_k, bad_v;
    u64 words[kHalf];
    alignas(64) float factor[kHalf];
};

// Carves a task's memory; from null, counts it. A line more between buffers keeps rows of one off the sets of the next.
struct Carver {
    u64 at;
    template <class X>
    X* take(i64 count) {
        const u64 here = at;
        at += static_cast<u64>(up_to(count * i64{sizeof(X)}, 64) + 5 * 64);
        return reinterpret_cast<X*>(here);
    }
};

template <class K>
class Task {
    using T = typename K::T;
    static constexpr int N = K::pieces, W = kWidth<float>;

  public:
    Task(const Laid& laid, Tiles& tiles, void* memory)
        : laid_(laid),
          call_(*laid.call),
          s_(laid.call->scores),
          stream_(tiles),
          carver_{reinterpret_cast<u64>(memory)} {
        const i64 width = laid.width * 32 * kHalf;
        for (int h = 0; h < 2; ++h) {
            q_[h] = carver_.take<char>(N * laid.depth * kPairTile);
            scores_[h] = carver_.take<float>(kKeys * kHalf);
            weights_[h] = carver_.take<char>(N * 2 * kPairTile);
            out_[h] = carver_.take<float>(width);
        }
        product_ = carver_.take<float>(width);
        columns_ = carver_.take<float>(s_.head_dim * kLanes);
        bias_ = carver_.take<float>(kKeys * kHalf);
        rows_ = carver_.take<float>(kKeys * s_.head_dim);
        for (float*& apart : apart_) apart = carver_.take<float>(width);
    }
    static i64 size(const Laid& laid) {
        Tiles none;
        return static_cast<i64>(Task(laid, none, nullptr).carver_.at);
    }

    void run(i64 index) {
        const i64 rows = s_.num_heads / s_.num_kv_heads * s_.seq_len_q, tiles = (rows + kLanes - 1) / kLanes;
        const i64 tile = tiles - 1 - index % tiles;  // the last rows of a causal mask cost the most: they go first
        head_ = index / tiles;
        queries_.place(s_, head_ / s_.num_kv_heads, head_ % s_.num_kv_heads, tile * kLanes,
                       rows < (tile + 1) * kLanes ? rows : (tile + 1) * kLanes);
        visible_.look(s_, queries_);
        adjusted_ =
            s_.softcap != 0 || s_.bias.data != nullptr || !(static_cast<float>(size_of_scale() * kLog2E) > 0x1p-120f);
        unit_ = static_cast<float>(adjusted_ ? kLog2E : size_of_scale() * kLog2E);
        lay_out_queries();
        for (int h = 0; h < 2; ++h) {
            for (int lane = 0; lane < kHalf; ++lane) m_[h][lane] = -kInfinity<float>, l_[h][lane] = 0;
            for (i64 i = 0; i < laid_.width * 32 * kHalf; ++i) out_[h][i] = 0;
        }
        key_tile_ = visible_.first_tile, half_ = 0;
        run_units();
        for (int h = 0; h * kHalf < queries_.count; ++h)
            finish_rows<T, float, kHalf>(call_, queries_, h * kHalf, lanes(h), 1 / kLog2E, m_[h], l_[h], out_[h]);
    }

  private:
    double size_of_scale() const { return s_.scale < 0 ? -s_.scale : s_.scale; }
    int lanes(int half) const {
        const int left = queries_.count - half * kHalf;
        return left < kHalf ? left : kHalf;
    }

    void run_units() {
        Unit *last = nullptr, *before = nullptr, *now = fetch();  // u - 2, u - 1, u
        if (now == nullptr) return;
        Product scores = product_of_scores(*now), values;
        stream_.begin(&scores, nullptr);
        stream_.finish();
        stream_.flush();
        while (now != nullptr) {
            Unit* next = fetch();
            if (next != nullptr) scores = product_of_scores(*next);
            if (before != nullptr) values = product_of_values(*before);
            stream_.begin(next ? &scores : nullptr, before ? &values : nullptr);
            stream_.share_among((last ? laid_.width * 2 : 0) + (now->end - now->begin) / 4);
            if (last != nullptr) {
                stream_.has_scores() ? stream_.step() : stream_.flush();  // either puts away the end of u - 2
                gather(*last);
            }
            settle(*now);
            if (call_.dropout != 0 || now->bad_v != 0)
                weigh_and_keep(*now);
            else
                weigh<false>(*now);
            stream_.finish();
            if (before == nullptr) stream_.flush();
            last = before, before = now, now = next;
        }
        stream_.flush();
        stream_.begin(nullptr, nullptr);
        if (last != nullptr) gather(*last);
        values = product_of_values(*before);
        stream_.begin(nullptr, &values);
        stream_.finish();
        stream_.flush();
        gather(*before);
    }

    // The next unit with anything to see, or null. Of four, the last three stay as they are.
    Unit* fetch() {
        for (; key_tile_ < visible_.last_tile; half_ = 0, ++key_tile_) {
            if (half_ == 0) cover_ = visible_.cover(key_tile_);
            if (cover_ == Cover::none) continue;
            while (half_ * kHalf < queries_.count && half_ < 2) {
                const int half = half_++;
                Unit& u = units_[number_ & 3];
                u.tile = key_tile_, u.first = key_tile_ * kKeys, u.half = half, u.number = number_;
                u.count = static_cast<int>(s_.seq_len_kv - u.first < kKeys ? s_.seq_len_kv - u.first : kKeys);
                const u64 whole = bits_between(0, u.count);
                u64 any = whole, every = whole;
                if (cover_ == Cover::some) {
                    any = 0;
                    for (int lane = 0; lane < kHalf; ++lane) {
                        u.words[lane] = visible_.words[half * kHalf + lane];
                        any |= u.words[lane];
                        if (lane < lanes(half)) every &= u.words[lane];
                    }
                    any &= whole;
                    if (any == 0) continue;
                }
                u.masked = every != whole;
                u.begin = static_cast<u32>(any) != 0 ? 0 : 32, u.end = any >> 32 != 0 ? 64 : 32;
                u.bad_k = laid_.bad_k[head_ * laid_.tiles + u.tile] & any;
                u.bad_v = laid_.bad_v[head_ * laid_.tiles + u.tile] & any;
                ++number_;
                return &u;
            }
        }
        return nullptr;
    }

    Product product_of_scores(const Unit& u) const {
        const bool rows = laid_.in_place && u.count == kKeys;
        const i64 row = rows ? s_.k.row * i64{sizeof(T)} : kTileBytes, step = N * kTile;
        return {rows ? reinterpret_cast<const char*>(queries_.of_head<T>(s_.k, u.first)) : laid_.k_at(head_, u.tile),
                row,
                rows ? 16 * row : laid_.depth * step,
                rows ? kTileBytes : step,
                kTile,
                q_[u.half],
                kPairTile,
                laid_.depth * kPairTile,
                scores_[u.number & 1],
                u.begin / 32,
                u.end / 32,
                0,
                laid_.depth};
    }
    Product product_of_values(const Unit& u) const {
        const i64 step = N * kTile;
        return {laid_.v_at(head_, u.tile),
                kTileBytes,
                2 * step,
                step,
                kTile,
                weights_[u.number & 1],
                kPairTile,
                2 * kPairTile,
                product_,
                0,
                laid_.width,
                u.begin / 32,
                u.end / 32};
    }

    // Queries as pairs down head_dim; a negative scale turns their sign. Queries out of range go in by themselves.
    void lay_out_queries() {
        const T* rows[kLanes] = {};
        for (int lane = 0; lane < queries_.count; ++lane) rows[lane] = queries_.at<T>(s_.q, lane);
        columns_of(rows, kLanes, s_.q.col, s_.head_dim, columns_);
        const V sign = splat(s_.scale < 0 ? -1.0f : 1.0f);
        for (int h = 0; h < 2; ++h) {
            bad_q_[h] = 0;
            for (int lane = 0; lane < kHalf; lane += W) {
                V top = {};
                __mmask16 spoiled = 0;
                float* column = columns_ + h * kHalf + lane;
                for (i64 c = 0; c < s_.head_dim; ++c, column += kLanes) {
                    const V x = load(column) * sign, size = size_of(x);
                    store(column, x);
                    spoiled |= _mm512_cmp_ps_mask((__m512)size, (__m512)splat(K::keys.high), _CMP_NLE_UQ);
                    top = larger(size, top);
                }
                for (int i = 0; i < W; ++i) spoiled |= (top[i] != 0 && top[i] < K::keys.low) << i;
                if (K::keys.high == kInfinity<float>) spoiled = 0;
                bad_q_[h] |= u32{spoiled} << lane;
                column = columns_ + h * kHalf + lane;
                for (i64 c = 0; c < laid_.depth * 32; c += 2) {
                    const V first = c < s_.head_dim ? load(column + c * kLanes) : V{};
                    const V second = c + 1 < s_.head_dim ? load(column + (c + 1) * kLanes) : V{};
                    char* to = q_[h] + c / 2 * kPairRow + lane * 4;
                    const i64 piece = laid_.depth * kPairTile;
                    split_pairs<N>(first, second,
                                   [to, piece](int i, U bits) { *reinterpret_cast<U*>(to + i * piece) = bits; });
                }
            }
        }
    }

    // Scores as the softmax wants them: rows and queries out of range in float32, cap and bias, -inf where excluded.
    void settle(const Unit& u) {
        float* scores = scores_[u.number & 1];
        if ((u.bad_k | bad_q_[u.half]) != 0) repair(u, scores);
        if (adjusted_) adjust(u, scores);
        if (u.masked) exclude<float, kHalf>(u.words, u.count, kHalf, scores);
        for (int i = u.count * kHalf; i < u.end * kHalf; i += W) store(scores + i, splat(-kInfinity<float>));
    }

    __attribute__((noinline)) void repair(const Unit& u, float* scores) {
        const u32 lanes_by_themselves = bad_q_[u.half];
        const u64 keys_by_themselves = u.bad_k;
        i64 leading;
        const float* rows = head_rows<T, float>(s_.k, queries_, u.first, u.count, s_.head_dim, rows_, &leading);
        product<float>(rows, leading, 1, u.count, columns_ + u.half * kHalf, kLanes, s_.head_dim, kHalf,
                       [=](i64 row, int lane, V sum) {
                           float* at = scores + row * kHalf + lane;
                           const __mmask16 which = (keys_by_themselves >> row) & 1
                                                       ? 0xffff
                                                       : static_cast<__mmask16>(lanes_by_themselves >> lane);
                           store(at, (V)_mm512_mask_mov_ps((__m512)load(at), which, (__m512)sum));
                       });
    }

    __attribute__((noinline)) void adjust(const Unit& u, float* scores) {
        const bool capped = s_.softcap != 0, biased = s_.bias.data != nullptr;
        const float scale = static_cast<float>(capped ? size_of_scale() / s_.softcap : size_of_scale());
        if (biased) s_.wide_bias ? load_bias_of<float>(u) : load_bias_of<T>(u);
        const float cap = static_cast<float>(s_.softcap);
        for (int i = u.begin * kHalf; i < u.count * kHalf; i += W) {
            V x = load(scores + i) * scale;
            if (capped) x = cap * tanh(x);
            if (biased) x += load(bias_ + i);
            store(scores + i, x);
        }
    }
    template <class B>
    void load_bias_of(const Unit& u) {
        const B* rows[kHalf] = {};
        for (int lane = 0; lane < lanes(u.half); ++lane)
            rows[lane] = queries_.at<B>(s_.bias, u.half * kHalf + lane) + u.first * s_.bias.col;
        columns_of<B, float, kHalf>(rows, kHalf, s_.bias.col, u.count, bias_);
    }

    // m' = max(m, max_j s_j); p_j = 2^(s_j - m'); l' = l 2^(m - m') + sum_j p_j, in units of log 2. Weights become
    // pairs at once, or stay where the scores were.
    template <bool Keep>
    REGARD_INLINE void weigh(Unit& u) {
        constexpr int R = kHalf / W;
        float* scores = scores_[u.number & 1];
        char* pairs = weights_[u.number & 1];
        V top[2][R];
#pragma GCC unroll 2
        for (int i = 0; i < R; ++i) top[0][i] = top[1][i] = splat(-kInfinity<float>);
        for (int j = u.begin; j < u.end; j += 4)
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k)
#pragma GCC unroll 2
                for (int i = 0; i < R; ++i)
                    top[k & 1][i] = larger(load(scores + (j + k) * kHalf + i * W), top[k & 1][i]);
        V shift[R], sum[R];
        const V unit = splat(unit_);
#pragma GCC unroll 2
        for (int i = 0; i < R; ++i) {
            float* m = m_[u.half] + i * W;
            const V before = load(m), now = larger(larger(top[0][i], top[1][i]) * unit, before);
            shift[i] = finite_or_zero(now, splat(-kInfinity<float>));
            store(m, now);
            store(u.factor + i * W, power_of_two<K::degree>(before - shift[i]));
            sum[i] = V{};
        }
        for (int j = u.begin; j < u.end; j += 4) {
            V p[4][R];
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k)
#pragma GCC unroll 2
                for (int i = 0; i < R; ++i) {
                    p[k][i] = power_of_two<K::degree>(load(scores + (j + k) * kHalf + i * W) * unit - shift[i]);
                    if (Keep) store(scores + (j + k) * kHalf + i * W, p[k][i]);
                }
#pragma GCC unroll 2
            for (int i = 0; i < R; ++i) {
                sum[i] += (p[0][i] + p[1][i]) + (p[2][i] + p[3][i]);
                if (!Keep) store_weights(p[0][i], p[1][i], pairs + j / 2 * kPairRow + i * 64);
                if (!Keep) store_weights(p[2][i], p[3][i], pairs + (j / 2 + 1) * kPairRow + i * 64);
            }
            stream_.due();
        }
#pragma GCC unroll 2
        for (int i = 0; i < R; ++i) {
            float* l = l_[u.half] + i * W;
            store(l, load(l) * load(u.factor + i * W) + sum[i]);
        }
    }
    static REGARD_INLINE void store_weights(V first, V second, char* to) {
        split_pairs<N>(first, second, [to](int i, U bits) { *reinterpret_cast<U*>(to + i * 2 * kPairTile) = bits; });
    }

    // Where weights are dropped, or rows of v go in by themselves.
    __attribute__((noinline)) void weigh_and_keep(Unit& u) {
        weigh<true>(u);
        float* weights = scores_[u.number & 1];
        const int first_lane = u.half * kHalf;
        if (call_.dropout != 0)
            drop<float, kHalf>(call_.seed, queries_, call_.first_row, u.first + u.begin, u.end - u.begin, call_.dropout,
                               weights + u.begin * kHalf, first_lane, lanes(u.half));
        for (int j = u.begin; j < u.end; j += 2)
            for (int lane = 0; lane < kHalf; lane += W)
                store_weights(load(weights + j * kHalf + lane), load(weights + (j + 1) * kHalf + lane),
                              weights_[u.number & 1] + j / 2 * kPairRow + lane * 4);
        if (u.bad_v == 0) return;
        float* apart = apart_[u.number & 3];
        const T* v = queries_.of_head<T>(call_.v, u.first);
        for (i64 i = 0; i < call_.head_dim_v * kHalf; ++i) apart[i] = 0;
        for (int j = u.begin; j < u.end; ++j) {
            if (!((u.bad_v >> j) & 1)) continue;
            for (int lane = 0; lane < kHalf; lane += W) {
                __mmask16 sees = 0xffff;
                if (u.masked)
                    for (int i = 0; i < W; ++i) sees &= ~((~(u.words[lane + i] >> j) & 1) << i);
                const __m512 p = (__m512)load(weights + j * kHalf + lane);
                for (i64 c = 0; c < call_.head_dim_v; ++c) {
                    float* at = apart + c * kHalf + lane;
                    const __m512 x = (__m512)splat(widen(v[j * call_.v.row + c * call_.v.col]));
                    store(at, (V)_mm512_mask3_fmadd_ps(p, x, (__m512)load(at), sees));
                }
            }
        }
    }

    // Oᵀ = Oᵀ · factor + the product of the unit.
    REGARD_INLINE void gather(const Unit& u) {
        constexpr int R = kHalf / W, kSlice = 16;
        float* out = out_[u.half];
        const float* apart = u.bad_v != 0 ? apart_[u.number & 3] : nullptr;
        V factor[R];
#pragma GCC unroll 2
        for (int i = 0; i < R; ++i) factor[i] = load(u.factor + i * W);
        for (i64 c = 0; c < laid_.width * 32; c += kSlice) {
#pragma GCC unroll 4
            for (int k = 0; k < kSlice; ++k)
#pragma GCC unroll 2
                for (int i = 0; i < R; ++i) {
                    const i64 at = (c + k) * kHalf + i * W;
                    store(out + at, load(out + at) * factor[i] + load(product_ + at));
                }
            stream_.scores_due();
        }
        if (apart != nullptr)
            for (i64 i = 0; i < call_.head_dim_v * kHalf; i += W) store(out + i, load(out + i) + load(apart + i));
    }

    const Laid& laid_;
    const ForwardCall& call_;
    const Scores& s_;
    Stream<K> stream_;
    Carver carver_;
    char *q_[2], *weights_[2];
    float *scores_[2], *out_[2], *product_, *columns_, *bias_, *rows_, *apart_[4];
    Queries queries_;
    Visible visible_;
    Cover cover_ = Cover::none;
    i64 head_ = 0, key_tile_ = 0;
    int half_ = 0, number_ = 0;
    bool adjusted_ = false;
    float unit_ = 0;
    u32 bad_q_[2];
    Unit units_[4];
    alignas(64) float m_[2][kHalf], l_[2][kHalf];
};

template <class K>
void task(const void* context, i64 index, void* memory) {
    const Laid& laid = *static_cast<const Laid*>(context);
    Tiles tiles;
    tiles.configure();
    Task<K>(laid, tiles, memory).run(index);
    tiles.release();
}

template <class K>
void run(const ForwardCall& call) {
    const Scores& s = call.scores;
    Laid laid{};
    laid.call = &call;
    laid.tiles = (s.seq_len_kv + kKeys - 1) / kKeys;
    laid.depth = (s.head_dim + 31) / 32, laid.width = (call.head_dim_v + 31) / 32;
    laid.in_place = __is_same(typename K::T, BFloat16) && s.k.col == 1 && s.k.row == s.head_dim && s.head_dim % 32 == 0;
    laid.k_bytes = 4 * laid.depth * K::pieces * kTile, laid.v_bytes = 4 * laid.width * K::pieces * kTile;
    laid.k_slots = laid.in_place ? 1 : laid.tiles;
    const i64 heads = s.batch * s.num_kv_heads, all = heads * laid.tiles;
    Carver carver{0};
    for (int turn = 0; turn < 2; ++turn) {  // counted, then taken
        if (turn == 1) carver.at = reinterpret_cast<u64>(kept_memory(static_cast<i64>(carver.at)));
        laid.k = carver.take<char>(heads * laid.k_slots * laid.k_bytes);
        laid.v = carver.take<char>(all * laid.v_bytes);
        laid.bad_k = carver.take<u64>(all), laid.bad_v = carver.take<u64>(all);
    }
    const i64 widest = laid.depth > laid.width ? laid.depth : laid.width;
    parallel(all, call.threads, kKeys * widest * 32 * i64{sizeof(float)}, lay_out<K>, &laid);
    const i64 tiles = (s.num_heads / s.num_kv_heads * s.seq_len_q + kLanes - 1) / kLanes;
    parallel(heads * tiles, call.threads, Task<K>::size(laid), task<K>, &laid);
}

}  // namespace

void forward(const ForwardCall& call) {
    const Scores& s = call.scores;
    if (s.dtype == kFloat64 || s.num_heads / s.num_kv_heads * s.seq_len_q <= kFewRows || s.seq_len_kv == 0 ||
        !(s.scale <= kLargestScale && -s.scale <= kLargestScale))
        return avx512_bf16::forward(call);
    if (s.dtype == kBFloat16) return run<Kind<BFloat16, 1, 1, kAny, kFinite, 5>>(call);
    if (s.dtype == kFloat16) return run<Kind<Float16, 4, 3, kFinite, kFinite, 5>>(call);
    if (call.precision == kMedium) return run<Kind<float, 1, 1, kSplit, kSplit, 6>>(call);
    if (call.precision == kHigh) return run<Kind<float, 3, 3, kSplit, kSplit, 6>>(call);
    run<Kind<float, 6, 6, kSplit, kSplit, 6>>(call);
}

#if defined(__AMX_BF16__)
const char* trouble() { return trouble_with_tiles(); }
#endif

}  // namespace regard::REGARD_TARGET
