#include "model/weights.h"

#include <gtest/gtest.h>

#include "backend/cpu/cpu_backend.h"
#include "model/config.h"
#include "tiny_model.h"

namespace draftwerk {
namespace {

std::string message_of(const auto& action) {
  try {
    action();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

class WeightsTest : public ::testing::Test {
 protected:
  std::unique_ptr<Backend> backend_ = make_cpu_backend(1);
  Weights weights_{*backend_};
  std::vector<std::byte> zeros_ = std::vector<std::byte>(std::size_t{1} << 16);
};

TEST_F(WeightsTest, MatricesFillInOrderAndWhole) {
  weights_.create("m", WeightType::f32, 40, 8);
  const auto upload = [&](std::int64_t first, std::int64_t count) {
    weights_.upload_rows("m", first, count, WeightType::f32,
                         std::span(zeros_).first(static_cast<std::size_t>(count) * 32));
  };
  EXPECT_NE(message_of([&] { upload(16, 16); }), "");
  upload(0, 32);
  EXPECT_NE(message_of([&] { (void)weights_.matrix("m", 40, 8); }).find("32 of 40 rows"), std::string::npos);
  EXPECT_NE(message_of([&] { upload(32, 16); }), "") << "beyond the end";
  upload(32, 8);
  EXPECT_EQ(weights_.matrix("m", 40, 8).rows(), 40);
  EXPECT_NE(message_of([&] { (void)weights_.matrix("m", 8, 40); }).find("[40, 8]"), std::string::npos);
}

TEST_F(WeightsTest, RefusesWrongSizesAndNames) {
  weights_.create("m", WeightType::q8_0, 16, 32);
  EXPECT_NE(message_of([&] { weights_.create("m", WeightType::f32, 1, 1); }).find("twice"), std::string::npos);
  EXPECT_NE(message_of([&] { weights_.create("n", WeightType::q8_0, 16, 33); }), "");
  EXPECT_NE(message_of([&] { weights_.create("n", WeightType::f32, 0, 32); }), "");
  EXPECT_NE(message_of([&] { weights_.upload_rows("m", 0, 16, WeightType::q8_0, std::span(zeros_).first(1)); }), "");
  EXPECT_NE(message_of([&] { weights_.upload_rows("x", 0, 16, WeightType::q8_0, zeros_); }), "");
  EXPECT_NE(message_of([&] { (void)weights_.matrix("x", 1, 1); }).find("x is missing"), std::string::npos);
  EXPECT_NE(message_of([&] { (void)weights_.vector("x", 1); }).find("x is missing"), std::string::npos);
}

TEST_F(WeightsTest, VectorsKeepTheirValues) {
  const std::vector<float> values = {1.0F, 2.0F, 3.0F};
  weights_.set_vector("v", values);
  EXPECT_EQ(weights_.vector("v", 3)[2], 3.0F);
  EXPECT_NE(message_of([&] { (void)weights_.vector("v", 4); }), "");
  EXPECT_NE(message_of([&] { weights_.set_vector("v", values); }), "");
  EXPECT_NE(message_of([&] { weights_.set_vector("w", {}); }), "");
}

TEST_F(WeightsTest, IndicesAreDistinctAndInRange) {
  weights_.set_indices("order", std::vector<std::int32_t>{4, 0, 2});
  EXPECT_EQ(weights_.index_values("order", 3, 5)[0], 4);
  EXPECT_EQ(weights_.indices("order", 3)[0], 4);
  EXPECT_EQ(message_of([&] { (void)weights_.index_values("order", 3, 4); }), "tensor order holds 4, allowed: 0 to 3");
  EXPECT_EQ(message_of([&] { (void)weights_.index_values("order", 2, 5); }),
            "tensor order has 3 values, the config asks for 2");
  weights_.set_indices("twice", std::vector<std::int32_t>{1, 3, 1});
  EXPECT_EQ(message_of([&] { (void)weights_.index_values("twice", 3, 5); }), "tensor twice holds 1 twice");
  weights_.set_indices("negative", std::vector<std::int32_t>{0, -1});
  EXPECT_EQ(message_of([&] { (void)weights_.index_values("negative", 2, 5); }),
            "tensor negative holds -1, allowed: 0 to 4");
  EXPECT_NE(message_of([&] { (void)weights_.index_values("x", 1, 1); }).find("x is missing"), std::string::npos);
  EXPECT_NE(message_of([&] { weights_.set_indices("order", std::vector<std::int32_t>{0}); }), "");
  EXPECT_NE(message_of([&] { weights_.set_indices("none", {}); }), "");
}

TEST_F(WeightsTest, AModelNamesTheTensorItMisses) {
  EXPECT_NE(message_of([&] { Gemma(*backend_, testing::tiny_config(), weights_, 8, 8); }).find("embed_tokens"),
            std::string::npos);
}

TEST(ModelConfigTest, NamesTheFieldThatIsWrong) {
  const auto message = [](const auto& change) {
    ModelConfig config = testing::tiny_config();
    change(config);
    return message_of([&] { check(config); });
  };
  EXPECT_EQ(message([](ModelConfig&) {}), "");
  EXPECT_NE(message([](ModelConfig& c) { c.vocabulary = 0; }).find("vocab_size is 0"), std::string::npos);
  EXPECT_NE(message([](ModelConfig& c) { c.hidden = -1; }).find("hidden_size"), std::string::npos);
  EXPECT_NE(message([](ModelConfig& c) { c.layers.clear(); }).find("layers"), std::string::npos);
  EXPECT_NE(message([](ModelConfig& c) { c.layers[0].kv_heads = 3; }).find("num_key_value_heads 3"), std::string::npos);
  EXPECT_NE(message([](ModelConfig& c) { c.layers[0].head_dim = 40; }).find("head_dim is 40"), std::string::npos);
  EXPECT_NE(message([](ModelConfig& c) { c.window = 0; }).find("sliding_window"), std::string::npos);
  EXPECT_NE(message([](ModelConfig& c) { c.rope[1].base = 0.0; }).find("RoPE"), std::string::npos);
}

}  // namespace
}  // namespace draftwerk
