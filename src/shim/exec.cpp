#include "shim/exec.hpp"

#include <stdlib.h>
#include <string.h>

#include "shim/files.hpp"
#include "shim/real.hpp"

namespace ring3::shim {
namespace {

constexpr const char* kNames[] = {"LD_PRELOAD=", "RING3_ENGINE_OPTIONS="};
constexpr size_t kCount = sizeof kNames / sizeof kNames[0];
char* g_carried[kCount];  // "NAME=value", or null where there was none

bool is_named(const char* entry, const char* name) { return strncmp(entry, name, strlen(name)) == 0; }

__attribute__((constructor)) void start() {
  real::resolve_early();
  remember_environment();
  watch_forks();
}

}  // namespace

void remember_environment() {
  for (size_t i = 0; i < kCount; i++) {
    for (char** e = environ; e != nullptr && *e != nullptr; e++) {
      if (is_named(*e, kNames[i])) g_carried[i] = ::strdup(*e);
    }
  }
  // Preloaded by other means, such as /etc/ld.so.preload: that goes along by itself.
  if (g_carried[0] != nullptr && strstr(g_carried[0], "libring3-shim.so") == nullptr) {
    for (char*& c : g_carried) c = nullptr;
  }
}

size_t carried_size(char* const* env) {
  size_t n = 0;
  while (env != nullptr && env[n] != nullptr) n++;
  return n + kCount + 1;
}

char* const* carried(char* const* env, char** room) {
  bool complete = true;
  bool found[kCount] = {};
  size_t n = 0;
  for (; env != nullptr && env[n] != nullptr; n++) {
    room[n] = env[n];
    for (size_t i = 0; i < kCount; i++) {
      if (!is_named(env[n], kNames[i])) continue;
      // A preload of the program's own gives way to the one that has the shim in it.
      if (i == 0 && g_carried[0] != nullptr && strstr(env[n], "libring3-shim.so") == nullptr) {
        room[n] = g_carried[0];
        complete = false;
      }
      found[i] = true;
    }
  }
  for (size_t i = 0; i < kCount; i++) {
    if (found[i] || g_carried[i] == nullptr) continue;
    room[n++] = g_carried[i];
    complete = false;
  }
  room[n] = nullptr;
  return complete ? env : room;
}

}  // namespace ring3::shim
