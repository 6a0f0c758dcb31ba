// Which instruction set the kernels use: the best that the machine has, or the one that DRAFTWERK_CPU_ISA names.
#pragma once

#include <string>
#include <vector>

namespace draftwerk::cpu {

/// amx is avx512 but for products of many rows, which it computes in tiles, to the same bits.
enum class Isa { portable, avx2, avx512, amx };

/// Every instruction set that this machine can run, worst first. Asks Linux for the tiles of amx, if the processor has
/// any: from then on no thread can have a stack for signals without room for them (sigaltstack()).
std::vector<Isa> available_isas();
/// The best available one, unless the environment variable DRAFTWERK_CPU_ISA (portable, avx2, avx512, amx)
/// names another, when tiles are asked for only if it is amx; throws std::runtime_error if it names one that does not
/// exist or that the machine lacks.
Isa choose_isa();
const char* isa_name(Isa isa);
/// That of everything but products of many rows: avx512 for amx.
Isa vector_isa(Isa isa);

/// Whether a kernel gains by asking for what lies a kilobyte ahead in the second cache, so that the first one has it in
/// time: an Intel with AMX takes 5% longer for a pass without, an AMD with AVX2 2 to 8% longer by asking
/// (docs/performance.md, "With AMX"). Other makes are taken for AMD.
bool near_prefetch_pays();

}  // namespace draftwerk::cpu
