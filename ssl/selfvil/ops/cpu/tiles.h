// Matrix products of bfloat16 by AMX: tiles of 16 rows of 16 words, which one instruction multiplies.
//
// Tiles are registers of a thread that `Tiles` sets up. The compiler does not know what the instructions read, so that
// every product begins and ends with a barrier for its memory accesses.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AMX_BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t TILE = 16;  // rows of a tile, and its words in a row

#if defined(__AMX_BF16__)

// This thread can use tiles while this exists. Afterwards they are set up as before, which may be by another library.
class Tiles {
 public:
  Tiles() {
    struct {
      uint8_t palette, start, unused[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } all{};
    all.palette = 1;
    for (int tile = 0; tile < 8; tile++) all.row_bytes[tile] = 4 * TILE, all.rows[tile] = TILE;
    static_assert(sizeof all == 64, "the format of the processor");
    _tile_storeconfig(before_);
    asm volatile("ldtilecfg %0" ::"m"(all));
  }
  ~Tiles() { asm volatile("ldtilecfg %0" ::"m"(before_)); }

 private:
  alignas(64) uint8_t before_[64];
};

// Whether the operating system lets this process use tiles: Linux wants to be asked before.
inline bool tiles_allowed() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of arch_prctl
  return !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
}

// Adds one word of k for all: C (16 R, 16 N) += A (16 R, 16 words) B (16 words, 16 N). Strides are in bytes.
template <int R, int N>
inline void add_tiles(const float* A, int64_t a_stride, const float* B, int64_t b_stride) {
  const int64_t a_tile = TILE * a_stride / 4;
  _tile_loadd(6, B, b_stride);
  if constexpr (N > 1) _tile_loadd(7, B + TILE, b_stride);
  _tile_loadd(4, A, a_stride);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (N > 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (R > 1) {
    _tile_loadd(5, A + a_tile, a_stride);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
  }
}

// C (16 R, 16 N) = A B, or C + A B, of any number of words. Strides are in words. All rows of A must be readable.
template <int R, int N>
__attribute__((noinline)) void multiply_tiles(int64_t words, const float* A, int64_t a_stride, const float* B,
                                              int64_t b_stride, float* C, int64_t c_stride, bool add) {
  float* below = C + TILE * c_stride;
  asm volatile("" ::: "memory");
  if (add) {
    _tile_loadd(0, C, 4 * c_stride);
    if constexpr (N > 1) _tile_loadd(1, C + TILE, 4 * c_stride);
    if constexpr (R > 1) _tile_loadd(2, below, 4 * c_stride);
    if constexpr (R > 1 && N > 1) _tile_loadd(3, below + TILE, 4 * c_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  int64_t k = 0;
  for (; k + TILE <= words; k += TILE) add_tiles<R, N>(A + k, 4 * a_stride, B + k * b_stride, 4 * b_stride);
  if (k < words) {  // what follows the last words may be anything, also not-a-number: zeros take its place
    alignas(64) float a[2 * TILE * TILE] = {}, b[2 * TILE * TILE] = {};
    for (int64_t row = 0; row < R * TILE; row++) memcpy(a + row * TILE, A + row * a_stride + k, (words - k) * 4);
    for (int64_t word = 0; word < words - k; word++)
      memcpy(b + word * N * TILE, B + (k + word) * b_stride, N * TILE * 4);
    asm volatile("" ::: "memory");
    add_tiles<R, N>(a, 4 * TILE, b, 4 * N * TILE);
  }
  _tile_stored(0, C, 4 * c_stride);
  if constexpr (N > 1) _tile_stored(1, C + TILE, 4 * c_stride);
  if constexpr (R > 1) _tile_stored(2, below, 4 * c_stride);
  if constexpr (R > 1 && N > 1) _tile_stored(3, below + TILE, 4 * c_stride);
  asm volatile("" ::: "memory");
}

// The same for one or two tiles of rows and columns.
inline void multiply_tiles(int64_t rows, int64_t columns, int64_t words, const float* A, int64_t a_stride,
                           const float* B, int64_t b_stride, float* C, int64_t c_stride, bool add) {
  auto run = rows > TILE ? columns > TILE ? multiply_tiles<2, 2> : multiply_tiles<2, 1>
                         : columns > TILE ? multiply_tiles<1, 2> : multiply_tiles<1, 1>;
  run(words, A, a_stride, B, b_stride, C, c_stride, add);
}

#else

class Tiles {};
inline bool tiles_allowed() { return true; }
inline void multiply_tiles(int64_t, int64_t, int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t,
                           bool) {}

#endif

}  // namespace
