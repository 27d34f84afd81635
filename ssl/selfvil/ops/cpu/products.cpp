// Matrix products of linear layers on CPUs, with what stands before and after them in the same pass: conversion to
// bfloat16, bias, GELU and its gradient, the sum with the residual stream, and the gradient of the bias.
//
// C = A B. Factors are copied ("packed") in the order in which the innermost loop reads them: all of B for at most DEPTH
// terms of a sum, and GROUP rows of A, unless these can be read in place. Some whole rows of C are computed in the cache,
// and then finished row by row: processors read memory ahead along rows, but not down the columns of a tile.
// Every sum has a fixed order, for any number of threads.
#include "vector.h"

namespace {

constexpr int64_t DEPTH = 1024;         // terms that are added before a sum goes to memory, in gradients of weights
constexpr int64_t CHUNK = 64;           // rows of an item of work
constexpr int64_t PARTS = 4;

// Filled in by layers.py: every member has 8 bytes. Strides are in numbers; `half` means bfloat16 instead of float32.
struct Product {
  Parallel parallel;
  int64_t threads, pairs;  // pairs: factors are multiplied in bfloat16
  int64_t rows, columns, inner;
  const void* a;
  int64_t a_half, a_row, a_column;  // A(m, k) is at m · a_row + k · a_column; one of both is 1
  int64_t b_half, b_transposed, b_stride;  // B(k, n) is at k · stride + n, or n · stride + k if transposed
  const void* b[PARTS];  // one below the other, where the first has lines 0 to b_lines[0]
  int64_t b_lines[PARTS];
  void* c;
  int64_t c_half, c_stride;
  float* tail;  // the last columns of C, (rows, tail_columns)
  int64_t tail_columns;
  const float* bias;  // (columns,) or null
  int64_t gelu;       // 0: none; 1: C becomes GELU(C); 2: C becomes C · GELU'(before)
  void* before;       // the argument of GELU, as C: written with 1, read with 2
  void* after;        // GELU of it, as C: written with 2
  const void* residual;  // added to C · scale, or null
  int64_t residual_half, residual_stride;
  const float* scale;  // of each `scale_rows` rows, or null
  int64_t scale_rows;
  float* a_sums;  // (rows,): sums of A over k, or null

  int64_t main_columns() const { return columns - tail_columns; }
  bool sums_in_c() const { return !c_half && !bias && !gelu && !residual && !tail; }
  template <class T>
  const T* line(int64_t n) const {
    for (int64_t part = 0; part < PARTS; part++) {
      if (n < b_lines[part]) return static_cast<const T*>(b[part]) + n * b_stride;
      n -= b_lines[part];
    }
    return nullptr;
  }
};

// --- packing ---------------------------------------------------------------------------------------------------------

constexpr int64_t LINES = 32;  // of B that are packed together

// LANES words of a line from k: numbers, or pairs of neighbours. Words after the line's end are 0.
template <class Words, class T>
inline Vector words_along(const T* from, int64_t left) {
  constexpr int64_t PER_WORD = Words::PER_WORD;
  if (left < LANES * PER_WORD) {
    T rest[LANES * PER_WORD] = {};
    if (left > 0) memcpy(rest, from, left * sizeof(T));
    return words_along<Words>(static_cast<const T*>(rest), LANES * PER_WORD);
  }
  if constexpr (PER_WORD == 1) return read(from);
  if constexpr (PER_WORD == 2 && sizeof(T) == 2) return load(reinterpret_cast<const float*>(from));
  BFloat16 pairs[2 * LANES];
  write(pairs, read(from)), write(pairs + LANES, read(from + LANES));
  return load(reinterpret_cast<const float*>(pairs));
}
// LANES numbers of a line of which `left` remain; the others are 0.
template <class T>
inline Vector numbers(const T* from, int64_t left) {
  if (left >= LANES) return read(from);
  T rest[LANES] = {};
  memcpy(rest, from, left * sizeof(T));
  return read(static_cast<const T*>(rest));
}
inline Halves halves_of(const float* from, int64_t left) { return halves(numbers(from, left)); }
inline Halves halves_of(const BFloat16* from, int64_t left) {
  Halves x{};
  if (left >= LANES) memcpy(&x, from, sizeof x);
  else memcpy(&x, from, left * sizeof(BFloat16));
  return x;
}
// LANES words of one line, or pairs of two lines, of which the second may be null.
template <class Words, class T>
inline Vector words_across(const T* even, const T* odd, int64_t left) {
  if constexpr (Words::PER_WORD == 1) return numbers(even, left);
  return words_of(halves_of(even, left), odd ? halves_of(odd, left) : Halves{});
}

// A panel: for each word of k, WIDTH numbers of different lines. `line(n)` is null for lines that do not exist.
template <class Words, int64_t WIDTH, class T, class F>
void pack_along(int64_t inner, F line, float* to) {
  const int64_t words = (inner + Words::PER_WORD - 1) / Words::PER_WORD;
  for (int64_t n = 0; n < WIDTH; n += LANES) {
    const T* lines[LANES];
    for (int64_t m = 0; m < LANES; m++) lines[m] = n + m < WIDTH ? line(n + m) : nullptr;
    for (int64_t k = 0; k < words; k += LANES) {
      Vector x[LANES];
      for (int64_t m = 0; m < LANES; m++)
        x[m] = lines[m] ? words_along<Words>(lines[m] + k * Words::PER_WORD, inner - k * Words::PER_WORD) : Vector{};
      exchange_all<LANES / 2>(x);
      const int64_t end = words - k < LANES ? words - k : LANES;
      for (int64_t m = 0; m < end; m++)
        memcpy(to + (k + m) * WIDTH + n, &x[m], (WIDTH - n < LANES ? WIDTH - n : LANES) * sizeof(float));
    }
  }
}
// The same for several panels of together `count` numbers that are neighbours in memory; `line(k)` has the first.
// `stride` words are from one panel to the next. `sums` gets their sums over k, and may be null.
template <class Words, int64_t WIDTH, class T, class F>
void pack_across(int64_t inner, int64_t count, F line, float* to, int64_t stride, float* sums) {
  constexpr int64_t PART = WIDTH < LANES ? WIDTH : LANES;
  Vector totals[CHUNK / LANES] = {};
  for (int64_t k = 0; k < inner; k += Words::PER_WORD) {
    const T *even = line(k), *odd = Words::PER_WORD == 2 && k + 1 < inner ? line(k + 1) : nullptr;
    for (int64_t later = k + AHEAD; later < k + AHEAD + Words::PER_WORD && later < inner; later++)
      prefetch(line(later), count);
    float* row = to + k / Words::PER_WORD * WIDTH;
    for (int64_t n = 0; n < count; n += LANES) {
      const Vector words = words_across<Words>(even + n, odd ? odd + n : nullptr, count - n);
      for (int64_t m = 0; m < LANES && n + m < count; m += PART)
        memcpy(row + (n + m) / WIDTH * stride + (n + m) % WIDTH, reinterpret_cast<const float*>(&words) + m,
               PART * sizeof(float));
      if (sums) {
        totals[n / LANES] += numbers(even + n, count - n);
        if (odd) totals[n / LANES] += numbers(odd + n, count - n);
      }
    }
  }
  for (int64_t n = 0; sums && n < count; n++) sums[n] += totals[n / LANES][n % LANES];
}

// For tiles: rows of words, to the end of a vector, with zeros after the last number.
template <class T, class F>
void pack_rows(int64_t inner, int64_t rows, F line, float* to, int64_t stride) {
  for (int64_t m = 0; m < rows; m++)
    for (int64_t k = 0; 2 * k < inner; k += LANES)
      store(to + m * stride + k, words_along<Pairs>(line(m) + 2 * k, inner - 2 * k));
}
// The same for `count` rows that are neighbours in memory; `line(k)` has number k of the first. `sums` may be null.
template <class T, class F>
void pack_turned(int64_t inner, int64_t count, F line, float* to, int64_t stride, float* sums) {
  for (int64_t m = 0; m < count; m += LANES) {
    Vector total{};
    for (int64_t k = 0; k < inner; k += 2 * LANES) {
      Vector x[LANES];
      for (int64_t word = 0; word < LANES; word++) {
        const int64_t first = k + 2 * word;
        for (int64_t later = first + 2 * LANES; later < first + 2 * LANES + 2 && later < inner; later++)
          prefetch(line(later) + m, count - m < LANES ? count - m : LANES);
        const T* even = first < inner ? line(first) + m : nullptr;
        const T* odd = first + 1 < inner ? line(first + 1) + m : nullptr;
        x[word] = even ? words_across<Pairs>(even, odd, count - m) : Vector{};
        if (sums && even) total += numbers(even, count - m);
        if (sums && odd) total += numbers(odd, count - m);
      }
      exchange_all<LANES / 2>(x);
      for (int64_t n = 0; n < LANES && m + n < count; n++) store(to + (m + n) * stride + k / 2, x[n]);
    }
    for (int64_t n = 0; sums && n < LANES && m + n < count; n++) sums[m + n] += total[n];
  }
}

// --- the end of a tile -----------------------------------------------------------------------------------------------

// GELU(x) = x Φ(x) and its derivative Φ(x) + x φ(x); erf is formula 7.1.26 of Abramowitz and Stegun, within 1.5e-7.
struct Gelu {
  Vector value, slope;
  explicit Gelu(Vector x) {
    const Vector z = choose(x < 0, -x, x) * 0.70710678118654752f, e = exponential(-z * z);
    const Vector t = reciprocal(1.f + 0.3275911f * z);
    Vector y = 1.061405429f * t - 1.453152027f;
    y = y * t + 1.421413741f;
    y = y * t - 0.284496736f;
    y = y * t + 0.254829592f;
    const Vector half = 0.5f * y * t * e, normal = choose(x < 0, half, 1.f - half);
    value = x * normal, slope = normal + x * e * 0.39894228040143268f;
  }
};
inline Vector read(const void* from, int64_t half, int64_t at) {
  return half ? read(static_cast<const BFloat16*>(from) + at) : read(static_cast<const float*>(from) + at);
}
inline void write(void* to, int64_t half, int64_t at, Vector x) {
  if (half) write(static_cast<BFloat16*>(to) + at, x);
  else write(static_cast<float*>(to) + at, x);
}
inline Vector round_to(int64_t half, Vector x) { return half ? (Vector)(rounded(x) & 0xffff0000u) : x; }

void finish(const Product& x, int64_t row, int64_t rows, int64_t column, int64_t columns, const float* tile,
            int64_t stride) {
  if (column >= x.main_columns()) {
    const int64_t first = column - x.main_columns(), left = x.tail_columns - first;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t n = 0; n < (columns < left ? columns : left); n++)
        x.tail[(row + r) * x.tail_columns + first + n] = tile[r * stride + n] + (x.bias ? x.bias[column + n] : 0);
    return;
  }
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t n = 0; n < columns; n += LANES) {
      Vector value = load(tile + r * stride + n);
      if (x.bias) value += load(x.bias + column + n);
      const int64_t at = (row + r) * x.c_stride + column + n;
      if (x.gelu == 1) {
        value = round_to(x.c_half, value);
        if (x.before) write(x.before, x.c_half, at, value);
        value = Gelu(value).value;
      } else if (x.gelu == 2) {
        const Gelu gelu(read(x.before, x.c_half, at));
        write(x.after, x.c_half, at, gelu.value);
        value *= gelu.slope;
      }
      if (x.residual) {
        if (x.scale) value *= x.scale[(row + r) / x.scale_rows];
        value += read(x.residual, x.residual_half, (row + r) * x.residual_stride + column + n);
      }
      write(x.c, x.c_half, at, value);
    }
  }
}

// --- the product -----------------------------------------------------------------------------------------------------

// Panels of B: those of the main columns, and after them those of the tail, padded.
template <int64_t WIDE>
struct Panels {
  int64_t main, all, main_end, end;
  explicit Panels(const Product& x)
      : main((x.main_columns() + WIDE - 1) / WIDE), all(main + (padded(x.tail_columns) + WIDE - 1) / WIDE),
        main_end(x.main_columns()), end(main_end + padded(x.tail_columns)) {}
  int64_t begin(int64_t panel) const { return panel < main ? panel * WIDE : main_end + (panel - main) * WIDE; }
  int64_t width(int64_t panel) const {
    const int64_t last = panel < main ? main_end : end, left = last - begin(panel);
    return left < WIDE ? left : WIDE;
  }
};

template <class Words, class A, class B>
bool compute(const Product& x) {
  constexpr int64_t WIDE = Words::PANEL, GROUP = Words::GROUP;
  const Panels<WIDE> panels(x);
  const int64_t blocks = x.sums_in_c() ? (x.inner + DEPTH - 1) / DEPTH : 1;
  constexpr int64_t STEP = Words::TILES ? 2 * TILE : 2;
  const int64_t depth = ((x.inner + blocks - 1) / blocks + STEP - 1) / STEP * STEP, words = depth / Words::PER_WORD;
  // Rows of A are read in place if their words are neighbours.
  const bool in_place = x.a_column == 1 && sizeof(A) * Words::PER_WORD == 4 && x.a_row % Words::PER_WORD == 0 &&
                        x.inner % Words::PER_WORD == 0;
  int64_t chunk = CHUNK;
  while (chunk > GROUP && (x.rows + chunk - 1) / chunk < 4 * x.threads) chunk /= 2;
  const int64_t chunks = (x.rows + chunk - 1) / chunk;
  const int64_t wide = apart(panels.end);  // a chunk's rows of C
  float* packed = kept_memory<1>(panels.all * WIDE * words);
  if (!packed) return false;
  const A* a = static_cast<const A*>(x.a);
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t first = block * depth, inner = x.inner - first < depth ? x.inner - first : depth;
    const int64_t used = (inner + Words::PER_WORD - 1) / Words::PER_WORD;
    // Numbers along k are packed panel by panel; across k, a few lines at a time, so that lines are read from end to end.
    auto pack_panel = [&](int64_t panel, float*) {
      const int64_t begin = panels.begin(panel), left = x.columns - begin;
      const int64_t count = left < panels.width(panel) ? left : panels.width(panel);
      auto line = [&](int64_t n) { return n < count ? x.template line<B>(begin + n) + first : nullptr; };
      pack_along<Words, WIDE, B>(inner, line, packed + panel * WIDE * words);
    };
    auto pack_lines = [&](int64_t item, float*) {
      const int64_t begin = item * LINES, left = inner - begin;
      auto line = [&](int64_t k) { return x.template line<B>(first + begin + k); };
      float* to = packed + begin / Words::PER_WORD * WIDE;
      pack_across<Words, WIDE, B>(left < LINES ? left : LINES, x.columns, line, to, WIDE * words, nullptr);
    };
    if (!(x.b_transposed ? for_each(panels.all, 0, x.threads, x.parallel, pack_panel)
                         : for_each((inner + LINES - 1) / LINES, 0, x.threads, x.parallel, pack_lines)))
      return false;
    auto multiply_rows = [&](int64_t item, float* memory) {
      const int64_t begin = item * chunk, end = begin + chunk < x.rows ? begin + chunk : x.rows;
      float *strip = memory, *buffer = memory + chunk * wide;
      auto across = [&](int64_t k) { return a + (first + k) * x.a_column + begin; };
      float* sums = x.a_sums ? x.a_sums + begin : nullptr;
      if (x.a_column != 1) {
        if constexpr (Words::TILES) pack_turned<A>(inner, end - begin, across, buffer, words, sums);
        else pack_across<Words, GROUP, A>(inner, end - begin, across, buffer, GROUP * words, sums);
      }
      for (int64_t r = begin; r < end && x.a_column == 1; r += GROUP) {
        const int64_t rows = end - r < GROUP ? end - r : GROUP;
        if (in_place && rows == GROUP) continue;
        float* to = buffer + (r - begin) * words;
        auto line = [&](int64_t m) { return m < rows ? a + (r + m) * x.a_row + first : nullptr; };
        if constexpr (Words::TILES) pack_rows<A>(inner, rows, line, to, words);
        else pack_along<Words, GROUP, A>(inner, line, to);
      }
      if (block)
        for (int64_t r = begin; r < end; r++)
          memcpy(strip + (r - begin) * wide, static_cast<float*>(x.c) + r * x.c_stride, x.columns * sizeof(float));
      for (int64_t panel = 0; panel < panels.all; panel++) {
        const int64_t width = panels.width(panel);
        const float* right = packed + panel * WIDE * words;
        for (int64_t r = begin; r < end; r += GROUP) {
          const int64_t rows = end - r < GROUP ? end - r : GROUP;
          const bool direct = in_place && rows == GROUP;
          const float* left = direct ? reinterpret_cast<const float*>(a + r * x.a_row + first)
                                     : buffer + (r - begin) * words;
          float* tile = strip + (r - begin) * wide + panels.begin(panel);
          if constexpr (Words::TILES)
            multiply_tiles(rows, width, used, left, direct ? x.a_row / 2 : words, right, WIDE, tile, wide, block > 0);
          else
            multiply<Words>(width / LANES, used, left, direct ? x.a_row / Words::PER_WORD : 1, direct ? 1 : GROUP, right,
                            WIDE, tile, wide, block > 0);
        }
      }
      finish(x, begin, end - begin, 0, panels.main_end, strip, wide);
      if (x.tail) finish(x, begin, end - begin, panels.main_end, x.tail_columns, strip + panels.main_end, wide);
    };
    if (!for_each(chunks, chunk * wide + chunk * words, x.threads, x.parallel, multiply_rows)) return false;
  }
  return true;
}

template <class Words>
bool compute(const Product& x) {
  if (x.a_half) return x.b_half ? compute<Words, BFloat16, BFloat16>(x) : compute<Words, BFloat16, float>(x);
  return x.b_half ? compute<Words, float, BFloat16>(x) : compute<Words, float, float>(x);
}

}  // namespace

// To be called once, before all others. Returns 0, or 1 if the operating system does not allow the instructions.
extern "C" int selfvil_start() { return tiles_allowed() ? 0 : 1; }

// Returns 0, or 1 without enough memory.
extern "C" int selfvil_product(const Product* x) {
  if (x->a_sums) memset(x->a_sums, 0, x->rows * sizeof(float));
  return (x->pairs ? compute<Pairs>(*x) : compute<Full>(*x)) ? 0 : 1;
}
