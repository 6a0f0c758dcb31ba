// Runs the CUDA sampler as the backend does: parameters and logits go to the emulated device, results come back.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>
#include <vector>

#include "backend/cuda/handles.h"
#include "backend/cuda/launch.h"
#include "backend/cuda/sampler.h"
#include "sampler_fixture.h"

namespace draftwerk::testing {

/// Tests whose steps run in one order of threads after the other.
class InAnyOrder : public ::testing::Test {
 protected:
  ~InAnyOrder() override { emulation::reset(); }

  static void any_order(int step) {
    constexpr emulation::Order kOrders[] = {emulation::Order::forward, emulation::Order::backward,
                                            emulation::Order::shuffled};
    emulation::set_order(kOrders[step % 3], static_cast<unsigned>(step));
  }
};

/// Device memory that is filled from a vector, and stays where it is while it is large enough.
template <typename T>
class DeviceArray {
 public:
  T* fill(const std::vector<T>& values) {
    if (values.size() > capacity_) {
      capacity_ = values.size();
      memory_ = cuda::DeviceMemory::of(capacity_ * sizeof(T));
    }
    std::memcpy(memory_.get(), values.data(), values.size() * sizeof(T));
    return static_cast<T*>(memory_.get());
  }

 private:
  cuda::DeviceMemory memory_;
  std::size_t capacity_ = 0;
};

class SamplerOnDevice {
 public:
  std::vector<VerifyResult> verify(const Rows& rows, std::span<const VerifyGroup> groups, int outputs) {
    sampler_.reserve(outputs, rows.vocabulary);
    const cuda::LogitRows logits = dense(rows, outputs);
    std::vector<VerifyResult> results(groups.size());
    begin();
    sampler_.stage_verify(groups, outputs, in_);
    sampler_.record_verify(list_, logits, outputs, nullptr, out_);
    run();
    sampler_.finish_verify(groups, outputs, results);
    return results;
  }

  std::vector<Candidate> propose(const Rows& rows, std::span<const ProposeRow> places, int count, int outputs) {
    return propose(dense(rows, outputs), places, count, outputs);
  }

  std::vector<Candidate> propose(const cuda::LogitRows& logits, std::span<const ProposeRow> places, int count,
                                 int outputs) {
    sampler_.reserve(outputs, logits.vocabulary);
    std::vector<Candidate> candidates(places.size() * static_cast<std::size_t>(count));
    begin();
    sampler_.stage_propose(places, count, outputs, in_);
    sampler_.record_propose(list_, logits, count, outputs, 0, nullptr);
    sampler_.collect(1, outputs, out_);
    run();
    sampler_.finish_propose(places, count, outputs, 0, candidates);
    return candidates;
  }

  /// Those of the last step.
  [[nodiscard]] std::vector<std::byte> launches() const { return launches_; }

 private:
  /// Rows as a head leaves them: something else behind each.
  cuda::LogitRows dense(const Rows& rows, int outputs) {
    cuda::LogitRows logits;
    logits.stride = rows.vocabulary / 4 * 4 + 8;
    logits.columns = logits.vocabulary = rows.vocabulary;
    const auto stride = static_cast<std::size_t>(logits.stride);
    const auto width = static_cast<std::size_t>(rows.vocabulary);
    std::vector<float> values(static_cast<std::size_t>(outputs) * stride, kInfinity);
    for (std::size_t r = 0; r < rows.values.size() / width; ++r) {
      std::copy_n(rows.values.data() + r * width, width, values.data() + r * stride);
    }
    logits.values = values_.fill(values);
    return logits;
  }

  void begin() {
    list_.clear();
    in_.clear();
    out_.clear();
  }

  void run() {
    launches_.assign(list_.bytes().begin(), list_.bytes().end());
    for (const cuda::Copy& copy : in_) enqueue(copy);
    list_.run(stream_.get());
    for (const cuda::Copy& copy : out_) enqueue(copy);
    stream_.wait();
  }

  void enqueue(const cuda::Copy& copy) {
    cuda::check(cudaMemcpyAsync(copy.to, copy.from, copy.bytes, cudaMemcpyDefault, stream_.get()), "copying");
  }

  cuda::Sampler sampler_;
  cuda::Stream stream_ = cuda::Stream::create();
  cuda::LaunchList list_;
  std::vector<cuda::Copy> in_;
  std::vector<cuda::Copy> out_;
  std::vector<std::byte> launches_;
  DeviceArray<float> values_;
};

}  // namespace draftwerk::testing
