// The operations around the mLSTM on CPUs, each in one pass over memory: convolution with SiLU; q, k, v and both gates;
// norm, skip and gate.
//
// models/layers.py has the plain operations. Sums are float32, and results are rounded once. An item of work is one
// image and a few channels, so that parameters are loaded once; its sums for the gradients of parameters are added to
// those of other images at the end, in a fixed order. Widths are multiples of 16.
#include "maps.h"

namespace {

inline Vector sigmoid(Vector x) { return reciprocal(1.f + exponential(-x)); }
// The derivative of SiLU, from x and its sigmoid.
inline Vector silu_slope(Vector x, Vector s) { return s * (1.f + x * (1.f - s)); }

constexpr int64_t SPAN = 64;  // tokens of an item, where an item has all channels
constexpr int64_t SET = 4;    // gates that are computed together

// --- convolution and SiLU --------------------------------------------------------------------------------------------

// Filled in by fused.py, as the other structures: every member has 8 bytes. Strides are in numbers.
struct Conv {
  Parallel parallel;
  int64_t threads, bfloat16, images, tokens, height, width, channels, reverse, silu, x_strides[2], dx_strides[2];
  const int64_t* kept;         // positions of the tokens on the grid, (B, N); null: all positions
  const void *x, *dy;          // dy and all of the following but dx are contiguous
  const float *weight, *bias;  // (9, E), (E,)
  void *y, *dx;                // with `silu`, y is SiLU(conv(x)), else x + conv(x)
  int64_t add;                 // dx is added to what is there
  float* sums;  // (B, 10, E): gradients of the weights and of the bias
  // Of the backward pass: linear maps of y and x, the gates, whose gradients are known by now. They add to those of y and x.
  int64_t gates;
  const float *d_gates, *y_gates, *x_gates;  // (B, N, gates), (gates, E), (gates, E)
  float* gate_sums;                          // (B, 2, gates, E): gradients of the weights for y and x

  // The grid of a vector of channels, with a border of zeros.
  int64_t plane() const { return (height + 2) * (width + 2) * LANES; }
  // Vectors of channels that an item has: their planes fit into the cache.
  int64_t vectors() const { return plane() > 16384 ? 1 : 128 / LANES; }
  int64_t blocks() const { return (channels / LANES + vectors() - 1) / vectors(); }
  int64_t floats(bool backward) const { return (vectors() + backward) * plane() + tokens + 16; }
};

// The gradient of a vector of a token's channels, plus that through the gates. The gates' own are added to `sums`.
inline Vector through_gates(const Conv& args, int64_t image, int64_t t, const float* weights, Vector value,
                            Vector gradient, float* sums) {
  const float* d_gates = args.d_gates + (image * args.tokens + t) * args.gates;
  for (int64_t g = 0; g < args.gates; g++) {
    gradient += d_gates[g] * load(weights + g * args.channels);
    add_to(sums + g * args.channels, d_gates[g] * value);
  }
  return gradient;
}

template <class T, bool BACKWARD>
void convolve(const Conv& args, int64_t item, float* memory) {
  const int64_t width = args.width, row = (width + 2) * LANES, plane = args.plane(), tokens = args.tokens;
  const int64_t image = item / args.blocks(), first = item % args.blocks() * args.vectors() * LANES;
  const int64_t last = first + args.vectors() * LANES, end = last < args.channels ? last : args.channels;
  const T* from = static_cast<const T*>(args.x) + image * args.x_strides[0];
  const int64_t base = image * tokens * args.channels, centre = row + LANES;
  const T* dy = static_cast<const T*>(args.dy) + base;
  T* dx = static_cast<T*>(args.dx) + image * args.dx_strides[0];
  float *planes = memory, *gradient = memory + args.vectors() * plane;
  int32_t* corners = reinterpret_cast<int32_t*>(gradient + BACKWARD * plane);  // of each token's 3 × 3 neighbours
  memset(memory, 0, (args.vectors() + BACKWARD) * plane * sizeof(float));
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t position = args.kept ? args.kept[image * tokens + t] : t;
    corners[t] = (int32_t)(position / width * row + position % width * LANES);
    prefetch(from + (t + AHEAD) * args.x_strides[1] + first, end - first);
    for (int64_t e = first; e < end; e += LANES)
      store(planes + (e - first) / LANES * plane + corners[t] + centre, read(from + t * args.x_strides[1] + e));
  }

  for (int64_t e = first; e < end; e += LANES) {
    const float* x = planes + (e - first) / LANES * plane;
    Vector weight[9], bias = load(args.bias + e);
    for (int k = 0; k < 9; k++) weight[k] = load(args.weight + (args.reverse ? 8 - k : k) * args.channels + e);
    if (!args.silu) weight[4] += 1.f;
    Vector d_weight[9] = {}, d_bias = {};
    float* gate_sums = args.gate_sums + image * 2 * args.gates * args.channels + e;
    for (int64_t t = 0; t < tokens; t++) {
      const float* corner = x + corners[t];
      Vector total = bias;
#pragma GCC unroll 9
      for (int k = 0; k < 9; k++) total += weight[k] * load(corner + k / 3 * row + k % 3 * LANES);
      Vector s = args.silu ? sigmoid(total) : all(1.f);
      if (!BACKWARD) {
        write(static_cast<T*>(args.y) + base + t * args.channels + e, total * s);
        continue;
      }
      prefetch(dy + (t + AHEAD) * args.channels + e, LANES);
      Vector d = read(dy + t * args.channels + e);
      if (args.gates) d = through_gates(args, image, t, args.y_gates + e, total * s, d, gate_sums);
      if (args.silu) d *= silu_slope(total, s);
      store(gradient + corners[t] + centre, d);
      d_bias += d;
#pragma GCC unroll 9
      for (int k = 0; k < 9; k++) d_weight[k] += d * load(corner + k / 3 * row + k % 3 * LANES);
    }
    if (!BACKWARD) continue;
    for (int64_t t = 0; t < tokens; t++) {
      const float* corner = gradient + corners[t];
      Vector total = {};
#pragma GCC unroll 9
      for (int k = 0; k < 9; k++) total += weight[8 - k] * load(corner + k / 3 * row + k % 3 * LANES);
      T* to = dx + t * args.dx_strides[1] + e;
      if (args.add) prefetch(to + AHEAD * args.dx_strides[1], LANES);
      if (args.gates)
        total = through_gates(args, image, t, args.x_gates + e, load(x + corners[t] + centre), total,
                              gate_sums + args.gates * args.channels);
      write(to, args.add ? total + read(to) : total);
    }
    float* sums = args.sums + image * 10 * args.channels + e;
    for (int k = 0; k < 9; k++) store(sums + (args.reverse ? 8 - k : k) * args.channels, d_weight[k]);
    store(sums + 9 * args.channels, d_bias);
  }
}

// --- q, k, v and the gates -------------------------------------------------------------------------------------------

struct Project {
  Parallel parallel;
  int64_t threads, bfloat16, images, tokens, channels, heads, c_strides[2], x_strides[2];
  const void *c, *x;                                    // the convolved and the plain branch
  const float *weights[3], *biases[3];                  // of q, k, v: (E / 4, 4, 4), and (E,) or null
  const float *c_gates, *x_gates, *gates_bias;          // (2 H, E), (2 H, E), (2 H,)
  void *q, *k, *v;                                      // (B, H, N, D), contiguous as all of the following; or null
  float *i, *f;                                         // (B, H, N)
  const void *dq, *dk, *dv;
  const float *di, *df;
  void *dc, *dx;
  float* sums;  // (spans, 3, 5, E): gradients of the weights by column of a block, and of biases; (spans, 2, 2 H, E)

  int64_t spans() const { return (images * tokens + SPAN - 1) / SPAN; }
};

// Where the tokens of an item are; they may be of several images.
struct Places {
  int64_t count, c[SPAN], x[SPAN], head[SPAN], gate[SPAN], first;
  Places(const Project& args, int64_t item) : first(item * SPAN) {
    const int64_t left = args.images * args.tokens - first, width = args.channels / args.heads;
    count = left < SPAN ? left : SPAN;
    int64_t image = first / args.tokens, token = first % args.tokens;
    for (int64_t t = 0; t < count; t++) {
      c[t] = image * args.c_strides[0] + token * args.c_strides[1];
      x[t] = image * args.x_strides[0] + token * args.x_strides[1];
      gate[t] = image * args.heads * args.tokens + token, head[t] = gate[t] * width;
      if (++token == args.tokens) token = 0, image++;
    }
  }
};

template <class T>
void project(const Project& args, int64_t item, float* memory) {
  const Places at(args, item);
  const int64_t width = args.channels / args.heads, gates = 2 * args.heads;
  const T *c = static_cast<const T*>(args.c), *x = static_cast<const T*>(args.x);
  if (args.q) arrange(args.weights, 0, args.channels, false, memory);
  for (int64_t first = 0; first < at.count; first += NEAR) {
    const int64_t end = first + NEAR < at.count ? first + NEAR : at.count;
    for (int64_t e = 0; e < args.channels && args.q; e += LANES) {
      const int64_t base = e / width * args.tokens * width + e % width;
      T *q = static_cast<T*>(args.q) + base, *k = static_cast<T*>(args.k) + base, *v = static_cast<T*>(args.v) + base;
      const Maps weight(memory, e);
      Vector bias[3];
      for (int p = 0; p < 3; p++) bias[p] = args.biases[p] ? load(args.biases[p] + e) : Vector{};
      for (int64_t t = first; t < end; t++) {
        const Fours from_c(read(c + at.c[t] + e)), from_x(read(x + at.x[t] + e));
        write(q + at.head[t], times(from_c, weight.of[0], bias[0]));
        write(k + at.head[t], times(from_c, weight.of[1], bias[1]));
        write(v + at.head[t], times(from_x, weight.of[2], bias[2]));
      }
    }
    for (int64_t g = 0; g < gates; g += SET) {
      float* to[SET];
      for (int64_t m = 0; m < SET; m++)
        to[m] = (g + m < args.heads ? args.i : args.f) + (g + m) % args.heads * args.tokens;
      for (int64_t t = first; t < end; t++) {
        Vector total[SET] = {};
        for (int64_t e = 0; e < args.channels; e += LANES) {
          Vector from_c = read(c + at.c[t] + e), from_x = read(x + at.x[t] + e);
#pragma GCC unroll 4
          for (int64_t m = 0; m < SET; m++) {
            total[m] += from_c * load(args.c_gates + (g + m) * args.channels + e);
            total[m] += from_x * load(args.x_gates + (g + m) * args.channels + e);
          }
        }
        for (int64_t m = 0; m < SET; m++) to[m][at.gate[t]] = sum(total[m]) + args.gates_bias[g + m];
      }
    }
  }
}

template <class T>
void project_backward(const Project& args, int64_t item, float* memory) {
  const Places at(args, item);
  const int64_t n = at.count, width = args.channels / args.heads, gates = 2 * args.heads, parts = args.spans();
  const T *c = static_cast<const T*>(args.c), *x = static_cast<const T*>(args.x);
  T *dc = static_cast<T*>(args.dc) + at.first * args.channels, *dx = static_cast<T*>(args.dx) + at.first * args.channels;
  float *sums = args.sums + item * MAP_SUMS * args.channels, *d_gates = memory;  // (n, 2 H)
  float* gate_sums = args.sums + (parts * MAP_SUMS + item * 2 * gates) * args.channels;
  float* arranged = memory + SPAN * gates;
  arrange(args.weights, 0, args.channels, true, arranged);
  memset(sums, 0, MAP_SUMS * args.channels * sizeof(float));
  memset(gate_sums, 0, 2 * gates * args.channels * sizeof(float));
  for (int64_t g = 0; g < gates; g++) {
    const float* from = (g < args.heads ? args.di : args.df) + g % args.heads * args.tokens;
    for (int64_t t = 0; t < n; t++) d_gates[t * gates + g] = from[at.gate[t]];
  }
  for (int64_t first = 0; first < n; first += NEAR)
    for (int64_t e = 0; e < args.channels; e += LANES) {
      const int64_t base = e / width * args.tokens * width + e % width, count = n - first < NEAR ? n - first : NEAR;
      const int64_t *head = at.head + first, *c_at = at.c + first, *x_at = at.x + first;
      const T *dq = static_cast<const T*>(args.dq) + base, *dk = static_cast<const T*>(args.dk) + base;
      const T* dv = static_cast<const T*>(args.dv) + base;
      const T* gradients[3] = {dq, dk, dv};
      Vector branches[2][NEAR];  // gradients of c and x so far
      for (int64_t t = 0; t < count && first + NEAR + t < n; t++) {
        prefetch(c + c_at[t + NEAR] + e, LANES), prefetch(x + x_at[t + NEAR] + e, LANES);
        for (const T* d : gradients) prefetch(d + head[t + NEAR], LANES);
      }
      maps_backward(
          count, Maps(arranged, e), [&](int64_t t) { return read(c + c_at[t] + e); },
          [&](int64_t t) { return read(x + x_at[t] + e); }, [&](int p, int64_t t) { return read(gradients[p] + head[t]); },
          branches[0], branches[1], sums + e, args.channels);
      for (int64_t g = 0; g < gates; g += SET)
        for (int branch = 0; branch < 2; branch++) {
          const float* gate_weights = (branch ? args.x_gates : args.c_gates) + g * args.channels + e;
          const T* from = (branch ? x : c) + e;
          const int64_t* places = branch ? x_at : c_at;
          Vector weight[SET], total[SET] = {};
          for (int64_t m = 0; m < SET; m++) weight[m] = load(gate_weights + m * args.channels);
          for (int64_t t = 0; t < count; t++) {
            Vector gradient = branches[branch][t], value = read(from + places[t]);
#pragma GCC unroll 4
            for (int64_t m = 0; m < SET; m++) {
              const Vector gate = all(d_gates[(first + t) * gates + g + m]);
              gradient += gate * weight[m], total[m] += gate * value;
            }
            branches[branch][t] = gradient;
          }
          for (int64_t m = 0; m < SET; m++) add_to(gate_sums + (branch * gates + g + m) * args.channels + e, total[m]);
        }
      for (int64_t t = 0; t < count; t++) {
        const int64_t to = (first + t) * args.channels + e;
        write(dc + to, branches[0][t]), write(dx + to, branches[1][t]);
      }
    }
}

// --- norm, skip and gate ---------------------------------------------------------------------------------------------

struct Norm {
  Parallel parallel;
  int64_t threads, bfloat16, images, heads, tokens, width, h_strides[3], c_strides[2], gate_strides[2];
  int64_t dgate_strides[2], sigmoid;  // the gate is SiLU, or the sigmoid
  double eps;
  const void *h, *c, *gate, *dy;       // c and skip, and gate, may be null; dy and the following but dgate are contiguous
  const float *weight, *bias, *skip;  // (E,); the weight is stored minus 1, the bias may be null
  void *y, *dh, *dc, *dgate;
  float* sums;  // (B, spans, 3, E), zeros: gradients of weight, bias and skip

  int64_t spans() const { return (tokens + SPAN - 1) / SPAN; }
};

template <class T, bool BACKWARD>
void norm(const Norm& args, int64_t item, float* memory) {
  const int64_t image = item / args.spans(), first = item % args.spans() * SPAN, width = args.width;
  const int64_t end = first + SPAN < args.tokens ? first + SPAN : args.tokens, channels = args.heads * width;
  float *centred = memory, *scaled = memory + width, *sums = args.sums + item * 3 * channels;
  for (int64_t t = first; t < end; t++) {
    const T* c = static_cast<const T*>(args.c) + image * args.c_strides[0] + t * args.c_strides[1];
    const T* gate = static_cast<const T*>(args.gate) + image * args.gate_strides[0] + t * args.gate_strides[1];
    T* dgate = static_cast<T*>(args.dgate) + image * args.dgate_strides[0] + t * args.dgate_strides[1];
    const int64_t row = (image * args.tokens + t) * channels;
    if (!BACKWARD && args.c) prefetch(c + AHEAD * args.c_strides[1], channels);
    if (!BACKWARD && args.gate) prefetch(gate + AHEAD * args.gate_strides[1], channels);
    for (int64_t head = 0; head < args.heads; head++) {
      const T* h = static_cast<const T*>(args.h) + image * args.h_strides[0] + head * args.h_strides[1];
      h += t * args.h_strides[2];
      Vector total{}, squares{};
      for (int64_t d = 0; d < width; d += LANES) {
        Vector x = read(h + d);
        store(centred + d, x), total += x;
      }
      const float mean = sum(total) / width;
      for (int64_t d = 0; d < width; d += LANES) {
        Vector x = load(centred + d) - mean;
        store(centred + d, x), squares += x * x;
      }
      const float scale = 1 / std::sqrt(sum(squares) / width + (float)args.eps);
      Vector of_scaled{}, of_product{};
      for (int64_t d = 0, e = head * width; d < width; d += LANES, e += LANES) {
        const Vector x = load(centred + d) * scale, weight = load(args.weight + e) + 1.f;
        const Vector skip = args.c ? load(args.skip + e) : Vector{}, branch = args.c ? read(c + e) : Vector{};
        Vector inner = x * weight + skip * branch;
        if (args.bias) inner += load(args.bias + e);
        const Vector z = args.gate ? read(gate + e) : Vector{}, s = args.gate ? sigmoid(z) : Vector{};
        const Vector factor = args.sigmoid ? s : z * s;
        if (!BACKWARD) {
          write(static_cast<T*>(args.y) + row + e, args.gate ? inner * factor : inner);
          continue;
        }
        const Vector dy = read(static_cast<const T*>(args.dy) + row + e), d_inner = args.gate ? dy * factor : dy;
        if (args.gate) write(dgate + e, dy * inner * (args.sigmoid ? s * (1.f - s) : silu_slope(z, s)));
        if (args.c) write(static_cast<T*>(args.dc) + row + e, d_inner * skip);
        store(sums + e, load(sums + e) + d_inner * x);
        store(sums + channels + e, load(sums + channels + e) + d_inner);
        if (args.c) store(sums + 2 * channels + e, load(sums + 2 * channels + e) + d_inner * branch);
        const Vector d_x = d_inner * weight;
        store(scaled + d, d_x), store(centred + d, x);
        of_scaled += d_x, of_product += d_x * x;
      }
      if (!BACKWARD) continue;
      const float mean_scaled = sum(of_scaled) / width, mean_product = sum(of_product) / width;
      T* dh = static_cast<T*>(args.dh) + ((image * args.heads + head) * args.tokens + t) * width;
      for (int64_t d = 0; d < width; d += LANES)
        write(dh + d, scale * (load(scaled + d) - mean_scaled - load(centred + d) * mean_product));
    }
  }
}

// Runs the function for T = float or bfloat16.
template <class A, class F, class G>
int run(const A& args, int64_t items, int64_t floats, F full, G half) {
  return for_each(items, floats, args.threads, args.parallel, [&](int64_t item, float* memory) {
           args.bfloat16 ? half(args, item, memory) : full(args, item, memory);
         }) ? 0 : 1;
}

}  // namespace

// All return 0, or 1 without enough memory.
extern "C" int selfvil_conv_forward(const Conv* args) {
  return run(*args, args->images * args->blocks(), args->floats(false), convolve<float, false>,
             convolve<BFloat16, false>);
}
extern "C" int selfvil_conv_backward(const Conv* args) {
  int failed = run(*args, args->images * args->blocks(), args->floats(true), convolve<float, true>,
                   convolve<BFloat16, true>);
  add_parts(args->sums, args->images, 10 * args->channels);
  add_parts(args->gate_sums, args->images, 2 * args->gates * args->channels);
  return failed;
}
extern "C" int selfvil_project_forward(const Project* args) {
  return run(*args, args->spans(), MAP_VECTORS * args->channels, project<float>, project<BFloat16>);
}
extern "C" int selfvil_project_backward(const Project* args) {
  const int64_t parts = args->spans(), floats = SPAN * 2 * args->heads + MAP_VECTORS * args->channels;
  int failed = run(*args, parts, floats, project_backward<float>, project_backward<BFloat16>);
  add_parts(args->sums, parts, MAP_SUMS * args->channels);
  add_parts(args->sums + parts * MAP_SUMS * args->channels, parts, 4 * args->heads * args->channels);
  return failed;
}
extern "C" int selfvil_norm_forward(const Norm* args) {
  return run(*args, args->images * args->spans(), 2 * args->width, norm<float, false>, norm<BFloat16, false>);
}
extern "C" int selfvil_norm_backward(const Norm* args) {
  const int64_t parts = args->images * args->spans();
  int failed = run(*args, parts, 2 * args->width, norm<float, true>, norm<BFloat16, true>);
  add_parts(args->sums, parts, 3 * args->heads * args->width);
  return failed;
}
