#include "control/rootfs/session.hpp"

#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "base/event_fd.hpp"
#include "control/rootfs/initramfs.hpp"
#include "vmm/machine/threads.hpp"

namespace ring3::rootfs {
namespace {

namespace files = std::filesystem;
constexpr i64 kGiveBack = 4 << 20;

Status put(const std::string& path, const std::string& content) {
  const UniqueFd fd(open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!fd) return Error::from_errno(path);
  for (std::size_t at = 0; at < content.size();) {
    const ssize_t wrote = ::write(fd.get(), content.data() + at, content.size() - at);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) return Error::from_errno(path);
    at += static_cast<std::size_t>(wrote);
  }
  return Ok{};
}

std::string get(const std::string& path, std::size_t most) {
  const UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  std::string text(most, '\0');
  const ssize_t got = fd ? ::read(fd.get(), text.data(), most) : -1;
  text.resize(got > 0 ? static_cast<std::size_t>(got) : 0);
  return text;
}

/// The working directory, as the guest has it: below the root, or the root itself.
std::string working_directory(const std::string& root) {
  std::error_code code;
  const std::string here = files::current_path(code).string();
  if (code) return "/";
  const std::string top = files::canonical(root, code).string();
  if (code || top == "/") return code ? "/" : here;
  if (here == top) return "/";
  return here.rfind(top + "/", 0) == 0 ? here.substr(top.size()) : "/";
}

std::string environment() {
  std::string text;
  const auto add = [&](const std::string& pair) { text += pair + '\0'; };
  add("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
  add("HOME=/root");
  for (const char* name : {"TERM", "LANG", "LC_ALL", "TZ"}) {
    if (const char* value = getenv(name); value != nullptr) add(std::string(name) + "=" + value);
  }
  return text;
}

}  // namespace

Result<std::unique_ptr<Session>> Session::create(const Request& request) {
  std::unique_ptr<Session> session(new Session);
  const char* temporary = getenv("TMPDIR");
  std::string name = std::string(temporary != nullptr && temporary[0] == '/' ? temporary : "/tmp") + "/ring3-run-XXXXXX";
  if (mkdtemp(name.data()) == nullptr) return Error::from_errno("cannot make a directory for the command in " + name.substr(0, name.size() - 17));
  session->base_ = name;
  session->control_ = name + "/control";
  session->initramfs_ = name + "/initramfs";
  session->terminal_ = request.terminal;
  if (mkdir(session->control_.c_str(), 0700) != 0) return Error::from_errno(session->control_);

  auto initramfs = make_initramfs(request.kernel, request.modules);
  if (!initramfs) return initramfs.error();
  std::string args;
  for (const std::string& word : request.command) args += word + '\0';
  std::string mode = "files";
  if (request.terminal) {
    winsize size{};
    ioctl(STDOUT_FILENO, TIOCGWINSZ, &size);
    mode = "tty " + std::to_string(size.ws_row) + " " + std::to_string(size.ws_col);
  }
  mode += request.read_only ? " ro" : " rw";
  for (const auto& [file, content] :
       {std::pair{session->initramfs_, std::string(initramfs->begin(), initramfs->end())},
        {session->control_ + "/args", args},
        {session->control_ + "/env", environment()},
        {session->control_ + "/cwd", working_directory(request.directory)},
        {session->control_ + "/mode", mode},
        {session->control_ + "/stdin", std::string()},
        {session->control_ + "/stdout", std::string()},
        {session->control_ + "/stderr", std::string()}}) {
    if (auto status = put(file, content); !status) return status.error();
  }
  // As its DHCP would say (docs/network.md).
  if (request.user_network) {
    if (auto status = put(session->control_ + "/net", "10.0.2.15 24 10.0.2.2 10.0.2.3\n"); !status) return status.error();
  }
  const char* outputs[2] = {"/stdout", "/stderr"};
  for (int i = 0; i < 2; i++) {
    session->streams_[i].file.reset(open((session->control_ + outputs[i]).c_str(), O_RDWR | O_CLOEXEC));
    session->streams_[i].to = i + 1;
    if (!session->streams_[i].file) return Error::from_errno(session->control_ + outputs[i]);
  }
  session->end_fd_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  int ends[2];
  if (!session->end_fd_ || pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return Error::from_errno("cannot talk to the command");
  for (int i = 0; i < 2; i++) session->signals_[i].reset(ends[i]);
  return session;
}

Session::~Session() {
  finish();
  std::error_code ignored;
  if (!base_.empty()) files::remove_all(base_, ignored);
}

void Session::start(std::function<void(const std::string&)> on_lost) {
  on_lost_ = std::move(on_lost);
  if (terminal_) return;
  output_ = vmm::start_thread("command-out", [this] { pass_output(); });
  // It may sit in a read() of standard input for ever, so it owns all that it uses.
  UniqueFd input(open((control_ + "/stdin").c_str(), O_WRONLY | O_APPEND | O_CLOEXEC));
  vmm::start_thread("command-in", [fd = std::make_shared<UniqueFd>(std::move(input)), end = control_ + "/stdin.end"] {
    std::array<char, 65536> buffer;
    for (;;) {
      const ssize_t got = ::read(STDIN_FILENO, buffer.data(), buffer.size());
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) break;
      for (ssize_t done = 0; done < got;) {
        const ssize_t wrote = ::write(fd->get(), buffer.data() + done, static_cast<std::size_t>(got - done));
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote <= 0) return;
        done += wrote;
      }
    }
    const UniqueFd mark(open(end.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
  }).detach();
}

/// Passes on what a file has grown by. False: nothing there.
bool Session::pass(Stream& stream) {
  std::array<char, 65536> buffer;
  const ssize_t got = ::pread(stream.file.get(), buffer.data(), buffer.size(), stream.done);
  if (got <= 0) return false;
  stream.done += got;
  for (ssize_t at = 0; at < got && stream.to >= 0;) {
    const ssize_t wrote = ::write(stream.to, buffer.data() + at, static_cast<std::size_t>(got - at));
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0 && errno == EAGAIN) {
      pollfd p{stream.to, POLLOUT, 0};
      ::poll(&p, 1, 100);
      continue;
    }
    if (wrote <= 0) {
      const std::string why = errno == EPIPE ? std::string() : std::string("cannot write the command's output: ") + std::strerror(errno);
      stream.to = -1;
      if (on_lost_) on_lost_(why);
      break;
    }
    at += wrote;
  }
  if (stream.done - stream.given_back >= kGiveBack) {
    const i64 end = stream.done & ~i64{4095};
    if (fallocate(stream.file.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, stream.given_back, end - stream.given_back) == 0) {
      stream.given_back = end;
    }
  }
  return true;
}

void Session::pass_output() {
  const UniqueFd watch(inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
  for (const char* name : {"/stdout", "/stderr"}) {
    if (watch) inotify_add_watch(watch.get(), (control_ + name).c_str(), IN_MODIFY);
  }
  for (;;) {
    pollfd fds[2] = {{watch.get(), POLLIN, 0}, {end_fd_.get(), POLLIN, 0}};
    // Not every file system tells; a look now and then costs little.
    ::poll(fds, 2, 100);
    std::array<char, 4096> events;
    while (watch && ::read(watch.get(), events.data(), events.size()) > 0) {
    }
    for (bool more = true; more;) {
      more = false;
      for (Stream& stream : streams_) more |= pass(stream);
    }
    if (fds[1].revents != 0) return;
  }
}

std::optional<int> Session::finish() {
  if (output_.joinable()) {
    signal_event(end_fd_.get());
    output_.join();
  }
  const std::string text = get(control_ + "/status", 8);
  if (text.empty() || text.size() > 3 || !std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; })) return std::nullopt;
  return std::min(std::stoi(text), 255);
}

bool Session::send(int signal) {
  const u8 number = static_cast<u8>(signal);
  return access((control_ + "/started").c_str(), F_OK) == 0 && ::write(signals_[1].get(), &number, 1) == 1;
}

std::string Session::complaint() const {
  std::string text = get(control_ + "/error", 400);
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 32 || c == 127) c = ' ';
  }
  return text;
}

vmm::ConsoleInput Tail::read(std::span<u8> into) {
  vmm::ConsoleInput input;
  const ssize_t got = ::read(input_fd_, into.data(), into.size());
  if (got > 0) input.bytes = static_cast<std::size_t>(got);
  return input;
}

bool Tail::write(std::span<const u8> bytes) {
  const std::lock_guard lock(mutex_);
  text_.append(bytes.begin(), bytes.end());
  if (text_.size() > kKept) text_.erase(0, text_.size() - kKept);
  return true;
}

std::string Tail::text() const {
  const std::lock_guard lock(mutex_);
  return text_;
}

}  // namespace ring3::rootfs
