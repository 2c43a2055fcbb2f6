// csrc/cuda/intrinsics.cuh for g++, which includes this inside namespace quantlib::cuda. A product of a warp gathers
// the registers of its lanes. Harsher than a GPU: an fma2 that rounds is an error, for decoding a code must be exact,
// and sums are cut off to binary32, as tensor cores do it.

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> (4 * i) & 15, byte = uint32_t(bytes >> (8 * (pick & 7))) & 0xff;
    y |= (pick & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
  }
  return y;
}

template <class X>
float half_of(uint32_t pair, int half) {
  return decode_float<X>(pair >> (16 * half) & 0xffffu);
}

template <class X>
uint32_t fma2(X, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y = 0;
  for (int half = 0; half < 2; ++half) {
    const double exact = double(half_of<X>(a, half)) * half_of<X>(b, half) + half_of<X>(c, half);
    const uint32_t code = encode_float<X>(float(exact), false);
    if (exact == exact && decode_float<X>(code) != exact) throw std::runtime_error("a code became another value");
    y |= code << (16 * half);
  }
  return y;
}

template <class X>
void mma(X, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  const cuda_on_cpu::Fragments warp(a, b, line);
  warp.each([&](int row, int column, int e) {
    double sum = c[e];
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2, half = k / 8;
      sum += double(half_of<X>(warp.a(row, t, half), k % 2)) * half_of<X>(warp.b(column, t, half), k % 2);
    }
    const float nearest = float(sum);
    c[e] = std::fabs(nearest) > std::fabs(sum) && std::fabs(sum) < 3.4e38 ? std::nextafter(nearest, 0.0f) : nearest;
  });
}

inline void mma(int8, int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  const cuda_on_cpu::Fragments warp(a, b, line);
  warp.each([&](int row, int column, int e) {
    const auto byte = [](uint32_t word, int k) { return int32_t(int8_t(word >> (8 * (k % 4)))); };
    uint32_t sum = uint32_t(c[e]);
    for (int k = 0; k < 32; ++k)
      sum += uint32_t(byte(warp.a(row, k % 16 / 4, k / 16), k) * byte(warp.b(column, k % 16 / 4, k / 16), k));
    c[e] = int32_t(sum);
  });
}

inline Vector<uint32_t, 4> load_once(const uint8_t* p) {
  return Vector<uint32_t, 4>::load(reinterpret_cast<const uint32_t*>(p));
}
