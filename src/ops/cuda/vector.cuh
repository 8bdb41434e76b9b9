// V neighbouring elements of f32 or bf16 memory (or of i8, to read) at a time, as floats in
// registers. The address must be a multiple of min(16, V sizeof(T)) bytes: vector_access.h tells on
// the host.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "core/dtype.h"

namespace krait::cuda {

template <int V>
struct Floats {
  float v[V];
  __device__ float& operator[](int i) { return v[i]; }
  __device__ float operator[](int i) const { return v[i]; }
};

template <int V>
__device__ Floats<V> constant(float x) {
  Floats<V> out;
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = x;
  return out;
}

// As they lie in memory: loads in flight cost half the registers with bf16.
template <class T, int V>
struct Packed {
  static constexpr int kBytes = V * static_cast<int>(sizeof(T));
  static constexpr int kWords = (kBytes + 3) / 4;
  uint32_t word[kWords];
};

template <int V, class T>
__device__ Packed<T, V> load_packed(const T* p) {
  using P = Packed<T, V>;
  P out;
  if constexpr (P::kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < P::kBytes / 16; ++i) {
      const uint4 w = reinterpret_cast<const uint4*>(p)[i];
      out.word[4 * i] = w.x, out.word[4 * i + 1] = w.y;
      out.word[4 * i + 2] = w.z, out.word[4 * i + 3] = w.w;
    }
  } else if constexpr (P::kBytes == 8) {
    const uint2 w = *reinterpret_cast<const uint2*>(p);
    out.word[0] = w.x, out.word[1] = w.y;
  } else if constexpr (P::kBytes == 4) {
    out.word[0] = *reinterpret_cast<const uint32_t*>(p);
  } else if constexpr (P::kBytes == 2) {
    out.word[0] = *reinterpret_cast<const uint16_t*>(p);
  } else {
    static_assert(P::kBytes == 1);
    out.word[0] = *reinterpret_cast<const uint8_t*>(p);
  }
  return out;
}

// The same for 8 or 16 bytes, past the first-level cache: what is read before
// wait_for_earlier_work, when that cache may hold what was there before.
template <int V, class T>
__device__ Packed<T, V> load_uncached(const T* p) {
  using P = Packed<T, V>;
  P out;
  if constexpr (P::kBytes == 16) {
    const uint4 w = __ldcg(reinterpret_cast<const uint4*>(p));
    out.word[0] = w.x, out.word[1] = w.y, out.word[2] = w.z, out.word[3] = w.w;
  } else {
    static_assert(P::kBytes == 8);
    const uint2 w = __ldcg(reinterpret_cast<const uint2*>(p));
    out.word[0] = w.x, out.word[1] = w.y;
  }
  return out;
}

// Byte i of a word of i8, exactly: with its sign bit turned it is b + 128, put behind the exponent
// of 2^23 a float of that much more. Two operations at full rate; conversions run at a quarter.
__device__ inline float unpack_int8(uint32_t word, int i) {
  const uint32_t biased = word ^ 0x80808080u;
  return __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7440u + static_cast<uint32_t>(i))) -
         8388736.0f;
}

template <class T, int V>
__device__ Floats<V> unpack(const Packed<T, V>& p) {
  Floats<V> out;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = __uint_as_float(p.word[i]);
    } else if constexpr (sizeof(T) == 1) {
      out[i] = unpack_int8(p.word[i / 4], i % 4);
    } else {
      const uint32_t w = p.word[i / 2];
      out[i] = __uint_as_float(i % 2 == 0 ? w << 16 : w & 0xffff0000u);
    }
  }
  return out;
}

template <int V, class T>
__device__ Floats<V> load_vector(const T* p) {
  return unpack(load_packed<V>(p));
}

// Rounds to T, to nearest even.
template <class T, int V>
__device__ Packed<T, V> pack(const Floats<V>& x) {
  Packed<T, V> out;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) out.word[i] = __float_as_uint(x[i]);
  } else if constexpr (V == 1) {
    out.word[0] = __bfloat16_as_ushort(__float2bfloat16_rn(x[0]));
  } else {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      out.word[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }
  return out;
}

template <int V, class T>
__device__ void store_vector(T* p, const Floats<V>& x) {
  using P = Packed<T, V>;
  const P in = pack<T>(x);
  if constexpr (P::kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < P::kBytes / 16; ++i)
      reinterpret_cast<uint4*>(p)[i] =
          make_uint4(in.word[4 * i], in.word[4 * i + 1], in.word[4 * i + 2], in.word[4 * i + 3]);
  } else if constexpr (P::kBytes == 8) {
    *reinterpret_cast<uint2*>(p) = make_uint2(in.word[0], in.word[1]);
  } else if constexpr (P::kBytes == 4) {
    *reinterpret_cast<uint32_t*>(p) = in.word[0];
  } else {
    *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(in.word[0]);
  }
}

}  // namespace krait::cuda
