#include "backend/cpu/memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "backend/round_up.h"

namespace draftwerk::cpu {
namespace {

constexpr std::size_t kSmallPage = 4096;
constexpr std::size_t kHugePage = std::size_t{2} << 20;
// Shared mappings are this large: virtual space, of which only what is used becomes resident (by huge pages).
constexpr std::size_t kChunk = std::size_t{64} << 20;
// From here on the part of a huge page that a mapping of its own wastes is below 1/8.
constexpr std::size_t kLarge = std::size_t{16} << 20;
constexpr std::size_t kWeightAlignment = 64;

}  // namespace

MappedMemory::MappedMemory(std::size_t bytes) : MappedMemory(bytes, kSmallPage) {}

MappedMemory::MappedMemory(std::size_t bytes, std::size_t alignment) : bytes_(bytes) {
  constexpr std::size_t kMost = SIZE_MAX / 2;
  if (bytes > kMost) throw std::bad_alloc();
  mapped_ = round_up(bytes == 0 ? 1 : bytes, kSmallPage) + (alignment - kSmallPage);
  mapping_ = ::mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  const auto address = reinterpret_cast<std::uintptr_t>(mapping_);
  data_ = static_cast<std::byte*>(mapping_) + (round_up(address, alignment) - address);
}

MappedMemory::~MappedMemory() { ::munmap(mapping_, mapped_); }

void MappedMemory::discard(std::byte* first, std::byte* last) {
  const auto address = reinterpret_cast<std::uintptr_t>(first);
  first += round_up(address, kSmallPage) - address;
  last -= reinterpret_cast<std::uintptr_t>(last) % kSmallPage;
  if (first < last) static_cast<void>(::madvise(first, static_cast<std::size_t>(last - first), MADV_DONTNEED));
}

std::shared_ptr<MappedMemory> MappedMemory::huge(std::size_t bytes) {
  std::shared_ptr<MappedMemory> memory(new MappedMemory(bytes, kHugePage));
  // Refused where huge pages are switched off; that costs speed only.
  static_cast<void>(::madvise(memory->data_, round_up(bytes, kSmallPage), MADV_HUGEPAGE));
  return memory;
}

MemorySlice WeightArena::take(std::size_t bytes) {
  if (bytes >= kLarge) {
    std::shared_ptr<MappedMemory> own = MappedMemory::huge(bytes);
    auto* data = static_cast<std::byte*>(own->data());
    return {std::move(own), data};
  }
  bytes = round_up(bytes, kWeightAlignment);
  if (!chunk_ || used_ + bytes > chunk_->bytes()) {
    chunk_ = MappedMemory::huge(kChunk);
    used_ = 0;
  }
  MemorySlice slice{chunk_, static_cast<std::byte*>(chunk_->data()) + used_};
  used_ += bytes;
  return slice;
}

}  // namespace draftwerk::cpu
