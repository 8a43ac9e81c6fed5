// Quantises a row for pack.metal, one SIMD group a row. Of four rules for the scale of a turbo
// group the unbiased one has the lowest KLD: scripts/group_scale.py of commit e1a90eb compares
// them.

// The constants of quant/quantize.py.
constant constexpr float FP16_NORMAL = 6.103515625e-5f;  // 2^-14
constant constexpr float FP16_STEPS = 16777216.0f;       // 2^24, of subnormals in 1
constant constexpr float FP16_MOST_Q8 = 515.5f;
constant constexpr float MOST_ROTATED = 1125899906842624.0f;  // 2^50
constant constexpr float FLOAT_MAX = 3.402823466e38f;

// The bits of a scale in half, saturated; all NaNs have the same bits. Subnormals, whose bits count
// from zero, are not left to a conversion that may flush them.
TKV_FN ushort scale_bits(float scale) {
  if (!(scale == scale)) {
    return ushort(0x7e00);
  }
  if (scale < FP16_NORMAL) {
    return ushort(rint(scale * FP16_STEPS));
  }
  return as_type<ushort>(half(scale > FP16_MAX ? FP16_MAX : scale));
}

// The bits of the scale that maps the largest magnitude of a q8_0 group to 127. Where half has few
// digits it is rounded up, so that no code is cut.
template <typename T>
TKV_FN ushort q8_scale_bits(float largest) {
  if (largest < 127.0f * FP16_NORMAL) {
    const float exact = largest * FP16_STEPS;
    const int below = int(exact);
    const int steps = float(below) < exact ? below + 1 : below;
    return ushort(exact > 0.5f ? (steps + 126) / 127 : 0);
  }
  const float scale = largest / 127.0f;
  return scale_bits(IsHalf<T>::value != 0 && scale > FP16_MOST_Q8 ? FP16_MOST_Q8 : scale);
}

// A value that can be rotated and squared; an infinity becomes NaN.
template <typename T>
TKV_FN float bounded(float x) {
  if (IsHalf<T>::value != 0) {
    return x;
  }
  const float magnitude = abs(x);
  const float most = magnitude <= FLOAT_MAX ? MOST_ROTATED : as_type<float>(0x7fc00000u);
  return magnitude <= MOST_ROTATED ? x : (x < 0.0f ? -most : most);
}

// The int8 code of a lane's value, and the scale of the group that the lanes hold; the scale maps
// the largest magnitude to 127. T: what the rows were, which bounds the scale.
template <typename T>
TKV_FN void quantize_q8_group(float value, bool inside, threadgroup uchar* codes,
                              threadgroup ushort* scale, int lane) {
  const float magnitude = flip_sign(value, as_type<uint>(value) >> 31);
  const bool not_finite = !(magnitude <= FLOAT_MAX);  // NaN or infinite
  float largest = simd_max(not_finite ? 0.0f : magnitude);
  if (simd_any(not_finite)) {
    largest = as_type<float>(0x7fc00000u);
  }
  const ushort bits = q8_scale_bits<T>(largest);
  const float step = half_bits(bits);
  float code = step > 0.0f && !not_finite ? rint(value / step) : 0.0f;
  code = code > 127.0f ? 127.0f : (code < -127.0f ? -127.0f : code);
  if (inside) {
    codes[lane] = uchar(int(code) & 255);
  }
  if (lane == 0) {
    *scale = bits;
  }
}

// q8_0 codes and scales of a row.
template <typename T, int DIM>
TKV_FN void quantize_q8(const device T* x, threadgroup uchar* codes, threadgroup ushort* scales,
                        int lane) {
  TKV_UNROLL
  for (int g = 0; g < ceil_div(DIM, LANES); g++) {
    const bool inside = g * LANES + lane < DIM;
    const float value = inside ? float(x[g * LANES + lane]) : 0.0f;
    quantize_q8_group<T>(value, inside, codes + g * LANES, scales + g * TILE, lane);
  }
}

// The nearest level's code: the number of boundaries below x.
template <int BITS>
TKV_FN int nearest_level(float x, threadgroup const float* boundaries) {
  int code = 0;
  TKV_UNROLL
  for (int bit = BITS - 1; bit >= 0; bit--) {
    code += x > boundaries[code + (1 << bit) - 1] ? 1 << bit : 0;
  }
  return code;
}

// The scale <y, y> / <y, c> of a group y with levels c.
TKV_FN float unbiased_scale(float energy, float levels_dot) {
  return energy == 0.0f ? 0.0f : energy / levels_dot;
}

// What centred keys are multiplied by, and what is subtracted then: mu of the KV head, the table,
// and the rows' positions.
struct Anchors {
  const device float* mu;
  const device float* scales;
  const device uint* cos_sin_table;
  int split_pairs;
  int row;          // row of the first new token in the sequence
  int padding;      // rows before the sequence's first token
  int n_uncentred;  // first keys of the sequence without an anchor
};

// Turbo codes and scales of a row, those of turbo8 as q8_0's; with CENTRED it is multiplied by its
// scales and its anchor is subtracted first. ROTATED: the row is in the rotated basis.
template <typename T, int BITS, int GROUP, int DIM, int WIDTH, bool CENTRED, bool ROTATED>
TKV_FN void quantize_turbo(const device T* x, threadgroup float* row, threadgroup uchar* codes,
                           threadgroup ushort* scales, threadgroup const float* levels,
                           const device uint* constants, Anchors anchors, int lane) {
  constexpr int N = ceil_div(WIDTH, LANES);
  const float factor = 1.0f / sqrt(float(WIDTH));
  for (int first = 0; first < DIM; first += WIDTH) {
    float y[N];
    TKV_UNROLL
    for (int j = 0; j < N; j++) {
      y[j] = lane + j * LANES < WIDTH ? float(x[first + lane + j * LANES]) : 0.0f;
      if (CENTRED && lane + j * LANES < WIDTH) {
        const int dim = first + lane + j * LANES;
        y[j] *= anchors.scales[dim];
        if (has_anchor(anchors.row, anchors.padding, anchors.n_uncentred)) {
          const device uint* cos_sin =
              anchors.cos_sin_table + anchor_block(anchors.row, anchors.padding) * (DIM / 2);
          y[j] -= anchor_value(anchors.mu, cos_sin, anchors.split_pairs, dim);
        }
      }
      y[j] = bounded<T>(y[j]);
    }
    if (!ROTATED) {
      rotate<WIDTH>(y, constants, row + first, lane);
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    TKV_UNROLL
    for (int j = 0; j < N; j++) {
      if (lane + j * LANES < WIDTH) {
        row[first + lane + j * LANES] = ROTATED ? y[j] : y[j] * factor;
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (BITS == 8) {
    for (int g = 0; g < ceil_div(DIM, LANES); g++) {
      const bool inside = g * LANES + lane < DIM;
      const float value = inside ? row[g * LANES + lane] : 0.0f;
      quantize_q8_group<float>(value, inside, codes + g * LANES, scales + g * TILE, lane);
    }
    return;
  }
  for (int first = 0; first < DIM; first += GROUP) {
    const int size = DIM - first < GROUP ? DIM - first : GROUP;
    float energy = 0.0f;
    for (int i = lane; i < size; i += LANES) {
      energy += row[first + i] * row[first + i];
    }
    energy = simd_sum(energy);
    const float rms = sqrt(energy / float(size));
    float levels_dot = 0.0f;
    for (int i = lane; i < size; i += LANES) {
      const float value = row[first + i];
      const int code =
          nearest_level<BITS>(rms > 0.0f ? value / rms : value * 0.0f, levels + MAX_LEVELS);
      codes[first + i] = uchar(code);
      levels_dot += value * levels[code];
    }
    levels_dot = simd_sum(levels_dot);
    if (lane == 0) {
      scales[first / GROUP * TILE] = scale_bits(unbiased_scale(energy, levels_dot));
    }
  }
}
