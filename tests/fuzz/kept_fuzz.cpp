// libFuzzer target of kept code: any file is refused with one line, or everything that is found in it has its numbers in
// range. scripts/fuzz builds and runs it with clang.
#include <cstdlib>

#include "engine/translate/kept_code.hpp"

extern "C" int LLVMFuzzerTestOneInput(const ring3::u8* data, std::size_t size) {
  using namespace ring3;  // NOLINT: a test
  using namespace ring3::engine;
  RawBytes file(data, data + size);
  KeptCode::seal(&file, 1);
  std::string refused;
  const auto kept = KeptCode::parse(std::move(file), 1, &refused);
  if (refused.find('\n') != std::string::npos) std::abort();
  kept->for_each([&](KeptCode::Source s) {
    TranslatedBlock out;
    KeptCode::Block block{&out, 0};
    for (const u64 move : {u64{0}, u64{2} << 20}) {
      s.rip += s.pic ? 0 : move;
      if (!kept->find(s, 1, &block)) continue;
      const auto inside = [&](u32 offset, u32 bytes) { return offset <= out.code.size() && bytes <= out.code.size() - offset; };
      bool fine = out.cold > 0 && out.cold <= out.code.size() && out.entry < out.cold && out.frame_entry + 5 <= out.cold &&
                  out.dead_stub < out.code.size() && out.bytes <= s.bytes.size() && out.insns <= kMaxBlockInsns;
      for (const DirectExit& e : out.exits) {
        fine &= inside(e.field, 4) && inside(e.slot, 4) && inside(e.tag, 4) && e.stub < out.code.size();
        fine &= e.bias == DirectExit::kSamePage || inside(e.bias, e.wide ? 8 : 4);
      }
      for (u32 field : out.relatives) fine &= inside(field, 4);
      for (u32 field : out.left_at) fine &= inside(field, 4) && block.left_at < s.bytes.size();
      for (const HostFaultPoint& f : out.faults) fine &= f.offset < out.code.size();
      if (!fine) std::abort();
    }
  });
  return 0;
}
