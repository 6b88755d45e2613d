#include "control/vms/registry.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <nlohmann/json.hpp>

namespace ring3::vms {
namespace {

constexpr const char* kFiles[] = {"info.json", "info.json.new", "console.log", "console.log.1", "console.sock", "ring3.log", "lock"};
constexpr std::size_t kMostInfo = 64 * 1024;

bool good_name(const std::string& name) {
  if (name.empty() || name.size() > 64 || name[0] == '-' || name[0] == '.') return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || c == '_' || c == '.';
  });
}

/// Makes a directory of our own, or checks that one is.
Status own_directory(const std::string& path) {
  if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) return Error::from_errno("cannot make " + path);
  struct stat info {};
  if (lstat(path.c_str(), &info) != 0) return Error::from_errno(path);
  if (!S_ISDIR(info.st_mode) || info.st_uid != geteuid() || (info.st_mode & 077) != 0) {
    return Error::of(EPERM, path + " is not a directory that only this user may enter; remove it, or set XDG_RUNTIME_DIR");
  }
  return Ok{};
}

bool is_own_directory(const char* path) {
  struct stat info {};
  return stat(path, &info) == 0 && S_ISDIR(info.st_mode) && info.st_uid == geteuid() && access(path, W_OK) == 0;
}

/// The process that holds the lock; 0: none. `other` when one holds it that this pid namespace has no number for.
constexpr pid_t kOther = -1;
pid_t holder_of(int lock_fd) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  if (fcntl(lock_fd, F_GETLK, &lock) != 0 || lock.l_type == F_UNLCK) return 0;
  return lock.l_pid > 0 ? lock.l_pid : kOther;
}

bool take_lock(int fd) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  return fcntl(fd, F_SETLK, &lock) == 0;
}

UniqueFd open_entry(const std::string& root, const std::string& name) {
  if (!good_name(name)) {
    errno = ENOENT;
    return UniqueFd();
  }
  return UniqueFd(open((root + "/" + name).c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
}

UniqueFd open_lock(int directory, int flags) {
  // Not waiting for who opens the other end, should it be a pipe.
  return UniqueFd(openat(directory, "lock", flags | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0600));
}

/// Whether the file that is open is still the one that the name leads to.
bool still_there(int directory, int fd) {
  struct stat by_fd {}, by_name {};
  return fstat(fd, &by_fd) == 0 && fstatat(directory, "lock", &by_name, AT_SYMLINK_NOFOLLOW) == 0 &&
         by_fd.st_ino == by_name.st_ino && by_fd.st_dev == by_name.st_dev;
}

std::string read_file(int directory, const char* name) {
  const UniqueFd fd(openat(directory, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
  std::string text;
  char buffer[4096];
  while (fd && text.size() < kMostInfo) {
    const ssize_t got = ::read(fd.get(), buffer, sizeof buffer);
    if (got <= 0) break;
    text.append(buffer, static_cast<std::size_t>(got));
  }
  return text;
}

VmInfo read_entry(int directory, const std::string& name) {
  VmInfo info;
  info.name = name;
  const auto json = nlohmann::json::parse(read_file(directory, "info.json"), nullptr, false);
  if (json.is_object()) {
    const auto number = [&](const char* key) -> u64 {
      const auto it = json.find(key);
      return it != json.end() && it->is_number_unsigned() ? it->get<u64>() : 0;
    };
    const auto text = [&](const char* key) {
      const auto it = json.find(key);
      return it != json.end() && it->is_string() ? it->get<std::string>().substr(0, 1024) : std::string();
    };
    info.started = number("started");
    info.memory_bytes = number("memory_bytes");
    info.cpus = static_cast<u32>(number("cpus"));
    info.engine = text("engine");
    info.console = text("console");
    info.why = text("why");
    const auto status = json.find("status");
    if (status != json.end() && status->is_number_integer()) info.status = static_cast<int>(status->get<i64>() & 0xff);
  }
  if (const UniqueFd lock = open_lock(directory, O_RDONLY)) info.pid = holder_of(lock.get());
  return info;
}

Result<bool> send(const std::string& root, const std::string& name, int signal, int value) {
  const UniqueFd directory = open_entry(root, name);
  const UniqueFd lock = directory ? open_lock(directory.get(), O_RDONLY) : UniqueFd();
  for (int attempt = 0; attempt < 10; attempt++) {
    const pid_t pid = lock ? holder_of(lock.get()) : 0;
    if (pid == 0) return false;
    if (pid == kOther) return Error::of(ESRCH, name + " runs in another container: stop it from there");
    const UniqueFd process(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
    if (!process) {
      if (errno == ESRCH) continue;
      return Error::from_errno("pidfd_open");
    }
    if (holder_of(lock.get()) != pid) continue;
    siginfo_t info{};
    info.si_signo = signal;
    info.si_code = SI_QUEUE;
    info.si_pid = getpid();
    info.si_uid = getuid();
    info.si_value.sival_int = value;
    if (syscall(SYS_pidfd_send_signal, process.get(), signal, &info, 0) == 0) return true;
    if (errno != ESRCH) return Error::from_errno("cannot signal " + name);
  }
  return false;
}

}  // namespace

Result<std::string> state_root() {
  std::string base;
  if (const char* runtime = std::getenv("XDG_RUNTIME_DIR"); runtime != nullptr && runtime[0] == '/') {
    base = runtime;
    if (!is_own_directory(runtime)) {
      return Error::of(EPERM, "XDG_RUNTIME_DIR (" + base + ") is not a directory of this user; set it to one, or unset it");
    }
    base += "/ring3";
  } else if (const std::string run = "/run/user/" + std::to_string(geteuid()); is_own_directory(run.c_str())) {
    base = run + "/ring3";
  } else {
    base = "/tmp/ring3-" + std::to_string(geteuid());
  }
  if (auto status = own_directory(base); !status) return status.error();
  return base;
}

Result<Claim> Claim::take(const std::string& root, const std::string& name) {
  if (!good_name(name)) return Error::of(EINVAL, "'" + name + "' is no name for a VM");
  Claim claim;
  claim.name_ = name;
  claim.directory_ = root + "/" + name;
  for (int attempt = 0; attempt < 100; attempt++) {
    if (auto status = own_directory(claim.directory_); !status) return status.error();
    claim.directory_fd_ = open_entry(root, name);
    if (!claim.directory_fd_) continue;  // removed just now
    claim.lock_ = open_lock(claim.directory_fd_.get(), O_RDWR | O_CREAT);
    if (!claim.lock_) continue;
    if (!take_lock(claim.lock_.get())) {
      if (errno != EAGAIN && errno != EACCES) return Error::from_errno("cannot lock " + claim.directory_);
      return Error::of(EEXIST, "a VM named " + name + " runs already: ring3 stop " + name + ", or choose another --name");
    }
    if (!still_there(claim.directory_fd_.get(), claim.lock_.get())) continue;
    for (const char* file : kFiles) {
      if (std::string(file) != "lock") unlinkat(claim.directory_fd_.get(), file, 0);
    }
    return claim;
  }
  return Error::of(EAGAIN, "cannot take " + claim.directory_ + ": it is made and removed all the time");
}

Result<Claim> Claim::take_any(const std::string& root) {
  for (int n = 1; n < 10000; n++) {
    const std::string name = "vm-" + std::to_string(n);
    if (const UniqueFd there = open_entry(root, name)) continue;  // an ended VM's log is not overwritten unasked
    auto claim = take(root, name);
    if (claim || claim.error().code != EEXIST) return claim;
  }
  return Error::of(ENOSPC, "there are too many VMs in " + root + ": see ring3 ps --all, ring3 rm");
}

Status Claim::publish(VmInfo info) {
  info_ = std::move(info);
  info_.name = name_;
  nlohmann::json json{{"name", info_.name},     {"started", info_.started}, {"memory_bytes", info_.memory_bytes},
                      {"cpus", info_.cpus},     {"engine", info_.engine},   {"console", info_.console}};
  if (info_.status) {
    json["status"] = *info_.status;
    json["why"] = info_.why;
  }
  const std::string text = json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  const UniqueFd fd(openat(directory_fd_.get(), "info.json.new", O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!fd || ::write(fd.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()) ||
      renameat(directory_fd_.get(), "info.json.new", directory_fd_.get(), "info.json") != 0) {
    return Error::from_errno("cannot write " + directory_ + "/info.json");
  }
  return Ok{};
}

Status Claim::finish(int status, const std::string& why) {
  VmInfo info = info_;
  info.status = status;
  info.why = why;
  unlinkat(directory_fd_.get(), "console.sock", 0);
  return publish(std::move(info));
}

Result<std::vector<VmInfo>> list(const std::string& root) {
  DIR* directory = opendir(root.c_str());
  if (directory == nullptr) return Error::from_errno(root);
  std::vector<VmInfo> all;
  while (const dirent* entry = readdir(directory)) {
    if (const UniqueFd fd = open_entry(root, entry->d_name)) all.push_back(read_entry(fd.get(), entry->d_name));
  }
  closedir(directory);
  std::sort(all.begin(), all.end(), [](const VmInfo& a, const VmInfo& b) { return a.name < b.name; });
  return all;
}

Result<VmInfo> find(const std::string& root, const std::string& name) {
  if (const UniqueFd fd = open_entry(root, name)) return read_entry(fd.get(), name);
  std::string others;
  if (auto all = list(root); all) {
    for (const VmInfo& vm : *all) {
      if (others.size() < 200) others += (others.empty() ? "" : ", ") + vm.name;
    }
  }
  return Error::of(ENOENT, "there is no VM named " + name +
                               (others.empty() ? "; none was started with --detach" : "; there are: " + others));
}

Status remove(const std::string& root, const std::string& name) {
  const UniqueFd directory = open_entry(root, name);
  if (!directory) return Error::from_errno("there is no VM named " + name);
  const UniqueFd lock = open_lock(directory.get(), O_RDWR | O_CREAT);
  if (!lock) return Error::from_errno(root + "/" + name + "/lock");
  if (!take_lock(lock.get())) return Error::of(EBUSY, name + " is running: ring3 stop " + name + " first");
  for (const char* file : kFiles) unlinkat(directory.get(), file, 0);
  if (unlinkat(AT_FDCWD, (root + "/" + name).c_str(), AT_REMOVEDIR) != 0 && errno != ENOENT) {
    return Error::from_errno("cannot remove " + root + "/" + name);
  }
  return Ok{};
}

void prune(const std::string& root, std::size_t most) {
  auto all = list(root);
  if (!all) return;
  std::vector<VmInfo> ended;
  for (VmInfo& vm : *all) {
    if (!vm.running()) ended.push_back(std::move(vm));
  }
  std::sort(ended.begin(), ended.end(), [](const VmInfo& a, const VmInfo& b) { return a.started > b.started; });
  for (std::size_t i = most; i < ended.size(); i++) {
    if (auto status = remove(root, ended[i].name); !status) continue;  // taken again meanwhile
  }
}

Result<bool> signal_stop(const std::string& root, const std::string& name, int grace_seconds) {
  return send(root, name, SIGTERM, grace_seconds);
}

Result<bool> signal_kill(const std::string& root, const std::string& name) { return send(root, name, SIGKILL, 0); }

std::string socket_path(int directory_fd) { return "/proc/self/fd/" + std::to_string(directory_fd) + "/console.sock"; }

}  // namespace ring3::vms
