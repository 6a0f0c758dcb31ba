// Target and drafter as Python holds them: under construction, tensor by tensor, then ready.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda_library.h"
#include "model/gemma.h"
#include "model/mtp.h"
#include "model/weights.h"

namespace draftwerk {

/// The tensors of a model while it is built.
class PyWeights {
 public:
  explicit PyWeights(Backend& backend) : weights_(backend) {}

  void create_weight(const std::string& name, const std::string& type, std::int64_t rows, std::int64_t columns);
  void upload_rows(const std::string& name, std::int64_t first_row, const std::string& source_type, std::int64_t rows,
                   const pybind11::buffer& data);
  void set_vector(const std::string& name,
                  const pybind11::array_t<float, pybind11::array::c_style | pybind11::array::forcecast>& values);
  void set_indices(
      const std::string& name,
      const pybind11::array_t<std::int32_t, pybind11::array::c_style | pybind11::array::forcecast>& values);
  /// Keeps a reference to `data` and reads it in place.
  void map_table(const std::string& name, const std::string& type, std::int64_t rows, std::int64_t columns,
                 const pybind11::buffer& data);

  [[nodiscard]] const Weights& weights() const { return weights_; }
  /// After this, tensors can no longer be added.
  void seal();

 private:
  Weights& building();

  Weights weights_;
  bool sealed_ = false;
};

/// A GPU, and the library that computes on it.
struct PyGpu {
  std::shared_ptr<const CudaLibrary> library;
  int number = 0;
  std::string name;
  std::string refusal;  ///< as of CudaDevice
};

/// Backend, weights and activations of a target in one.
class PyModel {
 public:
  /// On `gpu`, or on the processor if that is null.
  PyModel(const pybind11::dict& config, const PyGpu* gpu, int threads, int max_step_rows, int max_outputs);

  [[nodiscard]] PyWeights& weights() { return *weights_; }
  /// `full_head`: every logit is computed in every step, see Gemma::screen_head.
  void finish(bool full_head);
  Gemma& model();

  /// Keeps evaluation and a running engine apart: the model has one set of activations.
  void acquire();
  void release();

  pybind11::array_t<float> logits(const std::vector<TokenId>& tokens, int chunk);
  std::vector<double> time_rows(int rows, int repeats, int context);
  /// What is timed, written when it is first asked for. The model must be held.
  std::span<const TokenId> text();

  [[nodiscard]] std::string description() const { return backend_->description(); }
  /// (free, total) bytes of a GPU's memory; None on the processor.
  [[nodiscard]] std::optional<std::pair<std::size_t, std::size_t>> memory() const;
  [[nodiscard]] std::size_t weight_bytes() const { return weights_->weights().bytes(); }
  [[nodiscard]] Backend& backend() { return *backend_; }

  /// Holds the model while an evaluation runs.
  class Use {
   public:
    explicit Use(PyModel& model) : model_(model) { model_.acquire(); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    Use(Use&&) = delete;
    Use& operator=(Use&&) = delete;
    ~Use() { model_.release(); }

   private:
    PyModel& model_;
  };

 private:
  ModelConfig config_;
  int max_rows_;
  int max_outputs_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<PyWeights> weights_;
  std::optional<Gemma> model_;
  std::mutex mutex_;
  bool in_use_ = false;
  std::vector<TokenId> text_;
};

/// The MTP drafter of a target that is ready.
class PyMtpModel {
 public:
  PyMtpModel(std::shared_ptr<PyModel> target, const pybind11::dict& config);

  [[nodiscard]] PyWeights& weights() { return *weights_; }
  void finish();
  MtpModel& model();
  [[nodiscard]] const PyModel& target() const { return *target_; }

  /// (tokens, logits [drafts, vocabulary]) of a greedy or sampled round after `tokens`.
  pybind11::tuple draft(const std::vector<TokenId>& tokens, int count, int chunk, float temperature, int top_k,
                        float top_p, std::uint64_t seed);
  std::vector<double> time_drafts(int sequences, int count, int repeats, int context);
  [[nodiscard]] std::size_t weight_bytes() const { return weights_->weights().bytes(); }

 private:
  std::shared_ptr<PyModel> target_;
  std::optional<PyModel::Use> building_;  // shares the target's backend until it is finished
  MtpConfig config_;
  std::unique_ptr<PyWeights> weights_;
  std::optional<MtpModel> model_;
};

void bind_models(pybind11::module_& m);

}  // namespace draftwerk
