// Linear attention, forward and backward: S_t = diag(e^g_t) S_{t-1} + k_t u_tᵀ, out_t = scale · q_tᵀ S_t.
// Enters: a LinearCall or LinearBackwardCall; decay comes in natural logarithms. Leaves: out and the last state, or the
// gradients of q, k, v, decay, beta and the first state.
//
// u_t = v_t, or under the delta rules u_t = beta_t (v_t - k_tᵀ diag(e^g_t) S_{t-1}). With c_t the sum of g up to t
// within a chunk of rows, S the state before it, and D_tj = e^(c_t - c_j):
//   A_tj = k_t . D_tj k_j (j < t);  U = beta (V - (e^c K) S - A U), a unit triangular system (UT form), 16 rows at once
//   B_tj = q_t . D_tj k_j (j <= t);  O = scale ((e^c Q) S + B U);  S' = e^c_last S + (e^(c_last - c) K)ᵀ U
// One decay a row: D is a matrix of its own, every exponent a difference. One a column: D_tj = e^(c_t - m) e^(m - c_j)
// about the middle m of the chunk's range, and a chunk ends where that range would pass 60 (600 in double): no factor
// overflows, and a reset (-inf) merely starts a chunk. So does a row of NaN, which must not reach the rows before it.
// Forward: a task is a batch row, a k/v head and a span of v's columns, none of which mixes with another. Backward: a
// task is a batch row and a k/v head; it lays down the state before each chunk, then goes back over the chunks.
// Bytes: inputs and outputs once (the backward reads them twice), a state a head; the backward one state a chunk.
// Katharopoulos et al. 2020, eq. 16 to 20; GLA (Yang et al. 2024), sec. 4; DeltaNet (Yang et al. 2024), sec. 3.2;
// Gated DeltaNet (Yang et al. 2025), sec. 3.3.
#include "chunk.h"
#include "threads.h"

namespace regard::REGARD_TARGET {
namespace {

// ---- forward ----

struct Spans {
    i64 count, cols;  // of v's columns: split where there are fewer heads than threads; no bit depends on it
    explicit Spans(const LinearCall& call) {
        const i64 heads = call.batch * call.num_kv_heads, blocks = padded(call.head_dim_v) / kLanes;
        const i64 wanted = call.threads > 1 ? (2 * call.threads + heads - 1) / (heads > 0 ? heads : 1) : 1;
        cols = (blocks + least(wanted, blocks) - 1) / least(wanted, blocks) * kLanes;
        count = (call.head_dim_v + cols - 1) / cols;
    }
};

template <class C>
void forward_task(const void* context, i64 index, void* memory) {
    const LinearCall& call = *static_cast<const LinearCall*>(context);
    const Spans spans(call);
    const i64 head_index = index / spans.count, first = index % spans.count * spans.cols;
    Arena<C> arena{static_cast<char*>(memory)};
    Head<C> head(call, head_index / call.num_kv_heads, head_index % call.num_kv_heads, first,
                 least(spans.cols, call.head_dim_v - first), false, arena);
    head.load_state(call.state, head.state);
    for (i64 start = 0; start < call.seq_len; start += head.rows) {
        head.open(start, head.extent(start, least(call.chunk, call.seq_len - start), true));
        for (i64 h = 0; h < head.group(); ++h) {
            head.ask(head.kv_head * head.group() + h);
            head.answer(head.kv_head * head.group() + h);
        }
        head.advance();
    }
    head.save_state(head.state, call.last_state);
}

template <class C>
void run_forward(const LinearCall& call) {
    const Spans spans(call);
    Arena<C> arena{nullptr};
    const Head<C> head(call, 0, 0, 0, least(spans.cols, call.head_dim_v), false, arena);
    parallel(call.batch * call.num_kv_heads * spans.count, call.threads, arena.used, forward_task<C>, &call);
}

// ---- backward ----

template <class C>
void set(C* to, i64 count, C value) {
    for (i64 i = 0; i < count; ++i) to[i] = value;
}

template <class C>
void add(C* to, const C* from, C factor, i64 rows, i64 cols, i64 width) {
    for (i64 r = 0; r < rows; ++r)
        for (i64 c = 0; c < cols; ++c) to[r * width + c] += factor * from[r * width + c];
}

template <class C>
C dot(const C* x, const C* y, i64 cols) {
    Vector<C> sums = {};
    C sum = 0;
    for (i64 c = 0; c < cols; c += kWidth<C>) sums += load(x + c) * load(y + c);  // 0 beyond the columns
    for (int i = 0; i < kWidth<C>; ++i) sum += sums[i];
    return sum;
}

// With dO scaled and dS' the gradient of the state after the chunk (E, F carry D):
//   dU = (e^(c_last - c) K) dS' + Bᵀ dO;  E = lower(dO Uᵀ);  dQ = E K + e^c dO Sᵀ
//   dR = beta (I + beta A)^-ᵀ dU = dV;  dbeta_t = dR_t / beta_t . U_t / beta_t;  F = -strictly lower(dR Uᵀ)
//   dK = e^(c_last - c) U dS'ᵀ + Eᵀ Q + Fᵀ K + F K - e^c dR Sᵀ
//   dS = e^c_last dS' + (e^c Q)ᵀ dO - (e^c K)ᵀ dR
// Each of these terms holds k or q beside a power of c, so dc is that k or q times the term, and dg_t sums dc from t
// on.
template <class C>
struct Backward {
    const LinearBackwardCall& call;
    Head<C> head;
    C *grad_out, *grad_u, *u_columns, *state_columns, *grad_state, *grad_state_columns, *grad_before;
    C *grad_pairs, *part, *rest, *grad_keys, *pair_sum, *grad_beta;
    double *gains, *later;  // of the decay: terms that count for the rows after theirs, and for those up to theirs
    C* inner;               // states of a chunk that the decay has split
    i64* starts;

    Backward(const LinearBackwardCall& of, i64 batch, i64 kv_head, Arena<C>& arena)
        : call(of), head(of.forward, batch, kv_head, 0, of.forward.head_dim_v, true, arena) {
        const i64 l = head.width_l, d = head.width_d, e = head.width_e;
        grad_out = arena.take(l * e);
        grad_u = arena.take(l * e);
        u_columns = arena.take(e * l);
        state_columns = arena.take(e * d);
        grad_state = arena.take(d * e);
        grad_state_columns = arena.take(e * d);
        grad_before = arena.take(d * e);
        grad_pairs = arena.take(l * l);
        part = arena.take(l * d);
        rest = arena.take(l * d);
        grad_keys = arena.take(l * d);
        pair_sum = arena.take(l * d);
        grad_beta = arena.take(l);
        gains = arena.template take<double>(l * head.each);
        later = arena.template take<double>(l * head.each);
        inner = arena.take(head.decays > 1 ? of.forward.chunk * d * e : 0);
        starts = arena.template take<i64>(of.forward.chunk);
    }

    // to_t += sign x_t y_t, column by column or all together
    void gather(const C* x, const C* y, double sign, double* to) const {
        if (head.decays == 0) return;
        for (i64 t = 0; t < head.rows; ++t)
            for (i64 a = 0; a < head.dim; ++a)
                to[t * head.each + (head.decays > 1 ? a : 0)] +=
                    sign * x[t * head.width_d + a] * y[t * head.width_d + a];
    }

    // part = left · (grad_pairs right_keys) + sign · read · (of Sᵀ)
    void through_reads(const C* of, C sign) {
        const i64 rows = head.rows, d = head.width_d;
        set(part, rows * d, C(0));
        multiply_lower(grad_pairs, head.width_l, rows, head.right_keys, head.dim, d, part);
        times(part, head.left, rows, head.dim, d, part);
        multiply<kSet>(of, head.width_e, 1, rows, state_columns, d, head.cols, head.dim, rest, d);
        times(rest, head.read, rows, head.dim, d, rest);
        add(part, rest, sign, rows, head.dim, d);
    }

    void chunk() {
        const LinearCall& forward = call.forward;
        const i64 rows = head.rows, dim = head.dim, cols = head.cols, start = head.start;
        const i64 l = head.width_l, d = head.width_d, e = head.width_e;
        const bool delta = forward.beta.data != nullptr;
        transpose_rows(head.state, e, dim, cols, state_columns, d);
        transpose_rows(grad_state, e, dim, cols, grad_state_columns, d);
        transpose_rows(head.u, e, rows, cols, u_columns, l);
        set(gains, rows * head.each, 0.0);
        set(later, rows * head.each, 0.0);
        set(pair_sum, rows * d, C(0));

        multiply<kSet>(head.write_keys, d, 1, rows, grad_state, e, dim, cols, grad_u, e);
        multiply<kSet>(head.u, e, 1, rows, grad_state_columns, d, cols, dim, grad_keys, d);
        times(grad_keys, head.write, rows, dim, d, grad_keys);
        gather(head.keys, grad_keys, 1, gains);
        for (i64 a = 0; a < dim; ++a)
            for (i64 c = 0; c < e; ++c) grad_before[a * e + c] = head.carry[a] * grad_state[a * e + c];

        for (i64 h = head.kv_head * head.group(); h < (head.kv_head + 1) * head.group(); ++h) {
            head.ask(h);
            head.fetch(call.grad_out, h, 0, cols, e, forward.scale, grad_out);
            multiply_upper(head.pairs, l, rows, grad_out, cols, e, grad_u);
            multiply<kAdd>(head.read_queries, 1, d, dim, grad_out, e, rows, cols, grad_before, e);
            lower_pairs(grad_out, e, cols, u_columns, rows, l, head.pair_decay(), false, C(1), grad_pairs);
            multiply_upper(grad_pairs, l, rows, head.left_queries, dim, d, pair_sum);
            through_reads(grad_out, C(1));
            gather(head.queries, part, 1, later);
            for (i64 t = 0; t < rows; ++t) {  // the diagonal of E, apart: no decay comes between a step and itself
                const C own = dot(grad_out + t * e, head.u + t * e, cols);
                add(part + t * d, head.keys + t * d, own, 1, dim, d);
                add(grad_keys + t * d, head.queries + t * d, own, 1, dim, d);
            }
            head.put(part, d, dim, 1, call.grad_q, h, 0);
        }
        if (delta) {
            solve_back(head.key_pairs, l, head.beta, rows, cols, e, grad_u, head.before, grad_beta);
            multiply<kSubtract>(head.read_keys, 1, d, dim, grad_u, e, rows, cols, grad_before, e);
            lower_pairs(grad_u, e, cols, u_columns, rows, l, head.pair_decay(), false, C(-1), grad_pairs);
            multiply_upper(grad_pairs, l, rows, head.left_keys, dim, d, pair_sum);
            through_reads(grad_u, C(-1));
            gather(head.keys, part, 1, later);
            add(grad_keys, part, C(1), rows, dim, d);
            for (i64 t = 0; t < rows; ++t) *head.gate(call.grad_beta, start + t) = grad_beta[t];
        }
        times(pair_sum, head.right, rows, dim, d, pair_sum);
        gather(head.keys, pair_sum, -1, later);
        add(grad_keys, pair_sum, C(1), rows, dim, d);
        head.put(grad_keys, d, dim, 1, call.grad_k, head.kv_head, 0);
        head.put(grad_u, e, cols, 1, call.grad_v, head.kv_head, 0);
        if (head.decays > 0) decay();
        for (i64 i = 0; i < dim * e; ++i) grad_state[i] = grad_before[i];
    }

    // dg_t = e^c_last S . dS' + sum of gains before t + sum of later terms from t on
    void decay() {
        const LinearCall& forward = call.forward;
        const i64 rows = head.rows, e = head.width_e;
        for (i64 column = 0; column < head.decays; ++column) {
            double before = 0, after = 0;
            const i64 first = head.decays > 1 ? column : 0, last = head.decays > 1 ? column + 1 : head.dim;
            for (i64 a = first; a < last; ++a)
                for (i64 c = 0; c < head.cols; ++c)
                    before += double(head.carry[a]) * head.state[a * e + c] * grad_state[a * e + c];
            for (i64 t = 0; t < rows; ++t) {
                double& gain = gains[t * head.each + column];
                const double own = gain;
                gain = before;
                before += own;
            }
            for (i64 t = rows - 1; t >= 0; --t) {
                after += later[t * head.each + column];
                const C g = head.gate(forward.decay, head.start + t)[column * forward.decay.col];
                head.gate(call.grad_decay, head.start + t)[column * call.grad_decay.col] =
                    g < head.kFloor ? C(0) : static_cast<C>(gains[t * head.each + column] + after);
            }
        }
    }
};

template <class C>
void backward_task(const void* context, i64 index, void* memory) {
    const LinearBackwardCall& call = *static_cast<const LinearBackwardCall*>(context);
    const LinearCall& forward = call.forward;
    Arena<C> arena{static_cast<char*>(memory)};
    Backward<C> backward(call, index / forward.num_kv_heads, index % forward.num_kv_heads, arena);
    Head<C>& head = backward.head;
    const i64 chunks = (forward.seq_len + forward.chunk - 1) / forward.chunk, size = head.dim * head.width_e;
    C* states = static_cast<C*>(call.states) + index * chunks * size;
    const auto copy = [size](const C* from, C* to) {
        for (i64 i = 0; i < size; ++i) to[i] = from[i];
    };

    head.load_state(forward.state, head.state);
    for (i64 n = 0; n < chunks; ++n) {
        const i64 end = least((n + 1) * forward.chunk, forward.seq_len);
        copy(head.state, states + n * size);
        for (i64 start = n * forward.chunk; start < end && n + 1 < chunks; start += head.rows) {
            head.open(start, head.extent(start, end - start, false));
            head.advance();
        }
    }
    head.load_state(call.grad_last_state, backward.grad_state);
    for (i64 n = chunks - 1; n >= 0; --n) {
        const i64 end = least((n + 1) * forward.chunk, forward.seq_len);
        copy(states + n * size, head.state);
        i64 parts = 0;
        for (i64 start = n * forward.chunk; start < end; start += head.rows) {
            const i64 count = head.extent(start, end - start, false);
            backward.starts[parts] = start;
            if (parts > 0 || start + count < end) copy(head.state, backward.inner + parts * size);
            ++parts;
            head.open(start, count);
            if (start + count < end) head.advance();
        }
        backward.chunk();  // the last part is open, and the state before it at hand
        for (i64 part = parts - 2; part >= 0; --part) {
            const i64 start = backward.starts[part], count = backward.starts[part + 1] - start;
            copy(backward.inner + part * size, head.state);
            head.extent(start, count, false);
            head.open(start, count);
            backward.chunk();
        }
    }
    head.save_state(backward.grad_state, call.grad_state);
}

template <class C>
void run_backward(const LinearBackwardCall& call) {
    Arena<C> arena{nullptr};
    const Backward<C> backward(call, 0, 0, arena);
    parallel(call.forward.batch * call.forward.num_kv_heads, call.forward.threads, arena.used, backward_task<C>, &call);
}

}  // namespace

void linear_forward(const LinearCall& call) {
    call.dtype == kFloat64 ? run_forward<double>(call) : run_forward<float>(call);
}

void linear_backward(const LinearBackwardCall& call) {
    call.forward.dtype == kFloat64 ? run_backward<double>(call) : run_backward<float>(call);
}

}  // namespace regard::REGARD_TARGET
