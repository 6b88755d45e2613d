#include "control/cli/host.hpp"

#include <cpuid.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <fstream>
#include <sstream>

namespace ring3::control {

namespace {

struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf cpuid(unsigned leaf, unsigned subleaf = 0) {
  Leaf r;
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return {};
  return r;
}

bool bit(unsigned reg, int n) { return ((reg >> n) & 1) != 0; }

std::string brand_string() {
  if (cpuid(0x80000000).eax < 0x80000004) return "unknown";
  std::array<char, 49> text{};
  for (unsigned i = 0; i < 3; ++i) {
    const Leaf l = cpuid(0x80000002 + i);
    const unsigned words[4] = {l.eax, l.ebx, l.ecx, l.edx};
    std::memcpy(text.data() + i * 16, words, 16);
  }
  std::string name(text.data());
  while (!name.empty() && name.back() == ' ') name.pop_back();
  while (!name.empty() && name.front() == ' ') name.erase(name.begin());
  return name;
}

void cpu_features(HostInfo& info) {
  const Leaf l1 = cpuid(1);
  const Leaf l7 = cpuid(7);
  const Leaf x1 = cpuid(0x80000001);
  unsigned xcr0 = 0;
  if (bit(l1.ecx, 27)) {
    unsigned high;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
  }
  const bool ymm = (xcr0 & 6) == 6;
  const bool zmm = (xcr0 & 0xe6) == 0xe6;
  struct Feature {
    const char* name;
    bool there;
  };
  const Feature features[] = {
      {"sse4.2", bit(l1.ecx, 20)},        {"popcnt", bit(l1.ecx, 23)},
      {"cx16", bit(l1.ecx, 13)},          {"avx", bit(l1.ecx, 28) && ymm},
      {"avx2", bit(l7.ebx, 5) && ymm},    {"fma", bit(l1.ecx, 12) && ymm},
      {"bmi1", bit(l7.ebx, 3)},           {"bmi2", bit(l7.ebx, 8)},
      {"movbe", bit(l1.ecx, 22)},         {"adx", bit(l7.ebx, 19)},
      {"aes", bit(l1.ecx, 25)},           {"pclmulqdq", bit(l1.ecx, 1)},
      {"sha", bit(l7.ebx, 29)},           {"fsgsbase", bit(l7.ebx, 0)},
      {"xsave", bit(l1.ecx, 27)},         {"erms", bit(l7.ebx, 9)},
      {"avx512f", bit(l7.ebx, 16) && zmm}, {"invariant-tsc", bit(cpuid(0x80000007).edx, 8)},
  };
  for (const Feature& f : features) (f.there ? info.present : info.absent).emplace_back(f.name);
  const bool v2 = bit(l1.ecx, 0) && bit(l1.ecx, 9) && bit(l1.ecx, 13) && bit(l1.ecx, 19) && bit(l1.ecx, 20) &&
                  bit(l1.ecx, 23) && bit(x1.ecx, 0);
  const bool v3 = v2 && ymm && bit(l1.ecx, 28) && bit(l7.ebx, 5) && bit(l7.ebx, 3) && bit(l7.ebx, 8) && bit(l1.ecx, 12) &&
                  bit(l1.ecx, 22) && bit(l1.ecx, 29) && bit(x1.ecx, 5);
  const bool v4 = v3 && zmm && bit(l7.ebx, 16) && bit(l7.ebx, 17) && bit(l7.ebx, 28) && bit(l7.ebx, 30) && bit(l7.ebx, 31);
  info.x86_64_level = v4 ? 4 : v3 ? 3 : v2 ? 2 : 1;
  info.virtualised = bit(l1.ecx, 31);
  info.hardware_virtualisation = bit(l1.ecx, 5) || bit(x1.ecx, 2);
}

std::optional<u64> number_in(const std::string& path) {
  std::ifstream file(path);
  u64 value;
  if (file >> value) return value;
  return std::nullopt;
}

void memory_info(HostInfo& info) {
  std::ifstream file("/proc/meminfo");
  std::string key;
  u64 kib;
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    if (!(words >> key >> kib)) continue;
    if (key == "MemTotal:") info.memory_total = kib * 1024;
    if (key == "MemAvailable:") info.memory_available = kib * 1024;
    if (key == "SwapTotal:") info.swap_total = kib * 1024;
  }
}

std::optional<u64> cgroup_memory_limit() {
  std::ifstream file("/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind("0::", 0) == 0) return number_in("/sys/fs/cgroup" + line.substr(3) + "/memory.max");
  }
  return std::nullopt;
}

/// Asked of a child, because it cannot be undone.
bool may_make_user_namespace() {
  const pid_t child = fork();
  if (child < 0) return false;
  if (child == 0) _exit(unshare(CLONE_NEWUSER) == 0 ? 0 : 1);
  int status;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return false;
  }
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

bool has_seccomp_filters() {
  const unsigned action = SECCOMP_RET_KILL_PROCESS;
  return syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action) == 0;
}

int landlock_abi() {
  constexpr unsigned kVersionFlag = 1;  // LANDLOCK_CREATE_RULESET_VERSION
  const long abi = syscall(SYS_landlock_create_ruleset, nullptr, 0, kVersionFlag);
  return abi > 0 ? static_cast<int>(abi) : 0;
}

}  // namespace

u64 host_memory_ceiling() {
  HostInfo info;
  memory_info(info);
  return info.memory_total == 0 ? 0 : info.memory_total + info.swap_total;
}

HostInfo host_info() {
  HostInfo info;
  utsname name{};
  if (uname(&name) == 0) info.kernel = name.release;
  info.cpu_model = brand_string();
  cpu_features(info);
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) info.cpus = static_cast<u32>(CPU_COUNT(&cpus));
  memory_info(info);
  info.memory_limit = cgroup_memory_limit();
  info.max_map_count = number_in("/proc/sys/vm/max_map_count").value_or(0);
  info.overcommit = static_cast<int>(number_in("/proc/sys/vm/overcommit_memory").value_or(0));
  info.kvm_present = access("/dev/kvm", F_OK) == 0;
  info.seccomp_filters = has_seccomp_filters();
  info.user_namespaces = may_make_user_namespace();
  info.landlock_abi = landlock_abi();
  return info;
}

}  // namespace ring3::control
