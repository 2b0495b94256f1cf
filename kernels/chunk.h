// One chunk of linear attention: its matrices, its triangular system, and the state that it leaves.
// Enters: a LinearCall, a batch row, a k/v head, columns of v; scratch. Leaves: U, A, B, out, and the state moved on;
// for the backward pass every factor that led there. Floor: above simd.h and softmax.h; linear.cc says what the letters
// mean.
#pragma once
#include "simd.h"
#include "softmax.h"

namespace regard::REGARD_TARGET {

constexpr i64 kBlock = 16;  // rows of a triangle that are taken at once

REGARD_INLINE i64 padded(i64 n) { return (n + kLanes - 1) / kLanes * kLanes; }
REGARD_INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }

// Hands out scratch; without a base it only counts.
template <class C>
struct Arena {
    char* base;
    i64 used = 0;
    template <class Element = C>
    Element* take(i64 count) {
        const i64 begin = used;
        used += (count * i64{sizeof(Element)} + 63) / 64 * 64;
        return base == nullptr ? nullptr : reinterpret_cast<Element*>(base + begin);
    }
};

// ---- matrices: rows of a width that is a multiple of kLanes ----

template <class T, class C>
void load_rows(const T* from, i64 row_stride, i64 col_stride, i64 rows, i64 cols, i64 width, C factor, C* to) {
    for (i64 r = 0; r < rows; ++r) {
        const T* source = from + r * row_stride;
        C* target = to + r * width;
        i64 c = 0;
        if (col_stride == 1)
            for (; c + kWidth<C> <= cols; c += kWidth<C>) store(target + c, widen_vector(source + c) * factor);
        for (; c < cols; ++c) target[c] = widen(source[c * col_stride]) * factor;
        for (; c < width; ++c) target[c] = 0;
    }
}

template <class T, class C>
void save_rows(const C* from, i64 width, i64 rows, i64 cols, C factor, T* to, i64 row_stride, i64 col_stride) {
    for (i64 r = 0; r < rows; ++r)
        for (i64 c = 0; c < cols; ++c) narrow(from[r * width + c] * factor, to + r * row_stride + c * col_stride);
}

// Whole squares: up to a vector's width of rows and columns beyond are read and written.
template <class C>
void transpose_rows(const C* from, i64 width, i64 rows, i64 cols, C* to, i64 to_width) {
    constexpr int W = kWidth<C>;
    for (i64 r = 0; r < rows; r += W)
        for (i64 c = 0; c < cols; c += W) {
            Vector<C> square[W];
            for (int i = 0; i < W; ++i) square[i] = load(from + (r + i) * width + c);
            transpose<C>(square);
            for (int i = 0; i < W; ++i) store(to + (c + i) * to_width + r, square[i]);
        }
}

template <class C>
bool finite_row(const C* row, i64 stride, i64 cols) {
    using Wide = decltype(widen(*row));
    Wide rest = 0;
    i64 c = 0;
    if (stride == 1) {
        Vector<Wide> zero = {};
        for (; c + kWidth<Wide> <= cols; c += kWidth<Wide>) zero += widen_vector(row + c) * Wide(0);  // inf · 0 is NaN
        for (int i = 0; i < kWidth<Wide>; ++i) rest += zero[i];
    }
    for (; c < cols; ++c) rest += widen(row[c * stride]) * Wide(0);
    return rest == Wide(0);
}

// A factor for each number of a matrix, or one for each row (col 0); without data it is 1.
template <class C>
struct Factor {
    const C* data = nullptr;
    i64 row = 0, col = 0;
    Vector<C> at(i64 r, i64 c) const { return col == 0 ? splat(data[r * row]) : load(data + r * row + c); }
};

template <class C>
const C* times(const C* from, const Factor<C>& factor, i64 rows, i64 cols, i64 width, C* to) {
    if (factor.data == nullptr) return from;
    for (i64 r = 0; r < rows; ++r)
        for (i64 c = 0; c < cols; c += kWidth<C>)
            store(to + r * width + c, load(from + r * width + c) * factor.at(r, c));
    return to;
}

enum Sign : int { kSet, kAdd, kSubtract };

// out[row][lane] (=, +=, -=) sum_t a[row * a_row + t * a_step] b[t][lane]
template <Sign S, class C>
REGARD_INLINE void multiply(const C* a, i64 a_row, i64 a_step, i64 rows, const C* b, i64 b_width, i64 depth, i64 lanes,
                            C* out, i64 width) {
    product<C>(a, a_row, a_step, rows, b, b_width, depth, lanes, [out, width](i64 row, int lane, Vector<C> sum) {
        C* at = out + row * width + lane;
        store(at, S == kSet ? sum : S == kAdd ? load(at) + sum : load(at) - sum);
    });
}

// out[t][j] = factor · decay[t][j] · left_t . right_j for j <= t, or j < t where the diagonal is left out; the rest of
// each block on the diagonal is 0.
template <class C>
void lower_pairs(const C* left, i64 width, i64 depth, const C* right, i64 rows, i64 width_l, const C* decay,
                 bool diagonal, C factor, C* out) {
    for (i64 first = 0; first < rows; first += kBlock) {
        const i64 count = least(kBlock, rows - first), last = first + count;
        C* block = out + first * width_l;
        multiply<kSet>(left + first * width, width, 1, count, right, width_l, depth, last, block, width_l);
        for (i64 t = first; t < last; ++t) {
            C* row = out + t * width_l;
            const i64 end = diagonal ? t + 1 : t;
            for (i64 j = 0; j < end; ++j) row[j] *= decay == nullptr ? factor : factor * decay[t * width_l + j];
            for (i64 j = end; j < last; ++j) row[j] = 0;
        }
    }
}

// out_t += sum over j <= t of pairs[t][j] x_j
template <class C>
void multiply_lower(const C* pairs, i64 width_l, i64 rows, const C* x, i64 cols, i64 width, C* out) {
    for (i64 first = 0; first < rows; first += kBlock) {
        const i64 count = least(kBlock, rows - first);
        multiply<kAdd>(pairs + first * width_l, width_l, 1, count, x, width, first + count, cols, out + first * width,
                       width);
    }
}

// out_j += sum over t >= j of pairs[t][j] x_t
template <class C>
void multiply_upper(const C* pairs, i64 width_l, i64 rows, const C* x, i64 cols, i64 width, C* out) {
    for (i64 first = 0; first < rows; first += kBlock) {
        const i64 count = least(kBlock, rows - first);
        multiply<kAdd>(pairs + first * width_l + first, 1, width_l, count, x + first * width, width, rows - first, cols,
                       out + first * width, width);
    }
}

// x_t = beta_t (x_t - sum over j < t of pairs[t][j] x_j), in place; `before` receives x_t / beta_t.
template <class C>
void solve(const C* pairs, i64 width_l, const C* beta, i64 rows, i64 cols, i64 width, C* x, C* before) {
    for (i64 first = 0; first < rows; first += kBlock) {
        const i64 last = least(first + kBlock, rows);
        if (first > 0)
            multiply<kSubtract>(pairs + first * width_l, width_l, 1, last - first, x, width, first, cols,
                                x + first * width, width);
        for (i64 t = first; t < last; ++t)
            for (i64 c = 0; c < cols; c += kWidth<C>) {
                Vector<C> sum = load(x + t * width + c);
                for (i64 j = first; j < t; ++j) sum -= pairs[t * width_l + j] * load(x + j * width + c);
                if (before != nullptr) store(before + t * width + c, sum);
                store(x + t * width + c, sum * beta[t]);
            }
    }
}

// z_t = x_t - sum over s > t of pairs[s][t] beta_s z_s, from the last row on; x_t becomes beta_t z_t, and
// grad_beta_t = z_t . before_t.
template <class C>
void solve_back(const C* pairs, i64 width_l, const C* beta, i64 rows, i64 cols, i64 width, C* x, const C* before,
                C* grad_beta) {
    for (i64 first = (rows - 1) / kBlock * kBlock; first >= 0; first -= kBlock) {
        const i64 last = least(first + kBlock, rows);
        if (last < rows)
            multiply<kSubtract>(pairs + last * width_l + first, 1, width_l, last - first, x + last * width, width,
                                rows - last, cols, x + first * width, width);
        for (i64 t = last - 1; t >= first; --t) {
            Vector<C> dot = {};
            for (i64 c = 0; c < cols; c += kWidth<C>) {
                Vector<C> sum = load(x + t * width + c);
                for (i64 s = t + 1; s < last; ++s) sum -= pairs[s * width_l + t] * load(x + s * width + c);
                dot += sum * load(before + t * width + c);
                store(x + t * width + c, sum * beta[t]);
            }
            grad_beta[t] = 0;
            for (int i = 0; i < kWidth<C>; ++i) grad_beta[t] += dot[i];
        }
    }
}

// Runs with a number of the type that is stored: dtype's own. One copy of the rest serves all that compute in C.
template <class C, class Run>
REGARD_INLINE auto with_stored(int dtype, Run run) {
    if constexpr (sizeof(C) == 8) {
        return run(double{});
    } else {
        switch (dtype) {
            case kBFloat16:
                return run(BFloat16{});
            case kFloat16:
                return run(Float16{});
            default:
                return run(float{});
        }
    }
}

// ---- one k/v head, chunk by chunk ----

template <class C>
struct Head {
    const LinearCall& call;
    i64 batch, kv_head, first_col, cols;  // columns of v
    i64 dim, width_l, width_d, width_e;
    i64 decays, each;  // numbers of decay a row: none, one, or one a column of k; and how wide such a row is here
    i64 start = 0, rows = 0;

    double *sums, *low, *high;           // c_t, and the range of the chunk
    C *exponents, *carry, *decay_pairs;  // carry: e^c_last
    C *read_factors, *write_factors, *left_factors, *right_factors;
    Factor<C> read, write, left, right;  // e^c_t, e^(c_last - c_t), e^(c_t - m), e^(m - c_t)
    C *keys, *left_buffer, *right_buffer, *read_buffer, *write_buffer, *queries, *left_queries_buffer,
        *read_queries_buffer;
    const C *left_keys, *right_keys, *read_keys, *write_keys, *left_queries, *read_queries;
    C *right_columns, *key_pairs, *pairs;  // right_keys transposed, A, B
    C *beta, *u, *before;                  // before: U / beta, where the backward asks for it
    C *out, *state;

    Head(const LinearCall& of, i64 batch_index, i64 kv_head_index, i64 first, i64 count, bool backward, Arena<C>& arena)
        : call(of), batch(batch_index), kv_head(kv_head_index), first_col(first), cols(count), dim(of.head_dim) {
        width_l = padded(of.chunk), width_d = padded(dim), width_e = padded(cols);
        decays = of.decay.data == nullptr ? 0 : of.decay_dim;
        each = decays > 1 ? width_d : 1;
        const i64 whole = width_l * width_d, decayed = decays > 0 ? whole : 0, by_column = decays > 1 ? whole : 0;
        sums = arena.template take<double>(width_l * each);
        low = arena.template take<double>(each);
        high = arena.template take<double>(each);
        exponents = arena.take(width_l > width_d ? width_l : width_d);
        carry = arena.take(width_d);
        decay_pairs = arena.take(decays == 1 ? width_l * width_l : 0);
        read_factors = arena.take(width_l * each);
        write_factors = arena.take(width_l * each);
        left_factors = arena.take(by_column);
        right_factors = arena.take(by_column);
        keys = arena.take(whole);
        left_buffer = arena.take(by_column);
        right_buffer = arena.take(by_column);
        read_buffer = arena.take(decayed);
        write_buffer = arena.take(decayed);
        queries = arena.take(whole);
        left_queries_buffer = arena.take(by_column);
        read_queries_buffer = arena.take(decayed);
        right_columns = arena.take(whole);
        key_pairs = arena.take(width_l * width_l);
        pairs = arena.take(width_l * width_l);
        beta = arena.take(width_l);
        u = arena.take(width_l * width_e);
        before = backward ? arena.take(width_l * width_e) : nullptr;
        out = arena.take(width_l * width_e);
        state = arena.take(width_d * width_e);
    }

    i64 offset(const View& view, i64 head, i64 row) const {
        return batch * view.batch + head * view.head + row * view.row;
    }
    C* gate(const View& view, i64 row) const {  // of decay or beta
        return static_cast<C*>(view.data) + offset(view, kv_head, row);
    }
    // The chunk's rows of q, k, v or an output, from column `col` on.
    void fetch(const View& view, i64 head, i64 col, i64 count, i64 width, double factor, C* to) const {
        with_stored<C>(call.dtype, [&](auto number) {
            const auto* from = static_cast<const decltype(number)*>(view.data) + offset(view, head, start);
            load_rows(from + col * view.col, view.row, view.col, rows, count, width, static_cast<C>(factor), to);
        });
    }
    void put(const C* from, i64 width, i64 count, double factor, const View& view, i64 head, i64 col) const {
        with_stored<C>(call.dtype, [&](auto number) {
            auto* to = static_cast<decltype(number)*>(view.data) + offset(view, head, start);
            save_rows(from, width, rows, count, static_cast<C>(factor), to + col * view.col, view.row, view.col);
        });
    }
    i64 group() const { return call.num_heads / call.num_kv_heads; }
    const C* pair_decay() const { return decays == 1 ? decay_pairs : nullptr; }

    // A state of the caller's, (batch, num_kv_heads, head_dim, head_dim_v); none is zero.
    i64 state_offset() const { return (batch * call.num_kv_heads + kv_head) * dim * call.head_dim_v + first_col; }
    void load_state(const void* from, C* to) const {
        if (from != nullptr)
            return load_rows(static_cast<const C*>(from) + state_offset(), call.head_dim_v, 1, dim, cols, width_e, C(1),
                             to);
        for (i64 i = 0; i < dim * width_e; ++i) to[i] = 0;
    }
    void save_state(const C* from, void* to) const {
        save_rows(from, width_e, dim, cols, C(1), static_cast<C*>(to) + state_offset(), call.head_dim_v, 1);
    }

    bool finite(const View& view, i64 row, i64 count) const {
        return with_stored<C>(call.dtype, [&](auto number) {
            const auto* from = static_cast<const decltype(number)*>(view.data) + offset(view, kv_head, row);
            return finite_row(from, view.col, count);
        });
    }
    bool finite(i64 row) const {
        return finite(call.k, row, dim) && finite(call.v, row, call.head_dim_v) &&
               (call.beta.data == nullptr || finite_row(gate(call.beta, row), 1, 1));
    }

    static constexpr double kFloor = sizeof(C) == 8 ? -1000 : -200;  // e^kFloor is 0
    // How many rows from `from` on, at most `most`, make a chunk; their decay is summed on the way. Where `apart`, a
    // row with NaN or inf stands alone: 0 · NaN would reach the rows before it.
    i64 extent(i64 from, i64 most, bool apart) {
        constexpr double range = sizeof(C) == 8 ? 600 : 60;
        bool clean_before = true;
        for (i64 t = 0; t < most; ++t) {
            bool clean = !apart || finite(from + t), fits = true;
            if (decays > 0) {
                const C* decay = gate(call.decay, from + t);
                double* now = sums + t * each;
                for (i64 a = 0; a < decays; ++a) {
                    const double g = decay[a * call.decay.col];
                    now[a] = (t > 0 ? now[a - each] : 0) + (g < kFloor ? kFloor : g);
                    if (decays == 1) {
                        if (apart && now[a] - now[a] != 0) clean = false;
                        continue;
                    }
                    const double l = t > 0 && low[a] < now[a] ? low[a] : now[a];
                    const double h = t > 0 && high[a] > now[a] ? high[a] : now[a];
                    if (!(h - l <= range)) fits = false;
                }
            }
            if (t > 0 && !(fits && clean && clean_before)) return t;
            clean_before = clean && fits;
            if (decays > 1)
                for (i64 a = 0; a < decays; ++a) {
                    const double c = sums[t * each + a];
                    low[a] = t > 0 && low[a] < c ? low[a] : c;
                    high[a] = t > 0 && high[a] > c ? high[a] : c;
                }
        }
        return most;
    }

    // to[i] = e^exponent(i), up to a vector's width further
    template <class Exponent>
    void powers(i64 count, C* to, Exponent exponent) {
        constexpr C top = sizeof(C) == 8 ? 1024 : 128;  // whence exp2 is infinite
        for (i64 i = 0; i < count; ++i) exponents[i] = static_cast<C>(exponent(i) * kLog2E);
        for (i64 i = 0; i < count; i += kWidth<C>) {
            const Vector<C> x = load(exponents + i);
            store(to + i, exp2(x > top ? splat(top) : x));
        }
    }

    void find_factors() {
        read = write = left = right = {};
        for (i64 a = 0; a < dim; ++a) carry[a] = 1;
        if (decays == 0) return;
        const double *c = sums, *last = sums + (rows - 1) * each;
        if (decays == 1) {
            powers(rows, read_factors, [c](i64 t) { return c[t]; });
            for (i64 t = 0; t < rows; ++t)
                powers(t + 1, decay_pairs + t * width_l, [c, t](i64 j) { return c[t] - c[j]; });
            for (i64 t = 0; t < rows; ++t) write_factors[t] = decay_pairs[(rows - 1) * width_l + t];
            for (i64 a = 0; a < dim; ++a) carry[a] = read_factors[rows - 1];
            read = {read_factors, 1, 0};
            write = {write_factors, 1, 0};
            return;
        }
        const double *l = low, *h = high;
        for (i64 t = 0; t < rows; ++t, c += each) {
            powers(dim, read_factors + t * each, [c](i64 a) { return c[a]; });
            powers(dim, write_factors + t * each, [c, last](i64 a) { return last[a] - c[a]; });
            powers(dim, left_factors + t * each, [c, l, h](i64 a) { return c[a] - (l[a] + h[a]) / 2; });
            powers(dim, right_factors + t * each, [c, l, h](i64 a) { return (l[a] + h[a]) / 2 - c[a]; });
        }
        for (i64 a = 0; a < dim; ++a) carry[a] = read_factors[(rows - 1) * each + a];
        read = {read_factors, each, 1};
        write = {write_factors, each, 1};
        left = {left_factors, each, 1};
        right = {right_factors, each, 1};
    }

    // The chunk of `count` rows whose decay has just been summed: its keys, and its U from the state before it.
    void open(i64 from, i64 count) {
        start = from, rows = count;
        find_factors();
        fetch(call.k, kv_head, 0, dim, width_d, 1, keys);
        fetch(call.v, kv_head, first_col, cols, width_e, 1, u);
        right_keys = times(keys, right, rows, dim, width_d, right_buffer);
        write_keys = times(keys, write, rows, dim, width_d, write_buffer);
        transpose_rows(right_keys, width_d, rows, dim, right_columns, width_l);
        if (call.beta.data == nullptr) return;
        for (i64 t = 0; t < rows; ++t) beta[t] = *gate(call.beta, start + t);
        left_keys = times(keys, left, rows, dim, width_d, left_buffer);
        read_keys = times(keys, read, rows, dim, width_d, read_buffer);
        lower_pairs(left_keys, width_d, dim, right_columns, rows, width_l, pair_decay(), false, C(1), key_pairs);
        multiply<kSubtract>(read_keys, width_d, 1, rows, state, width_e, dim, cols, u, width_e);
        solve(key_pairs, width_l, beta, rows, cols, width_e, u, before);
    }

    void ask(i64 head) {
        fetch(call.q, head, 0, dim, width_d, 1, queries);
        left_queries = times(queries, left, rows, dim, width_d, left_queries_buffer);
        read_queries = times(queries, read, rows, dim, width_d, read_queries_buffer);
        lower_pairs(left_queries, width_d, dim, right_columns, rows, width_l, pair_decay(), true, C(1), pairs);
    }

    void answer(i64 head) {
        multiply<kSet>(read_queries, width_d, 1, rows, state, width_e, dim, cols, out, width_e);
        multiply_lower(pairs, width_l, rows, u, cols, width_e, out);
        put(out, width_e, cols, call.scale, call.out, head, first_col);
    }

    void advance() {
        C *to = state, *factor = carry;
        const i64 width = width_e;
        product<C>(write_keys, 1, width_d, dim, u, width_e, rows, cols,
                   [to, factor, width](i64 a, int lane, Vector<C> sum) {
                       C* at = to + a * width + lane;
                       store(at, load(at) * factor[a] + sum);
                   });
    }
};

}  // namespace regard::REGARD_TARGET
