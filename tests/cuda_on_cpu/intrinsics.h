// csrc/cuda/intrinsics.cuh for g++, which includes this inside namespace quantlib::cuda; intrinsics.cpp defines them.

uint32_t permute(uint32_t a, uint32_t b, uint32_t selector);
uint32_t fma2(float16, uint32_t a, uint32_t b, uint32_t c);
uint32_t fma2(bfloat16, uint32_t a, uint32_t b, uint32_t c);
void mma(float16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE());
void mma(bfloat16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE());
void mma(int8, int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE());

// 16 bytes of shared memory = `bytes` at `from` and zeros, when the thread has waited for the group they are in; before
// the others may read them, they meet. wait_copies<N>() leaves the last N groups on their way.
void copy_async(void* to, const void* from, int bytes = 16);
void commit_copies();
void wait_copies(int groups_left);
template <int N>
void wait_copies() {
  wait_copies(N);
}

inline Vector<uint32_t, 4> load_once(const uint8_t* p) {
  return Vector<uint32_t, 4>::load(reinterpret_cast<const uint32_t*>(p));
}
