// The signed Hadamard transform of one rotation group (mlx_turbokv/quant/rotation.py) by one SIMD
// group. Width w = m * 2^k; element i = a * 2^k + b is in lane i % 32, register i / 32. The
// Sylvester part runs along b by shuffles (by registers from distance 32), the dense part of order
// m along a through threadgroup memory. The caller divides by sqrt(w).

// The odd part of a width: 1, 3, 5, 7 or 9.
TKV_CONST_FN int odd_part(int width) {
  return width % 9 == 0 ? 9
                        : (width % 7 == 0 ? 7 : (width % 5 == 0 ? 5 : (width % 3 == 0 ? 3 : 1)));
}
// The order m of the dense part: 1, 12, 20, 28 or 36.
TKV_CONST_FN int dense_order(int width) {
  return odd_part(width) == 1 ? 1 : 4 * odd_part(width);
}

TKV_FN float flip_sign(float x, uint negative) {
  return as_type<float>(as_type<uint>(x) ^ (negative << 31));
}

template <int WIDTH>
TKV_FN void apply_signs(thread float* x, const device uint* constants, int lane) {
  TKV_UNROLL
  for (int j = 0; j < ceil_div(WIDTH, LANES); j++) {
    x[j] = flip_sign(x[j], (constants[j] >> lane) & 1u);
  }
}

template <int WIDTH>
TKV_FN void sylvester(thread float* x, int lane) {
  constexpr int BLOCK = WIDTH / dense_order(WIDTH);
  constexpr int N = ceil_div(WIDTH, LANES);
  TKV_UNROLL
  for (int distance = 1; distance < (BLOCK < LANES ? BLOCK : LANES); distance *= 2) {
    TKV_UNROLL
    for (int j = 0; j < N; j++) {
      const float other = simd_shuffle_xor(x[j], ushort(distance));
      x[j] = (lane & distance) ? other - x[j] : x[j] + other;
    }
  }
  TKV_UNROLL
  for (int step = 1; step * LANES < BLOCK; step *= 2) {
    TKV_UNROLL
    for (int j = 0; j < N; j++) {
      if ((j & step) == 0 && j + step < N) {
        const float low = x[j];
        const float high = x[j + step];
        x[j] = low + high;
        x[j + step] = low - high;
      }
    }
  }
}

// `matrix`: sign bits, two words for each output. `scratch`: WIDTH floats private to the SIMD
// group.
template <int WIDTH>
TKV_FN void dense_hadamard(thread float* x, const device uint* matrix, threadgroup float* scratch,
                           int lane) {
  constexpr int ORDER = dense_order(WIDTH);
  constexpr int BLOCK = WIDTH / ORDER;
  if (ORDER == 1) {
    return;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  TKV_UNROLL
  for (int j = 0; j < ceil_div(WIDTH, LANES); j++) {
    if (lane + j * LANES < WIDTH) {
      scratch[lane + j * LANES] = x[j];
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  TKV_UNROLL
  for (int j = 0; j < ceil_div(WIDTH, LANES); j++) {
    const int i = lane + j * LANES;
    if (i < WIDTH) {
      const int row = i / BLOCK;
      const uint low = matrix[2 * row];
      const uint high = matrix[2 * row + 1];
      float sum = 0.0f;
      for (int a = 0; a < ORDER; a++) {
        const uint bit = ((a < 32 ? low : high) >> (a & 31)) & 1u;
        sum += flip_sign(scratch[a * BLOCK + i % BLOCK], bit);
      }
      x[j] = sum;
    }
  }
}

// The transform without the signs.
template <int WIDTH>
TKV_FN void hadamard_transform(thread float* x, const device uint* constants,
                               threadgroup float* scratch, int lane) {
  sylvester<WIDTH>(x, lane);
  dense_hadamard<WIDTH>(x, constants + TABLE_HADAMARD_ROWS, scratch, lane);
}

template <int WIDTH>
TKV_FN void rotate(thread float* x, const device uint* constants, threadgroup float* scratch,
                   int lane) {
  apply_signs<WIDTH>(x, constants, lane);
  hadamard_transform<WIDTH>(x, constants, scratch, lane);
}

template <int WIDTH>
TKV_FN void rotate_inverse(thread float* x, const device uint* constants,
                           threadgroup float* scratch, int lane) {
  sylvester<WIDTH>(x, lane);
  dense_hadamard<WIDTH>(x, constants + TABLE_HADAMARD_COLUMNS, scratch, lane);
  apply_signs<WIDTH>(x, constants, lane);
}
