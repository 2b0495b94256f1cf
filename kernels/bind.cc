// The door: Python's pointers and numbers in, one kernel call out, with the interpreter's lock released meanwhile.
// Enters: arguments that op.py has checked. Leaves: nothing; the kernels write through the pointers.
// Floor: the top of the kernels; the only file that knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "threads.h"
#include "view.h"

#define REGARD_DECLARE(target)                                    \
    namespace regard::target {                                    \
    void forward(const ForwardCall&);                             \
    void stats(const StatsCall&);                                 \
    void tile(const TileCall&);                                   \
    void backward(const BackwardCall&);                           \
    i64 backward_memory(const BackwardCall&);                     \
    void linear_forward(const LinearCall&);                       \
    void linear_backward(const LinearBackwardCall&);              \
    void additive_forward(const AdditiveCall&);                   \
    void additive_backward(const AdditiveBackwardCall&);          \
    void decode(const DecodeCall&);                               \
    i64 decode_memory(const DecodeCall&);                         \
    void dropout(u64, i64, i64, i64, i64, double, std::uint8_t*); \
    i64 ceiling(const CeilingCall&);                              \
    }
// `plain` is the target whose kernels serve where this one has nothing of its own to add.
#define REGARD_TARGET_OVER(target, plain)                                                                        \
    Target {                                                                                                     \
        #target, regard::target::forward, regard::target::stats, regard::target::tile, regard::target::backward, \
            regard::target::backward_memory, regard::target::dropout, regard::plain::linear_forward,             \
            regard::plain::linear_backward, regard::plain::additive_forward, regard::plain::additive_backward,   \
            regard::target::decode, regard::target::decode_memory, regard::target::ceiling                       \
    }
// A target whose forward alone is its own.
#define REGARD_FORWARD_OVER(target, others)  \
    [&] {                                    \
        Target t = others;                   \
        t.name = #target;                    \
        t.forward = regard::target::forward; \
        return t;                            \
    }()
#define REGARD_TARGET_OF(target) REGARD_TARGET_OVER(target, target)

#if defined(__x86_64__)
REGARD_DECLARE(avx512_bf16)
REGARD_DECLARE(avx512)
REGARD_DECLARE(avx2)
#endif
#if defined(REGARD_AMX)
namespace regard::amx {
void forward(const ForwardCall&);
const char* trouble();
}  // namespace regard::amx
namespace regard::amx_emulated {
void forward(const ForwardCall&);
}
#endif
REGARD_DECLARE(portable)

namespace nb = nanobind;
using namespace nb::literals;

namespace regard {
namespace {

// The instruction sets that this processor has, best first; then those that only a test asks for, by name.
struct Targets {
    std::vector<Target> list;
    std::size_t shown;
    std::string left_out;  // one that the processor has, and why it does not serve
};

const Targets& targets() {
    static const Targets found = [] {
        Targets t{};
        std::vector<Target>& list = t.list;
        std::vector<Target> hidden;
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
        if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512cd")) {
            if (__builtin_cpu_supports("avx512bf16")) {
                const Target pairs = REGARD_TARGET_OVER(avx512_bf16, avx512);
#if defined(REGARD_AMX)
                if (__builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16")) {
                    if (const char* trouble = regard::amx::trouble())
                        t.left_out = std::string("amx (") + trouble + ")";
                    else
                        list.push_back(REGARD_FORWARD_OVER(amx, pairs));
                }
                hidden.push_back(REGARD_FORWARD_OVER(amx_emulated, pairs));
#endif
                list.push_back(pairs);
            }
            list.push_back(REGARD_TARGET_OF(avx512));
        }
        if (avx2) list.push_back(REGARD_TARGET_OF(avx2));
#endif
        list.push_back(REGARD_TARGET_OF(portable));
        t.shown = list.size();
        for (const Target& target : hidden) list.push_back(target);
        return t;
    }();
    return found;
}

const Target& target(int index) {
    if (index < 0 || index >= static_cast<int>(targets().list.size()))
        throw std::out_of_range("kernels: no such instruction set");
    return targets().list[static_cast<std::size_t>(index)];
}

std::vector<std::string> names(std::size_t first, std::size_t last) {
    std::vector<std::string> found;
    for (; first < last; ++first) found.push_back(targets().list[first].name);
    return found;
}

using BiasArgument = std::array<i64, 6>;  // a view, and 1 where the bias is float32 under half inputs
using ViewArgument = std::array<i64, 5>;  // address, strides of batch, head, row, column
using MaskArgument = std::array<i64, 6>;  // kind, address, strides of batch, head, row, count
using ShapeArgument =
    std::array<i64, 7>;  // batch, num_heads, num_kv_heads, seq_len_q, seq_len_kv, head_dim, head_dim_v

View view(const ViewArgument& a) { return {reinterpret_cast<void*>(a[0]), a[1], a[2], a[3], a[4]}; }

Scores scores(int dtype, const ShapeArgument& n, const ViewArgument& q, const ViewArgument& k, const BiasArgument& bias,
              const MaskArgument& m, double scale, double softcap) {
    const Mask mask{static_cast<int>(m[0]), reinterpret_cast<const void*>(m[1]), m[2], m[3], m[4], m[5]};
    return {
        dtype, n[0],         n[1],    n[2],    n[3],
        n[4],  n[5],         view(q), view(k), {reinterpret_cast<void*>(bias[0]), bias[1], bias[2], bias[3], bias[4]},
        mask,  bias[5] != 0, scale,   softcap};
}

LinearCall linear(int dtype, const ShapeArgument& n, i64 chunk, const ViewArgument& q, const ViewArgument& k,
                  const ViewArgument& v, const ViewArgument& out, const ViewArgument& decay, i64 decay_dim,
                  const ViewArgument& beta, i64 state, i64 last_state, double scale, int threads) {
    return {dtype,
            n[0],
            n[1],
            n[2],
            n[3],
            n[5],
            n[6],
            chunk,
            view(q),
            view(k),
            view(v),
            view(out),
            view(decay),
            view(beta),
            decay_dim,
            reinterpret_cast<const void*>(state),
            reinterpret_cast<void*>(last_state),
            scale,
            threads};
}

AdditiveCall additive(int dtype, const ShapeArgument& n, const ViewArgument& q, const ViewArgument& k,
                      const ViewArgument& v, i64 weight, const ViewArgument& out, const ViewArgument& lse,
                      const MaskArgument& mask, int threads) {
    return {scores(dtype, n, q, k, {}, mask, 1, 0),
            n[6],
            reinterpret_cast<const void*>(weight),
            view(v),
            view(out),
            view(lse),
            threads};
}

}  // namespace
}  // namespace regard

using namespace regard;

NB_MODULE(_kernels, module) {
    module.doc() = "The compiled kernels. Pointers go in unchecked: call them through regard.op only.";

    module.def("isas", [] { return names(0, targets().shown); });
    module.def("hidden_isas", [] { return names(targets().shown, targets().list.size()); });
    module.def("left_out", [] { return targets().left_out; });
    module.def("use_openmp", &use_openmp, "address"_a);

    module.def(
        "ceiling",
        [](int isa, int kind, i64 rounds, i64 from, i64 to, i64 bytes, int threads) {
            const CeilingCall call{kind,  rounds, reinterpret_cast<const void*>(from), reinterpret_cast<void*>(to),
                                   bytes, threads};
            nb::gil_scoped_release release;
            return target(isa).ceiling(call);
        },
        "isa"_a, "kind"_a, "rounds"_a, "from"_a, "to"_a, "bytes"_a, "threads"_a);

    module.def(
        "forward",
        [](int isa, int dtype, ShapeArgument shape, ViewArgument q, ViewArgument k, ViewArgument v, ViewArgument out,
           ViewArgument lse, BiasArgument bias, i64 sinks, MaskArgument mask, double scale, double softcap,
           double dropout, u64 seed, i64 first_row, int precision, int threads) {
            const ForwardCall call{scores(dtype, shape, q, k, bias, mask, scale, softcap),
                                   shape[6],
                                   view(v),
                                   view(out),
                                   view(lse),
                                   reinterpret_cast<const void*>(sinks),
                                   dropout,
                                   seed,
                                   first_row,
                                   precision,
                                   threads};
            nb::gil_scoped_release release;
            target(isa).forward(call);
        },
        "isa"_a, "dtype"_a, "shape"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "bias"_a, "sinks"_a, "mask"_a, "scale"_a,
        "softcap"_a, "dropout"_a, "seed"_a, "first_row"_a, "precision"_a, "threads"_a);

    module.def(
        "decode",
        [](int isa, int dtype, ShapeArgument shape, ViewArgument q, ViewArgument k, ViewArgument v, ViewArgument out,
           ViewArgument lse, BiasArgument bias, i64 sinks, MaskArgument mask, double scale, double softcap,
           double dropout, u64 seed, bool coded, ViewArgument key_scales, ViewArgument value_scales, i64 pages,
           i64 pages_of_row, i64 page_keys, i64 received, i64 part_keys, int threads) {
            DecodeCall call{{scores(dtype, shape, q, k, bias, mask, scale, softcap), shape[6], view(v), view(out),
                             view(lse), reinterpret_cast<const void*>(sinks), dropout, seed, 0, 0, threads},
                            coded,
                            view(key_scales),
                            view(value_scales),
                            reinterpret_cast<const std::int32_t*>(pages),
                            pages_of_row,
                            page_keys,
                            reinterpret_cast<void*>(received),
                            part_keys,
                            nullptr,
                            nullptr};
            nb::gil_scoped_release release;
            const i64 bytes = (target(isa).decode_memory(call) + 63) / 64 * 64;
            char* memory = kept_memory(bytes + 8 * shape[0] * shape[2]);
            call.memory = memory;
            call.done = reinterpret_cast<i64*>(memory + bytes);
            target(isa).decode(call);
        },
        "isa"_a, "dtype"_a, "shape"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "bias"_a, "sinks"_a, "mask"_a, "scale"_a,
        "softcap"_a, "dropout"_a, "seed"_a, "coded"_a, "key_scales"_a, "value_scales"_a, "pages"_a, "pages_of_row"_a,
        "page_keys"_a, "received"_a, "part_keys"_a, "threads"_a);

    module.def(
        "stats",
        [](int isa, int dtype, ShapeArgument shape, ViewArgument q, ViewArgument k, ViewArgument v, ViewArgument out,
           ViewArgument lse, BiasArgument bias, i64 sinks, MaskArgument mask, double scale, double softcap, i64 top_k,
           i64 top_keys, i64 top_weights, i64 received, ViewArgument entropy, ViewArgument max_score, i64 block_rows,
           i64 block_cols, ViewArgument block_mass, ViewArgument block_max, i64 chunk_rows, int threads) {
            const StatsCall call{{scores(dtype, shape, q, k, bias, mask, scale, softcap), shape[6], view(v), view(out),
                                  view(lse), reinterpret_cast<const void*>(sinks), 0, 0, 0, 0, threads},
                                 top_k,
                                 reinterpret_cast<i64*>(top_keys),
                                 reinterpret_cast<void*>(top_weights),
                                 reinterpret_cast<double*>(received),
                                 view(entropy),
                                 view(max_score),
                                 block_rows,
                                 block_cols,
                                 view(block_mass),
                                 view(block_max),
                                 chunk_rows};
            nb::gil_scoped_release release;
            target(isa).stats(call);
        },
        "isa"_a, "dtype"_a, "shape"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "bias"_a, "sinks"_a, "mask"_a, "scale"_a,
        "softcap"_a, "top_k"_a, "top_keys"_a, "top_weights"_a, "received"_a, "entropy"_a, "max_score"_a, "block_rows"_a,
        "block_cols"_a, "block_mass"_a, "block_max"_a, "chunk_rows"_a, "threads"_a);

    module.def(
        "tile",
        [](int isa, int dtype, ShapeArgument shape, ViewArgument q, ViewArgument k, ViewArgument lse, ViewArgument out,
           BiasArgument bias, MaskArgument mask, double scale, double softcap, i64 first_key, i64 keys, int stage,
           int threads) {
            const TileCall call{scores(dtype, shape, q, k, bias, mask, scale, softcap),
                                view(lse),
                                view(out),
                                first_key,
                                keys,
                                stage,
                                threads};
            nb::gil_scoped_release release;
            target(isa).tile(call);
        },
        "isa"_a, "dtype"_a, "shape"_a, "q"_a, "k"_a, "lse"_a, "out"_a, "bias"_a, "mask"_a, "scale"_a, "softcap"_a,
        "first_key"_a, "keys"_a, "stage"_a, "threads"_a);

    module.def(
        "backward",
        [](int isa, int dtype, ShapeArgument shape, ViewArgument q, ViewArgument k, ViewArgument v, ViewArgument out,
           ViewArgument grad_out, ViewArgument lse, ViewArgument grad_lse, ViewArgument grad_q, i64 grad_k, i64 grad_v,
           ViewArgument grad_bias, i64 grad_diagonal, i64 diagonals, i64 last_row, BiasArgument bias, MaskArgument mask,
           double scale, double softcap, double dropout, u64 seed, i64 first_row, i64 part_keys, int threads) {
            BackwardCall call{scores(dtype, shape, q, k, bias, mask, scale, softcap),
                              shape[6],
                              view(v),
                              view(out),
                              view(grad_out),
                              view(lse),
                              view(grad_lse),
                              view(grad_q),
                              reinterpret_cast<void*>(grad_k),
                              reinterpret_cast<void*>(grad_v),
                              view(grad_bias),
                              reinterpret_cast<void*>(grad_diagonal),
                              diagonals,
                              last_row,
                              dropout,
                              seed,
                              first_row,
                              part_keys,
                              nullptr,
                              threads};
            nb::gil_scoped_release release;
            const std::unique_ptr<char[]> memory(
                new char[static_cast<std::size_t>(target(isa).backward_memory(call)) + 64]);
            call.memory = memory.get() + (64 - reinterpret_cast<u64>(memory.get()) % 64);
            target(isa).backward(call);
        },
        "isa"_a, "dtype"_a, "shape"_a, "q"_a, "k"_a, "v"_a, "out"_a, "grad_out"_a, "lse"_a, "grad_lse"_a, "grad_q"_a,
        "grad_k"_a, "grad_v"_a, "grad_bias"_a, "grad_diagonal"_a, "diagonals"_a, "last_row"_a, "bias"_a, "mask"_a,
        "scale"_a, "softcap"_a, "dropout"_a, "seed"_a, "first_row"_a, "part_keys"_a, "threads"_a);

    module.def(
        "dropout",
        [](u64 seed, i64 batch, i64 head, i64 first_row, i64 rows, i64 keys, double probability, i64 keep) {
            nb::gil_scoped_release release;
            for (i64 row = 0; row < rows; ++row)
                target(0).dropout(seed, batch, head, first_row + row, keys, probability,
                                  reinterpret_cast<std::uint8_t*>(keep) + row * keys);
        },
        "seed"_a, "batch"_a, "head"_a, "first_row"_a, "rows"_a, "keys"_a, "probability"_a, "keep"_a);

    module.def(
        "linear_forward",
        [](int isa, int dtype, ShapeArgument shape, i64 chunk, ViewArgument q, ViewArgument k, ViewArgument v,
           ViewArgument out, ViewArgument decay, i64 decay_dim, ViewArgument beta, i64 state, i64 last_state,
           double scale, int threads) {
            const LinearCall call =
                linear(dtype, shape, chunk, q, k, v, out, decay, decay_dim, beta, state, last_state, scale, threads);
            nb::gil_scoped_release release;
            target(isa).linear_forward(call);
        },
        "isa"_a, "dtype"_a, "shape"_a, "chunk"_a, "q"_a, "k"_a, "v"_a, "out"_a, "decay"_a, "decay_dim"_a, "beta"_a,
        "state"_a, "last_state"_a, "scale"_a, "threads"_a);

    module.def(
        "linear_backward",
        [](int isa, int dtype, ShapeArgument shape, i64 chunk, ViewArgument q, ViewArgument k, ViewArgument v,
           ViewArgument decay, i64 decay_dim, ViewArgument beta, i64 state, double scale, ViewArgument grad_out,
           i64 grad_last_state, ViewArgument grad_q, ViewArgument grad_k, ViewArgument grad_v, ViewArgument grad_decay,
           ViewArgument grad_beta, i64 grad_state, i64 states, int threads) {
            const LinearBackwardCall call{
                linear(dtype, shape, chunk, q, k, v, {}, decay, decay_dim, beta, state, 0, scale, threads),
                view(grad_out),
                reinterpret_cast<const void*>(grad_last_state),
                view(grad_q),
                view(grad_k),
                view(grad_v),
                view(grad_decay),
                view(grad_beta),
                reinterpret_cast<void*>(grad_state),
                reinterpret_cast<void*>(states)};
            nb::gil_scoped_release release;
            target(isa).linear_backward(call);
        },
        "isa"_a, "dtype"_a, "shape"_a, "chunk"_a, "q"_a, "k"_a, "v"_a, "decay"_a, "decay_dim"_a, "beta"_a, "state"_a,
        "scale"_a, "grad_out"_a, "grad_last_state"_a, "grad_q"_a, "grad_k"_a, "grad_v"_a, "grad_decay"_a, "grad_beta"_a,
        "grad_state"_a, "states"_a, "threads"_a);

    module.def(
        "additive_forward",
        [](int isa, int dtype, ShapeArgument shape, ViewArgument q, ViewArgument k, ViewArgument v, i64 weight,
           ViewArgument out, ViewArgument lse, MaskArgument mask, int threads) {
            const AdditiveCall call = additive(dtype, shape, q, k, v, weight, out, lse, mask, threads);
            nb::gil_scoped_release release;
            target(isa).additive_forward(call);
        },
        "isa"_a, "dtype"_a, "shape"_a, "q"_a, "k"_a, "v"_a, "weight"_a, "out"_a, "lse"_a, "mask"_a, "threads"_a);

    module.def(
        "additive_backward",
        [](int isa, int dtype, ShapeArgument shape, ViewArgument q, ViewArgument k, ViewArgument v, i64 weight,
           ViewArgument out, ViewArgument lse, MaskArgument mask, ViewArgument grad_out, ViewArgument grad_lse,
           ViewArgument grad_q, i64 grad_k, i64 grad_v, i64 weight_parts, i64 part_keys, int threads) {
            const AdditiveBackwardCall call{additive(dtype, shape, q, k, v, weight, out, lse, mask, threads),
                                            view(grad_out),
                                            view(grad_lse),
                                            view(grad_q),
                                            reinterpret_cast<void*>(grad_k),
                                            reinterpret_cast<void*>(grad_v),
                                            reinterpret_cast<double*>(weight_parts),
                                            part_keys};
            nb::gil_scoped_release release;
            target(isa).additive_backward(call);
        },
        "isa"_a, "dtype"_a, "shape"_a, "q"_a, "k"_a, "v"_a, "weight"_a, "out"_a, "lse"_a, "mask"_a, "grad_out"_a,
        "grad_lse"_a, "grad_q"_a, "grad_k"_a, "grad_v"_a, "weight_parts"_a, "part_keys"_a, "threads"_a);
}
