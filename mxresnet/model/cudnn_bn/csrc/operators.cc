// SPDX-License-Identifier: Apache-2.0
// MXNet operators for batch_norm.h, through MXNet's interface for external operators
// (mxnet/lib_api.h). The file is compiled into two libraries: with batch_norm_cpu.cc, and with
// batch_norm_cudnn.cc and the macro MXRESNET_GPU.
//
//   mxresnet_batch_norm(data, gamma, beta, moving_mean, moving_var; eps, momentum, layout)
//   mxresnet_batch_norm_relu(same)
//   mxresnet_batch_norm_add_relu(data, gamma, beta, moving_mean, moving_var, addend; same)
//
// The addend is the last input, so that a network lists its parameters in the same order as with
// MXNet's own operators. The outputs are the result and, for the backward pass only, the saved
// mean, the saved inverse standard deviation and the reserve (uint8).
//
// Two limits of the interface:
// - forward cannot know whether it runs in training. moving_mean and moving_var change in every
//   forward pass, so that evaluation needs other operators.
// - backward cannot know whether to write or add a gradient. It writes; runtime.py rejects the
//   environment variables with which MXNet might need gradients added.
#include <mxnet/lib_api.h>

#include <cstdlib>

#include "batch_norm.h"

namespace {

using mxnet::ext::MX_FAIL;
using mxnet::ext::MX_SUCCESS;
using mxnet::ext::MXReturnValue;
using mxnet::ext::MXTensor;
using mxnet::ext::OpResource;
using Attributes = std::unordered_map<std::string, std::string>;
using Shape = std::vector<unsigned int>;

#ifdef MXRESNET_GPU
constexpr char kDevice[] = "gpu", kTypeName[] = "float16";
constexpr int kType = mxnet::ext::kFloat16;
#else
constexpr char kDevice[] = "cpu", kTypeName[] = "float32";
constexpr int kType = mxnet::ext::kFloat32;
#endif
constexpr int kOutputs = 4;
constexpr int kUnknownType = -1;

// The metadata that build.py finds in the file: the versions of MXNet and of its interface, and the
// hash of the sources.
extern "C" __attribute__((used, visibility("default"))) const char mxresnet_build[] =
    MXRESNET_BUILD;

const char* operator_name(int operation) {
  if (operation == MXRESNET_BN) return "mxresnet_batch_norm";
  if (operation == MXRESNET_BN_RELU) return "mxresnet_batch_norm_relu";
  return "mxresnet_batch_norm_add_relu";
}

MXReturnValue fail(int operation, const std::string& why) {
  MX_ERROR_MSG << operator_name(operation) << ": " << why;
  return MX_FAIL;
}

enum Input { kData, kGamma, kBeta, kMovingMean, kMovingVar, kAddend };

constexpr bool has_addend(int operation) { return operation == MXRESNET_BN_ADD_RELU; }
constexpr int input_count(int operation) { return has_addend(operation) ? kAddend + 1 : kAddend; }

std::string shape_text(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

bool parse_number(const std::string& text, double* value) {
  char* end = nullptr;
  *value = std::strtod(text.c_str(), &end);
  return !text.empty() && *end == 0;
}

// Returns whether the attributes are valid. MXNet's own, which begin with two underscores, are
// ignored; any other unknown attribute is an error.
bool read_attributes(int operation, const Attributes& attributes, MxresnetBatchNorm* call) {
  *call = MxresnetBatchNorm();
  call->operation = operation;
  call->channel_last = 1;
  call->epsilon = 1e-5;
  call->momentum = 0.9;
  for (const auto& item : attributes) {
    bool valid = item.first.compare(0, 2, "__") == 0;
    if (item.first == "eps") valid = parse_number(item.second, &call->epsilon) && call->epsilon > 0;
    if (item.first == "momentum")
      valid =
          parse_number(item.second, &call->momentum) && call->momentum >= 0 && call->momentum <= 1;
    if (item.first == "layout") {
      call->channel_last = item.second == "NHWC";
      valid = call->channel_last || item.second == "NCHW";
    }
    if (!valid) {
      fail(operation,
           "attribute " + item.first + "=" + item.second +
               " is not valid: eps must be above 0, momentum from 0 to 1, layout NHWC or NCHW");
      return false;
    }
  }
  return true;
}

template <typename Dimension>
void read_shape(const std::vector<Dimension>& shape, MxresnetBatchNorm* call) {
  const int channel = call->channel_last ? 3 : 1, row = call->channel_last ? 1 : 2;
  call->n = shape[0], call->c = shape[channel], call->h = shape[row], call->w = shape[row + 1];
}

template <int operation>
MXReturnValue parse(const Attributes& attributes, int* inputs, int* outputs) {
  MxresnetBatchNorm call;
  *inputs = input_count(operation);
  *outputs = kOutputs;
  return read_attributes(operation, attributes, &call) ? MX_SUCCESS : MX_FAIL;
}

template <int operation>
MXReturnValue infer_type(const Attributes&, std::vector<int>* inputs, std::vector<int>* outputs) {
  for (int i = 0; i < input_count(operation); ++i) {
    const bool is_data = i == kData || i == kAddend;
    const int expected = is_data ? kType : static_cast<int>(mxnet::ext::kFloat32);
    if (inputs->at(i) != kUnknownType && inputs->at(i) != expected)
      return fail(operation, is_data ? std::string("data must be ") + kTypeName + " in the " +
                                           kDevice + " build"
                                     : "gamma, beta, moving_mean and moving_var must be float32");
    inputs->at(i) = expected;
  }
  *outputs = {kType, mxnet::ext::kFloat32, mxnet::ext::kFloat32, mxnet::ext::kUint8};
  return MX_SUCCESS;
}

template <int operation>
MXReturnValue infer_storage(const Attributes&, std::vector<int>* inputs,
                            std::vector<int>* outputs) {
  for (int& type : *inputs) {
    if (type > mxnet::ext::kDefaultStorage)
      return fail(operation, "sparse arrays are not supported");
    type = mxnet::ext::kDefaultStorage;
  }
  for (int& type : *outputs) type = mxnet::ext::kDefaultStorage;
  return MX_SUCCESS;
}

// Checks all shapes and infers those of the outputs. The shape of every input must be known,
// because MXNet 1.9.1 writes past a buffer when an external operator infers the shape of an input.
// runtime.py therefore declares the variables with their shapes.
template <int operation>
MXReturnValue infer_shape(const Attributes& attributes, std::vector<Shape>* inputs,
                          std::vector<Shape>* outputs) {
  MxresnetBatchNorm call;
  if (!read_attributes(operation, attributes, &call)) return MX_FAIL;
  const Shape data = inputs->at(kData);
  if (data.empty()) return fail(operation, "the shape of data is not known");
  if (data.size() != 4)
    return fail(operation, "data has shape " + shape_text(data) + ", and 4 axes are needed");
  if (has_addend(operation) && inputs->at(kAddend) != data)
    return fail(operation, "addend has shape " + shape_text(inputs->at(kAddend)) + ", data " +
                               shape_text(data));
  read_shape(data, &call);
  const Shape channels = {static_cast<unsigned int>(call.c)};
  for (int i = kGamma; i <= kMovingVar; ++i)
    if (inputs->at(i) != channels)
      return fail(operation, "gamma, beta, moving_mean and moving_var must have shape " +
                                 shape_text(channels) + ", one of them has " +
                                 shape_text(inputs->at(i)));
  char message[MXRESNET_MESSAGE_BYTES] = "";
  uint64_t reserve = 0;
  if (mxresnet_batch_norm_reserve(&call, &reserve, message)) return fail(operation, message);
  // MXNet 1.9.1 takes the shape of an empty array for an unknown shape.
  *outputs = {data, channels, channels, {static_cast<unsigned int>(reserve ? reserve : 1)}};
  return MX_SUCCESS;
}

MXReturnValue mutable_inputs(const Attributes&, std::vector<int>* indices) {
  *indices = {kMovingMean, kMovingVar};
  return MX_SUCCESS;
}

void set_inputs(MXTensor* input, MxresnetBatchNorm* call) {
  read_shape(input[kData].shape, call);
  call->x = input[kData].data_ptr;
  call->gamma = input[kGamma].data<float>();
  call->beta = input[kBeta].data<float>();
  call->running_mean = input[kMovingMean].data<float>();
  call->running_variance = input[kMovingVar].data<float>();
  if (has_addend(call->operation)) call->z = input[kAddend].data_ptr;
}

void set_outputs(MXTensor* output, MxresnetBatchNorm* call) {
  call->y = output[0].data_ptr;
  call->saved_mean = output[1].data<float>();
  call->saved_inverse_std = output[2].data<float>();
  call->reserve = output[3].data_ptr;
  // Without a reserve, this is the one byte that infer_shape declares instead of an empty array.
  call->reserve_bytes = static_cast<uint64_t>(output[3].size());
}

using Pass = int (*)(const MxresnetBatchNorm*, char*);

// Allocates the workspace and computes a forward or backward pass.
MXReturnValue run(Pass pass, bool backward, const OpResource& resource, MxresnetBatchNorm* call) {
  char message[MXRESNET_MESSAGE_BYTES] = "";
  MxresnetSizes sizes = {0, 0, 0};
#ifdef MXRESNET_GPU
  call->stream = resource.get_cuda_stream();
#endif
  if (mxresnet_batch_norm_sizes(call, &sizes, message)) return fail(call->operation, message);
  call->workspace_bytes = backward ? sizes.backward_workspace : sizes.forward_workspace;
  if (call->workspace_bytes > INT32_MAX)
    return fail(call->operation, "the workspace is larger than MXNet can allocate");
  const int bytes = static_cast<int>(call->workspace_bytes);
#ifdef MXRESNET_GPU
  if (bytes) call->workspace = resource.alloc_gpu(bytes);
#else
  if (bytes) call->workspace = resource.alloc_cpu(bytes);
#endif
  return pass(call, message) ? fail(call->operation, message) : MX_SUCCESS;
}

template <int operation>
MXReturnValue forward(const Attributes& attributes, std::vector<MXTensor>* inputs,
                      std::vector<MXTensor>* outputs, const OpResource& resource) {
  MxresnetBatchNorm call;
  if (!read_attributes(operation, attributes, &call)) return MX_FAIL;
  set_inputs(inputs->data(), &call);
  set_outputs(outputs->data(), &call);
  return run(mxresnet_batch_norm_forward, false, resource, &call);
}

// inputs: the gradients of forward's outputs, of which only the first is used, forward's inputs,
// and forward's outputs. outputs: the gradients of forward's inputs.
template <int operation>
MXReturnValue backward(const Attributes& attributes, std::vector<MXTensor>* inputs,
                       std::vector<MXTensor>* outputs, const OpResource& resource) {
  MxresnetBatchNorm call;
  if (!read_attributes(operation, attributes, &call)) return MX_FAIL;
  call.dy = inputs->at(0).data_ptr;
  set_inputs(inputs->data() + kOutputs, &call);
  set_outputs(inputs->data() + kOutputs + input_count(operation), &call);
  MXTensor* gradient = outputs->data();
  call.dx = gradient[kData].data_ptr;
  call.dgamma = gradient[kGamma].data<float>();
  call.dbeta = gradient[kBeta].data<float>();
  if (has_addend(operation)) call.dz = gradient[kAddend].data_ptr;
  return run(mxresnet_batch_norm_backward, true, resource, &call);
}

}  // namespace

#define MXRESNET_REGISTER(name, operation)     \
  REGISTER_OP(name)                            \
      .setParseAttrs(parse<operation>)         \
      .setInferType(infer_type<operation>)     \
      .setInferSType(infer_storage<operation>) \
      .setInferShape(infer_shape<operation>)   \
      .setMutateInputs(mutable_inputs)         \
      .setForward(forward<operation>, kDevice) \
      .setBackward(backward<operation>, kDevice)

MXRESNET_REGISTER(mxresnet_batch_norm, MXRESNET_BN);
MXRESNET_REGISTER(mxresnet_batch_norm_relu, MXRESNET_BN_RELU);
MXRESNET_REGISTER(mxresnet_batch_norm_add_relu, MXRESNET_BN_ADD_RELU);

MXReturnValue initialize(int version) {
  if (version == MXRESNET_MXNET_VERSION) return MX_SUCCESS;
  MX_ERROR_MSG << "library built for MXNet " << MXRESNET_MXNET_VERSION << ", loaded by MXNet "
               << version;
  return MX_FAIL;
}
