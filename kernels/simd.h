// Vectors of the target being compiled: the compiler's own vector types, no intrinsics.
// Enters: REGARD_TARGET, the namespace, and the compiler's flags for it. Leaves: lanes, conversions, transposes, exp2,
// tanh. Floor: above view.h. Included only by files that are compiled once per target, and includes nothing that the
// linker could share between targets: a std:: template compiled for AVX-512 must not end up in the portable copy.
#pragma once
#include "view.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define REGARD_INLINE inline __attribute__((always_inline))

namespace regard::REGARD_TARGET {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kBlockRows = 6, kBlockVectors = 4;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kBlockRows = 6, kBlockVectors = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kBlockRows = 6, kBlockVectors = 2;
#else
constexpr int kVectorBytes = 16, kBlockRows = 6, kBlockVectors = 2;
#endif

// Storage of the half types; the numbers themselves are always computed in float.
struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

template <class C>
struct LanesOf;
template <>
struct LanesOf<float> {
    typedef float V __attribute__((vector_size(kVectorBytes)));
    // Of 2 bytes, not 4: two bfloat16 move as one float, and begin at any bfloat16.
    typedef float Loose __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
    typedef std::int32_t I __attribute__((vector_size(kVectorBytes)));
    typedef std::uint32_t U __attribute__((vector_size(kVectorBytes)));
    typedef std::uint32_t LooseU __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
    typedef std::uint16_t Half __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
    static constexpr int width = kVectorBytes / 4;
};
template <>
struct LanesOf<double> {
    typedef double V __attribute__((vector_size(kVectorBytes)));
    typedef double Loose __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
    typedef std::int64_t I __attribute__((vector_size(kVectorBytes)));
    typedef std::uint64_t U __attribute__((vector_size(kVectorBytes)));
    static constexpr int width = kVectorBytes / 8;
};
// Two bfloat16 side by side, multiplied and added up at once where the target has an instruction for it.
struct Pair {
    std::uint16_t first, second;
};
template <>
struct LanesOf<Pair> {
    typedef std::uint32_t V __attribute__((vector_size(kVectorBytes)));
    typedef std::uint32_t Loose __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
    static constexpr int width = kVectorBytes / 4;
};
#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif
template <class T>
constexpr bool kPaired = kHasPairs && __is_same(T, BFloat16);

template <class C>
using Vector = typename LanesOf<C>::V;
template <class C>
constexpr int kWidth = LanesOf<C>::width;

template <class C>
REGARD_INLINE Vector<C> load(const C* p) {
    return *reinterpret_cast<const typename LanesOf<C>::Loose*>(p);
}
// *p, wherever it begins: see LanesOf<float>::Loose.
template <class T>
REGARD_INLINE T peek(const T* p) {
    T x;
    __builtin_memcpy(&x, p, sizeof(T));
    return x;
}
template <class C>
REGARD_INLINE void store(C* p, Vector<C> x) {
    *reinterpret_cast<typename LanesOf<C>::Loose*>(p) = x;
}
template <class C>
REGARD_INLINE Vector<C> splat(C x) {
    return Vector<C>{} + x;
}
// The larger; of a NaN and a number, the second.
template <class V>
REGARD_INLINE V larger(V x, V or_else) {
    return x > or_else ? x : or_else;
}

template <class C>
constexpr C kInfinity = static_cast<C>(__builtin_inf());

// ---- half types ----

REGARD_INLINE float widen(float x) { return x; }
REGARD_INLINE double widen(double x) { return x; }
REGARD_INLINE float widen(BFloat16 x) { return __builtin_bit_cast(float, static_cast<u32>(x.bits) << 16); }
REGARD_INLINE float widen(Float16 x) { return static_cast<float>(__builtin_bit_cast(_Float16, x.bits)); }

REGARD_INLINE void narrow(float x, float* to) { *to = x; }
REGARD_INLINE void narrow(double x, double* to) { *to = x; }
REGARD_INLINE void narrow(float x, Float16* to) {
    to->bits = __builtin_bit_cast(std::uint16_t, static_cast<_Float16>(x));
}
REGARD_INLINE void narrow(float x, BFloat16* to) {  // to nearest, ties to even; a NaN stays one
    const u32 bits = __builtin_bit_cast(u32, x);
    const u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to->bits = static_cast<std::uint16_t>(x != x ? (bits >> 16) | 0x40 : rounded);
}

// run<storage, what is computed in>() for a dtype of view.h.
template <class Run>
REGARD_INLINE void by_dtype(int dtype, Run run) {
    switch (dtype) {
        case kFloat32:
            return run.template operator()<float, float>();
        case kBFloat16:
            return run.template operator()<BFloat16, float>();
        case kFloat16:
            return run.template operator()<Float16, float>();
        default:
            return run.template operator()<double, double>();
    }
}

// A vector of numbers that lie side by side.
REGARD_INLINE Vector<float> widen_vector(const float* p) { return load(p); }
REGARD_INLINE Vector<double> widen_vector(const double* p) { return load(p); }
REGARD_INLINE Vector<float> widen_vector(const BFloat16* p) {
    using L = LanesOf<float>;
    const auto bits = __builtin_convertvector(*reinterpret_cast<const L::Half*>(p), L::U);
    return reinterpret_cast<L::V>(bits << 16);
}
REGARD_INLINE Vector<float> widen_vector(const Float16* p) {
    using L = LanesOf<float>;
    const auto bits = __builtin_convertvector(*reinterpret_cast<const L::Half*>(p), L::U);
    const L::U magnitude = (bits & 0x7fff) << 13;
    // 2^112 moves the exponent from float16's bias to float32's, subnormals included; the largest exponent means inf or
    // NaN.
    L::U wide = reinterpret_cast<L::U>(reinterpret_cast<L::V>(magnitude) * 0x1p112f);
    wide |= reinterpret_cast<L::U>(magnitude >= 0x0f800000) & 0x7f800000;
    return reinterpret_cast<L::V>(wide | ((bits & 0x8000) << 16));
}

// ---- transposes ----

template <int W>
struct Indices {};

template <class V, int S, int... L>
REGARD_INLINE void exchange(V& a, V& b) {
    constexpr int W = sizeof...(L);
    const V low = __builtin_shufflevector(a, b, ((L & S) ? W + L - S : L)...);
    b = __builtin_shufflevector(a, b, ((L & S) ? W + L : L + S)...);
    a = low;
}
template <int S, class V>
REGARD_INLINE void exchange_by(V& a, V& b, Indices<2>) {
    exchange<V, S, 0, 1>(a, b);
}
template <int S, class V>
REGARD_INLINE void exchange_by(V& a, V& b, Indices<4>) {
    exchange<V, S, 0, 1, 2, 3>(a, b);
}
template <int S, class V>
REGARD_INLINE void exchange_by(V& a, V& b, Indices<8>) {
    exchange<V, S, 0, 1, 2, 3, 4, 5, 6, 7>(a, b);
}
template <int S, class V>
REGARD_INLINE void exchange_by(V& a, V& b, Indices<16>) {
    exchange<V, S, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(a, b);
}
template <int S, int W, class V>
REGARD_INLINE void transpose_step(V* rows) {
    if constexpr (S < W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
            if ((i & S) == 0) exchange_by<S>(rows[i], rows[i + S], Indices<W>{});
        transpose_step<2 * S, W>(rows);
    }
}
// A square of vectors, rows to columns, in log2(width) rounds of exchanges.
template <class C>
REGARD_INLINE void transpose(Vector<C> (&rows)[kWidth<C>]) {
    transpose_step<1, kWidth<C>>(rows);
}

// ---- functions ----

// 2^x, relative error below 2e-9 before rounding (float) and 1e-17 (double). -inf gives 0, NaN gives NaN; below 2^-126
// (2^-1022) gives 0.
REGARD_INLINE Vector<float> exp2(Vector<float> x) {
    using L = LanesOf<float>;
    x = x < -127.0f ? splat(-127.0f) : x;
    const L::V shifted = x + 0x1.8p23f;  // the nearest integer, in the low bits
    const L::V f = x - (shifted - 0x1.8p23f);
    L::V p = splat(0.000153533606f);
    p = p * f + 0.00133988749f;
    p = p * f + 0.00961843737f;
    p = p * f + 0.0555033247f;
    p = p * f + 0.240226479f;
    p = p * f + 0.693147203f;
    p = p * f + 1.0f;
    const L::U power = (reinterpret_cast<L::U>(shifted) + 127u)
                       << 23;  // a product, not an addition to the exponent: NaN survives it
    return p * reinterpret_cast<L::V>(power);
}
REGARD_INLINE Vector<double> exp2(Vector<double> x) {
    using L = LanesOf<double>;
    x = x < -1023.0 ? splat(-1023.0) : x;
    const L::V shifted = x + 0x1.8p52;
    const L::V f = (x - (shifted - 0x1.8p52)) * 0.693147180559945309417;
    L::V p = splat(1.0 / 6227020800.0);  // the series of e^f, |f| <= ln(2) / 2
    constexpr double factorials[] = {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0,
                                     120.0,       24.0,       6.0,       2.0,      1.0,     1.0};
#pragma GCC unroll 13
    for (double factorial : factorials) p = p * f + 1.0 / factorial;
    const L::U power = (reinterpret_cast<L::U>(shifted) + 1023u) << 52;
    return p * reinterpret_cast<L::V>(power);
}

// tanh x. float: an odd polynomial (relative error 5e-9) up to 0.63, where 1 - 2 / (e^2x + 1) would cancel.
REGARD_INLINE Vector<float> tanh(Vector<float> x) {
    using V = Vector<float>;
    const V size = x < 0.0f ? -x : x;
    const V z = x * x;
    V p = splat(-0.00566078047f);
    p = p * z + 0.0206019992f;
    p = p * z - 0.053729227f;
    p = p * z + 0.133313289f;
    p = p * z - 0.333332783f;
    const V e = exp2(size * -2.88539008f);
    const V large = (1.0f - e) / (1.0f + e);
    return size < 0.63f ? x + x * z * p : (x < 0.0f ? -large : large);
}
REGARD_INLINE Vector<double> tanh(Vector<double> x) {
    for (int i = 0; i < kWidth<double>; ++i) x[i] = __builtin_tanh(x[i]);
    return x;
}

// The sum of each of `width` vectors: transposed, they add up downwards.
template <class C>
REGARD_INLINE Vector<C> sums(Vector<C> (&rows)[kWidth<C>]) {
    transpose<C>(rows);
    Vector<C> total = rows[0];
#pragma GCC unroll 16
    for (int i = 1; i < kWidth<C>; ++i) total += rows[i];
    return total;
}

// ---- products ----

// What a product is made of: numbers of C, or pairs of bfloat16 summed in float; `Left` is how the left side is stored.
template <class E>
struct Term {
    using Left = E;
    using Sum = E;
    static REGARD_INLINE Vector<E> spread(const E* left) { return splat(*left); }
    static REGARD_INLINE Vector<E> add(Vector<E> sum, Vector<E> left, Vector<E> right) { return sum + left * right; }
};
template <>
struct Term<Pair> {
    using Left = BFloat16;
    using Sum = float;
    static REGARD_INLINE Vector<Pair> spread(const BFloat16* left) {
        typedef u32 Loose __attribute__((aligned(2), may_alias));
        return Vector<Pair>{} + *reinterpret_cast<const Loose*>(left);
    }
    static REGARD_INLINE Vector<float> add(Vector<float> sum, Vector<Pair> left, Vector<Pair> right) {
#if defined(__AVX512BF16__)
        return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
#else
        (void)left, (void)right;
        return sum;
#endif
    }
};
template <class E>
using Left = typename Term<E>::Left;
template <class E>
using Sum = typename Term<E>::Sum;

// R x N vectors of out[r][lane] = sum over t < depth of a[r * a_row + t * a_step] * b[t * b_step + lane]. Each sum is
// made of chains of kChain terms in the order of t, so that a number does not depend on the block it was computed in;
// short chains round less.
constexpr i64 kChain = 32;

template <class E, int R, int N, class Finish>
REGARD_INLINE void block(const Left<E>* a, i64 a_row, i64 a_step, const E* b, i64 b_step, i64 depth, i64 row, int lane,
                         Finish finish) {
    constexpr int W = kWidth<E>;
    Vector<Sum<E>> total[R][N];
    for (i64 start = 0; start < depth || start == 0; start += kChain) {
        const i64 end = depth < start + kChain ? depth : start + kChain;
        Vector<Sum<E>> sum[R][N] = {};
        for (i64 t = start; t < end; ++t) {
            Vector<E> right[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) right[n] = load(b + t * b_step + n * W);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Vector<E> left = Term<E>::spread(a + r * a_row + t * a_step);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) sum[r][n] = Term<E>::add(sum[r][n], left, right[n]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) total[r][n] = start == 0 ? sum[r][n] : total[r][n] + sum[r][n];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) finish(row + r, lane + n * W, total[r][n]);
}

template <class E, int R, int N, class Finish>
REGARD_INLINE void block_of_at_most(const Left<E>* a, i64 a_row, i64 a_step, const E* b, i64 b_step, i64 depth, i64 row,
                                    i64 rows, int lane, Finish finish) {
    if constexpr (R > 0) {
        if (rows == R) return block<E, R, N>(a, a_row, a_step, b, b_step, depth, row, lane, finish);
        block_of_at_most<E, R - 1, N>(a, a_row, a_step, b, b_step, depth, row, rows, lane, finish);
    }
}

template <class E, int R, int N, class Finish>
__attribute__((noinline)) void column_of_blocks(const Left<E>* a, i64 a_row, i64 a_step, i64 rows, const E* b,
                                                i64 b_step, i64 depth, int lane, Finish finish) {
    i64 row = 0;
    for (; row + R <= rows; row += R)
        block<E, R, N>(a + row * a_row, a_row, a_step, b + lane, b_step, depth, row, lane, finish);
    block_of_at_most<E, R - 1, N>(a + row * a_row, a_row, a_step, b + lane, b_step, depth, row, rows - row, lane,
                                  finish);
}

// finish(row, lane, sums) for all rows < rows and lanes < lanes, and lanes beyond up to a multiple of kLanes: b and
// what finish writes must be so wide. Few lanes (decoding) take taller blocks.
template <class E, class Finish>
REGARD_INLINE void product(const Left<E>* a, i64 a_row, i64 a_step, i64 rows, const E* b, i64 b_step, i64 depth,
                           i64 lanes, Finish finish) {
    constexpr int W = kWidth<E>, N = kBlockVectors;
    for (int lane = 0; lane < lanes; lane += N * W) {
        if (lanes - lane <= W)
            column_of_blocks<E, 2 * kBlockRows, 1>(a, a_row, a_step, rows, b, b_step, depth, lane, finish);
        else if (N > 2 && lanes - lane <= 2 * W)
            column_of_blocks<E, N * kBlockRows / 2, 2>(a, a_row, a_step, rows, b, b_step, depth, lane, finish);
        else
            column_of_blocks<E, kBlockRows, N>(a, a_row, a_step, rows, b, b_step, depth, lane, finish);
    }
}

}  // namespace regard::REGARD_TARGET
