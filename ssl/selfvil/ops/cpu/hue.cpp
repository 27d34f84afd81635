// Rotation of the hue of 8-bit RGB pixels, in place. Values are those of Pillow's conversions to HSV of 8 bits and back,
// bit for bit: float32 and float64 where Pillow has them, and no fused multiply-add.
//
// With m the largest and d the difference of the largest and the smallest value, the hue in sixths of the wheel is
// (g - b) / d if red is the largest, 2 + (b - r) / d for green, 4 + (r - g) / d for blue (Smith, "Color gamut transform
// pairs", 1978). Hue and saturation are truncated to 8 bits; the colours of the rotated pixel are rounded.
//
// Loops without branches over blocks of pixels, which the compiler vectorises.

#include <cstdint>

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("O3,fp-contract=off,no-trapping-math")
#endif

namespace {

struct Turn {
  int64_t parallel, threads;
  uint8_t* pixels;  // (count, 3)
  int64_t count, shift;  // shift: 0 to 255, added to the hue
};

constexpr int BLOCK = 128;

// What follows from a hue alone: the sixth of the wheel, and the position within it.
struct Wheel {
  int32_t sixth[256];
  float within[256];
  Wheel() {
    for (int hue = 0; hue < 256; hue++) {
      double place = hue * 6.0 / 255.0;
      sixth[hue] = (int32_t)place % 6;
      within[hue] = (float)(place - (int32_t)place);
    }
  }
};

// Rounds half up; adding 0.5 first would round some values just below a half up.
inline int32_t rounded(double x) {
  int32_t whole = (int32_t)x;
  return whole + (x - whole >= 0.5);
}

void turn(const Wheel& wheel, uint8_t* pixels, int count, int32_t shift) {
  int32_t red[BLOCK] = {}, green[BLOCK] = {}, blue[BLOCK] = {}, hue[BLOCK];
  for (int i = 0; i < count; i++) {
    red[i] = pixels[3 * i];
    green[i] = pixels[3 * i + 1];
    blue[i] = pixels[3 * i + 2];
  }
  for (int i = 0; i < BLOCK; i++) {
    int32_t r = red[i], g = green[i], b = blue[i];
    int32_t most = r > g ? r : g, least = r < g ? r : g;
    most = most > b ? most : b;
    least = least < b ? least : b;
    float spread = (float)(most > least ? most - least : 1);
    float to_red = (float)(most - r) / spread, to_green = (float)(most - g) / spread;
    float to_blue = (float)(most - b) / spread;
    float if_green = (float)(2.0 + (double)to_red - (double)to_blue);
    float if_blue = (float)(4.0 + (double)to_green - (double)to_red);
    float sixths = r == most ? to_blue - to_green : g == most ? if_green : if_blue;
    double place = (double)sixths / 6.0 + 1.0;
    float share = (float)(place >= 1.0 ? place - 1.0 : place);
    hue[i] = (int32_t)((double)share * 255.0) + shift & 255;
  }
  for (int i = 0; i < BLOCK; i++) {
    int32_t r = red[i], g = green[i], b = blue[i];
    int32_t most = r > g ? r : g, least = r < g ? r : g;
    most = most > b ? most : b;
    least = least < b ? least : b;
    float ratio = (float)(most - least) / (float)(most > 0 ? most : 1);
    int32_t saturation = (int32_t)((double)ratio * 255.0);
    float share = (float)((double)saturation / 255.0), part = wheel.within[hue[i]];
    double value = most, strength = share;
    int32_t low = rounded(value * (1.0 - strength)), falling = rounded(value * (1.0 - (double)(share * part)));
    int32_t rising = rounded(value * (1.0 - strength * (1.0 - (double)part))), sixth = wheel.sixth[hue[i]];
    red[i] = sixth == 0 || sixth == 5 ? most : sixth == 1 ? falling : sixth == 4 ? rising : low;
    green[i] = sixth == 1 || sixth == 2 ? most : sixth == 3 ? falling : sixth == 0 ? rising : low;
    blue[i] = sixth == 3 || sixth == 4 ? most : sixth == 5 ? falling : sixth == 2 ? rising : low;
  }
  for (int i = 0; i < count; i++) {
    pixels[3 * i] = (uint8_t)red[i];
    pixels[3 * i + 1] = (uint8_t)green[i];
    pixels[3 * i + 2] = (uint8_t)blue[i];
  }
}

}  // namespace

extern "C" int selfvil_turn_hue(const Turn* args) {
  static const Wheel wheel;
  for (int64_t first = 0; first < args->count; first += BLOCK) {
    const int64_t left = args->count - first;
    turn(wheel, args->pixels + 3 * first, (int)(left < BLOCK ? left : BLOCK), (int32_t)args->shift);
  }
  return 0;
}
