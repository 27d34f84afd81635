// Working memory of the mLSTM of one head, and how tokens are copied into it and out of it.
//
// Tokens are packed into padded float32 matrices in the order of the scan, so that strides, bfloat16, widths and the
// direction concern only these copies.
#pragma once
#include "maps.h"

namespace {

constexpr int64_t BLOCK = 32;  // rows
constexpr float EPS = 1e-6f;   // that of reference.py

// Filled in by mlstm.py: every member has 8 bytes. Strides are in numbers, for images, heads and tokens.
struct Arguments {
  Parallel parallel;
  int64_t threads, bfloat16, images, heads, tokens, width, value_width, chunk, reverse;
  const void *q, *k, *v, *i, *log_f, *dh;  // the forward pass has no dh, the backward pass no i and log_f
  int64_t q_strides[3], k_strides[3], v_strides[3], i_strides[3], f_strides[3], dh_strides[3];
  float *a, *row_sum, *limit;  // (B, H, N) in the order of the scan
  float *di, *dlog_f;          // contiguous, as are the above
  void *h, *dq, *dk, *dv;
  int64_t h_strides[3], dq_strides[3], dk_strides[3], dv_strides[3];
  // Instead of q, k and v: c (B, N, E), of which q and k are maps, and u, of which v is one; weights and biases of maps.
  const void *c, *u;
  int64_t c_strides[2], u_strides[2];
  const float *weights[3], *biases[3];
  // Then, of the backward pass: gradients of q, k and v are not stored, that of c is added to dc, and that of u written.
  void *dc, *du;
  int64_t dc_strides[2], du_strides[2];
  float* map_sums;  // (B, MAP_SUMS, E)

  int64_t token(int64_t t) const { return reverse ? tokens - 1 - t : t; }
  int64_t later(int64_t t) const { return token(t + AHEAD < tokens ? t + AHEAD : tokens - 1); }
};

// Working memory of a head, in matrices with padded rows and columns; those of `factors` are only for pairs of bfloat16.
struct Head {
  int64_t tokens, chunk, chunks, width, value_width, d, e, stride, v_stride, t_stride;
  float *maps, *maps_by_row, *a, *row_max, *q, *k, *v, *k_t, *scores, *past, *fade, *scaled, *state, *norm;
  float *h;                                                                                        // forward
  float *dh, *v_t, *dq, *dk, *dv, *d_scores, *kept, *row_scale, *r, *da, *dn, *after, *after_t, *after_sum;  // backward
  struct {
    float *q, *q_right, *k, *k_right, *v, *v_right, *dh, *dh_right, *scores, *d_scores, *d_scores_right;
    float *scaled, *state, *after, *after_t;
  } factors;
  int64_t floats;

  Head(const Arguments& x, bool backward, bool pairs, Workspace memory)
      : tokens(x.tokens), chunk(x.chunk < tokens ? padded(x.chunk) : tokens), chunks((tokens + chunk - 1) / chunk),
        width(x.width), value_width(x.value_width), d(padded(width)), e(padded(value_width)), stride(apart(d)),
        v_stride(apart(e)), t_stride(apart(padded(chunk))) {
    const int64_t rows = padded(chunk), wide = stride > v_stride ? stride : v_stride;
    const int64_t t_rows = padded((d > e ? d : e) + LANES);  // rows of transposes, which are written in whole vectors
    maps = memory.take(x.c ? MAP_VECTORS * width : 0), maps_by_row = memory.take(x.c && backward ? MAP_VECTORS * width : 0);
    a = memory.take(padded(tokens)), row_max = memory.take(padded(tokens));
    q = memory.take(rows * stride), k = memory.take(rows * stride), v = memory.take(rows * v_stride);
    k_t = memory.take(t_rows * t_stride), scores = memory.take(BLOCK * t_stride);
    past = memory.take(rows), fade = memory.take(rows), scaled = memory.take(rows * wide);
    if (!backward) {
      h = memory.take(rows * v_stride), state = memory.take(d * v_stride), norm = memory.take(d);
    } else {
      dh = memory.take(rows * v_stride), v_t = memory.take(t_rows * t_stride);
      dq = memory.take(rows * stride), dk = memory.take(rows * stride), dv = memory.take(rows * v_stride);
      d_scores = memory.take(BLOCK * t_stride), kept = memory.take(BLOCK * BLOCK);
      row_scale = memory.take(rows), dn = memory.take(rows), r = memory.take(tokens), da = memory.take(padded(tokens));
      state = memory.take((chunks - 1) * e * stride), norm = memory.take((chunks - 1) * d);
      after = memory.take(d * v_stride), after_t = memory.take(e * stride), after_sum = memory.take(d);
    }
    auto factor = [&](int64_t size) { return pairs ? memory.take(size) : nullptr; };
    factors.q = factor(rows * stride), factors.k = factor(rows * stride), factors.v = factor(rows * v_stride);
    factors.q_right = factor(rows * stride / 2), factors.k_right = factor(rows * stride / 2);
    factors.v_right = factor(rows * v_stride / 2), factors.scaled = factor(rows * wide / 2);
    factors.scores = factor(BLOCK * t_stride), factors.d_scores = factor(BLOCK * t_stride);
    factors.d_scores_right = factor(BLOCK * t_stride / 2);
    factors.dh = factor(rows * v_stride), factors.dh_right = factor(rows * v_stride / 2);
    factors.state = factor(padded(d > e ? d : e) * wide / 2), factors.after = factor(d * v_stride / 2);
    factors.after_t = factor(e * stride / 2);
    floats = memory.used();
  }
};

// n tokens of the scan from `first` in float32, and rows of zeros up to padded(n).
template <class T>
void pack(const Arguments& x, const void* base, const int64_t (&strides)[3], int64_t item, int64_t first, int64_t n,
          int64_t width, float* to, int64_t stride) {
  const T* from = static_cast<const T*>(base) + item / x.heads * strides[0] + item % x.heads * strides[1];
  for (int64_t t = 0; t < n; t++) {
    if (strides[2] != width) prefetch(from + x.later(first + t) * strides[2], width);
    read_row(from + x.token(first + t) * strides[2], width, to + t * stride);
  }
  memset(to + n * stride, 0, (padded(n) - n) * stride * sizeof(float));
}
void arrange_maps(const Arguments& x, const Head& to, int64_t item, bool backward) {
  const int64_t begin = item % x.heads * x.width;
  if (x.c) arrange(x.weights, begin, begin + x.width, false, to.maps);
  if (x.c && backward) arrange(x.weights, begin, begin + x.width, true, to.maps_by_row);
}
// q, k and v of n tokens from `first`, as `pack`. Without `with_q`, only k and v.
template <class T>
void pack_inputs(const Arguments& x, const Head& to, int64_t item, int64_t first, int64_t n, bool with_q) {
  if (!x.c) {
    if (with_q) pack<T>(x, x.q, x.q_strides, item, first, n, x.width, to.q, to.stride);
    pack<T>(x, x.k, x.k_strides, item, first, n, x.width, to.k, to.stride);
    return pack<T>(x, x.v, x.v_strides, item, first, n, x.value_width, to.v, to.v_stride);
  }
  const int64_t image = item / x.heads, begin = item % x.heads * x.width;
  const T* c = static_cast<const T*>(x.c) + image * x.c_strides[0] + begin;
  const T* u = static_cast<const T*>(x.u) + image * x.u_strides[0] + begin;
  auto bias = [&](int map, int64_t e) { return x.biases[map] ? load(x.biases[map] + begin + e) : Vector{}; };
  for (int64_t t = 0; t < n; t++) {
    const int64_t token = x.token(first + t), later = x.later(first + t);
    prefetch(c + later * x.c_strides[1], x.width), prefetch(u + later * x.u_strides[1], x.width);
    for (int64_t e = 0; e < x.width; e += LANES) {
      const Maps maps(to.maps, e);
      const Fours from_c(read(c + token * x.c_strides[1] + e)), from_u(read(u + token * x.u_strides[1] + e));
      if (with_q) store(to.q + t * to.stride + e, times(from_c, maps.of[0], bias(0, e)));
      store(to.k + t * to.stride + e, times(from_c, maps.of[1], bias(1, e)));
      store(to.v + t * to.v_stride + e, times(from_u, maps.of[2], bias(2, e)));
    }
  }
  const int64_t rest = padded(n) - n;
  if (with_q) memset(to.q + n * to.stride, 0, rest * to.stride * sizeof(float));
  memset(to.k + n * to.stride, 0, rest * to.stride * sizeof(float));
  memset(to.v + n * to.v_stride, 0, rest * to.v_stride * sizeof(float));
}
template <class T>
void unpack(const Arguments& x, void* base, const int64_t (&strides)[3], int64_t item, int64_t first, int64_t n,
            int64_t width, const float* from, int64_t stride) {
  T* to = static_cast<T*>(base) + item / x.heads * strides[0] + item % x.heads * strides[1];
  for (int64_t t = 0; t < n; t++) write_row(from + t * stride, width, to + x.token(first + t) * strides[2]);
}

// Of q, k and v of n tokens from `first`: written, or through their maps to those of c and u.
template <class T>
void unpack_gradients(const Arguments& x, const Head& from, int64_t item, int64_t first, int64_t n) {
  if (!x.c) {
    unpack<T>(x, x.dq, x.dq_strides, item, first, n, x.width, from.dq, from.stride);
    unpack<T>(x, x.dk, x.dk_strides, item, first, n, x.width, from.dk, from.stride);
    return unpack<T>(x, x.dv, x.dv_strides, item, first, n, x.value_width, from.dv, from.v_stride);
  }
  const int64_t image = item / x.heads, begin = item % x.heads * x.width, channels = x.heads * x.width;
  const T* c = static_cast<const T*>(x.c) + image * x.c_strides[0] + begin;
  const T* u = static_cast<const T*>(x.u) + image * x.u_strides[0] + begin;
  T* dc = static_cast<T*>(x.dc) + image * x.dc_strides[0] + begin;
  T* du = static_cast<T*>(x.du) + image * x.du_strides[0] + begin;
  const float* gradients[3] = {from.dq, from.dk, from.dv};
  const int64_t strides[3] = {from.stride, from.stride, from.v_stride};
  for (int64_t t0 = 0; t0 < n; t0 += NEAR) {
    const int64_t count = n - t0 < NEAR ? n - t0 : NEAR;
    int64_t token[NEAR];
    for (int64_t t = 0; t < count; t++) {
      token[t] = x.token(first + t0 + t);
      prefetch(dc + x.later(first + t0 + t) * x.dc_strides[1], x.width);
    }
    for (int64_t e = 0; e < x.width; e += LANES) {
      Vector of_c[NEAR], of_u[NEAR];
      maps_backward(
          count, Maps(from.maps_by_row, e), [&](int64_t t) { return read(c + token[t] * x.c_strides[1] + e); },
          [&](int64_t t) { return read(u + token[t] * x.u_strides[1] + e); },
          [&](int p, int64_t t) { return load(gradients[p] + (t0 + t) * strides[p] + e); }, of_c, of_u,
          x.map_sums + image * MAP_SUMS * channels + begin + e, channels);
      for (int64_t t = 0; t < count; t++) {
        T* to = dc + token[t] * x.dc_strides[1] + e;
        write(to, of_c[t] + read(to)), write(du + token[t] * x.du_strides[1] + e, of_u[t]);
      }
    }
  }
}

}  // namespace
