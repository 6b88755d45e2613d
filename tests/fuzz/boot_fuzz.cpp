// libFuzzer target of the kernel loaders: any file loads or is refused with one line, and nothing outside
// guest memory is written. scripts/fuzz builds and runs it with clang.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "vmm/boot/loader.hpp"

extern "C" int LLVMFuzzerTestOneInput(const ring3::u8* data, std::size_t size) {
  using namespace ring3;  // NOLINT: a test
  if (size < 2) return 0;
  // The first bytes choose the surroundings, the rest is the file.
  const std::size_t ram_size = (data[0] & 1) ? 1u << 20 : 4u << 20;
  static std::vector<u8> ram;
  ram.assign(ram_size, 0);
  boot::File initrd;
  initrd.name = "initrd";
  initrd.size = 1 + 997ull * data[1];
  initrd.read = [](u64, std::span<u8> to) -> Status {
    std::memset(to.data(), 0x5a, to.size());
    return Ok{};
  };
  boot::Request request;
  request.kernel = boot::File::of("kernel", {data + 2, size - 2});
  request.initrd = (data[0] & 2) ? &initrd : nullptr;
  request.command_line = (data[0] & 4) ? std::string(2000, 'x') : "console=ttyS0";
  request.memory = ram_size;
  request.rsdp = Gpa(0xf0000);
  const auto entry = boot::load_kernel(request, ram);
  if (!entry) {
    const std::string& message = entry.error().message;
    if (message.empty() || message.find('\n') != std::string::npos) std::abort();
  }
  return 0;
}
