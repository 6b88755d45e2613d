// Small guests on the whole machine, the same on each provider of the KVM ABI: console, ports, MMIO,
// interrupts, application processors, and each way a run ends.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <thread>

#include "engine/abi/provider.hpp"
#include "kvm/kernel_provider.hpp"
#include "vmm/machine/machine.hpp"

// Flat multiboot images at 2 MiB: 32-bit protected mode, no paging, no stack set up but by the loader.
// HERE(x) is the address of a label in the guest.
asm(R"(
        .macro  GUEST name
        .pushsection .rodata
        .balign 16
        .globl  guest_\name, guest_\name\()_end
        .code32
guest_\name:
        .long   0x1badb002, 0x10000, -(0x1badb002 + 0x10000)
        .long   0x200000, 0x200000, 0x200000 + guest_\name\()_end - guest_\name, 0x210000
        .long   0x200020
        .endm
        .macro  END_GUEST name
guest_\name\()_end:
        .code64
        .popsection
        .endm

GUEST hello
        mov     $0x3f8, %edx
        mov     $0x200000 + 1f - guest_hello, %esi
        mov     $6, %ecx
        cld
        rep     outsb
        mov     $'!', %al
        out     %al, (%dx)
        mov     $0x12345678, %eax       # echo ports, wide and narrow
        out     %eax, $0xe0
        in      $0xe2, %ax
        cmp     $0x1234, %ax
        jne     2f
        mov     $0xff001000, %ebx       # the device's memory
        movl    $0xcafef00d, (%ebx)
        cmpb    $0xfe, 2(%ebx)
        jne     2f
        mov     $0x600000, %edi         # string input
        mov     $0xe0, %edx
        mov     $3, %ecx
        rep     insl
        cmpl    $0x12345678, 0x600008
        jne     2f
        in      $0x80, %al              # nobody there
        cmp     $0xff, %al
        jne     2f
        mov     $21, %eax
        out     %eax, $0xf4
2:      mov     $1, %eax
        out     %eax, $0xf4
        hlt
1:      .ascii  "hello\n"
END_GUEST hello

GUEST cpus
        mov     $0x510, %edx
        mov     $5, %ax
        out     %ax, (%dx)
        inc     %edx
        xor     %eax, %eax
        in      (%dx), %al
        out     %eax, $0xf4
        hlt
END_GUEST cpus

GUEST poweroff
        mov     $0x604, %edx
        mov     $0x3400, %ax
        out     %ax, (%dx)
        hlt
END_GUEST poweroff

GUEST reset_i8042
        mov     $0x3f8, %edx
        mov     $'B', %al
        out     %al, (%dx)
        cmpl    $0, 0x300000            # RAM is as new
        jne     1f
        movl    $1, 0x300000
        mov     $0xfe, %al
        out     %al, $0x64
1:      hlt
        jmp     1b
END_GUEST reset_i8042

GUEST reset_cf9
        mov     $0xcf9, %edx
        mov     $6, %al
        out     %al, (%dx)
        hlt
END_GUEST reset_cf9

GUEST triple_fault
        lidt    0x200000 + 1f - guest_triple_fault
        ud2
1:      .word   0
        .long   0
END_GUEST triple_fault

GUEST panic
        mov     $0x505, %edx
        in      (%dx), %al
        and     $1, %al
        out     %al, (%dx)
        hlt
END_GUEST panic

GUEST spin
1:      incl    0x300000
        jmp     1b
END_GUEST spin

GUEST burst
        mov     $0x3f8, %edx
        mov     $200000, %ecx
        mov     $'x', %al
1:      out     %al, (%dx)
        dec     %ecx
        jnz     1b
        mov     $0x604, %edx
        mov     $0x3400, %ax
        out     %ax, (%dx)
        hlt
END_GUEST burst

GUEST echo
        mov     $0x3fc, %edx            # RTS: ready for input
        mov     $2, %al
        out     %al, (%dx)
1:      mov     $0x3fd, %edx
        in      (%dx), %al
        test    $1, %al
        jz      1b
        mov     $0x3f8, %edx
        in      (%dx), %al
        cmp     $'q', %al
        je      2f
        out     %al, (%dx)
        jmp     1b
2:      mov     $0x604, %edx
        mov     $0x3400, %ax
        out     %ax, (%dx)
        hlt
END_GUEST echo

GUEST interrupt
        mov     $0x11, %al              # 8259s: vectors 0x20 and 0x28, all masked but IRQ 0, 2, 5
        out     %al, $0x20
        out     %al, $0xa0
        mov     $0x20, %al
        out     %al, $0x21
        mov     $0x28, %al
        out     %al, $0xa1
        mov     $4, %al
        out     %al, $0x21
        mov     $2, %al
        out     %al, $0xa1
        mov     $1, %al
        out     %al, $0x21
        out     %al, $0xa1
        mov     $0xda, %al
        out     %al, $0x21
        mov     $0xff, %al
        out     %al, $0xa1
        mov     $0x200000 + timer - guest_interrupt, %eax
        mov     $0x20, %ebx
        call    gate
        mov     $0x200000 + line5 - guest_interrupt, %eax
        mov     $0x25, %ebx
        call    gate
        lidt    0x200000 + 9f - guest_interrupt
        mov     $0x34, %al              # PIT channel 0 at 1 kHz
        out     %al, $0x43
        mov     $0xa9, %al
        out     %al, $0x40
        mov     $0x04, %al
        out     %al, $0x40
1:      sti                             # ten ticks
        hlt
        jmp     1b
gate:   mov     %ax, 0x301000(,%ebx,8)
        movw    $0x10, 0x301002(,%ebx,8)
        movw    $0x8e00, 0x301004(,%ebx,8)
        shr     $16, %eax
        mov     %ax, 0x301006(,%ebx,8)
        ret
timer:  incl    0x300000                # without IRET, which some KVMs cannot emulate in protected mode
        mov     $0x20, %al
        out     %al, $0x20
        add     $12, %esp
        cmpl    $10, 0x300000
        jb      1b
        mov     $0x2005, %edx           # then IRQ 5 by the test device
        mov     $1, %al
        out     %al, (%dx)
0:      sti
        hlt
        jmp     0b
line5:  mov     $5, %eax
        out     %eax, $0xf4
        hlt
9:      .word   0x1ff
        .long   0x301000
END_GUEST interrupt

GUEST smp
        mov     $0x200000 + 1f - guest_smp, %esi        # real-mode code to 0x8000
        mov     $0x8000, %edi
        mov     $2f - 1f, %ecx
        cld
        rep     movsb
        mov     $0xfee00000, %ebx
        movl    $0x1ff, 0xf0(%ebx)      # enable the LAPIC
        movl    $0x000c4500, 0x300(%ebx)        # INIT to all others
        mov     $1000, %ecx
3:      pause
        loop    3b
        movl    $0x000c4608, 0x300(%ebx)        # SIPI, vector 8
        mov     $0x510, %edx
        mov     $5, %ax
        out     %ax, (%dx)
        inc     %edx
        xor     %eax, %eax
        in      (%dx), %al
        dec     %eax
4:      pause
        cmp     0x9000, %al
        jne     4b
        out     %eax, $0xf4
        hlt
        .code16
1:      xor     %ax, %ax
        mov     %ax, %ds
        lock incb 0x9000
5:      hlt
        jmp     5b
2:
END_GUEST smp
)");

#define DECLARE_GUEST(name) \
  extern "C" const unsigned char guest_##name[]; \
  extern "C" const unsigned char guest_##name##_end[];
DECLARE_GUEST(hello)
DECLARE_GUEST(cpus)
DECLARE_GUEST(poweroff)
DECLARE_GUEST(reset_i8042)
DECLARE_GUEST(reset_cf9)
DECLARE_GUEST(triple_fault)
DECLARE_GUEST(panic)
DECLARE_GUEST(spin)
DECLARE_GUEST(burst)
DECLARE_GUEST(echo)
DECLARE_GUEST(interrupt)
DECLARE_GUEST(smp)

namespace ring3::vmm {
namespace {

using Kind = Outcome::Kind;
using namespace std::chrono_literals;

// A console whose output the test reads and whose input comes through a pipe.
class TestConsole final : public Console {
 public:
  TestConsole() {
    int fds[2];
    EXPECT_EQ(pipe2(fds, O_CLOEXEC | O_NONBLOCK), 0);
    in_ = UniqueFd(fds[0]);
    out_ = UniqueFd(fds[1]);
  }
  bool write(std::span<const u8> bytes) override {
    std::unique_lock lock(mutex_);
    text_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    writes_++;
    while (blocked_ && !cancelled_) {
      lock.unlock();
      std::this_thread::sleep_for(1ms);
      lock.lock();
    }
    return !cancelled_;
  }
  int input_fd() const override { return in_.get(); }
  ConsoleInput read(std::span<u8> into) override {
    const ssize_t n = ::read(in_.get(), into.data(), into.size());
    ConsoleInput r;
    if (n > 0) {
      r.bytes = static_cast<std::size_t>(n);
      r.stop = into[0] == 0x01;
    }
    r.closed = n == 0;
    return r;
  }
  void cancel() override {
    std::lock_guard lock(mutex_);
    cancelled_ = true;
  }

  void type(const std::string& s) { EXPECT_EQ(::write(out_.get(), s.data(), s.size()), static_cast<ssize_t>(s.size())); }
  void close_input() { out_.reset(); }
  void block(bool b) {
    std::lock_guard lock(mutex_);
    blocked_ = b;
  }
  std::string text() {
    std::lock_guard lock(mutex_);
    return text_;
  }
  int writes() {
    std::lock_guard lock(mutex_);
    return writes_;
  }
  bool wait_for(const std::string& wanted) {
    for (int i = 0; i < 10000; i++) {
      if (text().find(wanted) != std::string::npos) return true;
      std::this_thread::sleep_for(1ms);
    }
    return false;
  }

 private:
  UniqueFd in_, out_;
  std::mutex mutex_;
  std::string text_;
  int writes_ = 0;
  bool blocked_ = false;
  bool cancelled_ = false;
};

class Guests : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    auto made = std::string(GetParam()) == "kernel" ? kvm::open_kernel_kvm()
                                                    : engine::create_soft_system({.values = {{"engine", GetParam()}}});
    if (!made) GTEST_SKIP() << made.error().message;
    endpoint_ = std::move(*made);
    ASSERT_NE(mkdtemp(dir_), nullptr);
    config_.memory_bytes = u64{16} << 20;
    config_.test_device = true;
    config_.reboot = false;
  }
  void TearDown() override {
    if (!config_.kernel.empty()) unlink(config_.kernel.c_str());
    rmdir(dir_);
  }
  void make(const unsigned char* begin, const unsigned char* end) {
    config_.kernel = std::string(dir_) + "/guest";
    std::ofstream(config_.kernel, std::ios::binary).write(reinterpret_cast<const char*>(begin), end - begin);
    auto m = Machine::create(config_, endpoint_, console_);
    ASSERT_TRUE(m.ok()) << m.error().message;
    machine_ = std::move(*m);
  }
  // Runs with a limit: a test must not hang.
  Outcome run(std::chrono::seconds limit = 60s) {
    std::mutex mutex;
    std::condition_variable cv;
    bool done = false;
    bool late = false;
    std::thread watchdog([&] {
      std::unique_lock lock(mutex);
      if (!cv.wait_for(lock, limit, [&] { return done; })) {
        late = true;
        machine_->request_stop();
      }
    });
    Outcome o = machine_->run();
    {
      std::lock_guard lock(mutex);
      done = true;
    }
    cv.notify_all();
    watchdog.join();
    EXPECT_FALSE(late) << "the guest ran into the limit";
    return o;
  }

  char dir_[32] = "/tmp/ring3-guest-XXXXXX";
  std::shared_ptr<kvm::Endpoint> endpoint_;
  MachineConfig config_;
  TestConsole console_;
  std::unique_ptr<Machine> machine_;
};

#define MAKE(name) ASSERT_NO_FATAL_FAILURE(make(guest_##name, guest_##name##_end))

TEST_P(Guests, ConsolePortsAndMmio) {
  MAKE(hello);
  const Outcome o = run();
  EXPECT_EQ(o.kind, Kind::kTestExit) << o.message;
  EXPECT_EQ(o.status, 43);
  EXPECT_EQ(console_.text(), "hello\n!");
}

TEST_P(Guests, CountsItsProcessors) {
  config_.cpus = 3;
  MAKE(cpus);
  const Outcome o = run();
  EXPECT_EQ(o.kind, Kind::kTestExit) << o.message;
  EXPECT_EQ(o.status, 7);
}

TEST_P(Guests, PowersOff) {
  MAKE(poweroff);
  EXPECT_EQ(run().kind, Kind::kPoweredOff);
}

TEST_P(Guests, ResetEndsTheRunWithoutReboot) {
  MAKE(reset_i8042);
  EXPECT_EQ(run().kind, Kind::kReboot);
  EXPECT_EQ(console_.text(), "B");
}

TEST_P(Guests, ResetRegister) {
  MAKE(reset_cf9);
  EXPECT_EQ(run().kind, Kind::kReboot);
}

TEST_P(Guests, RebootsWithCleanMemory) {
  config_.reboot = true;
  config_.cpus = 2;
  MAKE(reset_i8042);
  std::thread stopper([&] {
    EXPECT_TRUE(console_.wait_for("BBBB"));
    machine_->request_stop();
  });
  EXPECT_EQ(run().kind, Kind::kStopped);
  stopper.join();
}

TEST_P(Guests, TripleFault) {
  MAKE(triple_fault);
  const Outcome o = run();
  EXPECT_EQ(o.kind, Kind::kTripleFault) << o.message;
  EXPECT_NE(o.message.find("vCPU 0"), std::string::npos) << o.message;
}

TEST_P(Guests, Panic) {
  MAKE(panic);
  EXPECT_EQ(run().kind, Kind::kPanic);
}

TEST_P(Guests, StopsASpinningGuest) {
  MAKE(spin);
  std::thread stopper([&] {
    std::this_thread::sleep_for(50ms);
    machine_->request_stop();
  });
  EXPECT_EQ(run().kind, Kind::kStopped);
  stopper.join();
}

TEST_P(Guests, StopsBeforeItRuns) {
  MAKE(spin);
  machine_->request_stop();
  EXPECT_EQ(run().kind, Kind::kStopped);
}

TEST_P(Guests, ConsoleEndsTheRun) {
  MAKE(spin);
  console_.type("\x01");
  EXPECT_EQ(run().kind, Kind::kStopped);
}

TEST_P(Guests, PausesAndResumes) {
  MAKE(burst);
  std::thread pauser([&] {
    EXPECT_TRUE(console_.wait_for("xxxx"));
    for (int i = 0; i < 3; i++) {
      machine_->pause();
      std::this_thread::sleep_for(20ms);  // what was written before arrives
      const auto before = console_.text().size();
      std::this_thread::sleep_for(50ms);
      EXPECT_EQ(console_.text().size(), before);
      machine_->resume();
      std::this_thread::sleep_for(5ms);
    }
  });
  EXPECT_EQ(run().kind, Kind::kPoweredOff);
  pauser.join();
  EXPECT_EQ(console_.text(), std::string(200000, 'x'));
}

TEST_P(Guests, OutputComesInBursts) {
  MAKE(burst);
  EXPECT_EQ(run().kind, Kind::kPoweredOff);
  EXPECT_EQ(console_.text(), std::string(200000, 'x'));
  EXPECT_LT(console_.writes(), 20000);
}

TEST_P(Guests, StopsThoughTheTerminalDoesNot) {
  MAKE(burst);
  console_.block(true);
  std::thread stopper([&] {
    std::this_thread::sleep_for(300ms);
    machine_->request_stop();
  });
  EXPECT_EQ(run().kind, Kind::kStopped);
  stopper.join();
}

TEST_P(Guests, EchoesItsInput) {
  MAKE(echo);
  std::string text;
  for (int i = 0; i < 6000; i++) text.push_back(static_cast<char>('A' + i % 16));  // more than the UART holds
  console_.type(text);
  std::thread typist([&] {
    EXPECT_TRUE(console_.wait_for(text));
    console_.type("q");
  });
  EXPECT_EQ(run().kind, Kind::kPoweredOff);
  typist.join();
  EXPECT_EQ(console_.text(), text);
}

TEST_P(Guests, TimerAndLineInterrupts) {
  MAKE(interrupt);
  const Outcome o = run();
  EXPECT_EQ(o.kind, Kind::kTestExit) << o.message;
  EXPECT_EQ(o.status, 11);
}

TEST_P(Guests, ApplicationProcessorsStart) {
  config_.cpus = 4;
  MAKE(smp);
  const Outcome o = run();
  EXPECT_EQ(o.kind, Kind::kTestExit) << o.message;
  EXPECT_EQ(o.status, 7);
}

TEST_P(Guests, ManyStartsLeaveNothingBehind) {
  const auto count_fds = [] {
    int n = 0;
    for (int fd = 0; fd < 1024; fd++) n += fcntl(fd, F_GETFD) >= 0;
    return n;
  };
  MAKE(poweroff);
  EXPECT_EQ(run().kind, Kind::kPoweredOff);
  machine_.reset();
  const int before = count_fds();
  for (int i = 0; i < 20; i++) {
    MAKE(poweroff);
    EXPECT_EQ(run().kind, Kind::kPoweredOff);
    machine_.reset();
  }
  EXPECT_EQ(count_fds(), before);
}

INSTANTIATE_TEST_SUITE_P(Providers, Guests, testing::Values("kernel", "interpreter", "translator"),
                         [](const auto& p) { return std::string(p.param); });

}  // namespace
}  // namespace ring3::vmm
