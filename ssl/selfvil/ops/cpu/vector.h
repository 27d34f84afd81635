// Vectors, matrix products and threads of the CPU kernels, for any instruction set.
//
// Written with the vector extensions of GCC and Clang, so that one source serves all processors: the flags of the
// compiler choose the width of a vector. No header of torch is included, which keeps the compilation short.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#include "tiles.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8, VECTORS = 3;  // a product keeps ROWS × VECTORS sums in registers
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 4, VECTORS = 3;
#else
constexpr int LANES = 4, ROWS = 4, VECTORS = 3;
#endif
constexpr int64_t ALIGNED = 16;  // rows and columns of padded matrices are multiples of this, and so of the above

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

constexpr int64_t AHEAD = 8;  // rows, of tokens or of a factor, that are asked for before they are read

// Asks for n numbers before they are read: pieces of rows are too short for the processor to read ahead.
template <class T>
inline void prefetch(const T* from, int64_t n) {
  for (int64_t k = 0; k < n; k += 64 / (int64_t)sizeof(T)) __builtin_prefetch(from + k);
}
inline Vector load(const float* p) { Vector x; memcpy(&x, p, sizeof x); return x; }
inline void store(float* p, Vector x) { memcpy(p, &x, sizeof x); }
inline Vector all(float x) { return x - Vector{}; }
inline Vector choose(Integers condition, Vector yes, Vector no) { return condition ? yes : no; }
// 1 / x with a relative error below 2e-7, for normal numbers.
inline Vector reciprocal(Vector x) {
#if defined(__AVX512F__)  // a division takes as long as ten other operations
  const Vector y = (Vector)_mm512_rcp14_ps((__m512)x);
  return y * (2.f - x * y);
#else
  return 1.f / x;
#endif
}
inline float sum(Vector x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#endif
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += x[lane];
  return total;
}
inline Integers lanes() {
  Integers x{};
  for (int lane = 0; lane < LANES; lane++) x[lane] = lane;
  return x;
}
inline int64_t padded(int64_t n) { return (n + ALIGNED - 1) / ALIGNED * ALIGNED; }
// A stride for rows of n numbers with which a column of the matrix does not map to few sets of the cache.
inline int64_t apart(int64_t n) { return n % 64 ? n : n + ALIGNED; }

// exp with a relative error below 1e-7, limited to normal numbers: x below -87.3 gives 1e-38, x above 88.3 gives 2e38.
// exp(x) = 2^n exp(r), |r| <= log(2) / 2; ln 2 is subtracted in two parts, and the polynomial is that of Cephes' expf.
inline Vector exponential(Vector x) {
  x = choose(x < -87.3f, all(-87.3f), x);  // not-a-number passes
  x = choose(x > 88.3f, all(88.3f), x);
  const float shift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  Vector shifted = x * 1.44269504088896341f + shift, n = shifted - shift;
  x = x - n * 0.693359375f;
  x = x + n * 2.12194440e-4f;
  Vector y = all(1.9875691500e-4f);
  y = y * x + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  y = y * (x * x) + x + 1.f;
  Bits power = ((Bits)shifted - (uint32_t)(0x4b400000 - 127)) << 23;
  return y * (Vector)power;
}

// --- numbers in memory -----------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};

inline Vector read(const float* p) { return load(p); }
inline Vector read(const BFloat16* p) {
  Halves x;
  memcpy(&x, p, sizeof x);
  return (Vector)(__builtin_convertvector(x, Bits) << 16);
}
inline void write(float* p, Vector x) { store(p, x); }
// The upper 16 bits are the nearest bfloat16, ties to even.
inline Bits rounded(Vector x) {
  Bits bits = (Bits)x, nan = (Bits)(x != x);
  return ((bits + 0x7fff + ((bits >> 16) & 1)) & ~nan) | (nan & 0x7fc00000);
}
inline Halves halves(Vector x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  return __builtin_convertvector(rounded(x) >> 16, Halves);
#endif
}
inline void write(BFloat16* p, Vector x) {
  const Halves result = halves(x);
  memcpy(p, &result, sizeof result);
}
// Words of neighbouring bfloat16, the first in the lower half.
inline Vector words_of(Halves first, Halves second) {
  return (Vector)(__builtin_convertvector(first, Bits) | (__builtin_convertvector(second, Bits) << 16));
}

// n numbers to float32, with zeros up to padded(n); and back.
template <class T>
void read_row(const T* from, int64_t n, float* to) {
  int64_t d = 0;
  for (; d + LANES <= n; d += LANES) store(to + d, read(from + d));
  if (d < n) {
    T rest[LANES] = {};
    memcpy(rest, from + d, (n - d) * sizeof(T));
    store(to + d, read(rest));
    d += LANES;
  }
  for (; d < padded(n); d += LANES) store(to + d, Vector{});
}
template <class T>
void write_row(const float* from, int64_t n, T* to) {
  int64_t d = 0;
  for (; d + LANES <= n; d += LANES) write(to + d, load(from + d));
  if (d < n) {
    T rest[LANES];
    write(rest, load(from + d));
    memcpy(to + d, rest, (n - d) * sizeof(T));
  }
}

// --- matrices in float32, rows and columns padded with zeros ---------------------------------------------------------

template <int WIDTH, int... LANE>
inline void exchange(Vector& x, Vector& y, std::integer_sequence<int, LANE...>) {
  // Exchanges the blocks of WIDTH lanes above the diagonal of x with those below the diagonal of y.
#if defined(__clang__)
  Vector low = __builtin_shufflevector(x, y, (LANE & WIDTH ? LANES + LANE - WIDTH : LANE)...);
  y = __builtin_shufflevector(x, y, (LANE & WIDTH ? LANES + LANE : LANE + WIDTH)...);
#else
  Vector low = __builtin_shuffle(x, y, Integers{(LANE & WIDTH ? LANES + LANE - WIDTH : LANE)...});
  y = __builtin_shuffle(x, y, Integers{(LANE & WIDTH ? LANES + LANE : LANE + WIDTH)...});
#endif
  x = low;
}
template <int WIDTH>
inline void exchange_all(Vector (&x)[LANES]) {
  if constexpr (WIDTH > 0) {
#pragma GCC unroll 16
    for (int row = 0; row < LANES; row++)
      if (!(row & WIDTH)) exchange<WIDTH>(x[row], x[row + WIDTH], std::make_integer_sequence<int, LANES>());
    exchange_all<WIDTH / 2>(x);
  }
}
// to (columns, rows) = the transpose of from (rows, columns); both sizes are multiples of LANES.
inline void transpose(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; row += LANES)
    for (int64_t column = 0; column < columns; column += LANES) {
      Vector x[LANES];
#pragma GCC unroll 16
      for (int n = 0; n < LANES; n++) x[n] = load(from + (row + n) * stride + column);
      exchange_all<LANES / 2>(x);
#pragma GCC unroll 16
      for (int n = 0; n < LANES; n++) store(to + (column + n) * to_stride + row, x[n]);
    }
}
// The same for any number of rows, up to the next multiple of LANES in `to`; the columns after them are not defined.
inline void transpose_some(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t column = 0; column < columns; column += LANES) {
    Vector x[LANES];
    for (int n = 0; n < LANES; n++) x[n] = n < rows ? load(from + n * stride + column) : Vector{};
    exchange_all<LANES / 2>(x);
    for (int n = 0; n < LANES; n++) store(to + (column + n) * to_stride, x[n]);
  }
}

// --- products --------------------------------------------------------------------------------------------------------

// The factors of a product A B are matrices of words of 32 bits: float32, or pairs of bfloat16 that are neighbours along
// the columns of A and the rows of B. Sums are float32. Sizes are in numbers, strides in words.
// `GROUP` rows of a product are computed together, and `PANEL` columns.
struct Full {
  static constexpr int PER_WORD = 1;
  static constexpr bool TILES = false;
  static constexpr int64_t GROUP = ROWS, PANEL = VECTORS * LANES;
  static Vector add(Vector sum, Vector a, Vector b) { return sum + a * b; }
};
#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int PER_WORD = 2;
#if defined(__AMX_BF16__)
  static constexpr bool TILES = true;
  static constexpr int64_t GROUP = 2 * TILE, PANEL = 2 * TILE;
#else
  static constexpr bool TILES = false;
  static constexpr int64_t GROUP = ROWS, PANEL = VECTORS * LANES;
#endif
  static Vector add(Vector sum, Vector a, Vector b) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#else
using Pairs = Full;
#endif

struct Factor {
  const float* words;
  int64_t stride;
  Factor from(int64_t row) const { return {words + row * stride, stride}; }
};

// Matrix x as A of a product.
template <class Words>
Factor as_left(const float* x, int64_t stride, int64_t rows, int64_t columns, float* buffer) {
  if (Words::PER_WORD == 1) return {x, stride};
  const int64_t words = padded((columns + 1) / 2), to_stride = apart(words);
  for (int64_t row = 0; row < rows; row++) {
    BFloat16* to = reinterpret_cast<BFloat16*>(buffer + row * to_stride);
    int64_t c = 0;
    for (; c < columns; c += LANES) write(to + c, load(x + row * stride + c));
    for (; c < 2 * words; c += LANES) write(to + c, Vector{});
  }
  return {buffer, to_stride};
}
// Matrix x as B of a product, or its transpose as A: then the words of A are apart by 1 along its rows.
template <class Words>
Factor as_right(const float* x, int64_t stride, int64_t rows, int64_t columns, float* buffer) {
  if (Words::PER_WORD == 1) return {x, stride};
  for (int64_t row = 0; row < rows; row += 2)
    for (int64_t c = 0; c < columns; c += LANES) {
      store(buffer + row / 2 * stride + c,
            words_of(halves(load(x + row * stride + c)), halves(load(x + (row + 1) * stride + c))));
    }
  return {buffer, stride};
}
// The transpose of a left factor, which is a right factor.
template <class Words>
Factor transposed(Factor x, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  transpose(x.words, x.stride, rows, padded((columns + Words::PER_WORD - 1) / Words::PER_WORD), to, to_stride);
  return {to, to_stride};
}

struct Range {
  int64_t begin, end;
};

// C (ROWS, N vectors) = A B, or C + A B, of `inner` words. A has a stride for rows and one for columns.
template <class Words, int N>
__attribute__((noinline)) void multiply(int64_t inner, const float* A, int64_t row, int64_t column, const float* B, int64_t b_stride, float* C,
              int64_t c_stride, bool add) {
  Vector sums[ROWS][N];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
    for (int n = 0; n < N; n++) sums[r][n] = add ? load(C + r * c_stride + n * LANES) : Vector{};
  for (int64_t k = 0; k < inner; k++, A += column, B += b_stride) {
    Vector b[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; n++) b[n] = load(B + n * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      int32_t word;
      memcpy(&word, A + r * row, sizeof word);
      Vector a = (Vector)(word - Integers{});
#pragma GCC unroll 3
      for (int n = 0; n < N; n++) sums[r][n] = Words::add(sums[r][n], a, b[n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
    for (int n = 0; n < N; n++) store(C + r * c_stride + n * LANES, sums[r][n]);
}

template <class Words>
__attribute__((noinline)) void multiply(int64_t vectors, int64_t inner, const float* A, int64_t row, int64_t column, const float* B,
                     int64_t b_stride, float* C, int64_t c_stride, bool add) {
  static_assert(VECTORS == 3, "one case for each number of vectors");
  if (vectors == 3) multiply<Words, 3>(inner, A, row, column, B, b_stride, C, c_stride, add);
  if (vectors == 2) multiply<Words, 2>(inner, A, row, column, B, b_stride, C, c_stride, add);
  if (vectors == 1) multiply<Words, 1>(inner, A, row, column, B, b_stride, C, c_stride, add);
}

enum Left { PLAIN, TRANSPOSED };

// C (rows, columns) = A B or C + A B, where A may be given as its transpose, as a right factor. `range(r)` are the
// columns of A that are not 0 for the rows r to r + GROUP.
template <Left LEFT, class F>
void tile_product(int64_t rows, int64_t columns, Factor A, Factor B, float* C, int64_t c_stride, bool add, F range) {
  constexpr int64_t GROUP = Pairs::GROUP, PANEL = Pairs::PANEL, DEPTH = 4 * TILE;
  for (int64_t r = 0; r < rows; r += GROUP) {
    const int64_t height = rows - r < GROUP ? rows - r : GROUP;
    const Range inner = range(r);
    const int64_t begin = inner.begin / 2, end = (inner.end + 1) / 2, depth = LEFT == PLAIN ? end - begin : DEPTH;
    for (int64_t k = begin; k < end; k += depth) {
      alignas(64) float turned[LEFT == PLAIN ? 1 : GROUP * DEPTH];
      const int64_t words = end - k < depth ? end - k : depth;
      if constexpr (LEFT == TRANSPOSED) {  // whole vectors; what follows the last words is not used
        for (int64_t word = 0; word < words; word += TILE)
          transpose_some(A.words + (k + word) * A.stride + r, A.stride, words - word, height, turned + word, DEPTH);
      }
      for (int64_t column = 0; column < columns; column += PANEL)
        multiply_tiles(height, columns - column, words, LEFT == PLAIN ? A.words + r * A.stride + k : turned,
                       LEFT == PLAIN ? A.stride : DEPTH, B.words + k * B.stride + column, B.stride,
                       C + r * c_stride + column, c_stride, add || k > begin);
    }
  }
}
template <class Words, Left LEFT, class F>
void product(int64_t rows, int64_t columns, Factor A, Factor B, float* C, int64_t c_stride, bool add, F range) {
  const int64_t row = LEFT == PLAIN ? A.stride : 1, column = LEFT == PLAIN ? 1 : A.stride;
  if constexpr (Words::TILES) return tile_product<LEFT>(rows, columns, A, B, C, c_stride, add, range);
  int64_t vectors = columns / LANES, panels = (vectors + VECTORS - 1) / VECTORS;
  for (int64_t panel = 0; panel < panels; panel++) {  // of about equal width
    int64_t first = vectors * panel / panels, last = vectors * (panel + 1) / panels;
    for (int64_t r = 0; r < rows; r += ROWS) {
      Range inner = range(r);
      inner.begin /= Words::PER_WORD, inner.end = (inner.end + Words::PER_WORD - 1) / Words::PER_WORD;
      multiply<Words>(last - first, inner.end - inner.begin, A.words + r * row + inner.begin * column, row, column,
                      B.words + inner.begin * B.stride + first * LANES, B.stride, C + r * c_stride + first * LANES,
                      c_stride, add);
    }
  }
}
template <class Words, Left LEFT>
void product(int64_t rows, int64_t columns, int64_t inner, Factor A, Factor B, float* C, int64_t c_stride, bool add) {
  product<Words, LEFT>(rows, columns, A, B, C, c_stride, add, [=](int64_t) { return Range{0, inner}; });
}

// The same, where row r of C has only the columns up to `first` + r. Others are not written, except in
// the rest of a vector, or of GROUP rows.
template <class Words>
void causal_product(int64_t rows, int64_t first, int64_t inner, Factor A, Factor B, float* C, int64_t c_stride) {
  const int64_t panel = Words::PANEL, words = (inner + Words::PER_WORD - 1) / Words::PER_WORD;
  for (int64_t column = 0; column < first + rows; column += panel)
    for (int64_t r = 0; r < rows; r += Words::GROUP) {
      if constexpr (Words::TILES) {
        const int64_t height = rows - r < Words::GROUP ? rows - r : Words::GROUP;
        if (column < first + r + height)
          multiply_tiles(height, first + r + height - column, words, A.words + r * A.stride, A.stride,
                         B.words + column, B.stride, C + r * c_stride + column, c_stride, false);
        continue;
      }
      int64_t vectors = (first + r + ROWS - column + LANES - 1) / LANES;
      multiply<Words>(vectors < VECTORS ? vectors : VECTORS, words, A.words + r * A.stride, A.stride, 1,
                      B.words + column, B.stride, C + r * c_stride + column, c_stride, false);
    }
}

inline float dot(const float* x, const float* y, int64_t n) {
  Vector total{};
  for (int64_t d = 0; d < n; d += LANES) total += load(x + d) * load(y + d);
  return sum(total);
}
// y = scale · y + factor · x
inline void scale_add(float* y, float scale, float factor, const float* x, int64_t n) {
  for (int64_t d = 0; d < n; d += LANES) store(y + d, scale * load(y + d) + factor * load(x + d));
}
inline void scale(float* y, float factor, int64_t n) {
  for (int64_t d = 0; d < n; d += LANES) store(y + d, factor * load(y + d));
}

// Adds the parts (parts, n) into the first of them.
inline void add_parts(float* sums, int64_t parts, int64_t n) {
  for (int64_t part = 1; part < parts; part++)
    for (int64_t i = 0; i < n; i++) sums[i] += sums[part * n + i];
}

// --- memory and threads ----------------------------------------------------------------------------------------------

// Parts of one block of memory, each aligned to 64 bytes. Without memory it only counts.
class Workspace {
 public:
  explicit Workspace(float* memory = nullptr) : memory_(memory) {}
  float* take(int64_t floats) {
    float* part = memory_ ? memory_ + used_ : nullptr;
    used_ += (floats + 15) / 16 * 16;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  float* memory_;
  int64_t used_ = 0;
};

// Numbers too small for a normal float32 become 0 while this exists: processors compute with them slowly.
class FlushDenormals {
#if defined(__SSE2__)
 public:
  FlushDenormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8040); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#endif
};

// Working memory of this thread, aligned to 64 bytes, or null. It is kept for the next call: new pages of memory cost
// as much as the work on them. Each SLOT is another block; blocks above 64 MB are returned by the next smaller request.
template <int SLOT>
float* kept_memory(int64_t floats) {
  struct Block {
    void* memory = nullptr;
    int64_t floats = 0;
    ~Block() { free(memory); }
  };
  static thread_local Block block;
  if (block.floats < floats || (block.floats > (1 << 24) && floats <= (1 << 24))) {
    free(block.memory);
    block.floats = 0;
    if (posix_memalign(&block.memory, 64, floats * sizeof(float))) return block.memory = nullptr, nullptr;
    block.floats = floats;
  }
  return static_cast<float*>(block.memory);
}

// Starts a function in all threads of OpenMP's pool: GOMP_parallel of the library that torch has loaded.
using Parallel = void (*)(void (*function)(void*), void* argument, unsigned threads, unsigned flags);

// Runs work(item, memory) for every item, each with `floats` of memory, and returns whether there was enough memory.
// An item is computed by one thread in a fixed order, so that the number of threads does not change results.
template <class F>
bool for_each(int64_t items, int64_t floats, int64_t threads, Parallel parallel, F work) {
  struct Shared {
    int64_t items, next, floats;
    F& work;
  } shared{items, 0, floats, work};
  auto run = [](void* argument) {
    Shared& shared = *static_cast<Shared*>(argument);
    FlushDenormals flush;
    [[maybe_unused]] Tiles tiles;
    float* memory = shared.floats ? kept_memory<0>(shared.floats) : nullptr;
    if (shared.floats && !memory) return;
    for (;;) {
      int64_t item = __atomic_fetch_add(&shared.next, 1, __ATOMIC_RELAXED);
      if (item >= shared.items) break;
      shared.work(item, memory);
    }
  };
  if (threads > items) threads = items;
  if (threads > 1)
    parallel(run, &shared, threads, 0);
  else
    run(&shared);
  return shared.next >= items;
}

}  // namespace
