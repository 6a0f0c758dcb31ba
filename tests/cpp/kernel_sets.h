// Matrix kernels under test: those of every instruction set that this machine has, and wherever there is AVX-512 those
// of amx on tiles in software (emulated/).
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/matmul.h"

namespace draftwerk::cpu {

namespace emulated_amx {
const MatmulKernels& matmul_kernels();
}  // namespace emulated_amx

struct KernelSet {
  std::string name;
  const MatmulKernels* kernels = nullptr;
};

inline void PrintTo(const KernelSet& set, std::ostream* out) { *out << set.name; }

inline std::vector<KernelSet> kernel_sets() {
  std::vector<KernelSet> sets;
  for (const Isa isa : available_isas()) sets.push_back({isa_name(isa), &matmul_kernels(isa)});
#if defined(__x86_64__)
  if (available_isas().back() >= Isa::avx512) sets.push_back({"emulated_amx", &emulated_amx::matmul_kernels()});
#endif
  return sets;
}

}  // namespace draftwerk::cpu
