// The mLSTM on CPUs, forward and backward: scores never leave the processor's cache.
//
// The symbols and gradients are those of torch_mlstm.py, the states between chunks those of chunkwise.py. A head is
// computed by one thread, chunk by chunk; if its sequence is one chunk, there are no states and time is quadratic.
// mlstm.h has the matrices of a head, and copies tokens into them. A chunk is computed in blocks of rows. For the
// columns before a block, D_ij = exp(a_j - m) exp(m - M_i) with m the maximum before the block: exp is computed for each
// column and row, and for each score only within the block. All these exponents are at most 0.
#include "mlstm.h"

namespace {

float denominator(float row_sum, float limit) {
  float size = std::fabs(row_sum);
  return (size > limit ? size : limit) + EPS;
}

// exp(sign · (x - m)) for n numbers, to the end of a vector.
__attribute__((noinline)) void exponentials(const float* x, float m, float sign, int64_t n, float* to) {
  for (int64_t j = 0; j < n; j += LANES) store(to + j, exponential(sign * (load(x + j) - m)));
}

// D of a row, of a vector of columns of the row's own block; 0 for columns after the row.
Vector within(const float* a, float row_max, int64_t column, int64_t row) {
  Integers hidden = lanes() > Integers{} + (int32_t)(row - column);
  return choose(hidden, Vector{}, exponential(load(a + column) - row_max));
}

// Rows are computed up to a multiple of this.
template <class Words>
constexpr int64_t STEP = Words::TILES ? TILE : ROWS;

// The end of the columns that are computed for a row: to the end of a vector.
int64_t columns_end(int64_t row) { return (row / ROWS * ROWS + ROWS + LANES - 1) / LANES * LANES; }
// A product reads, in all rows of a group, the columns to the end of the group: zeros from `column` of row `row`.
template <class Words>
void hide(float* weights, int64_t column, int64_t row, int64_t end) {
  const int64_t group_end = row / Words::GROUP * Words::GROUP + Words::GROUP;
  for (; column < (group_end < end ? group_end : end); column += LANES) store(weights + column, Vector{});
}
// The columns of a block of rows from r0 that are not 0 for a group of rows.
template <class Words>
auto up_to_row(int64_t r0, int64_t block) {
  return [=](int64_t r) { return Range{0, r0 + (r + Words::GROUP < block ? r + Words::GROUP : block)}; };
}

void copy_gates(const Head& x, const float* a) {
  float m = -INFINITY;
  for (int64_t t = 0; t < x.tokens; t++) {
    x.a[t] = a[t];
    x.row_max[t] = m = a[t] > m ? a[t] : m;
  }
  for (int64_t t = x.tokens; t < padded(x.tokens); t++) x.a[t] = x.row_max[t] = 0;
}

// state (rows, columns) = fade · before + the sum over n tokens of weights · left rightᵀ; `left` is given as a right
// factor. Each token's weights · right remains in x.scaled.
template <class Words>
void extend(const Head& x, int64_t n, const float* weights, float fade, Factor left, int64_t rows, const float* right,
            int64_t stride, int64_t columns, float* state, const float* before) {
  for (int64_t t = 0; t < n; t++)
    for (int64_t c = 0; c < columns; c += LANES)
      store(x.scaled + t * stride + c, weights[t] * load(right + t * stride + c));
  if (before)
    for (int64_t row = 0; row < rows; row++)
      for (int64_t c = 0; c < columns; c += LANES)
        store(state + row * stride + c, fade * load(before + row * stride + c));
  const Factor scaled = as_right<Words>(x.scaled, stride, n, columns, x.factors.scaled);
  product<Words, TRANSPOSED>(rows, columns, n, left, scaled, state, stride, before != nullptr);
}

// norm = fade · before + the sum over n tokens of weights · x
void extend_norm(int64_t n, const float* weights, float fade, const float* x, int64_t stride, int64_t columns,
                 float* norm, const float* before) {
  for (int64_t c = 0; c < columns; c += LANES) {
    Vector total = before ? fade * load(before + c) : Vector{};
    for (int64_t t = 0; t < n; t++) total += weights[t] * load(x + t * stride + c);
    store(norm + c, total);
  }
}

// --- forward ---------------------------------------------------------------------------------------------------------

// a, and lim, in the order of the scan; sums in double precision.
void scan_gates(const Arguments& x, int64_t item, float* a, float* limit) {
  const int64_t image = item / x.heads, head = item % x.heads;
  const float* i = static_cast<const float*>(x.i) + image * x.i_strides[0] + head * x.i_strides[1];
  const float* f = static_cast<const float*>(x.log_f) + image * x.f_strides[0] + head * x.f_strides[1];
  double log_forget = 0, m = -INFINITY;
  for (int64_t t = 0; t < x.tokens; t++) {
    log_forget += f[x.token(t) * x.f_strides[2]];
    double taken = i[x.token(t) * x.i_strides[2]] - log_forget;
    m = taken > m ? taken : m;
    a[t] = (float)taken;
    limit[t] = (float)-(log_forget + m);
  }
  for (int64_t t = 0; t < x.tokens; t += LANES) {
    float part[LANES] = {};
    int64_t n = x.tokens - t < LANES ? x.tokens - t : LANES;
    memcpy(part, limit + t, n * sizeof(float));
    store(part, exponential(load(part)));
    memcpy(limit + t, part, n * sizeof(float));
  }
}

template <class T, class Words>
void forward(const Arguments& args, int64_t item, float* memory) {
  const Head x(args, false, Words::PER_WORD > 1, Workspace(memory));
  float *a = args.a + item * x.tokens, *row_sum = args.row_sum + item * x.tokens, *limit = args.limit + item * x.tokens;
  scan_gates(args, item, a, limit);
  copy_gates(x, a);
  arrange_maps(args, x, item, false);
  const float root = std::sqrt((float)x.width);

  for (int64_t first = 0; first < x.tokens; first += x.chunk) {
    const int64_t n = x.tokens - first < x.chunk ? x.tokens - first : x.chunk, rows = padded(n);
    const int64_t used = (n + STEP<Words> - 1) / STEP<Words> * STEP<Words>;  // rows that are computed
    const float *taken = x.a + first, *row_max = x.row_max + first;
    const float m_before = first ? row_max[-1] : 0;
    pack_inputs<T>(args, x, item, first, n, true);
    const Factor q = as_left<Words>(x.q, x.stride, rows, x.d, x.factors.q);
    const Factor k = as_left<Words>(x.k, x.stride, rows, x.d, x.factors.k);
    const Factor k_t = transposed<Words>(k, rows, x.d, x.k_t, x.t_stride);
    const Factor v = as_right<Words>(x.v, x.v_stride, rows, x.e, x.factors.v_right);
    Factor state{};
    if (first) state = as_right<Words>(x.state, x.v_stride, x.d, x.e, x.factors.state);

    for (int64_t r0 = 0; r0 < used; r0 += BLOCK) {
      const int64_t block = used - r0 < BLOCK ? used - r0 : BLOCK;
      float sums[BLOCK] = {}, *h = x.h + r0 * x.v_stride;
      if (first) {
        product<Words, PLAIN>(block, x.e, x.width, q.from(r0), state, h, x.v_stride, false);
        exponentials(row_max + r0, m_before, -1, block, x.fade);
        for (int64_t r = 0; r < block; r++) {
          scale(h + r * x.v_stride, x.fade[r], x.e);
          sums[r] = x.fade[r] * dot(x.q + (r0 + r) * x.stride, x.norm, x.d);
        }
      }
      causal_product<Words>(block, r0, x.width, q.from(r0), k_t, x.scores, x.t_stride);
      const float m = r0 ? row_max[r0 - 1] : 0;
      exponentials(taken, m, 1, r0, x.past);
      exponentials(row_max + r0, m, -1, block, x.fade);
      for (int64_t r = 0; r < block; r++) {
        float* weights = x.scores + r * x.t_stride;
        Vector total{};
        int64_t j = 0;
        for (; j < r0; j += LANES) {
          Vector w = load(weights + j) * (load(x.past + j) * x.fade[r]);
          store(weights + j, w), total += w;
        }
        for (; j < columns_end(r0 + r); j += LANES) {
          Vector w = load(weights + j) * within(taken, row_max[r0 + r], j, r0 + r);
          store(weights + j, w), total += w;
        }
        hide<Words>(weights, j, r0 + r, r0 + block);
        sums[r] += sum(total);
      }
      const Factor weights = as_left<Words>(x.scores, x.t_stride, block, r0 + block, x.factors.scores);
      product<Words, PLAIN>(block, x.e, weights, v, h, x.v_stride, first > 0, up_to_row<Words>(r0, block));
      for (int64_t r = 0; r < block && r0 + r < n; r++) {
        row_sum[first + r0 + r] = sums[r] / root;
        scale(h + r * x.v_stride, 1 / (root * denominator(sums[r] / root, limit[first + r0 + r])), x.e);
      }
    }
    unpack<T>(args, args.h, args.h_strides, item, first, n, x.value_width, x.h, x.v_stride);
    if (first + n < x.tokens) {  // then n is a whole chunk
      const float now = row_max[n - 1], fade = first ? exponential(all(m_before - now))[0] : 0;
      exponentials(taken, now, 1, n, x.past);
      const Factor k_right = as_right<Words>(x.k, x.stride, n, x.d, x.factors.k_right);
      extend<Words>(x, n, x.past, fade, k_right, x.d, x.v, x.v_stride, x.e, x.state, first ? x.state : nullptr);
      extend_norm(n, x.past, fade, x.k, x.stride, x.d, x.norm, first ? x.norm : nullptr);
    }
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

// The transposed state and the norm before each chunk but the first.
template <class T, class Words>
void states(const Arguments& args, const Head& x, int64_t item) {
  for (int64_t c = 0; c + 1 < x.chunks; c++) {
    const int64_t first = c * x.chunk, n = x.chunk, size = x.e * x.stride;
    const float now = x.row_max[first + n - 1], fade = c ? exponential(all(x.row_max[first - 1] - now))[0] : 0;
    pack_inputs<T>(args, x, item, first, n, false);
    exponentials(x.a + first, now, 1, n, x.past);
    const Factor v = as_right<Words>(x.v, x.v_stride, n, x.e, x.factors.v_right);
    extend<Words>(x, n, x.past, fade, v, x.e, x.k, x.stride, x.d, x.state + c * size,
                  c ? x.state + (c - 1) * size : nullptr);
    extend_norm(n, x.past, fade, x.k, x.stride, x.d, x.norm + c * x.d, c ? x.norm + (c - 1) * x.d : nullptr);
  }
}

template <class T, class Words>
void chunk_gradients(const Arguments& args, const Head& x, int64_t item, int64_t c) {
  const int64_t first = c * x.chunk, n = x.tokens - first < x.chunk ? x.tokens - first : x.chunk, rows = padded(n);
  const int64_t used = (n + STEP<Words> - 1) / STEP<Words> * STEP<Words>;
  const float *taken = x.a + first, *row_max = x.row_max + first, root = std::sqrt((float)x.width);
  const float *row_sum = args.row_sum + item * x.tokens + first, *limit = args.limit + item * x.tokens + first;
  const float m_before = c ? row_max[-1] : 0, m_after = row_max[n - 1], *norm = x.norm + (c - 1) * x.d;
  const bool has_after = c + 1 < x.chunks;
  pack_inputs<T>(args, x, item, first, n, true);
  pack<T>(args, args.dh, args.dh_strides, item, first, n, x.value_width, x.dh, x.v_stride);
  const Factor q = as_left<Words>(x.q, x.stride, rows, x.d, x.factors.q);
  const Factor k = as_left<Words>(x.k, x.stride, rows, x.d, x.factors.k);
  const Factor v = as_left<Words>(x.v, x.v_stride, rows, x.e, x.factors.v);
  const Factor dh = as_left<Words>(x.dh, x.v_stride, rows, x.e, x.factors.dh);
  const Factor k_t = transposed<Words>(k, rows, x.d, x.k_t, x.t_stride);
  const Factor v_t = transposed<Words>(v, rows, x.e, x.v_t, x.t_stride);
  const Factor q_right = as_right<Words>(x.q, x.stride, rows, x.d, x.factors.q_right);
  const Factor k_right = as_right<Words>(x.k, x.stride, rows, x.d, x.factors.k_right);
  const Factor dh_right = as_right<Words>(x.dh, x.v_stride, rows, x.e, x.factors.dh_right);
  Factor state{};
  if (c) state = as_right<Words>(x.state + (c - 1) * x.e * x.stride, x.stride, x.e, x.d, x.factors.state);
  for (int64_t t = 0; t < rows; t++) {
    x.row_scale[t] = t < n ? 1 / (root * denominator(row_sum[t], limit[t])) : 0;
    x.dn[t] = 0;
  }

  float* da = x.da + first;
  memset(da, 0, rows * sizeof(float));
  if (has_after) {  // the rows after this chunk
    const Factor after = as_right<Words>(x.after, x.v_stride, x.d, x.e, x.factors.after);
    const Factor after_t = as_right<Words>(x.after_t, x.stride, x.e, x.d, x.factors.after_t);
    product<Words, PLAIN>(rows, x.d, x.value_width, v, after_t, x.dk, x.stride, false);
    product<Words, PLAIN>(rows, x.e, x.width, k, after, x.dv, x.v_stride, false);
    exponentials(taken, m_after, 1, n, x.past);
    for (int64_t t = 0; t < n; t++) {
      scale_add(x.dk + t * x.stride, x.past[t], x.past[t], x.after_sum, x.d);
      scale(x.dv + t * x.v_stride, x.past[t], x.e);
      da[t] = dot(x.k + t * x.stride, x.dk + t * x.stride, x.d);
    }
  } else {
    memset(x.dk, 0, rows * x.stride * sizeof(float));
    memset(x.dv, 0, rows * x.v_stride * sizeof(float));
  }

  for (int64_t r0 = 0; r0 < used; r0 += BLOCK) {
    const int64_t block = used - r0 < BLOCK ? used - r0 : BLOCK;
    float carried[BLOCK] = {}, r_state[BLOCK] = {}, *dq = x.dq + r0 * x.stride;
    if (c) {
      product<Words, PLAIN>(block, x.d, x.value_width, dh.from(r0), state, dq, x.stride, false);
      exponentials(row_max + r0, m_before, -1, block, carried);
      for (int64_t r = 0; r < block; r++) {
        carried[r] *= x.row_scale[r0 + r];
        r_state[r] = carried[r] * dot(x.q + (r0 + r) * x.stride, dq + r * x.stride, x.d);
      }
    }
    causal_product<Words>(block, r0, x.width, q.from(r0), k_t, x.scores, x.t_stride);
    causal_product<Words>(block, r0, x.value_width, dh.from(r0), v_t, x.d_scores, x.t_stride);
    const float m = r0 ? row_max[r0 - 1] : 0;
    exponentials(taken, m, 1, r0, x.past);
    exponentials(row_max + r0, m, -1, block, x.fade);
    for (int64_t r = 0; r < block; r++) {
      const int64_t row = r0 + r, end = columns_end(row);
      const float row_scale = x.row_scale[row], fade = x.fade[r] * row_scale;
      float *weights = x.scores + r * x.t_stride, *d_scores = x.d_scores + r * x.t_stride, *kept = x.kept + r * BLOCK;
      Vector total{};
      int64_t j = 0;
      for (; j < r0; j += LANES) {
        Vector w = load(weights + j) * (load(x.past + j) * fade);
        store(weights + j, w), total += w * load(d_scores + j);
      }
      for (; j < end; j += LANES) {
        Vector decay = within(taken, row_max[row], j, row) * row_scale, w = load(weights + j) * decay;
        store(weights + j, w), store(kept + j - r0, decay), total += w * load(d_scores + j);
      }
      const float r_row = r_state[r] + sum(total);
      float dn = 0;
      if (row < n) {
        x.r[first + row] = r_row;
        if (std::fabs(row_sum[row]) >= limit[row]) dn = row_sum[row] > 0 ? -r_row : row_sum[row] < 0 ? r_row : 0;
      }
      x.dn[row] = dn;
      auto finish = [&](int64_t j, Vector decay) {
        Vector d_score = load(d_scores + j) + dn;
        store(da + j, load(da + j) + load(weights + j) * d_score);
        store(d_scores + j, d_score * decay);
      };
      for (j = 0; j < r0; j += LANES) finish(j, load(x.past + j) * fade);
      for (; j < end; j += LANES) finish(j, load(kept + j - r0));
      hide<Words>(weights, j, row, r0 + block), hide<Words>(d_scores, j, row, r0 + block);
      if (c) scale_add(dq + r * x.stride, carried[r], carried[r] * dn, norm, x.d);
    }
    const int64_t columns = r0 + block;
    const Factor d_scores = as_left<Words>(x.d_scores, x.t_stride, block, columns, x.factors.d_scores);
    const Factor d_right = as_right<Words>(x.d_scores, x.t_stride, block, columns, x.factors.d_scores_right);
    const Factor weights = as_right<Words>(x.scores, x.t_stride, block, columns, x.factors.scores);
    product<Words, PLAIN>(block, x.d, d_scores, k_right, dq, x.stride, c > 0, up_to_row<Words>(r0, block));
    const auto from_column = [=](int64_t j) { return Range{j > r0 ? j - r0 : 0, block}; };
    const int64_t word_row = r0 / Words::PER_WORD;
    product<Words, TRANSPOSED>(columns, x.d, d_right, q_right.from(word_row), x.dk, x.stride, true, from_column);
    product<Words, TRANSPOSED>(columns, x.e, weights, dh_right.from(word_row), x.dv, x.v_stride, true, from_column);
  }
  unpack_gradients<T>(args, x, item, first, n);

  if (c) {  // for the chunks before this one
    const float fade = has_after ? exponential(all(m_before - m_after))[0] : 0;
    exponentials(row_max, m_before, -1, rows, x.past);
    for (int64_t t = 0; t < rows; t++) x.past[t] *= x.row_scale[t];
    extend<Words>(x, rows, x.past, fade, dh_right, x.e, x.q, x.stride, x.d, x.after_t, has_after ? x.after_t : nullptr);
    extend_norm(rows, x.dn, fade, x.scaled, x.stride, x.d, x.after_sum, has_after ? x.after_sum : nullptr);
    transpose(x.after_t, x.stride, x.e, x.d, x.after, x.v_stride);
  }
}

// Gradients of i and log f, in the order of memory, from r and da.
void gate_gradients(const Arguments& args, const Head& x, int64_t item) {
  const float *row_sum = args.row_sum + item * x.tokens, *limit = args.limit + item * x.tokens;
  int64_t argmax = 0;
  for (int64_t t = 0; t < x.tokens; t++) {
    if (x.a[t] >= x.row_max[t]) argmax = t;
    x.da[argmax] -= x.r[t] * EPS / denominator(row_sum[t], limit[t]);
  }
  double total = 0;
  for (int64_t t = x.tokens - 1; t >= 0; t--) {
    const bool sum_dominates = std::fabs(row_sum[t]) >= limit[t];
    total -= x.da[t];
    if (!sum_dominates) total += x.r[t] * (1 - EPS / denominator(row_sum[t], limit[t]));
    args.di[item * x.tokens + args.token(t)] = x.da[t];
    args.dlog_f[item * x.tokens + args.token(t)] = (float)total;
  }
}

template <class T, class Words>
void backward(const Arguments& args, int64_t item, float* memory) {
  const Head x(args, true, Words::PER_WORD > 1, Workspace(memory));
  copy_gates(x, args.a + item * x.tokens);
  arrange_maps(args, x, item, true);
  states<T, Words>(args, x, item);
  for (int64_t c = x.chunks - 1; c >= 0; c--) chunk_gradients<T, Words>(args, x, item, c);
  gate_gradients(args, x, item);
}

template <class F>
int run(const Arguments& args, bool is_backward, F work) {
  const int64_t floats = Head(args, is_backward, args.bfloat16, Workspace()).floats;
  return for_each(args.images * args.heads, floats, args.threads, args.parallel, work) ? 0 : 1;
}

}  // namespace

// Both return 0, or 1 without enough memory.
extern "C" int selfvil_mlstm_forward(const Arguments* args) {
  return run(*args, false, [=](int64_t item, float* memory) {
    args->bfloat16 ? forward<BFloat16, Pairs>(*args, item, memory) : forward<float, Full>(*args, item, memory);
  });
}
extern "C" int selfvil_mlstm_backward(const Arguments* args) {
  int failed = run(*args, true, [=](int64_t item, float* memory) {
    args->bfloat16 ? backward<BFloat16, Pairs>(*args, item, memory) : backward<float, Full>(*args, item, memory);
  });
  if (args->map_sums) add_parts(args->map_sums, args->images, MAP_SUMS * args->heads * args->width);
  return failed;
}
