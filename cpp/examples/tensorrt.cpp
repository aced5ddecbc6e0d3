// One image through an engine of this project (convert_onnx_to_trt.py), from C++: its features as
// aliked_extract writes them. Built where NVIDIA's headers are: TensorRT 10, 11 or for RTX.
//   aliked_tensorrt IMAGE --engine FILE
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "files.h"

namespace {

const std::string USAGE =
    "aliked_tensorrt IMAGE --engine FILE [--output FOLDER]";

struct Logger : nvinfer1::ILogger {
  void log(Severity severity, const char *text) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", text);
  }
};

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Device memory of one input or output.
struct Buffer {
  void *memory = nullptr;
  std::size_t size = 0;
  void make(std::size_t bytes) {
    size = bytes;
    check(cudaMalloc(&memory, bytes));
  }
  ~Buffer() { cudaFree(memory); }
};

// uint8 [H, W, 3] to float32 [3, H, W] in [0, 1]: the input of engines that take no bytes.
std::vector<float> planes(const Image &image) {
  const std::size_t pixels = std::size_t(image.height) * std::size_t(image.width);
  std::vector<float> planes(3 * pixels);
  for (std::size_t i = 0; i < pixels; ++i)
    for (std::size_t c = 0; c < 3; ++c) planes[c * pixels + i] = float(image.rgb[3 * i + c]) / 255;
  return planes;
}

void check_type(const nvinfer1::ICudaEngine &engine, const char *name, nvinfer1::DataType type) {
  if (engine.getTensorDataType(name) != type)
    throw std::runtime_error("the engine has no \"" + std::string(name) + "\" of the type wanted");
}

std::size_t count(const nvinfer1::Dims &dims) {
  std::size_t count = 1;
  for (int i = 0; i < dims.nbDims; ++i) count *= std::size_t(dims.d[i]);
  return count;
}

// The rows of a [K, width] output that are keypoints.
std::vector<float> kept(const std::vector<float> &rows, const std::vector<float> &scores) {
  const std::size_t width = scores.empty() ? 0 : rows.size() / scores.size();
  std::vector<float> kept;
  for (std::size_t i = 0; i < scores.size(); ++i)
    if (scores[i] > 0)  // rows of score 0 are none
      kept.insert(kept.end(), &rows[i * width], &rows[i * width] + width);
  return kept;
}

int body(int words_count, char **words) {
  const CommandLine line(words_count, words, {"engine", "output"});
  const std::string file = line.get("engine", std::string());
  if (line.names.size() != 1 || file.empty())
    throw std::runtime_error("usage: " + USAGE);
  const Image image = read_image(line.names[0]);
  std::ifstream bytes_of(file, std::ios::binary);
  const std::vector<char> plan{std::istreambuf_iterator<char>(bytes_of), {}};
  if (plan.empty()) throw std::runtime_error("cannot read " + file);

  Logger logger;
  const std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
  if (!runtime) throw std::runtime_error("TensorRT does not start");
  const std::unique_ptr<nvinfer1::ICudaEngine> engine(
      runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (!engine) throw std::runtime_error(file + " is no engine of this TensorRT and this GPU");
  const std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
  if (!context) throw std::runtime_error("there is not enough memory for " + file);

  // "image" goes in; "keypoints", "descriptors" and "scores" come out, found by name.
  using nvinfer1::DataType, nvinfer1::Dims4;
  const bool bytes = engine->getTensorDataType("image") == DataType::kUINT8;
  if (!bytes) check_type(*engine, "image", DataType::kFLOAT);
  for (const char *name : {"keypoints", "scores", "descriptors"})
    check_type(*engine, name, DataType::kFLOAT);
  if (!context->setInputShape("image", bytes ? Dims4(1, image.height, image.width, 3)
                                             : Dims4(1, 3, image.height, image.width)))
    throw std::runtime_error("the engine does not take images of this size");
  std::map<std::string, Buffer> buffers;
  std::map<std::string, std::vector<float>> outputs;
  for (int i = 0; i < engine->getNbIOTensors(); ++i) {
    const char *name = engine->getIOTensorName(i);
    const std::size_t values = count(context->getTensorShape(name));
    buffers[name].make(values * sizeof(float));
    context->setTensorAddress(name, buffers[name].memory);
    if (engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kOUTPUT)
      outputs[name].resize(values);
  }
  const std::vector<float> floats = bytes ? std::vector<float>() : planes(image);
  check(cudaMemcpy(buffers["image"].memory, bytes ? (const void *)image.rgb.data() : floats.data(),
                   bytes ? image.rgb.size() : buffers["image"].size, cudaMemcpyHostToDevice));
  cudaStream_t stream;  // TensorRT waits more often on the default one
  check(cudaStreamCreate(&stream));
  if (!context->enqueueV3(stream)) throw std::runtime_error("the engine does not run");
  check(cudaStreamSynchronize(stream));
  check(cudaStreamDestroy(stream));
  for (auto &[name, values] : outputs)
    check(cudaMemcpy(values.data(), buffers[name].memory, buffers[name].size,
                     cudaMemcpyDeviceToHost));

  const std::vector<float> &all = outputs.at("scores");
  const std::vector<float> keypoints = kept(outputs.at("keypoints"), all), scores = kept(all, all),
                           descriptors = kept(outputs.at("descriptors"), all);
  const int length = all.empty() ? 0 : int(outputs.at("descriptors").size() / all.size());
  write_features(line.get("output", std::string(".")), line.names[0],
                 {keypoints, scores, descriptors, length});
  std::printf("%s: %zu keypoints\n", line.names[0].c_str(), scores.size());
  return 0;
}

}  // namespace

int main(int count, char **words) { return run_program(USAGE, body, count, words); }
