/* SPDX-License-Identifier: Apache-2.0
 *
 * Training batch norm with what follows it, as plain C: nothing of MXNet, nothing of cuDNN. batch_norm_cudnn.cc and
 * batch_norm_cpu.cc implement it, operators.cc offers it to MXNet, benchmarks/gpu_batch_norm.py calls it directly
 * (MxresnetBatchNorm is declared there once more: keep the two alike).
 */
#ifndef MXRESNET_BATCH_NORM_H_
#define MXRESNET_BATCH_NORM_H_

#include <stddef.h>
#include <stdint.h>

#define MXRESNET_MESSAGE_BYTES 512

enum MxresnetOperation {
  MXRESNET_BN = 0,         /* y = batch_norm(x) */
  MXRESNET_BN_RELU = 1,    /* y = relu(batch_norm(x)) */
  MXRESNET_BN_ADD_RELU = 2 /* y = relu(batch_norm(x) + z) */
};

/* One call. x, z, y and their gradients have n * h * w * c elements, packed, in the layout that channel_last says: float16 in
 * the GPU build, float32 in the CPU build. All that has one value per channel is float32. */
typedef struct MxresnetBatchNorm {
  int32_t operation;    /* MxresnetOperation */
  int32_t channel_last; /* 1: n, h, w, c   0: n, c, h, w */
  int64_t n, h, w, c;
  double epsilon;
  double momentum; /* running = momentum * running + (1 - momentum) * new, the new variance unbiased */
  void *stream;    /* cudaStream_t */

  const void *x;
  const void *z; /* only MXRESNET_BN_ADD_RELU */
  void *y;       /* output of forward, input of backward */
  const float *gamma, *beta;
  float *running_mean, *running_variance;  /* read and written by forward */
  float *saved_mean, *saved_inverse;       /* forward to backward: mean and 1 / sqrt(variance + epsilon) */
  void *reserve;                           /* forward to backward: where relu let through, as bits */
  uint64_t reserve_bytes;
  void *workspace;
  uint64_t workspace_bytes;

  const void *dy;
  void *dx;
  void *dz; /* only MXRESNET_BN_ADD_RELU */
  float *dgamma, *dbeta;
} MxresnetBatchNorm;

typedef struct MxresnetSizes {
  uint64_t reserve, forward_workspace, backward_workspace; /* bytes */
} MxresnetSizes;

#ifdef __cplusplus
extern "C" {
#endif

/* Each returns 0, or 1 with one line in message (MXRESNET_MESSAGE_BYTES long). Work is queued on the stream. */

/* Is such a call possible at all? Looks at operation, layout and sizes only, and at no device. */
int mxresnet_batch_norm_check(const MxresnetBatchNorm *call, char *message);
/* Asks the current device. */
int mxresnet_batch_norm_sizes(const MxresnetBatchNorm *call, MxresnetSizes *sizes, char *message);
int mxresnet_batch_norm_forward(const MxresnetBatchNorm *call, char *message);
int mxresnet_batch_norm_backward(const MxresnetBatchNorm *call, char *message);

/* Bytes of reserve that operators.cc declares, when mxresnet_use_device has been told which device will do the work;
 * an estimate before that. */
int mxresnet_batch_norm_reserve(const MxresnetBatchNorm *call, uint64_t *bytes, char *message);
void mxresnet_use_device(int device);

#ifdef __cplusplus
}
#endif

#endif
