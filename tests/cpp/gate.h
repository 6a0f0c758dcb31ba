// A drafter that drafts nothing and holds the engine where a test wants it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <limits>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <vector>

#include "drafting/drafter.h"

namespace draftwerk::testing {

/// Where the engine thread waits in the middle of a step, so that commands come at a known time. It passes once for
/// each step of each sequence that drafts and decodes; the n-th time, such a sequence has n tokens if it is the only
/// one.
class Gate {
 public:
  explicit Gate(int hold_at) : hold_at_(hold_at) {}

  /// Waits until the engine thread waits.
  void wait_until_held() {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, kTimeout, [this] { return passes_ >= hold_at_; })) {
      throw std::runtime_error("the engine does not come to the gate");
    }
  }
  /// Lets it pass, up to the time `hold_at`.
  void let_pass(int hold_at = std::numeric_limits<int>::max()) {
    const std::lock_guard lock(mutex_);
    hold_at_ = hold_at;
    changed_.notify_all();
  }

  std::vector<std::unique_ptr<Drafter>> drafter() {
    std::vector<std::unique_ptr<Drafter>> drafters;
    drafters.push_back(std::make_unique<GateDrafter>(*this));
    return drafters;
  }

 private:
  static constexpr std::chrono::seconds kTimeout{60};

  class GateDrafter : public Drafter {
   public:
    explicit GateDrafter(Gate& gate) : gate_(gate) {}
    [[nodiscard]] const char* name() const override { return "gate"; }
    std::unique_ptr<DraftState> open() override { return std::make_unique<DraftState>(); }
    DraftOutlook outlook(const DraftContext&, int) override {
      gate_.pass();
      return {};
    }
    int propose(std::span<DraftJob> /*jobs*/) override { return 0; }

   private:
    Gate& gate_;
  };

  void pass() {
    std::unique_lock lock(mutex_);
    ++passes_;
    changed_.notify_all();
    changed_.wait_for(lock, kTimeout, [this] { return passes_ < hold_at_; });
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  int passes_ = 0;
  int hold_at_;
};

}  // namespace draftwerk::testing
