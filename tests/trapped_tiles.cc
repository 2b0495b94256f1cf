// The kernel of the real tile instructions, run on a processor that has none: each raises SIGILL, and is carried out
// here. Enters: nothing. Leaves: exit status 0 where every call of `amx` gives the bits of `amx_emulated`, and how many
// instructions of each kind were carried out. What is proved is what the compiler made: registers, addresses, strides,
// order; the arithmetic and the encodings are those of the manual (Intel SDM, vol. 2).
// `make tiles` builds and runs it.
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../kernels/view.h"

namespace regard::amx {
void forward(const ForwardCall&);
}
namespace regard::amx_emulated {
void forward(const ForwardCall&);
}
using namespace regard;

namespace {

enum Kind { kConfigure, kRelease, kZero, kLoad, kStore, kMultiply };
const char* const names[] = {"ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbf16ps"};
long long carried_out[6];

struct Registers {
    bool configured;
    std::uint8_t configuration[64];
    std::uint8_t rows[8][16][64];
} registers;

[[noreturn]] void give_up(const char* why, const std::uint8_t* at) {
    std::fprintf(stderr, "trapped_tiles: %s at", why);
    for (int i = 0; i < 10; ++i) std::fprintf(stderr, " %02x", at[i]);
    std::fprintf(stderr, "\n");
    std::_Exit(2);
}

float bfloat(const std::uint8_t* at) {
    std::uint32_t bits = 0;
    std::memcpy(reinterpret_cast<char*>(&bits) + 2, at, 2);
    if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

void multiply(int c, int a, int b) {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            float sums[2] = {};
            for (int k = 0; k < 16; ++k)
                for (int i = 0; i < 2; ++i)
                    sums[i] = flushed(std::fma(bfloat(&registers.rows[a][m][4 * k + 2 * i]),
                                               bfloat(&registers.rows[b][k][4 * n + 2 * i]), sums[i]));
            float total;
            std::memcpy(&total, &registers.rows[c][m][4 * n], 4);
            total = flushed(flushed(total) + flushed(sums[0] + sums[1]));
            std::memcpy(&registers.rows[c][m][4 * n], &total, 4);
        }
}

void trap(int, siginfo_t*, void* context) {
    greg_t* g = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const auto* at = reinterpret_cast<const std::uint8_t*>(g[REG_RIP]);
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84) != 0) give_up("not a tile instruction", at);
    constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    const int prefix = at[2] & 3, third = (~at[2] >> 3) & 15, opcode = at[3], mod = at[4] >> 6, low = at[4] & 7,
              reg = (at[4] >> 3) & 7;
    const bool r = !(at[1] & 0x80), x = !(at[1] & 0x40), b = !(at[1] & 0x20);
    int length = 5;
    std::int64_t base = 0, index = 0;
    if (mod != 3) {
        int scale = 0;
        if (low == 4) {
            const int sib = at[length++];
            if ((sib & 7) == 5 && mod == 0) give_up("an address without a base", at);
            base = g[kOrder[(sib & 7) + 8 * b]];
            const int which = ((sib >> 3) & 7) + 8 * x;
            index = which == 4 ? 0 : g[kOrder[which]];
            scale = sib >> 6;
        } else {
            base = g[kOrder[low + 8 * b]];
        }
        if (mod == 1) base += static_cast<std::int8_t>(at[length++]);
        if (mod == 2) {
            std::int32_t displacement;
            std::memcpy(&displacement, at + length, 4);
            base += displacement, length += 4;
        }
        index <<= scale;
    }
    Kind kind;
    if (opcode == 0x49 && prefix == 0 && mod != 3) {
        kind = kConfigure;
        std::memcpy(registers.configuration, reinterpret_cast<const void*>(base + index), 64);
        const std::uint8_t* c = registers.configuration;
        bool whole = c[0] == 1;
        for (int i = 1; i < 16; ++i) whole &= c[i] == 0;
        for (int i = 0; i < 8; ++i) whole &= c[16 + 2 * i] == 64 && c[17 + 2 * i] == 0 && c[48 + i] == 16;
        for (int i = 8; i < 16; ++i) whole &= c[16 + 2 * i] == 0 && c[17 + 2 * i] == 0 && c[48 + i] == 0;
        if (!whole) give_up("a configuration that is not eight whole tiles", at);
        registers.configured = true;
        std::memset(registers.rows, 0, sizeof registers.rows);
    } else if (opcode == 0x49 && prefix == 0 && at[4] == 0xc0) {
        kind = kRelease;
        registers.configured = false;
    } else if (!registers.configured || r) {
        give_up("a tile instruction without a configuration, or of a ninth tile", at);
    } else if (opcode == 0x49 && prefix == 3 && mod == 3) {
        kind = kZero;
        std::memset(registers.rows[reg], 0, 1024);
    } else if (opcode == 0x4b && mod != 3 && low == 4) {
        kind = prefix == 3 ? kLoad : kStore;
        if (prefix != 3 && prefix != 2) give_up("another tile load", at);
        for (int row = 0; row < 16; ++row) {
            void* memory = reinterpret_cast<void*>(base + row * index);
            kind == kLoad ? std::memcpy(registers.rows[reg][row], memory, 64)
                          : std::memcpy(memory, registers.rows[reg][row], 64);
        }
    } else if (opcode == 0x5c && prefix == 2 && mod == 3) {
        kind = kMultiply;
        if (reg == low || reg == third || low == third) give_up("a product with a tile twice", at);
        multiply(reg, low, third);
    } else {
        give_up("an unknown instruction", at);
    }
    ++carried_out[kind];
    g[REG_RIP] += length;
}

double uniform() { return std::rand() / (RAND_MAX + 1.0); }

// One call by both, on random numbers of a dtype; the number of outputs whose bits differ.
long long differences(int dtype, int precision, i64 heads, i64 kv_heads, i64 rows, i64 keys, i64 dim, i64 dim_v,
                      int mask_kind, double softcap, double dropout, double scale, bool spoiled) {
    const std::size_t size = dtype == kFloat32 ? 4 : 2;
    const auto make = [&](i64 count) {
        std::vector<char> bytes(static_cast<std::size_t>(count) * size + 64);
        for (i64 i = 0; i < count; ++i) {
            float x = static_cast<float>(std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307 * uniform()));
            if (spoiled && i % 997 == 5) x = i % 2 ? 1e30f : __builtin_inff();
            std::uint32_t bits;
            std::memcpy(&bits, &x, 4);
            const _Float16 half = static_cast<_Float16>(x);
            const std::uint16_t top = static_cast<std::uint16_t>(bits >> 16);
            std::memcpy(&bytes[static_cast<std::size_t>(i) * size],
                        dtype == kFloat32    ? static_cast<const void*>(&x)
                        : dtype == kBFloat16 ? static_cast<const void*>(&top)
                                             : static_cast<const void*>(&half),
                        size);
        }
        return bytes;
    };
    std::vector<char> q = make(heads * rows * dim), k = make(kv_heads * keys * dim), v = make(kv_heads * keys * dim_v);
    std::vector<std::int32_t> ranges;
    for (i64 i = 0; i < rows; ++i)
        ranges.insert(ranges.end(), {static_cast<int>(i > 90 ? i - 90 : 0), static_cast<int>(i < keys ? i + 1 : keys)});
    std::vector<u64> words(static_cast<std::size_t>(rows * ((keys + 63) / 64)));
    for (u64& w : words) w = uniform() < 0.3 ? 0 : static_cast<u64>(uniform() * 0x1p63) * 2;
    Mask mask{mask_kind,
              mask_kind == kBits ? static_cast<const void*>(words.data()) : ranges.data(),
              0,
              0,
              mask_kind == kBits ? (keys + 63) / 64 : 1,
              mask_kind == kBits ? (keys + 63) / 64 : 1};
    std::vector<char> out[2];
    std::vector<float> lse[2];
    for (int i = 0; i < 2; ++i) {
        out[i].assign(static_cast<std::size_t>(heads * rows * dim_v) * size, 'x');
        lse[i].assign(static_cast<std::size_t>(heads * rows), 7);
        ForwardCall call{};
        call.scores = {dtype,
                       1,
                       heads,
                       kv_heads,
                       rows,
                       keys,
                       dim,
                       {q.data(), 0, rows * dim, dim, 1},
                       {k.data(), 0, keys * dim, dim, 1},
                       {},
                       mask,
                       false,
                       scale,
                       softcap};
        call.head_dim_v = dim_v;
        call.v = {v.data(), 0, keys * dim_v, dim_v, 1};
        call.out = {out[i].data(), 0, rows * dim_v, dim_v, 1};
        call.lse = {lse[i].data(), 0, rows, 1, 0};
        call.dropout = dropout, call.seed = 3, call.precision = precision, call.threads = 1;
        i == 0 ? amx::forward(call) : amx_emulated::forward(call);
    }
    long long count = 0;
    for (std::size_t i = 0; i < lse[0].size(); ++i)
        count += std::memcmp(&lse[0][i], &lse[1][i], 4) != 0 && !(std::isnan(lse[0][i]) && std::isnan(lse[1][i]));
    if (!spoiled) return count + (std::memcmp(out[0].data(), out[1].data(), out[0].size()) != 0);
    return count;
}

}  // namespace

int main() {
    if (__builtin_cpu_supports("amx-bf16")) return std::puts("this processor has the instructions: nothing to trap"), 0;
    struct sigaction action = {};
    action.sa_sigaction = trap;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, nullptr);
    long long wrong = 0, calls = 0;
    const auto check = [&](long long found) { wrong += found, ++calls; };
    for (int dtype : {kBFloat16, kFloat16, kFloat32})
        for (int precision = 0; precision < (dtype == kFloat32 ? 3 : 1); ++precision) {
            check(differences(dtype, precision, 2, 1, 80, 200, 64, 64, kNoMask, 0, 0, 0.125, false));
            check(differences(dtype, precision, 2, 2, 150, 150, 64, 128, kIntervals, 0, 0, -0.2, false));
            check(differences(dtype, precision, 3, 1, 40, 300, 80, 33, kBits, 2.0, 0.3, 0.2, false));
            check(differences(dtype, precision, 1, 1, 65, 1, 1, 1, kNoMask, 0, 0, 0.5, false));
            check(differences(dtype, precision, 2, 1, 70, 190, 96, 40, kIntervals, 0, 0, 0.1, true));
        }
    for (int kind = 0; kind < 6; ++kind) std::printf("%-12s %lld\n", names[kind], carried_out[kind]);
    std::printf("%lld calls, %lld differences\n", calls, wrong);
    return wrong == 0 && carried_out[kMultiply] > 0 ? 0 : 1;
}
