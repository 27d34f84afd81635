// Linear maps of each four neighbouring channels, which make q, k and v of the published layer.
#pragma once
#include "vector.h"

namespace {

// The lane `COLUMN` of each four.
template <int COLUMN, int... LANE>
inline Vector of_four(Vector x, std::integer_sequence<int, LANE...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, (LANE / 4 * 4 + COLUMN)...);
#else
  return __builtin_shuffle(x, Integers{(LANE / 4 * 4 + COLUMN)...});
#endif
}
struct Fours {
  Vector of[4];
  explicit Fours(Vector x) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>();
    of[0] = of_four<0>(x, lanes), of[1] = of_four<1>(x, lanes), of[2] = of_four<2>(x, lanes), of[3] = of_four<3>(x, lanes);
  }
};
inline Vector times(const Fours& x, const Vector (&weight)[4], Vector sum) {
  for (int n = 0; n < 4; n++) sum += x.of[n] * weight[n];
  return sum;
}

constexpr int64_t NEAR = 8;          // tokens whose channels are read together: in more rows, memory is not read ahead
constexpr int64_t MAP_SUMS = 15;     // rows of the gradients of weights, by column of a block, and of biases
constexpr int64_t MAP_VECTORS = 12;  // of the weights of q, k and v for LANES channels

// Weights (E / 4, 4, 4) of q, k and v for the channels [begin, end): by column of the blocks, or by row.
inline void arrange(const float* const (&weights)[3], int64_t begin, int64_t end, bool by_row, float* to) {
  for (int64_t e = begin; e < end; e += LANES)
    for (int p = 0; p < 3; p++)
      for (int n = 0; n < 4; n++)
        for (int lane = 0; lane < LANES; lane++)
          *to++ = weights[p][(e + lane) / 4 * 16 + (by_row ? n * 4 + lane % 4 : lane % 4 * 4 + n)];
}
// Of LANES channels, from what `arrange` has written; `e` counts from its first channel.
struct Maps {
  Vector of[3][4];
  Maps(const float* arranged, int64_t e) {
    for (int p = 0; p < 3; p++)
      for (int n = 0; n < 4; n++) of[p][n] = load(arranged + (e / LANES * MAP_VECTORS + p * 4 + n) * LANES);
  }
};

inline void add_to(float* sum, Vector x) { store(sum, load(sum) + x); }

// Gradients of LANES channels of at most NEAR tokens: of c and u, from those of q, k and v. `weight` is arranged by row.
// The functions of a token give c, u, and the gradient of map p. Sums of rows `stride` apart are added to `sums`.
template <class C, class U, class D>
inline void maps_backward(int64_t count, const Maps& weight, C c, U u, D gradient, Vector* dc, Vector* du, float* sums,
                          int64_t stride) {
  Vector d_weight[3][4] = {}, d_bias[3] = {};
  for (int64_t t = 0; t < count; t++) {
    const Fours from_c(c(t)), from_u(u(t));
    const Vector d[3] = {gradient(0, t), gradient(1, t), gradient(2, t)};
#pragma GCC unroll 3
    for (int p = 0; p < 3; p++) {
      const Fours& from = p < 2 ? from_c : from_u;
#pragma GCC unroll 4
      for (int m = 0; m < 4; m++) d_weight[p][m] += d[p] * from.of[m];
      d_bias[p] += d[p];
    }
    dc[t] = times(Fours(d[1]), weight.of[1], times(Fours(d[0]), weight.of[0], Vector{}));
    du[t] = times(Fours(d[2]), weight.of[2], Vector{});
  }
  for (int p = 0; p < 3; p++) {
    for (int m = 0; m < 4; m++) add_to(sums + (p * 5 + m) * stride, d_weight[p][m]);
    add_to(sums + (p * 5 + 4) * stride, d_bias[p]);
  }
}

}  // namespace
