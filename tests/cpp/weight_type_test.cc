#include "backend/weight_type.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace draftwerk {
namespace {

TEST(WeightType, RowsAreAsFilesStoreThem) {
  struct Case {
    WeightType type;
    const char* name;
    int columns;
    std::size_t bytes;  // of the block's fields, as ggml-common.h lists them
  };
  const Case cases[] = {
      {WeightType::f32, "f32", 1, 4},
      {WeightType::f16, "f16", 1, 2},
      {WeightType::bf16, "bf16", 1, 2},
      {WeightType::q8_0, "q8_0", 32, 2 + 32},
      {WeightType::q4_0, "q4_0", 32, 2 + 16},
      {WeightType::q5_0, "q5_0", 32, 2 + 4 + 16},
      {WeightType::q4_k, "q4_k", 256, 2 + 2 + 12 + 128},
      {WeightType::q6_k, "q6_k", 256, 128 + 64 + 16 + 2},
      {WeightType::f8_e4m3, "f8_e4m3", 1, 1},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    EXPECT_STREQ(weight_type_name(c.type), c.name);
    EXPECT_EQ(parse_weight_type(c.name), c.type);
    EXPECT_EQ(block_columns(c.type), c.columns);
    EXPECT_EQ(block_bytes(c.type), c.bytes);
    for (const std::int64_t blocks : {1, 2, 7, 1 << 20}) {
      const std::size_t scale_bytes = c.type == WeightType::f8_e4m3 ? 4 : 0;
      EXPECT_EQ(stored_row_bytes(c.type, blocks * c.columns), scale_bytes + static_cast<std::size_t>(blocks) * c.bytes);
    }
    // No row at all, and rows that end within a block.
    for (const std::int64_t columns : {0, -1, -c.columns}) {
      EXPECT_THROW(static_cast<void>(stored_row_bytes(c.type, columns)), std::invalid_argument) << columns;
    }
    for (const std::int64_t part : {1, c.columns / 2, c.columns - 1}) {
      if (part % c.columns == 0) continue;
      EXPECT_THROW(static_cast<void>(stored_row_bytes(c.type, 2 * c.columns + part)), std::invalid_argument) << part;
    }
  }
}

TEST(WeightType, RowsOfRealModels) {
  EXPECT_EQ(stored_row_bytes(WeightType::f32, 10), 40U);
  EXPECT_EQ(stored_row_bytes(WeightType::q8_0, 64), 68U);
  EXPECT_EQ(stored_row_bytes(WeightType::q5_0, 640), 440U);
  EXPECT_EQ(stored_row_bytes(WeightType::q4_k, 512), 288U);
  EXPECT_EQ(stored_row_bytes(WeightType::q6_k, 256), 210U);
  EXPECT_THROW(static_cast<void>(stored_row_bytes(WeightType::q4_k, 640)), std::invalid_argument);
}

TEST(WeightType, AnUnknownNameIsAnsweredWithTheKnownOnes) {
  for (const std::string name : {"q3_k", "Q5_0", "q5_0 ", "q5", ""}) {
    try {
      static_cast<void>(parse_weight_type(name));
      ADD_FAILURE() << "'" << name << "' was taken";
    } catch (const std::invalid_argument& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find("'" + name + "'"), std::string::npos) << message;
      for (const char* known : {"f32", "f16", "bf16", "q8_0", "q4_0", "q5_0", "q4_k", "q6_k"}) {
        EXPECT_NE(message.find(known), std::string::npos) << message;
      }
    }
  }
}

}  // namespace
}  // namespace draftwerk
