#include "backend/cpu/isa.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace draftwerk::cpu {

namespace {

// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

// The flags that the _avx512.cc files are compiled with.
bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// A process has to ask Linux for tiles, once for all its threads. It refuses if a thread has a stack for signals that
// has no room for 8 KB of tiles, and refuses such stacks afterwards.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool granted = [] {
    constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
    return has_avx512() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx};

bool is_available(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return has_avx2();
    case Isa::avx512:
      return has_avx512();
    case Isa::amx:
      return has_amx();
    case Isa::portable:
      break;
  }
  return true;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::amx:
      return "amx";
  }
  return "unknown";
}

Isa vector_isa(Isa isa) { return isa == Isa::amx ? Isa::avx512 : isa; }

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : kIsas) {
    if (is_available(isa)) isas.push_back(isa);
  }
  return isas;
}

Isa choose_isa() {
  const char* wish = std::getenv("DRAFTWERK_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return available_isas().back();
  for (const Isa isa : kIsas) {
    if (std::strcmp(wish, isa_name(isa)) != 0) continue;
    if (is_available(isa)) return isa;
    throw std::runtime_error("DRAFTWERK_CPU_ISA=" + std::string(wish) + ": this machine lacks " + wish +
                             (isa == Isa::amx ? ", or its kernel keeps it from this process" : "") +
                             "; the best it has is " + isa_name(available_isas().back()));
  }
  throw std::runtime_error("DRAFTWERK_CPU_ISA=" + std::string(wish) + ": expected portable, avx2, avx512 or amx");
}

bool near_prefetch_pays() {
#if defined(__x86_64__)
  static const bool pays = __builtin_cpu_is("intel");
  return pays;
#else
  return false;
#endif
}

}  // namespace draftwerk::cpu
