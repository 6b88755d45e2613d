#include <elf.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdlib>
#include <cstring>

#include "base/unique_fd.hpp"
#include "control/cli/commands.hpp"
#include "control/cli/text.hpp"
#include "engine/abi/provider.hpp"

namespace ring3::control {

namespace {

/// The preload library: beside this program in the build tree and where it is installed alike.
std::string find_shim() {
  char self[PATH_MAX];
  const ssize_t n = ::readlink("/proc/self/exe", self, sizeof self - 1);
  if (n <= 0) return "";
  std::string path(self, static_cast<std::size_t>(n));
  for (int up = 0; up < 2; up++) path.resize(path.find_last_of('/') == std::string::npos ? 0 : path.find_last_of('/'));
  path += std::string("/") + RING3_LIBDIR + "/ring3/libring3-shim.so";
  return ::access(path.c_str(), R_OK) == 0 ? path : "";
}

/// As execvp(3) finds it; empty when there is none.
std::string find_program(const std::string& name) {
  const auto runnable = [](const std::string& path) {
    struct stat st;
    return ::stat(path.c_str(), &st) == 0 && S_ISREG(st.st_mode) && ::access(path.c_str(), X_OK) == 0;
  };
  if (name.find('/') != std::string::npos) return runnable(name) ? name : "";
  const char* variable = std::getenv("PATH");
  std::string rest = variable != nullptr ? variable : "/usr/local/bin:/usr/bin:/bin";
  for (;;) {
    const auto colon = rest.find(':');
    const std::string directory = rest.substr(0, colon);
    const std::string path = (directory.empty() ? "." : directory) + "/" + name;
    if (runnable(path)) return path;
    if (colon == std::string::npos) return "";
    rest = rest.substr(colon + 1);
  }
}

/// Why nothing can be preloaded into this program; empty when it can (or it is no ELF file: a script's interpreter is
/// the system's business).
std::string preload_problem(const std::string& path) {
  struct stat st;
  if (::stat(path.c_str(), &st) == 0 && (st.st_mode & (S_ISUID | S_ISGID)) != 0 && ::geteuid() != 0) {
    return "it is set-user-ID or set-group-ID, which ignores preloaded libraries";
  }
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  Elf64_Ehdr header;
  if (!fd || ::pread(fd.get(), &header, sizeof header, 0) != static_cast<ssize_t>(sizeof header) ||
      std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) {
    return "";
  }
  if (header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_machine != EM_X86_64) return "it is no 64-bit x86 program";
  for (unsigned i = 0; i < header.e_phnum && i < 512; i++) {
    Elf64_Phdr program;
    const off_t at = static_cast<off_t>(header.e_phoff) + static_cast<off_t>(i) * header.e_phentsize;
    if (::pread(fd.get(), &program, sizeof program, at) != static_cast<ssize_t>(sizeof program)) break;
    if (program.p_type == PT_INTERP) return "";
  }
  return "it is linked statically, and a library can only be preloaded into a dynamically linked program";
}

}  // namespace

int with(const WithOptions& options) {
  // Checked here, where the message is the user's to read, and not amid the other program's start.
  if (auto engine = open_engine(EngineKind::kSoft, options.engine_options); !engine) return fail(engine.error().message);
  warn_without_translator(options.engine_options);
  const std::string shim = find_shim();
  if (shim.empty()) return fail("libring3-shim.so is not where it belongs, beside this program's library directory");
  if (shim.find_first_of(" :") != std::string::npos) {
    return fail("the path " + printable(shim) + " has a space or a colon in it, which LD_PRELOAD cannot express");
  }
  const std::string program = find_program(options.command[0]);
  if (program.empty()) return fail("there is no program '" + printable(options.command[0]) + "' to run");
  if (const std::string problem = preload_problem(program); !problem.empty()) {
    return fail("'" + printable(program) + "' cannot be run on ring3's KVM: " + problem);
  }

  const char* before = std::getenv("LD_PRELOAD");
  const std::string preload = before != nullptr && *before != 0 ? shim + ":" + before : shim;
  std::string words;
  for (const auto& [key, value] : options.engine_options) words += (words.empty() ? "" : ",") + key + "=" + value;
  ::setenv("LD_PRELOAD", preload.c_str(), 1);
  if (words.empty()) {
    ::unsetenv("RING3_ENGINE_OPTIONS");
  } else {
    ::setenv("RING3_ENGINE_OPTIONS", words.c_str(), 1);
  }
  std::vector<char*> argv;
  for (const std::string& word : options.command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  std::signal(SIGPIPE, SIG_DFL);  // the program's business again
  ::execv(program.c_str(), argv.data());
  return fail("cannot run " + printable(program) + ": " + std::strerror(errno));
}

}  // namespace ring3::control
