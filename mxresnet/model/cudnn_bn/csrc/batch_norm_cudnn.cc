// SPDX-License-Identifier: Apache-2.0
// Implementation of batch_norm.h with the fused kernels of cuDNN 8: float16 NHWC data, float32
// statistics. It has host code only. cuDNN 9 still has the functions and declares them deprecated.
//
// Source: cuDNN's documentation of cudnnBatchNormalizationForwardTrainingEx,
// cudnnBatchNormalizationBackwardEx and cudnnBatchNormalizationForwardInference. The fused modes
// require float16 NHWC data, CUDNN_BATCHNORM_SPATIAL_PERSISTENT and a number of channels that is a
// multiple of four.
#include <cudnn.h>

#include <cstdio>
#include <map>
#include <memory>

#include "batch_norm.h"

namespace {

constexpr cudnnBatchNormMode_t kMode = CUDNN_BATCHNORM_SPATIAL_PERSISTENT;
// Evaluation has no persistent variant.
constexpr cudnnBatchNormMode_t kEvaluationMode = CUDNN_BATCHNORM_SPATIAL;

int fail(const MxresnetBatchNorm& call, char* message, const char* what, const char* why) {
  std::snprintf(message, MXRESNET_MESSAGE_BYTES, "%s: %s (data of %lld x %lld x %lld x %lld)", what,
                why, static_cast<long long>(call.n), static_cast<long long>(call.h),
                static_cast<long long>(call.w), static_cast<long long>(call.c));
  return 1;
}

// Checks the statuses of calls. Each function returns whether all is well; if not, there is a
// message.
class Checker {
 public:
  Checker(const MxresnetBatchNorm& call, char* message) : call_(call), message_(message) {}

  bool check(const char* function, cudnnStatus_t status) {
    return status == CUDNN_STATUS_SUCCESS ||
           !fail(call_, message_, function, cudnnGetErrorString(status));
  }

  bool check(const char* function, cudaError_t status) {
    return status == cudaSuccess || !fail(call_, message_, function, cudaGetErrorString(status));
  }

  bool check_bytes(const char* what, uint64_t needed, uint64_t given) {
    char why[128];
    std::snprintf(why, sizeof(why), "%llu bytes are needed and %llu were given",
                  static_cast<unsigned long long>(needed), static_cast<unsigned long long>(given));
    return given >= needed || !fail(call_, message_, what, why);
  }

 private:
  const MxresnetBatchNorm& call_;
  char* message_;
};

// Returns cuDNN's handle of this thread and the current device, with its stream set; null if that
// failed. Handles are never destroyed: when a thread ends, the CUDA driver may have been unloaded.
cudnnHandle_t thread_handle(Checker& checker, void* stream) {
  static thread_local std::map<int, cudnnHandle_t> handles;
  int device = 0;
  if (!checker.check("cudaGetDevice", cudaGetDevice(&device))) return nullptr;
  cudnnHandle_t& handle = handles[device];
  if (!handle && !checker.check("cudnnCreate", cudnnCreate(&handle))) return handle = nullptr;
  const cudnnStatus_t status = cudnnSetStream(handle, static_cast<cudaStream_t>(stream));
  return checker.check("cudnnSetStream", status) ? handle : nullptr;
}

using Tensor = std::unique_ptr<cudnnTensorStruct, decltype(&cudnnDestroyTensorDescriptor)>;
using Activation =
    std::unique_ptr<cudnnActivationStruct, decltype(&cudnnDestroyActivationDescriptor)>;

}  // namespace

struct MxresnetPlan {
  explicit MxresnetPlan(const MxresnetBatchNorm& call) : shape(call) {}

  cudnnBatchNormOps_t operation() const {
    if (shape.operation == MXRESNET_BN) return CUDNN_BATCHNORM_OPS_BN;
    if (shape.operation == MXRESNET_BN_RELU) return CUDNN_BATCHNORM_OPS_BN_ACTIVATION;
    return CUDNN_BATCHNORM_OPS_BN_ADD_ACTIVATION;
  }

  // Descriptors. Those of tensors that the operation does not have are null, as cuDNN requires.
  cudnnTensorDescriptor_t data() const { return data_.get(); }
  cudnnTensorDescriptor_t channels() const { return channels_.get(); }
  cudnnTensorDescriptor_t addend() const {
    return shape.operation == MXRESNET_BN_ADD_RELU ? data_.get() : nullptr;
  }
  cudnnActivationDescriptor_t activation() const {
    return shape.operation == MXRESNET_BN ? nullptr : activation_.get();
  }
  cudnnTensorDescriptor_t backward_y() const {
    return shape.operation == MXRESNET_BN ? nullptr : data_.get();
  }

  // Each of these returns whether all is well; if not, there is a message.
  bool create_descriptors(Checker& checker);
  bool set_descriptors(Checker& checker);
  bool query_sizes(Checker& checker, cudnnHandle_t handle);

  const MxresnetBatchNorm shape;  // only its operation, layout and sizes are used
  MxresnetSizes sizes = {0, 0, 0};

 private:
  Tensor data_{nullptr, cudnnDestroyTensorDescriptor};
  Tensor channels_{nullptr, cudnnDestroyTensorDescriptor};
  Activation activation_{nullptr, cudnnDestroyActivationDescriptor};
};

bool MxresnetPlan::create_descriptors(Checker& checker) {
  cudnnTensorDescriptor_t tensor = nullptr;
  cudnnActivationDescriptor_t activation = nullptr;
  if (!checker.check("cudnnCreateTensorDescriptor", cudnnCreateTensorDescriptor(&tensor)))
    return false;
  data_.reset(tensor);
  if (!checker.check("cudnnCreateTensorDescriptor", cudnnCreateTensorDescriptor(&tensor)))
    return false;
  channels_.reset(tensor);
  const cudnnStatus_t status = cudnnCreateActivationDescriptor(&activation);
  if (!checker.check("cudnnCreateActivationDescriptor", status)) return false;
  activation_.reset(activation);
  return true;
}

bool MxresnetPlan::set_descriptors(Checker& checker) {
  cudnnStatus_t status = cudnnSetTensor4dDescriptor(
      data_.get(), CUDNN_TENSOR_NHWC, CUDNN_DATA_HALF, static_cast<int>(shape.n),
      static_cast<int>(shape.c), static_cast<int>(shape.h), static_cast<int>(shape.w));
  if (!checker.check("cudnnSetTensor4dDescriptor", status)) return false;
  status = cudnnDeriveBNTensorDescriptor(channels_.get(), data_.get(), kMode);
  if (!checker.check("cudnnDeriveBNTensorDescriptor", status)) return false;
  status = cudnnSetActivationDescriptor(activation_.get(), CUDNN_ACTIVATION_RELU,
                                        CUDNN_PROPAGATE_NAN, 0);
  return checker.check("cudnnSetActivationDescriptor", status);
}

bool MxresnetPlan::query_sizes(Checker& checker, cudnnHandle_t handle) {
  size_t reserve = 0, forward = 0, backward = 0;
  cudnnStatus_t status = cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
      handle, kMode, operation(), activation(), data(), &reserve);
  if (!checker.check("cudnnGetBatchNormalizationTrainingExReserveSpaceSize", status)) return false;
  status = cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
      handle, kMode, operation(), data(), addend(), data(), channels(), activation(), &forward);
  if (!checker.check("cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize", status))
    return false;
  status = cudnnGetBatchNormalizationBackwardExWorkspaceSize(handle, kMode, operation(), data(),
                                                             backward_y(), data(), addend(), data(),
                                                             channels(), activation(), &backward);
  if (!checker.check("cudnnGetBatchNormalizationBackwardExWorkspaceSize", status)) return false;
  sizes = MxresnetSizes{reserve, forward, backward};
  return true;
}

namespace {

// Returns whether a call has the plan's operation and shape; if not, there is a message.
bool check_shape(const MxresnetPlan& plan, const MxresnetBatchNorm& call, char* message) {
  const MxresnetBatchNorm& shape = plan.shape;
  if (call.operation == shape.operation && call.n == shape.n && call.h == shape.h &&
      call.w == shape.w && call.c == shape.c)
    return true;
  return !fail(call, message, "plan", "the plan is for another operation or shape");
}

// Returns whether a training call also has enough memory; if not, there is a message.
bool check_training_call(Checker& checker, const MxresnetPlan& plan, const MxresnetBatchNorm& call,
                         uint64_t workspace, char* message) {
  return check_shape(plan, call, message) &&
         checker.check_bytes("reserve of batch norm", plan.sizes.reserve, call.reserve_bytes) &&
         checker.check_bytes("workspace of batch norm", workspace, call.workspace_bytes);
}

}  // namespace

extern "C" {

int mxresnet_batch_norm_check(const MxresnetBatchNorm* call, char* message) {
  const int64_t limit = INT32_MAX;  // the type of cuDNN's sizes is int
  if (call->n < 1 || call->h < 1 || call->w < 1 || call->c < 1)
    return fail(*call, message, "data", "data has no elements");
  if (call->n * call->h * call->w < 2)
    return fail(*call, message, "data", "a channel has one value only, which has no variance");
  if (!call->channel_last)
    return fail(*call, message, "layout NCHW", "cuDNN's fused batch norm is for NHWC only");
  if (call->c % 4)
    return fail(*call, message, "data", "cuDNN's fused kernels need channels in multiples of 4");
  if (call->n * call->h * call->w * call->c > limit)
    return fail(*call, message, "data", "more than 2^31 - 1 elements");
  return 0;
}

int mxresnet_plan_create(const MxresnetBatchNorm* call, MxresnetPlan** plan, MxresnetSizes* sizes,
                         char* message) {
  if (mxresnet_batch_norm_check(call, message)) return 1;
  Checker checker(*call, message);
  std::unique_ptr<MxresnetPlan> created(new MxresnetPlan(*call));
  const cudnnHandle_t handle = thread_handle(checker, nullptr);
  if (!handle || !created->create_descriptors(checker) || !created->set_descriptors(checker) ||
      !created->query_sizes(checker, handle))
    return 1;
  *sizes = created->sizes;
  *plan = created.release();
  return 0;
}

void mxresnet_plan_destroy(MxresnetPlan* plan) { delete plan; }

int mxresnet_batch_norm_forward(const MxresnetPlan* plan, const MxresnetBatchNorm* call,
                                char* message) {
  Checker checker(*call, message);
  const MxresnetSizes& sizes = plan->sizes;
  if (!check_training_call(checker, *plan, *call, sizes.forward_workspace, message)) return 1;
  const cudnnHandle_t handle = thread_handle(checker, call->stream);
  if (!handle) return 1;
  const float one = 1, zero = 0;
  const cudnnStatus_t status = cudnnBatchNormalizationForwardTrainingEx(
      handle, kMode, plan->operation(), &one, &zero, plan->data(), call->x, plan->addend(),
      plan->addend() ? call->z : nullptr, plan->data(), call->y, plan->channels(), call->gamma,
      call->beta, 1 - call->momentum, call->running_mean, call->running_variance, call->epsilon,
      call->saved_mean, call->saved_inverse_std, plan->activation(), call->workspace,
      sizes.forward_workspace, call->reserve, sizes.reserve);
  return !checker.check("cudnnBatchNormalizationForwardTrainingEx", status);
}

int mxresnet_batch_norm_backward(const MxresnetPlan* plan, const MxresnetBatchNorm* call,
                                 char* message) {
  Checker checker(*call, message);
  const MxresnetSizes& sizes = plan->sizes;
  if (!check_training_call(checker, *plan, *call, sizes.backward_workspace, message)) return 1;
  const cudnnHandle_t handle = thread_handle(checker, call->stream);
  if (!handle) return 1;
  const float one = 1, zero = 0;
  const cudnnStatus_t status = cudnnBatchNormalizationBackwardEx(
      handle, kMode, plan->operation(), &one, &zero, &one, &zero, plan->data(), call->x,
      plan->backward_y(), plan->backward_y() ? call->y : nullptr, plan->data(), call->dy,
      plan->addend(), plan->addend() ? call->dz : nullptr, plan->data(), call->dx, plan->channels(),
      call->gamma, call->beta, call->dgamma, call->dbeta, call->epsilon, call->saved_mean,
      call->saved_inverse_std, plan->activation(), call->workspace, sizes.backward_workspace,
      call->reserve, sizes.reserve);
  return !checker.check("cudnnBatchNormalizationBackwardEx", status);
}

// cuDNN has no fused function for evaluation. Its batch norm can add to what y contains, which is
// here a copy of the addend, so that the sum is rounded once; ReLU then runs in place.
int mxresnet_batch_norm_evaluate(const MxresnetPlan* plan, const MxresnetBatchNorm* call,
                                 char* message) {
  Checker checker(*call, message);
  if (!check_shape(*plan, *call, message)) return 1;
  const cudnnHandle_t handle = thread_handle(checker, call->stream);
  if (!handle) return 1;
  const float one = 1, zero = 0;
  if (plan->addend()) {
    const size_t bytes = static_cast<size_t>(call->n * call->h * call->w * call->c) * 2;
    const cudaError_t status = cudaMemcpyAsync(call->y, call->z, bytes, cudaMemcpyDeviceToDevice,
                                               static_cast<cudaStream_t>(call->stream));
    if (!checker.check("cudaMemcpyAsync", status)) return 1;
  }
  cudnnStatus_t status = cudnnBatchNormalizationForwardInference(
      handle, kEvaluationMode, &one, plan->addend() ? &one : &zero, plan->data(), call->x,
      plan->data(), call->y, plan->channels(), call->gamma, call->beta, call->running_mean,
      call->running_variance, call->epsilon);
  if (!checker.check("cudnnBatchNormalizationForwardInference", status)) return 1;
  if (!plan->activation()) return 0;
  status = cudnnActivationForward(handle, plan->activation(), &one, plan->data(), call->y, &zero,
                                  plan->data(), call->y);
  return !checker.check("cudnnActivationForward", status);
}

int mxresnet_set_device(int device, int* previous, char* message) {
  cudaError_t status = previous ? cudaGetDevice(previous) : cudaSuccess;
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status == cudaSuccess) return 0;
  std::snprintf(message, MXRESNET_MESSAGE_BYTES, "GPU %d: %s", device, cudaGetErrorString(status));
  return 1;
}

int mxresnet_allocate(uint64_t bytes, void** memory, char* message) {
  const cudaError_t status = cudaMalloc(memory, bytes);
  if (status == cudaSuccess) return 0;
  std::snprintf(message, MXRESNET_MESSAGE_BYTES, "cudaMalloc of %llu bytes: %s",
                static_cast<unsigned long long>(bytes), cudaGetErrorString(status));
  return 1;
}

void mxresnet_free(void* memory) { cudaFree(memory); }

}  // extern "C"
