#include "kvm/kernel_provider.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <mutex>

#include "base/mapping.hpp"
#include "base/unique_fd.hpp"

namespace ring3::kvm {
namespace {

// The kernel's KVM_RUN is interrupted by any handled signal; immediate_exit closes the window
// between the caller's last look and the ioctl.
void on_kick(int) {}

Status install_kick_handler() {
  static std::once_flag once;
  static int failed = 0;
  std::call_once(once, [] {
    struct sigaction action {};
    action.sa_handler = on_kick;  // no SA_RESTART: KVM_RUN has to return
    if (sigaction(kernel_kick_signal(), &action, nullptr) < 0) failed = errno;
  });
  if (failed != 0) return Error::from_errno("sigaction", failed);
  return Ok{};
}

void unblock_kick_signal() {
  thread_local bool done = false;
  if (done) return;
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, kernel_kick_signal());
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
  done = true;
}

class KernelEndpoint final : public Endpoint {
 public:
  enum class Kind { kSystem, kVm, kVcpu };
  KernelEndpoint(Kind kind, UniqueFd fd, std::size_t mmap_size, Mapping run)
      : kind_(kind), fd_(std::move(fd)), mmap_size_(mmap_size), run_(std::move(run)) {}

  long ioctl(unsigned long request, u64 arg) override {
    if (request == KVM_RUN && kind_ == Kind::kVcpu) return run();
    return plain_ioctl(request, arg);
  }

  Result<std::unique_ptr<Endpoint>> create(unsigned long request, u64 arg) override {
    Kind kind;
    if (kind_ == Kind::kSystem && request == KVM_CREATE_VM) {
      kind = Kind::kVm;
    } else if (kind_ == Kind::kVm && request == KVM_CREATE_VCPU) {
      kind = Kind::kVcpu;
    } else {
      return Error::of(EINVAL, "this KVM object does not make that");
    }
    const long fd = plain_ioctl(request, arg);
    if (fd < 0) return Error::of(static_cast<int>(-fd), std::strerror(static_cast<int>(-fd)));
    UniqueFd owned(static_cast<int>(fd));
    Mapping run;
    if (kind == Kind::kVcpu) {
      auto mapped = Mapping::shared_fd(owned.get(), mmap_size_, PROT_READ | PROT_WRITE);
      if (!mapped) return mapped.error();
      run = std::move(*mapped);
    }
    return std::unique_ptr<Endpoint>(
        std::make_unique<KernelEndpoint>(kind, std::move(owned), mmap_size_, std::move(run)));
  }

  kvm_run* run_page() override { return reinterpret_cast<kvm_run*>(run_.data()); }

  void kick() override {
    if (!run_) return;
    __atomic_store_n(&run_page()->immediate_exit, u8{1}, __ATOMIC_SEQ_CST);
    const int tid = running_tid_.load(std::memory_order_seq_cst);
    // A thread that has left KVM_RUN meanwhile gets one no-op signal too many: harmless.
    if (tid != 0) syscall(SYS_tgkill, getpid(), tid, kernel_kick_signal());
  }

 private:
  long plain_ioctl(unsigned long request, u64 arg) {
    const int r = ::ioctl(fd_.get(), request, arg);
    return r < 0 ? -static_cast<long>(errno) : r;
  }

  long run() {
    unblock_kick_signal();
    running_tid_.store(static_cast<int>(syscall(SYS_gettid)), std::memory_order_seq_cst);
    const long r = plain_ioctl(KVM_RUN, 0);
    running_tid_.store(0, std::memory_order_seq_cst);
    return r;
  }

  Kind kind_;
  UniqueFd fd_;
  std::size_t mmap_size_;
  Mapping run_;
  std::atomic<int> running_tid_{0};
};

}  // namespace

int kernel_kick_signal() { return SIGRTMIN + 3; }

Result<std::unique_ptr<Endpoint>> open_kernel_kvm(const char* path) {
  if (auto s = install_kick_handler(); !s) return s.error();
  UniqueFd fd(::open(path, O_RDWR | O_CLOEXEC));
  if (!fd) {
    const int code = errno;
    const std::string p = path;
    if (code == ENOENT) return Error::of(code, p + " does not exist: this host offers no hardware virtualisation");
    if (code == EACCES || code == EPERM) {
      return Error::of(code, "no permission to open " + p + ": add yourself to its group (usually kvm)");
    }
    return Error::from_errno(p, code);
  }
  if (const int version = ::ioctl(fd.get(), KVM_GET_API_VERSION, 0); version < 0) {
    return Error::of(ENOTTY, std::string(path) + " is not a KVM device");
  }
  const int size = ::ioctl(fd.get(), KVM_GET_VCPU_MMAP_SIZE, 0);
  if (size < static_cast<int>(sizeof(kvm_run))) return Error::of(EIO, "KVM_GET_VCPU_MMAP_SIZE gave nonsense");
  return std::unique_ptr<Endpoint>(std::make_unique<KernelEndpoint>(
      KernelEndpoint::Kind::kSystem, std::move(fd), static_cast<std::size_t>(size), Mapping()));
}

}  // namespace ring3::kvm
