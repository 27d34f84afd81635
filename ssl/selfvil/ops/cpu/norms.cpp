// LayerNorm of tokens on CPUs, whose backward pass adds the gradient of the residual stream; the gates of the block with an
// MLP; and the weights of the published block's gates.
#include "vector.h"

namespace {

constexpr int64_t SPAN = 64;  // tokens whose sums for parameters' gradients are one part

// Filled in by layers.py, as the other structure: every member has 8 bytes; `half` means bfloat16 instead of float32.
struct LayerNorm {
  Parallel parallel;
  int64_t threads, rows, width;  // a multiple of 16
  double eps;
  int64_t x_half, y_half;
  const void* x;               // (rows, width), contiguous as the others
  const float *weight, *bias;  // (width,); the weight is stored minus 1, the bias may be null
  void* y;
  float* statistics;     // (rows, 2): mean and 1 / deviation
  const void *dy, *sum;  // gradients of y, and of x by another path, or null
  void* dx;
  float* sums;  // (spans, 2, width): gradients of weight and bias

  int64_t spans() const { return (rows + SPAN - 1) / SPAN; }
};

template <class X, class Y>
void normalise(const LayerNorm& args, int64_t item) {
  const int64_t width = args.width, end = (item + 1) * SPAN < args.rows ? (item + 1) * SPAN : args.rows;
  for (int64_t row = item * SPAN; row < end; row++) {
    const X* x = static_cast<const X*>(args.x) + row * width;
    Y* y = static_cast<Y*>(args.y) + row * width;
    Vector total{}, squares{};
    for (int64_t d = 0; d < width; d += LANES) total += read(x + d);
    const float mean = sum(total) / width;
    for (int64_t d = 0; d < width; d += LANES) {
      const Vector centred = read(x + d) - mean;
      squares += centred * centred;
    }
    const float scale = 1 / std::sqrt(sum(squares) / width + (float)args.eps);
    for (int64_t d = 0; d < width; d += LANES) {
      Vector value = (read(x + d) - mean) * scale * (load(args.weight + d) + 1.f);
      write(y + d, args.bias ? value + load(args.bias + d) : value);
    }
    args.statistics[2 * row] = mean, args.statistics[2 * row + 1] = scale;
  }
}

template <class X, class Y>
void normalise_backward(const LayerNorm& args, int64_t item) {
  const int64_t width = args.width, end = (item + 1) * SPAN < args.rows ? (item + 1) * SPAN : args.rows;
  float *d_weight = args.sums + item * 2 * width, *d_bias = d_weight + width;
  memset(d_weight, 0, 2 * width * sizeof(float));
  for (int64_t row = item * SPAN; row < end; row++) {
    const X *x = static_cast<const X*>(args.x) + row * width, *other = static_cast<const X*>(args.sum) + row * width;
    const Y* dy = static_cast<const Y*>(args.dy) + row * width;
    X* dx = static_cast<X*>(args.dx) + row * width;
    const float mean = args.statistics[2 * row], scale = args.statistics[2 * row + 1];
    Vector of_scaled{}, of_product{};
    for (int64_t d = 0; d < width; d += LANES) {
      const Vector value = (read(x + d) - mean) * scale, gradient = read(dy + d);
      store(d_weight + d, load(d_weight + d) + gradient * value);
      store(d_bias + d, load(d_bias + d) + gradient);
      const Vector scaled = gradient * (load(args.weight + d) + 1.f);
      of_scaled += scaled, of_product += scaled * value;
    }
    const float mean_scaled = sum(of_scaled) / width, mean_product = sum(of_product) / width;
    for (int64_t d = 0; d < width; d += LANES) {
      const Vector value = (read(x + d) - mean) * scale, scaled = read(dy + d) * (load(args.weight + d) + 1.f);
      const Vector gradient = scale * (scaled - mean_scaled - value * mean_product);
      write(dx + d, args.sum ? gradient + read(other + d) : gradient);
    }
  }
}

template <class F>
int run(const LayerNorm& args, F work) {
  return for_each(args.spans(), 0, args.threads, args.parallel, [&](int64_t item, float*) { work(args, item); }) ? 0 : 1;
}

// --- gates -----------------------------------------------------------------------------------------------------------

struct Gates {
  Parallel parallel;
  int64_t threads, images, tokens, heads;
  double cap;          // pre-activations become cap · tanh(x / cap); 0: they remain
  const float* raw;    // (B, N, 2 H), contiguous: input gates come first
  const float* gaps;   // (B, N): how often a token's forget gate is applied; null: once
  float *i, *log_f;    // (B, H, N), contiguous
  const float *di, *dlog_f;
  int64_t half, stride;  // of draw
  void* draw;            // (B, N, ...), zeros after the 2 H gates to the next multiple of 16
};

// tanh without loss of digits near 0, where gates begin.
inline float capped(float x, float cap) { return cap > 0 ? cap * std::tanh(x / cap) : x; }

void gates(const Gates& args, int64_t image) {
  for (int64_t t = 0; t < args.tokens; t++) {
    const float* raw = args.raw + (image * args.tokens + t) * 2 * args.heads;
    const float gap = args.gaps ? args.gaps[image * args.tokens + t] : 1, cap = (float)args.cap;
    for (int64_t h = 0; h < args.heads; h++) {
      const int64_t to = (image * args.heads + h) * args.tokens + t;
      const float f = capped(raw[args.heads + h], cap);
      args.i[to] = capped(raw[h], cap);
      args.log_f[to] = gap * ((f < 0 ? f : 0) - std::log1p(std::exp(-std::fabs(f))));
    }
  }
}

template <class T>
void gates_backward(const Gates& args, int64_t image) {
  for (int64_t t = 0; t < args.tokens; t++) {
    const float* raw = args.raw + (image * args.tokens + t) * 2 * args.heads;
    const float gap = args.gaps ? args.gaps[image * args.tokens + t] : 1, cap = (float)args.cap;
    T* to = static_cast<T*>(args.draw) + (image * args.tokens + t) * args.stride;
    for (int64_t g = 0; g < padded(2 * args.heads); g += LANES) {
      float values[LANES] = {};
      for (int64_t n = g; n < g + LANES && n < 2 * args.heads; n++) {
        const int64_t from = (image * args.heads + n % args.heads) * args.tokens + t;
        const float x = capped(raw[n], cap), share = x / cap;
        float d = n < args.heads ? args.di[from] : gap * args.dlog_f[from] / (1 + std::exp(x));
        values[n - g] = cap > 0 ? d * (1 - share * share) : d;
      }
      write(to + g, load(values));
    }
  }
}

// --- weights of gates ------------------------------------------------------------------------------------------------

// The gates are linear in q, k and v, and these are linear in two branches: products of both maps' weights.
struct Fold {
  Parallel parallel;
  int64_t threads, heads, channels;
  const float *input, *forget, *input_bias, *forget_bias;  // weights (H, 3 E) for q, k and v, and biases (H,)
  const float *maps[3], *biases[3];                        // of q, k and v: (E / 4, 4, 4), and (E,) or null
  float *c, *x, *bias;                                     // for the branches, (2 H, E) each, and (2 H,)
  const float *dc, *dx, *dbias;
  float *dinput, *dforget, *dmaps, *dbiases;  // dmaps (3, E / 4, 4, 4) and dbiases (3, E): sums are added to them

  const float* row(int64_t gate) const { return (gate < heads ? input + gate * 3 * channels : forget + (gate - heads) * 3 * channels); }
};

void fold(const Fold& args) {
  for (int64_t gate = 0; gate < 2 * args.heads; gate++) {
    double total = gate < args.heads ? args.input_bias[gate] : args.forget_bias[gate - args.heads];
    for (int64_t part = 0; part < 3; part++) {
      const float* row = args.row(gate) + part * args.channels;
      float* to = (part == 2 ? args.x : args.c) + gate * args.channels;
      for (int64_t e = 0; e < args.channels; e++) {
        const float *map = args.maps[part] + e / 4 * 16 + e % 4, *from = row + e / 4 * 4;
        const float value = from[0] * map[0] + from[1] * map[4] + from[2] * map[8] + from[3] * map[12];
        to[e] = part == 1 ? to[e] + value : value;
        if (args.biases[part]) total += row[e] * args.biases[part][e];
      }
    }
    args.bias[gate] = (float)total;
  }
}

void fold_backward(const Fold& args) {
  for (int64_t gate = 0; gate < 2 * args.heads; gate++)
    for (int64_t part = 0; part < 3; part++) {
      const float *row = args.row(gate) + part * args.channels, *bias = args.biases[part];
      const float *d = (part == 2 ? args.dx : args.dc) + gate * args.channels, d_bias = args.dbias[gate];
      float* to = gate < args.heads ? args.dinput + gate * 3 * args.channels : args.dforget + (gate - args.heads) * 3 * args.channels;
      to += part * args.channels;
      for (int64_t e = 0; e < args.channels; e++) {
        const float *map = args.maps[part] + e * 4, *from = d + e / 4 * 4;
        float* d_map = args.dmaps + (part * args.channels + e) * 4;
        to[e] = from[0] * map[0] + from[1] * map[1] + from[2] * map[2] + from[3] * map[3] + (bias ? d_bias * bias[e] : 0);
        for (int64_t n = 0; n < 4; n++) d_map[n] += row[e] * from[n];
        args.dbiases[part * args.channels + e] += row[e] * d_bias;
      }
    }
}

}  // namespace

// All return 0, or 1 without enough memory.
extern "C" int selfvil_layer_norm_forward(const LayerNorm* args) {
  if (args->x_half) return run(*args, normalise<BFloat16, BFloat16>);
  return args->y_half ? run(*args, normalise<float, BFloat16>) : run(*args, normalise<float, float>);
}
extern "C" int selfvil_layer_norm_backward(const LayerNorm* args) {
  int failed = args->x_half   ? run(*args, normalise_backward<BFloat16, BFloat16>)
               : args->y_half ? run(*args, normalise_backward<float, BFloat16>)
                              : run(*args, normalise_backward<float, float>);
  add_parts(args->sums, args->spans(), 2 * args->width);
  return failed;
}
extern "C" int selfvil_gates_forward(const Gates* args) {
  return for_each(args->images, 0, args->threads, args->parallel, [=](int64_t n, float*) { gates(*args, n); }) ? 0 : 1;
}
extern "C" int selfvil_gates_backward(const Gates* args) {
  return for_each(args->images, 0, args->threads, args->parallel, [=](int64_t image, float*) {
           args->half ? gates_backward<BFloat16>(*args, image) : gates_backward<float>(*args, image);
         }) ? 0 : 1;
}
extern "C" int selfvil_fold_forward(const Fold* args) { return fold(*args), 0; }
extern "C" int selfvil_fold_backward(const Fold* args) { return fold_backward(*args), 0; }
