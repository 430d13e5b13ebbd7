/* SPDX-License-Identifier: Apache-2.0
 *
 * C interface of a batch norm with optional addition and ReLU. It depends on neither MXNet nor
 * cuDNN. batch_norm_cudnn.cc and batch_norm_cpu.cc implement it, operators.cc makes MXNet operators
 * of it, benchmarks/batch_norm_library.py calls it from Python.
 *
 * MxresnetBatchNorm and MxresnetSizes are declared again in benchmarks/batch_norm_library.py: a
 * change must be made in both.
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

/* The arguments of one pass. x, z, y and their gradients are packed arrays of
 * n * h * w * c elements: float16 in the GPU build, float32 in the CPU build. Arrays with one value
 * per channel are float32. */
typedef struct MxresnetBatchNorm {
  int32_t operation;    /* MxresnetOperation */
  int32_t channel_last; /* 1: NHWC, 0: NCHW */
  int64_t n, h, w, c;
  double epsilon;
  double momentum; /* running = momentum * running + (1 - momentum) * new; new variance unbiased */
  void* stream;    /* cudaStream_t */

  const void* x;
  const void* z; /* only MXRESNET_BN_ADD_RELU */
  void* y;       /* output of forward, input of backward */
  const float *gamma, *beta;
  float *running_mean, *running_variance; /* read and written by forward, read by evaluate */

  /* Written by forward, read by backward. */
  float* saved_mean;
  float* saved_inverse_std; /* 1 / sqrt(variance + epsilon) */
  void* reserve;            /* one bit per element: whether it passed ReLU */
  uint64_t reserve_bytes;
  void* workspace;
  uint64_t workspace_bytes;

  const void* dy;
  void* dx;
  void* dz; /* only MXRESNET_BN_ADD_RELU */
  float *dgamma, *dbeta;
} MxresnetBatchNorm;

typedef struct MxresnetSizes {
  uint64_t reserve, forward_workspace, backward_workspace; /* bytes */
} MxresnetSizes;

#ifdef __cplusplus
extern "C" {
#endif

/* What a batch norm of one operation, layout and shape needs on one device: cuDNN's descriptors and
 * sizes. Creating it is slow, so that a layer has one for its lifetime. */
typedef struct MxresnetPlan MxresnetPlan;

/* Functions that return int return 0 on success, else 1 with one line in message, an array of
 * MXRESNET_MESSAGE_BYTES. Work is queued on the stream. */

/* Check operation, layout and sizes, without using a device. */
int mxresnet_batch_norm_check(const MxresnetBatchNorm* call, char* message);

/* Create the plan for the operation, layout and shape of a call on the current device, and return
 * the sizes that its reserve and workspaces need. */
int mxresnet_plan_create(const MxresnetBatchNorm* call, MxresnetPlan** plan, MxresnetSizes* sizes,
                         char* message);
void mxresnet_plan_destroy(MxresnetPlan* plan);

/* Training. */
int mxresnet_batch_norm_forward(const MxresnetPlan* plan, const MxresnetBatchNorm* call,
                                char* message);
int mxresnet_batch_norm_backward(const MxresnetPlan* plan, const MxresnetBatchNorm* call,
                                 char* message);

/* Evaluation: compute y with running_mean and running_variance, which do not change. It needs no
 * reserve and no workspace. */
int mxresnet_batch_norm_evaluate(const MxresnetPlan* plan, const MxresnetBatchNorm* call,
                                 char* message);

/* Make a device current, and return the previous one if `previous` is not null. */
int mxresnet_set_device(int device, int* previous, char* message);

/* Allocate and free memory of the current device. */
int mxresnet_allocate(uint64_t bytes, void** memory, char* message);
void mxresnet_free(void* memory);

#ifdef __cplusplus
}
#endif

#endif
