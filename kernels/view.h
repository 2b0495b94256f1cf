// The contract with Python: what a kernel is given, and nothing else.
// Enters: raw pointers with element strides, sizes, scalars; all checked in Python before the door.
// Leaves: numbers written through the same kind of view.
// Floor: the lowest; included by every target, so it holds no code that a target could compile differently.
#pragma once
#include <cstdint>

namespace regard {

using i64 = std::int64_t;
using u64 = std::uint64_t;
using u32 = std::uint32_t;

// Queries side by side in the vector lanes, and keys down the rows, of one score tile. 64 keys are one word of mask
// bits.
constexpr int kLanes = 64;
constexpr int kKeys = 64;

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Element strides of (batch, head, row, column); a stride of 0 broadcasts. No data: the tensor is absent.
struct View {
    void* data = nullptr;
    i64 batch = 0, head = 0, row = 0, col = 0;
};

enum MaskKind : int { kNoMask = 0, kIntervals = 1, kBits = 2 };

// kIntervals: int32 pairs [lo, hi) of key indices, `count` pairs a query row, disjoint; empty ones have lo == hi.
// kBits: one 64-bit word for each 64 keys, `count` words a query row; bit j is key 64 * word + j.
// Strides count pairs (intervals) or words (bits).
struct Mask {
    int kind = kNoMask;
    const void* data = nullptr;
    i64 batch = 0, head = 0, row = 0, count = 0;
};

// Everything that decides a score: softcap · tanh(scale · q·k / softcap) + bias, excluded where the mask says so.
struct Scores {
    int dtype;
    i64 batch, num_heads, num_kv_heads, seq_len_q, seq_len_kv, head_dim;
    View q, k, bias;
    Mask mask;
    bool wide_bias;         // bias is float32 under half inputs
    double scale, softcap;  // softcap 0: none
};

// How float32 is multiplied where the target has only bfloat16 products: torch.get_float32_matmul_precision().
enum Precision : int { kHighest = 0, kHigh = 1, kMedium = 2 };

struct ForwardCall {
    Scores scores;
    i64 head_dim_v;
    View v, out, lse;   // lse: float32, or float64 where the inputs are
    const void* sinks;  // (num_heads,) in the inputs' dtype, or null
    double dropout;     // probability of dropping a weight; 0: none
    u64 seed;
    i64 first_row;  // this call's row 0 is row first_row of the whole: dropout depends on it
    int precision;  // of Precision; targets that multiply float32 itself have but the highest
    int threads;
};

// A forward call of few queries. Keys and values may lie in pages: row j of batch row b is row j % page_keys of page
// pages[b * pages_of_row + j / page_keys], and the views' batch stride is a page's. They may be int8, times a scale a
// row.
struct DecodeCall {
    ForwardCall forward;
    bool coded;                     // k and v are int8
    View key_scales, value_scales;  // float32, one a row; no data: 1
    const std::int32_t* pages;      // (batch, pages_of_row), or null
    i64 pages_of_row, page_keys;    // page_keys: a multiple of a tile
    void* received;                 // (batch, num_heads, seq_len_kv) as lse, for seq_len_q = 1, or null
    i64 part_keys;                  // keys of one part: a multiple of a tile, decided by seq_len_kv alone
    void* memory;                   // decode_memory(call) bytes
    i64* done;                      // (batch, num_kv_heads)
};

// What attention did. Where `forward` has values, out and lse are written on the way, with the bits of the forward
// pass; else lse is given. No dropout. Column sums are gathered per chunk of query rows, in double, so that no two
// tasks write one number.
struct StatsCall {
    ForwardCall forward;
    i64 top_k;
    i64* top_keys;  // (batch, num_heads, seq_len_q, top_k), -1 past the visible keys
    void* top_weights;
    double* received;  // (chunks, batch, num_heads, seq_len_kv), zeroed by the caller
    View entropy, max_score;
    i64 block_rows, block_cols;  // 0: no blocks
    View block_mass, block_max;  // zeroed by the caller; row = block row, col = block column
    i64 chunk_rows;              // a multiple of block_rows where there are blocks
};

// Gradients of attention from the forward's out and lse.
struct BackwardCall {
    Scores scores;
    i64 head_dim_v;
    View v, out, grad_out, lse, grad_lse;
    View grad_q;            // in the inputs' dtype
    void *grad_k, *grad_v;  // (batch, num_kv_heads, seq_len_kv, head_dim or head_dim_v), added to
    View grad_bias;         // of a dense bias, in lse's dtype, added to; a stride of 0: the bias broadcasts there
    void* grad_diagonal;    // (key parts, batch, num_heads, diagonals), zeroed by the caller, or null; entry j - i +
                            // last_row
    i64 diagonals, last_row;
    double dropout;
    u64 seed;
    i64 first_row;
    i64 part_keys;  // keys of one part: a multiple of 4 tiles, decided by seq_len_kv alone
    void* memory;   // backward_memory(call) bytes
    int threads;
};

enum Stage : int { kScaled = 0, kCapped = 1, kBiased = 2, kWeights = 3 };

// A tile of the scores or weights: the queries of `scores` against keys [first_key, first_key + keys).
struct TileCall {
    Scores scores;
    View lse, out;  // out: float32, or float64 where the inputs are
    i64 first_key, keys;
    int stage;
    int threads;
};

// Linear attention: a state decays by e^decay, takes in k_t u_tᵀ and is read by q_t.
struct LinearCall {
    int dtype;
    i64 batch, num_heads, num_kv_heads, seq_len, head_dim, head_dim_v;
    i64 chunk;  // the most rows taken at once
    View q, k, v, out;
    View decay, beta;   // float32, or float64 where the inputs are; no data: the rule has none
    i64 decay_dim;      // 1 or head_dim
    const void* state;  // (batch, num_kv_heads, head_dim, head_dim_v), in decay's dtype, or null: zero
    void* last_state;   // likewise
    double scale;
    int threads;
};

struct LinearBackwardCall {
    LinearCall forward;  // its out and last_state are not looked at
    View grad_out;
    const void* grad_last_state;
    View grad_q, grad_k, grad_v;  // in the inputs' dtype
    View grad_decay, grad_beta;   // in decay's dtype
    void* grad_state;
    void* states;  // (batch, num_kv_heads, chunks, head_dim, head_dim_v rounded up to kLanes)
};

// Additive attention: scores are weightᵀ tanh(q + k); `scores` has one head, no bias, scale or softcap.
struct AdditiveCall {
    Scores scores;
    i64 head_dim_v;
    const void* weight;  // (head_dim,), in the inputs' dtype
    View v, out, lse;    // lse: float32, or float64 where the inputs are
    int threads;
};

struct AdditiveBackwardCall {
    AdditiveCall forward;
    View grad_out, grad_lse;
    View grad_q;  // in lse's dtype, zeroed by the caller; batch: stride of a part of the keys, head: of a batch row
    void *grad_k, *grad_v;  // (batch, seq_len_kv, head_dim or head_dim_v), in lse's dtype, added to
    double* weight_parts;   // (parts, batch, head_dim), added to
    i64 part_keys;          // keys of one part: a multiple of a tile
};

// What the processor can do at best. Tile registers have a number of their own, for a target that has them.
enum CeilingKind : int { kFloat32Peak = 0, kFloat64Peak = 1, kPairsPeak = 2, kTilesPeak = 3, kRead = 4, kCopy = 5 };

struct CeilingCall {
    int kind;
    i64 rounds;        // of a peak
    const void* from;  // `bytes` of them, a multiple of 4
    void* to;          // copy: as many; read: one float for each 4 MiB
    i64 bytes;
    int threads;
};

// One compiled copy of the kernels.
struct Target {
    const char* name;
    void (*forward)(const ForwardCall&);
    void (*stats)(const StatsCall&);
    void (*tile)(const TileCall&);
    void (*backward)(const BackwardCall&);
    i64 (*backward_memory)(const BackwardCall&);
    void (*dropout)(u64 seed, i64 batch, i64 head, i64 row, i64 keys, double probability, std::uint8_t* keep);
    void (*linear_forward)(const LinearCall&);
    void (*linear_backward)(const LinearBackwardCall&);
    void (*additive_forward)(const AdditiveCall&);
    void (*additive_backward)(const AdditiveBackwardCall&);
    void (*decode)(const DecodeCall&);
    i64 (*decode_memory)(const DecodeCall&);
    i64 (*ceiling)(const CeilingCall&);
};

}  // namespace regard
