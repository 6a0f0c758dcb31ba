#include "backend/cpu/isa.h"

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>

#include "backend/cpu/int4.h"
#include "backend/cpu/layer_kernels.h"
#include "backend/cpu/sampler_kernels.h"
#include "gtest/gtest.h"

namespace draftwerk::cpu {
namespace {

// Sets DRAFTWERK_CPU_ISA for one test and puts back what was there.
class IsaVariable {
 public:
  explicit IsaVariable(const char* value) {
    if (const char* old = std::getenv("DRAFTWERK_CPU_ISA")) old_.emplace(old);
    if (value != nullptr) {
      setenv("DRAFTWERK_CPU_ISA", value, 1);
    } else {
      unsetenv("DRAFTWERK_CPU_ISA");
    }
  }
  IsaVariable(const IsaVariable&) = delete;
  IsaVariable& operator=(const IsaVariable&) = delete;
  ~IsaVariable() {
    if (old_) {
      setenv("DRAFTWERK_CPU_ISA", old_->c_str(), 1);
    } else {
      unsetenv("DRAFTWERK_CPU_ISA");
    }
  }

 private:
  std::optional<std::string> old_;
};

std::string error_for(const char* value) {
  const IsaVariable variable(value);
  std::string message;
  try {
    static_cast<void>(choose_isa());
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  return message;
}

TEST(Isa, PortableIsAlwaysThereAndFirst) {
  ASSERT_FALSE(available_isas().empty());
  EXPECT_EQ(available_isas().front(), Isa::portable);
}

TEST(Isa, AmxIsAvx512ButForItsTiles) {
  EXPECT_EQ(vector_isa(Isa::amx), Isa::avx512);
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) EXPECT_EQ(vector_isa(isa), isa);
  EXPECT_EQ(&sampler_kernels(Isa::amx), &sampler_kernels(Isa::avx512));
  EXPECT_EQ(&layer_kernels(Isa::amx), &layer_kernels(Isa::avx512));
  EXPECT_EQ(int4_quantizer(Isa::amx), int4_quantizer(Isa::avx512));
}

TEST(Isa, BestIsTheDefault) {
  for (const char* unset : {static_cast<const char*>(nullptr), ""}) {
    const IsaVariable variable(unset);
    EXPECT_EQ(choose_isa(), available_isas().back());
  }
}

TEST(Isa, TheVariableChoosesEachAvailableOne) {
  for (const Isa isa : available_isas()) {
    const IsaVariable variable(isa_name(isa));
    EXPECT_EQ(choose_isa(), isa);
  }
}

TEST(Isa, WhatLiesNearIsAskedForOnIntelsAlone) {
  std::ifstream file("/proc/cpuinfo");
  if (!file) GTEST_SKIP() << "no /proc/cpuinfo here";
  const std::string cpus((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  EXPECT_EQ(near_prefetch_pays(), cpus.find("GenuineIntel") != std::string::npos);
}

TEST(Isa, UnknownNameIsRefusedWithTheValidOnes) {
  EXPECT_EQ(error_for("sse9"), "DRAFTWERK_CPU_ISA=sse9: expected portable, avx2, avx512 or amx");
}

TEST(Isa, AMissingOneIsRefused) {
  if (available_isas().back() == Isa::amx) GTEST_SKIP() << "this machine has them all";
  EXPECT_EQ(error_for("amx").find("DRAFTWERK_CPU_ISA=amx: this machine lacks amx, or its kernel keeps it from this "
                                  "process; the best it has is "),
            0U);
}

}  // namespace
}  // namespace draftwerk::cpu
