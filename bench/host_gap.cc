// What the host does in a step of the CUDA backend, in microseconds: how long a device would wait for the first launch
// of a step, and how long all of it takes. The model has the layers of Gemma 4 31B and its drafter but tiny matrices,
// and kernels are emulated (tests/cuda) for the first steps and left out then: every step gives what the last of those
// gave. What the driver takes for launches and copies is not in it.
//
//   cmake --build build/cpp --target draftwerk_host_gap && build/cpp/tests/cuda/draftwerk_host_gap
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

#include "backend/cuda/cuda_backend.h"
#include "engine/engine.h"
#include "reference_engine.h"
#include "tiny_model.h"

namespace draftwerk {
namespace {

constexpr int kLayers = 60;
constexpr int kSteps = 400;
constexpr int kWarmUp = 4;  ///< with kernels

ModelConfig layers_of_31b() {
  ModelConfig config = testing::tiny_dense_config();
  const LayerConfig sliding = config.layers[0];
  const LayerConfig full = config.layers[1];
  config.layers.clear();
  for (int i = 0; i < kLayers; ++i) config.layers.push_back(i % 6 == 5 ? full : sliding);
  return config;
}

MtpConfig layers_of_its_drafter(const ModelConfig& target) {
  MtpConfig config = testing::tiny_mtp_config(target, 0);
  const LayerConfig sliding = config.text.layers.front();
  config.text.layers = {sliding, sliding, sliding, target.layers[5]};
  LayerConfig& full = config.text.layers.back();
  full.shares_kv = true;
  full.key_is_value = false;
  full.mlp = sliding.mlp;
  return config;
}

double median(std::vector<double> values) {
  if (values.empty()) return 0.0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle * 1e6;
}

void measure(Gemma& model, MtpModel& mtp, int streams, int drafts) {
  EngineOptions options;
  options.draft_length = drafts;
  options.max_sequences = streams;
  std::vector<std::unique_ptr<Drafter>> drafters;
  if (drafts > 0) drafters.push_back(make_mtp_drafter(mtp));
  Engine engine(model, options, std::move(drafters), {});
  std::vector<Request> requests;
  for (int i = 0; i < streams; ++i) {
    requests.push_back(testing::make_request(testing::random_tokens(20, static_cast<unsigned>(i)), kWarmUp));
    requests.back().ignore_eos = true;
  }
  testing::run_all(engine, requests);
  emulation::skip_kernels();
  emulation::take_host_times();
  for (Request& request : requests) request.max_tokens = kSteps;
  testing::run_all(engine, requests);
  const emulation::HostTimes times = emulation::take_host_times();
  emulation::reset();
  std::printf("| %d | %d | %.0f | %.0f |\n", streams, drafts, median(times.to_launch), median(times.to_wait));
  std::fflush(stdout);
}

void measure_all() {
  const ModelConfig config = layers_of_31b();
  const std::unique_ptr<Backend> backend = make_cuda_backend(0);
  Weights weights(*backend);
  Weights drafter_weights(*backend);
  testing::TensorMaker(weights, WeightType::bf16, 7).target(config);
  Gemma model(*backend, config, weights, 256, 256);
  const MtpConfig drafter = layers_of_its_drafter(config);
  testing::TensorMaker(drafter_weights, WeightType::bf16, 8).drafter(drafter);
  MtpModel mtp(model, drafter, drafter_weights);
  std::printf("| streams | drafts | us to the first launch | us of the host in all |\n|---|---|---|---|\n");
  for (const int streams : {1, 4, 16}) {
    for (const int drafts : {0, 8}) measure(model, mtp, streams, drafts);
  }
}

}  // namespace
}  // namespace draftwerk

int main() {
  draftwerk::measure_all();
  return 0;
}
