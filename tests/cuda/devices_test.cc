// What is said where there is no GPU to run on.
#include "backend/cuda/devices.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

#include "backend/cuda/cuda_backend.h"

namespace draftwerk::cuda {
namespace {

class Devices : public ::testing::Test {
 protected:
  ~Devices() override { emulation::reset(); }

  static std::string refusal(int number) {
    try {
      use_device(number);
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "";
  }
};

TEST_F(Devices, AreNamed) {
  EXPECT_EQ(use_device(0).name, "emulated");
  const std::vector<CudaDevice> devices = cuda_devices();
  ASSERT_EQ(devices.size(), 1U);
  EXPECT_EQ(devices[0].name, "emulated");
  EXPECT_EQ(devices[0].refusal, "");
}

TEST_F(Devices, ThatCannotBeUsedAreNamedWithTheReason) {
  emulation::set_device(1, 7, 5, 13000);
  ASSERT_EQ(cuda_devices().size(), 1U);
  EXPECT_EQ(cuda_devices()[0].refusal, refusal(0));
}

TEST_F(Devices, AreRefusedWithWhatWouldWork) {
  EXPECT_EQ(refusal(1), "there is no GPU 1; there is one, 0");
  emulation::set_device(2, 9, 0, 13000);
  EXPECT_EQ(refusal(-1), "there is no GPU -1; there are 2, from 0");
  emulation::set_device(1, 7, 5, 13000);
  EXPECT_EQ(refusal(0), "GPU 0 (emulated) has compute capability 7.5, and 8.0 or more is needed; use --device cpu");
  emulation::set_device(0, 9, 0, 13000);
  EXPECT_EQ(refusal(0), "there is no NVIDIA GPU; use --device cpu");
  emulation::set_device(1, 9, 0, 12020);
  EXPECT_EQ(refusal(0),
            "the NVIDIA driver supports CUDA 12.2, and 13.0 is needed; install a newer driver, or use --device cpu");
  emulation::set_device(1, 9, 0, 0);
  EXPECT_EQ(refusal(0), "no NVIDIA driver was found; install one, or use --device cpu");
}

}  // namespace
}  // namespace draftwerk::cuda
