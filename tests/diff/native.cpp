#include "native.hpp"

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstring>

extern "C" {
void ring3_diff_enter();
void ring3_diff_exit_a();
void ring3_diff_exit_b();
void ring3_diff_leave();
}

namespace ring3::diff {
namespace {

/// As native_entry.S has it. No address that a random operand is likely to reach: it is there on this side alone.
constexpr u64 kFrame = 0x2a5c7000;
constexpr u16 kCs64 = 0x33, kCs32 = 0x23, kDs = 0x2b;  // Linux' user selectors

struct Frame {
  u64 gpr[16];
  u64 rip;
  u64 rflags;
  u8 pad0[0xc0 - 0x90];
  u8 xsave[kXsaveBytes];
  u64 host_rsp;
  u64 target;
  u32 far_offset;
  u16 far_selector;
  u16 pad1;
  u32 exit_kind;
  u32 compat;
  u32 host_mxcsr;
  u32 host_fcw;
  u32 data_selector;
  u32 zero_selector;
  u32 components;  ///< that are loaded and stored
  // Not known to the assembly:
  volatile bool active;
  bool faulted;
  u64 trapno, error, cr2;
};
static_assert(offsetof(Frame, xsave) == 0xc0 && offsetof(Frame, host_rsp) == 0xb40);
static_assert(offsetof(Frame, far_offset) == 0xb50 && offsetof(Frame, host_mxcsr) == 0xb60);
static_assert(offsetof(Frame, zero_selector) == 0xb6c && offsetof(Frame, components) == 0xb70 && sizeof(Frame) <= 0x1000);

Frame* frame() { return reinterpret_cast<Frame*>(kFrame); }

u8* g_code_rw = nullptr;       // writable alias of the code page
u8* g_read_only_rw = nullptr;  // writable alias of the read-only page
// 32-bit exits: far jumps to these 64-bit stubs below 4 GiB, which jump on to the real exits.
constexpr u64 kTrampoline = kCode + 0xf00;

void on_signal(int sig, siginfo_t* info, void* context) {
  auto* uc = static_cast<ucontext_t*>(context);
  Frame* f = frame();
  if (!f->active) {
    signal(sig, SIG_DFL);
    return;
  }
  f->active = false;
  const greg_t* g = uc->uc_mcontext.gregs;
  static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  for (int i = 0; i < 16; ++i) f->gpr[i] = static_cast<u64>(g[kOrder[i]]);
  f->rip = static_cast<u64>(g[REG_RIP]);
  f->rflags = static_cast<u64>(g[REG_EFL]);
  std::memcpy(f->xsave, uc->uc_mcontext.fpregs, host_has_avx512() ? kXsaveBytes : 832);
  f->faulted = true;
  f->trapno = static_cast<u64>(g[REG_TRAPNO]);
  f->error = static_cast<u64>(g[REG_ERR]);
  f->cr2 = static_cast<u64>(g[REG_CR2]);
  (void)info;
  // Resume in this process' own code, with its stack and a clean floating-point unit.
  uc->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(&ring3_diff_leave);
  uc->uc_mcontext.gregs[REG_RSP] = static_cast<greg_t>(f->host_rsp);
  uc->uc_mcontext.gregs[REG_EFL] = 2;
  // CSGSFS: cs in the low 16 bits, ss in the top 16.
  u64 segments = static_cast<u64>(uc->uc_mcontext.gregs[REG_CSGSFS]);
  segments = (segments & ~0xffffull) | kCs64;
  uc->uc_mcontext.gregs[REG_CSGSFS] = static_cast<greg_t>(segments);
}

/// A component the CPU left in its initial configuration is not written by XSAVE.
void normalise_xsave(u8* area) {
  u64 bv;
  std::memcpy(&bv, area + 512, 8);
  if (!(bv & 1)) {
    std::memset(area, 0, 24);
    area[0] = 0x7f;
    area[1] = 0x03;
    std::memset(area + 32, 0, 128);
  }
  if (!(bv & 2)) std::memset(area + 160, 0, 256);
  if (!(bv & 4)) std::memset(area + 576, 0, 256);
  if (!(bv & 0x20)) std::memset(area + 1088, 0, 64);
  if (!(bv & 0x40)) std::memset(area + 1152, 0, 512);
  if (!(bv & 0x80)) std::memset(area + 1664, 0, 1024);
}

void* map_at(u64 where, std::size_t size, int prot, int fd, off_t offset) {
  const int flags = MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_POPULATE;
  return ::mmap(reinterpret_cast<void*>(where), size, prot, flags, fd, offset);
}

}  // namespace

Result<std::unique_ptr<NativeRunner>> NativeRunner::create() {
  host_has_avx512();  // before a signal handler asks
  const int fd = ::memfd_create("ring3-diff", MFD_CLOEXEC);
  if (fd < 0 || ::ftruncate(fd, 0x10000) != 0) return Error::from_errno("memfd");
  // Offsets in the memfd: 0 code, 0x1000 read-only page, 0x2000 frame, 0x4000 data.
  void* code = map_at(kCode, kCodeSize, PROT_READ | PROT_EXEC, fd, 0);
  void* ro = map_at(kReadOnly, 0x1000, PROT_READ, fd, 0x1000);
  void* fr = map_at(kFrame, 0x1000, PROT_READ | PROT_WRITE, fd, 0x2000);
  void* data = map_at(kData, kDataSize, PROT_READ | PROT_WRITE, fd, 0x4000);
  void* absent = ::mmap(reinterpret_cast<void*>(kAbsent), 0x1000, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  void* rw = ::mmap(nullptr, 0x2000, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  ::close(fd);
  if (code == MAP_FAILED || ro == MAP_FAILED || fr == MAP_FAILED || data == MAP_FAILED || absent == MAP_FAILED ||
      rw == MAP_FAILED)
    return Error::from_errno("cannot map the oracle's pages at their fixed addresses");
  g_code_rw = static_cast<u8*>(rw);
  g_read_only_rw = g_code_rw + 0x1000;

  stack_t stack{};
  stack.ss_size = 1 << 16;
  stack.ss_sp = ::mmap(nullptr, stack.ss_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ::sigaltstack(&stack, nullptr);
  struct sigaction action {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int sig : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) ::sigaction(sig, &action, nullptr);

  // jmp *[rip+2]; the address behind it, aligned: the instruction may have set EFLAGS.AC
  for (int i = 0; i < 2; ++i) {
    u8* t = g_code_rw + (kTrampoline - kCode) + 16 * i;
    const u8 jump[] = {0xff, 0x25, 2, 0, 0, 0};
    std::memcpy(t, jump, 6);
    const u64 to = reinterpret_cast<u64>(i == 0 ? &ring3_diff_exit_a : &ring3_diff_exit_b);
    std::memcpy(t + 8, &to, 8);
  }
  return std::unique_ptr<NativeRunner>(new NativeRunner);
}

Result<std::unique_ptr<NativeRunner>> NativeRunner::create_in_child() {
  ::munmap(reinterpret_cast<void*>(kCode), kCodeSize);
  ::munmap(reinterpret_cast<void*>(kData), kAbsent + 0x1000 - kData);
  ::munmap(reinterpret_cast<void*>(kFrame), 0x1000);
  return create();
}

NativeRunner::~NativeRunner() = default;
u8* NativeRunner::data() const { return reinterpret_cast<u8*>(kData); }
u8* NativeRunner::read_only() const { return g_read_only_rw; }
const u8* NativeRunner::code() const { return g_code_rw; }

void NativeRunner::set_code(unsigned offset, const u8* insn, unsigned size, bool compat32) {
  u8* at = g_code_rw + offset;
  std::memcpy(at, insn, size);
  const unsigned pads[2] = {size, kFarPad};
  for (int i = 0; i < 2; ++i) {
    u8* pad = at + pads[i];
    const u64 target = kTrampoline + 16 * i;
    if (compat32) {  // ljmp $0x33, target
      pad[0] = 0xea;
      const u32 t = static_cast<u32>(target);
      std::memcpy(pad + 1, &t, 4);
      pad[5] = kCs64;
      pad[6] = 0;
    } else {  // jmp rel32; nops
      pad[0] = 0xe9;
      const u32 rel = static_cast<u32>(target - (kCode + offset + pads[i] + 5));
      std::memcpy(pad + 1, &rel, 4);
      pad[5] = pad[6] = 0x90;
    }
  }
}

Outcome NativeRunner::run(Registers* regs, bool compat32) {
  Frame* f = frame();
  std::memcpy(f->gpr, regs->gpr, sizeof(f->gpr));
  f->rflags = regs->rflags;
  std::memcpy(f->xsave, regs->xsave, sizeof(f->xsave));
  std::memset(f->xsave + 512, 0, 64);
  f->components = host_has_avx512() ? 0xe7 : 7;
  f->xsave[512] = static_cast<u8>(f->components);
  f->far_offset = static_cast<u32>(regs->rip);
  f->far_selector = compat32 ? kCs32 : kCs64;
  f->compat = compat32;
  f->data_selector = kDs;
  f->zero_selector = 0;
  f->faulted = false;
  f->active = true;
  ring3_diff_enter();
  f->active = false;

  Outcome out;
  std::memcpy(regs->gpr, f->gpr, sizeof(f->gpr));
  regs->rflags = f->rflags;
  std::memcpy(regs->xsave, f->xsave, sizeof(f->xsave));
  normalise_xsave(regs->xsave);
  if (f->faulted) {
    out.kind = Outcome::Kind::Fault;
    out.vector = static_cast<u8>(f->trapno);
    if (out.vector == 13 || out.vector == 14) out.error = static_cast<u32>(f->error);
    if (out.vector == 14) out.cr2 = f->cr2;
    regs->rip = f->rip;
  } else {
    out.kind = f->exit_kind ? Outcome::Kind::Branched : Outcome::Kind::FellThrough;
  }
  return out;
}

}  // namespace ring3::diff
