// The only macros of the protocol headers: they are plain C++20, compiled alike by the host compiler, by nvcc for the
// device and by the tests.
#pragma once

#if defined(__CUDACC__)
#define MNNVL_AR_HD __host__ __device__ __forceinline__
#else
#define MNNVL_AR_HD inline
#endif

#if defined(__CUDA_ARCH__)
#define MNNVL_AR_UNROLL _Pragma("unroll")
#define MNNVL_AR_ROLLED _Pragma("unroll 1")
#else
#define MNNVL_AR_UNROLL
#define MNNVL_AR_ROLLED
#endif
