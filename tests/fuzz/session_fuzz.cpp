/// libFuzzer target of what `ring3 ps`, `stop`, `console`, `logs` and `rm` have to do with: the files of VMs under XDG_RUNTIME_DIR,
/// and the socket at which consoles attach. The first byte chooses which; the rest is what is found in the files, or what clients send
/// while a guest writes and reads.
///
/// What must hold beside "no finding": nothing outside of the directory is changed, nobody is signalled, nothing waits; what is shown has
/// no control characters and the JSON is valid; each client's keys reach the guest once and in order, each client sees the output from
/// the line that was being written on, and the log has all of it.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "control/cli/keys.hpp"
#include "control/cli/text.hpp"
#include "control/cli/vm_text.hpp"
#include "control/vms/boot_stage.hpp"
#include "control/vms/registry.hpp"
#include "control/vms/shared_console.hpp"

namespace {

namespace files = std::filesystem;
using namespace ring3;
using vms::SharedConsole;

void check(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "session_fuzz: %s\n", what);
  std::abort();
}

struct Input {
  const u8* data;
  std::size_t size;
  u8 byte() {
    if (size == 0) return 0;
    size--;
    return *data++;
  }
  std::string text(std::size_t n) {
    n = std::min(n, size);
    std::string s(reinterpret_cast<const char*>(data), n);
    data += n, size -= n;
    return s;
  }
};

const std::string& base() {
  static const std::string& path =
      *new const std::string(std::string(access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp") + "/ring3-session-fuzz-" + std::to_string(getpid()));
  return path;
}

/// Valid UTF-8 without anything that a terminal obeys: a decoder of its own.
bool shows(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto c = static_cast<unsigned char>(text[i]);
    if (c < 0x20 || c == 0x7f) return false;
    const std::size_t n = c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
    if ((c >= 0x80 && c < 0xc2) || c > 0xf4 || i + n > text.size()) return false;
    for (std::size_t k = 1; k < n; k++) {
      if ((static_cast<unsigned char>(text[i + k]) & 0xc0) != 0x80) return false;
    }
    const auto second = n > 1 ? static_cast<unsigned char>(text[i + 1]) : u8{0};
    if (c == 0xc2 && second < 0xa0) return false;                                         // C1
    if ((c == 0xe0 && second < 0xa0) || (c == 0xf0 && second < 0x90)) return false;        // longer than need be
    if ((c == 0xed && second >= 0xa0) || (c == 0xf4 && second >= 0x90)) return false;      // surrogates; behind U+10FFFF
    i += n;
  }
  return true;
}

// ---------------------------------------------------------------------------------------------------- registry

// What the target makes, it makes without following what it made before.
void put(int directory, const char* name, const std::string& text) {
  const UniqueFd fd(openat(directory, name, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600));
  if (fd) (void)!::write(fd.get(), text.data(), text.size());
}
UniqueFd make_entry(const std::string& path, mode_t mode) {
  (void)!mkdir(path.c_str(), mode);
  return UniqueFd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
}

void look(const std::string& root) {
  auto all = vms::list(root);
  check(bool(all), "the VMs cannot be listed");
  const std::string table = control::vm_table(*all, 1u << 31);
  check(static_cast<std::size_t>(std::count(table.begin(), table.end(), '\n')) == all->size() + 1, "a VM takes other than a line");
  std::string one_line = table;
  std::replace(one_line.begin(), one_line.end(), '\n', ' ');
  check(shows(one_line), "control characters in the table");
  const auto json = nlohmann::json::parse(control::vm_json(*all), nullptr, false);
  check(json.is_array() && json.size() == all->size(), "what is for programs is no JSON");
  for (const vms::VmInfo& vm : *all) {
    check(!vm.running(), "a VM runs that nobody started");
    check(shows(control::printable(vm.why)) && shows(control::state_of(vm)), "control characters in a message");
    check(!vm.status || (*vm.status >= 0 && *vm.status < 256), "a status that is none");
  }
}

void registry(Input in) {
  const std::string root = base() + "/root";
  std::error_code ignored;
  files::remove_all(root, ignored);
  files::create_directory(root);
  static const std::string kNames[] = {"vm-1", "a", "b.c", "-x", ".h", "..", "a/b", "vm-2"};
  static const char* const kFiles[] = {"info.json", "lock", "console.log", "info.json.new", "console.sock", "other"};
  for (int steps = 0; steps < 24 && in.size != 0; steps++) {
    const u8 op = in.byte();
    const std::string& name = kNames[op >> 4 & 7];
    const bool entry = name.find('/') == std::string::npos && name != "..";  // what may be made by us
    const std::string path = root + "/" + name;
    switch (op & 15) {
      case 0: case 1: case 2: {
        if (!entry) break;
        const UniqueFd directory = make_entry(path, (op & 0x80) != 0 ? 0700 : 0755);
        const std::size_t size = in.byte();
        put(directory.get(), "info.json", in.text((op & 15) == 0 ? size * 8 : size));
        break;
      }
      case 3: {
        if (!entry) break;
        const u8 kind = in.byte();
        const char* file = kFiles[kind % 6];
        const UniqueFd directory = make_entry(path, 0700);
        if ((kind >> 4 & 3) == 0) (void)!symlinkat("../../outside/secret", directory.get(), file);
        else if ((kind >> 4 & 3) == 1) (void)!mkfifoat(directory.get(), file, 0600);
        else if ((kind >> 4 & 3) == 2) (void)!mkdirat(directory.get(), file, 0700);
        else put(directory.get(), file, "x");
        break;
      }
      case 4:
        if (entry) (void)!symlink((op & 0x80) != 0 ? "../outside" : "vm-1", path.c_str());
        break;
      case 5:
        if (entry) put(AT_FDCWD, path.c_str(), "no directory");
        break;
      case 6: look(root); break;
      case 7: {
        auto vm = vms::find(root, name);
        check(vm || vm.error().message.find('\n') == std::string::npos, "an error of several lines");
        break;
      }
      case 8: (void)vms::remove(root, name); break;
      case 9: vms::prune(root, in.byte() % 4); break;
      case 10: {
        auto sent = vms::signal_stop(root, name, 0);
        check(sent && !*sent, "a VM that does not run was told to stop");
        break;
      }
      case 11: case 12: {
        auto claim = (op & 15) == 11 ? vms::Claim::take(root, name) : vms::Claim::take_any(root);
        if (!claim) break;
        vms::VmInfo info;
        info.started = in.byte();
        info.cpus = in.byte();
        info.engine = in.text(in.byte() % 32);
        info.console = in.text(in.byte() % 32);
        if (!claim->publish(info)) break;
        auto back = vms::find(root, claim->name());
        check(back && back->started == info.started && back->cpus == info.cpus, "what was published is not found");
        if (shows(info.engine)) check(back->engine == info.engine, "another engine is found");
        const std::string why = in.text(in.byte() % 32);
        if (claim->finish(op, why)) {
          back = vms::find(root, claim->name());
          check(back && back->status == op, "another status is found");
        }
        break;
      }
      default: {
        const std::string text = in.text(in.byte());
        const std::string shown = control::printable(text);
        check(shows(shown) && shown.size() <= 130, "text that is not printable");
        if (shows(text) && text.size() < 120) check(shown == text, "printable text was changed");
      }
    }
  }
  look(root);
  check(files::file_size(base() + "/outside/secret") == 6 && std::distance(files::directory_iterator(base() + "/outside"), {}) == 1,
        "something outside of the directory was changed");
}

// ----------------------------------------------------------------------------------------------------- console

struct Client {
  UniqueFd fd;
  std::size_t from = 0;   // of the output
  std::size_t seen = 0;
  u8 typed = 0;           // keys in frames so far, modulo 16
  bool tame = true;       // only frames so far
  bool dropped = false;   // may have been
};

class Attached {
 public:
  Attached() : directory_(open((base() + "/console").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    for (const char* file : {"console.log", "console.log.1", "console.sock"}) unlinkat(directory_.get(), file, 0);
    auto made = SharedConsole::create(directory_.get(), [](u16, u16) {}, SharedConsole::Serving::kByCaller);
    check(bool(made), "no console");
    console_ = std::move(*made);
  }
  void run(Input in) {
    for (int steps = 0; steps < 64 && in.size != 0; steps++) step(in);
    serve();
    for (Client& c : clients_) read(c);
    typed(1 << 16);
    console_.reset();
    std::ifstream log(base() + "/console/console.log", std::ios::binary);
    const std::string kept{std::istreambuf_iterator<char>(log), {}};
    check(kept == written_, "the log is not what was written");
  }

 private:
  void serve() {
    for (int rounds = 0; console_->serve_once(0) > 0; rounds++) {
      check(rounds < 4000, "the console does not come to rest");
      pollfd p{console_->input_fd(), POLLIN, 0};
      if (poll(&p, 1, 0) > 0) typed(4096);
    }
  }
  void step(Input& in) {
    const u8 op = in.byte();
    const std::size_t i = op >> 4 & 7;
    switch (op & 15) {
      case 0: return attach();
      case 1: case 2: {
        std::string text(in.byte() * ((op & 0x80) != 0 ? 300u : 1u), '\0');
        for (std::size_t k = 0; k < text.size(); k++) text[k] = static_cast<char>('a' + (written_.size() + k) % 23);
        if ((op & 0x10) != 0 && !text.empty()) text[text.size() / 2] = '\n';
        if (written_.size() + text.size() > (1u << 20)) return;  // the log stays in one piece
        written_ += text;
        console_->write({reinterpret_cast<const u8*>(text.data()), text.size()});
        return;
      }
      case 3: return typed(in.byte());
      case 4: return serve();
      case 5: (void)console_->serve_once(0); return;
      default: break;
    }
    if (i >= clients_.size() || !clients_[i].fd) return;
    Client& c = clients_[i];
    switch (op & 15) {
      case 6: case 7: case 8: {
        std::string frame(3, '\0');
        const std::size_t n = (op & 0x80) != 0 ? in.byte() * 64u : in.byte() % 16u;
        frame[1] = static_cast<char>(n), frame[2] = static_cast<char>(n >> 8);
        const bool wild = !c.tame;
        for (std::size_t k = 0; k < n; k++) frame += static_cast<char>(i << 4 | ((c.typed + k) & 15));
        send(c, frame);
        if (!wild) c.typed = static_cast<u8>((c.typed + n) & 15);
        break;
      }
      case 9: send(c, std::string("\1\4\0", 3) + in.text(4)); c.tame = false; break;
      case 10: c.tame = false; send(c, in.text(in.byte() % 32)); break;
      case 11: read(c); break;
      case 12: c.fd.reset(); break;
      case 13: shutdown(c.fd.get(), (op & 0x80) != 0 ? SHUT_RD : SHUT_WR); c.dropped = true; break;
      default: read(c); break;
    }
  }
  void attach() {
    if (clients_.size() >= 10) return;
    serve();
    UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strcpy(address.sun_path, vms::socket_path(directory_.get()).c_str());
    check(connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0, "nobody listens");
    serve();
    const std::size_t line = written_.rfind('\n') == std::string::npos ? 0 : written_.rfind('\n') + 1;
    const std::size_t from = std::max(line, written_.size() - std::min<std::size_t>(written_.size(), 512));
    clients_.push_back({std::move(fd), from});
  }
  void send(Client& c, const std::string& bytes) {
    const ssize_t n = ::send(c.fd.get(), bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n != static_cast<ssize_t>(bytes.size())) c.tame = false;
  }
  void read(Client& c) {
    static char buffer[65536];
    while (c.fd) {
      const ssize_t n = ::recv(c.fd.get(), buffer, sizeof buffer, MSG_DONTWAIT);
      if (n <= 0) return;
      const std::size_t at = c.from + c.seen;
      check(at + static_cast<std::size_t>(n) <= written_.size() && std::memcmp(written_.data() + at, buffer, static_cast<std::size_t>(n)) == 0,
            "a client sees other than what was written");
      c.seen += static_cast<std::size_t>(n);
    }
  }
  /// The guest reads.
  void typed(std::size_t most) {
    static u8 buffer[1 << 16];
    const auto got = console_->read(std::span(buffer).first(most));
    check(got.bytes <= most, "more input than there was room for");
    for (std::size_t k = 0; k < got.bytes; k++) {
      const std::size_t i = buffer[k] >> 4;
      if (std::any_of(clients_.begin(), clients_.end(), [](const Client& c) { return !c.tame; })) return;  // those may say what they like
      check(i < clients_.size() && (buffer[k] & 15) == next_[i], "keys that nobody typed, or in another order");
      next_[i] = (next_[i] + 1) & 15;
    }
  }

  UniqueFd directory_;
  std::unique_ptr<SharedConsole> console_;
  std::vector<Client> clients_;
  std::string written_;
  u8 next_[16] = {};
};

// --------------------------------------------------------------------------------------- what a guest writes, keys

void words(Input in) {
  const u8 cut = in.byte();
  const std::string text = in.text(in.size);
  const auto bytes = [](std::string& s) { return std::span(reinterpret_cast<u8*>(s.data()), s.size()); };
  // In one piece or in several: the same.
  vms::BootStage whole, parts;
  std::string copy = text;
  (void)whole.observe(bytes(copy));
  auto before = parts.stage();
  std::string kept, kept_too;
  control::EscapeKeys keys, keys_too;
  bool stopped = false;
  for (std::size_t at = 0; at < text.size();) {
    std::string part = text.substr(at, 1 + cut % 16 + at % 3);
    at += part.size();
    (void)parts.observe(bytes(part));
    check(parts.stage() >= before, "a guest that goes back");
    before = parts.stage();
    if (stopped) continue;
    const auto found = keys.filter(bytes(part));
    check(found.bytes <= part.size(), "more keys than were typed");
    kept += part.substr(0, found.bytes);
    stopped = found.stop;
  }
  check(whole.stage() == parts.stage(), "the stage depends on how the output came");
  const auto found = keys_too.filter(bytes(copy));
  kept_too = copy.substr(0, found.bytes);
  check(kept == kept_too && found.stop == stopped, "the keys depend on how they came");
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  signal(SIGPIPE, SIG_IGN);
  files::create_directories(base() + "/outside");
  files::create_directories(base() + "/console");
  std::ofstream(base() + "/outside/secret") << "secret";
  std::atexit([] {
    std::error_code ignored;
    files::remove_all(base(), ignored);
  });
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const u8* data, std::size_t size) {
  if (size < 4) return 0;
  const Input rest{data + 1, size - 1};
  switch (data[0] % 8) {
    case 0: words(rest); break;
    case 1: case 2: case 3: registry(rest); break;
    default: Attached().run(rest);
  }
  return 0;
}
