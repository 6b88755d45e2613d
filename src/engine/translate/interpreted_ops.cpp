#include "engine/translate/interpreted_ops.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "engine/decode/decoder.hpp"
#include "engine/interp/operand.hpp"
#include "engine/translate/translator_vcpu.hpp"

namespace ring3::engine {
namespace {

constexpr const char* kReasons[] = {"mode", "alone", "untranslated", "refused"};
constexpr const char* kKinds[] = {"",   "gpr", "high", "mem", "imm", "imm2", "rel", "far",
                                  "seg", "cr",  "dr",   "vec", "mmx", "st",   "other"};

bool hosts_own(Op op) { return op == Op::HostX87 || op == Op::HostMmx || op == Op::HostVec; }

u64 key_of(InterpretedOps::Reason reason, bool user, const DecodedInsn& i) {
  u64 key = static_cast<u64>(i.op);
  const auto add = [&](u64 value, unsigned bits) { key = key << bits | (value & ((1ull << bits) - 1)); };
  add(static_cast<u64>(reason), 2);
  add(user, 1);
  add(i.opsize, 4);
  add(i.addrsize, 4);
  add(i.flags & (kLock | kRep | kRepne | kVex), 6);
  add(i.has(kHasMem) ? i.mem.seg : 0, 3);
  for (const Operand& o : i.operands) add(static_cast<u64>(o.kind), 4);
  add(hosts_own(i.op) ? i.opcode : 0, 8);
  return key;
}

}  // namespace

Result<std::unique_ptr<InterpretedOps>> InterpretedOps::create(const std::string& path) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return Error::from_errno("cannot write " + path);
  std::FILE* file = ::fdopen(fd, "w");
  if (file == nullptr) {
    const Error error = Error::from_errno("fdopen");
    ::close(fd);
    return error;
  }
  return std::unique_ptr<InterpretedOps>(new InterpretedOps(file));
}

InterpretedOps::~InterpretedOps() {
  write(report());
  std::fclose(file_);
}

void InterpretedOps::write(const std::string& text) {
  std::rewind(file_);
  if (::ftruncate(::fileno(file_), 0) != 0) return;
  std::fwrite(text.data(), 1, text.size(), file_);
  std::fflush(file_);
}

void InterpretedOps::count(Reason reason, bool user, u64 rip, const DecodedInsn& insn) {
  const std::lock_guard lock(mutex_);
  Entry& e = entries_[key_of(reason, user, insn)];
  e.count++;
  // The address that more than half of them have stays here, if one has (the majority vote of Boyer and Moore).
  if (e.votes == 0) {
    e.rip = rip;
    e.example = insn;
    e.reason = reason;
    e.user = user;
  }
  e.votes += e.rip == rip ? 1 : -1;
  if ((++total_ & 0xfffff) == 0) write(table());
}

std::string InterpretedOps::report() const {
  const std::lock_guard lock(mutex_);
  return table();
}

std::string InterpretedOps::table() const {
  std::vector<const Entry*> sorted;
  for (const auto& [key, entry] : entries_) sorted.push_back(&entry);
  std::sort(sorted.begin(), sorted.end(), [](const Entry* a, const Entry* b) { return a->count > b->count; });
  std::string text;
  char part[128];
  for (const Entry* e : sorted) {
    const DecodedInsn& i = e->example;
    std::snprintf(part, sizeof part, "%12llu %-12s %-6s %s%s%s%s", static_cast<unsigned long long>(e->count),
                  kReasons[static_cast<unsigned>(e->reason)], e->user ? "user" : "kernel", i.has(kLock) ? "lock " : "",
                  i.has(kRep) ? "rep " : i.has(kRepne) ? "repne " : "", name(i.op), i.has(kVex) ? " vex" : "");
    text += part;
    std::snprintf(part, sizeof part, " o%u a%u", i.opsize * 8u, i.addrsize * 8u);
    text += part;
    for (const Operand& o : i.operands)
      if (o.kind != OperandKind::None) text += std::string(" ") + kKinds[static_cast<unsigned>(o.kind)];
    if (i.has(kHasMem) && i.mem.seg != DS && i.mem.seg != SS) text += " seg" + std::to_string(i.mem.seg);
    std::snprintf(part, sizeof part, "  %llx:", static_cast<unsigned long long>(e->rip));
    text += part;
    for (unsigned n = 0; n < i.length && n < sizeof i.raw; n++) {
      std::snprintf(part, sizeof part, "%02x", i.raw[n]);
      text += part;
    }
    text += "\n";
  }
  return text;
}

/// The instruction at RIP is about to be interpreted.
void TranslatorVcpu::note_interpreted() {
  using Reason = InterpretedOps::Reason;
  const Stop kept = mmu_.stop();
  u8 bytes[15] = {};
  const u64 linear = c_.code64 ? s_.rip : static_cast<u32>(s_.seg[CS].base + s_.rip);
  const unsigned got = canonical(linear) ? mmu_.fetch_bytes(linear, bytes, sizeof bytes) : 0;
  mmu_.stop() = kept;
  DecodedInsn insn;
  if (got == 0 || decode(bytes, got, c_.code_mode, !c_.protected_mode, c_.features.amd, &insn) != DecodeResult::Ok)
    insn = DecodedInsn{};
  Reason reason = !translatable() ? Reason::Mode : !can_enter() ? Reason::Alone : Reason::Untranslated;
  if (reason == Reason::Untranslated && insn.op != Op::Invalid) {
    BlockRequest request;
    const bool has = c_.features.allows(insn);
    request.rip = s_.rip;
    request.mode = mode();
    request.insns = std::span<const DecodedInsn>(&insn, 1);
    request.has_feature = std::span<const bool>(&has, 1);
    out_.clear();
    if ((s_.rip & (kPageSize - 1)) + insn.length <= kPageSize && translator_->translate(request, &out_))
      reason = Reason::Refused;
  }
  options_.interpreted_ops->count(reason, c_.cpl == 3, s_.rip, insn);
}

}  // namespace ring3::engine
