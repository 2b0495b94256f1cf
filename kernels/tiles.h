// Tile registers: eight matrices of 16 rows by 64 bytes, and the product of bfloat16 pairs between them.
// Enters: addresses and row strides in bytes. Leaves: tiles in memory. Floor: above simd.h, beside scores.h.
//
//   multiply<C, A, B>:  C[m][n] += sum over k < 16 of A[m][2k] B[k][2n] + A[m][2k+1] B[k][2n+1]   (TDPBF16PS)
//
// Two implementations of one interface: the processor's, and one in plain vectors that computes what the instruction
// defines, bit for bit, so that a kernel made of tiles can be proved where no such processor is at hand.
// Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2: "TDPBF16PS"; vol. 1, ch. 18 (AMX), ch. 13
// (XSAVE).
#pragma once
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "simd.h"

namespace regard::REGARD_TARGET {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;

// The registers that the processor has. They belong to the thread; `configure` and `release` bracket a task.
// Written as assembler: the intrinsics of GCC 12 load the configuration from too small an operand, and none tells the
// compiler that a tile load reads memory.
struct ProcessorTiles {
    static REGARD_INLINE void configure() {
        struct alignas(64) Configuration {
            std::uint8_t palette, start_row, reserved[14];
            std::uint16_t row_bytes[16];
            std::uint8_t rows[16];
        } c = {};
        static_assert(sizeof c == 64);
        c.palette = 1;
        for (int i = 0; i < kTiles; ++i) c.row_bytes[i] = kTileBytes, c.rows[i] = kTileRows;
        asm volatile("ldtilecfg %0" : : "m"(c));
    }
    static REGARD_INLINE void release() { asm volatile("tilerelease" : : : "memory"); }
    template <int R>
    static REGARD_INLINE void zero() {
        asm volatile("tilezero %%tmm%c0" : : "i"(R));
    }
    template <int R>
    static REGARD_INLINE void load(const void* from, i64 stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(R) : "memory");
    }
    template <int R>
    static REGARD_INLINE void store(void* to, i64 stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(R) : "memory");
    }
    template <int C, int A, int B>
    static REGARD_INLINE void multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    }
};

// The same in memory. Even and odd members of the pairs are summed apart by fused multiply-adds from zero, added to
// each other, and then to C; every step rounds to nearest even, reads denormals as zero and flushes them to zero.
class EmulatedTiles {
    using V = Vector<float>;
    using U = LanesOf<float>::U;

  public:
    void configure() {}
    void release() {}
    template <int R>
    void zero() {
        for (U& row : tiles_[R]) row = U{};
    }
    template <int R>
    void load(const void* from, i64 stride) {
        for (int m = 0; m < kTileRows; ++m)
            tiles_[R][m] =
                *reinterpret_cast<const LanesOf<float>::LooseU*>(static_cast<const char*>(from) + m * stride);
    }
    template <int R>
    void store(void* to, i64 stride) const {
        for (int m = 0; m < kTileRows; ++m)
            *reinterpret_cast<LanesOf<float>::LooseU*>(static_cast<char*>(to) + m * stride) = tiles_[R][m];
    }
    template <int C, int A, int B>
    void multiply() {
        multiply(tiles_[C], tiles_[A], tiles_[B]);
    }

  private:
    static __attribute__((noinline)) void multiply(U* c, const U* a, const U* b) {
        constexpr unsigned kFlushAll = 0x9fc0;  // flush to zero, denormals are zeros, no exceptions, to nearest even
        const unsigned before = _mm_getcsr();
        _mm_setcsr(kFlushAll);
        asm volatile("" : : : "memory");  // no arithmetic moves out of the bracket: all of it hangs on loads and stores
        for (int m = 0; m < kTileRows; ++m) {
            V even = {}, odd = {};
            for (int k = 0; k < kTileRows; ++k) {
                const U left = U{} + a[m][k];
                even = (V)_mm512_fmadd_ps((__m512)(left << 16), (__m512)(b[k] << 16), (__m512)even);
                odd = (V)_mm512_fmadd_ps((__m512)(left & 0xffff0000u), (__m512)(b[k] & 0xffff0000u), (__m512)odd);
            }
            c[m] = (U)((V)c[m] + (even + odd));
        }
        asm volatile("" : : : "memory");
        _mm_setcsr(before);
    }

    U tiles_[kTiles][kTileRows] = {};
};

// Whether the processor's tiles do here what the manual says: the system lets this process use them, and products,
// chains of them, strides and every register agree with the emulation. Null, or what is wrong. Sums of small integers
// have no rounding, so they must agree to the bit; sums of odd fractions to their rounding, whatever the order.
inline const char* trouble_with_tiles() {
#if defined(__linux__) && defined(__x86_64__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return "the system refuses the tile registers";
    constexpr int kStride = 80;
    alignas(64) static char a[2][kTileRows * kStride], b[2][kTileRows * kStride];
    alignas(64) static float found[4][kTileRows * kStride / 4], expected[4][kTileRows * kStride / 4];
    const auto run = [](auto& tiles, float (*to)[kTileRows* kStride / 4]) {
        tiles.configure();
        tiles.template load<4>(a[0], kStride), tiles.template load<5>(a[1], kStride);
        tiles.template load<6>(b[0], kStride), tiles.template load<7>(b[1], kStride);
        tiles.template zero<0>(), tiles.template zero<1>(), tiles.template zero<2>(), tiles.template zero<3>();
        for (int i = 0; i < 2; ++i) {
            tiles.template multiply<0, 4, 6>(), tiles.template multiply<1, 4, 7>();
            tiles.template multiply<2, 5, 6>(), tiles.template multiply<3, 5, 7>();
        }
        tiles.template store<0>(to[0], kStride), tiles.template store<1>(to[1], kStride);
        tiles.template store<2>(to[2], kStride), tiles.template store<3>(to[3], kStride);
        tiles.release();
    };
    u32 random = 12345;
    for (int round = 0; round < 4; ++round) {
        const bool exact = round < 2;
        for (int t = 0; t < 4; ++t)
            for (int m = 0; m < kTileRows; ++m)
                for (int n = 0; n < 32; ++n) {
                    random = random * 1664525 + 1013904223;
                    const int whole = static_cast<int>(random >> 24) - 128;
                    narrow(exact ? static_cast<float>(whole) : static_cast<float>(whole) / 96,
                           reinterpret_cast<BFloat16*>((t < 2 ? a[t] : b[t - 2]) + m * kStride) + n);
                }
        ProcessorTiles real;
        EmulatedTiles emulated;
        run(real, found);
        run(emulated, expected);
        const float allowed = exact ? 0.0f : 1e-4f;  // 64 products of at most 1.8, and some 70 roundings
        for (int t = 0; t < 4; ++t)
            for (int m = 0; m < kTileRows; ++m)
                for (int n = 0; n < kTileRows; ++n) {
                    const float off = found[t][m * kStride / 4 + n] - expected[t][m * kStride / 4 + n];
                    if (!(off <= allowed && -off <= allowed)) return "their products are not those of the manual";
                }
    }
    return nullptr;
#else
    return "this system has no way to ask for the tile registers";
#endif
}

}  // namespace regard::REGARD_TARGET
