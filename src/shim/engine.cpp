#include "shim/engine.hpp"

#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>

#include "shim/signals.hpp"

namespace ring3::shim {
namespace {

Engine g_engine;
bool g_loaded = false;  // atomic
pthread_mutex_t g_mutex = PTHREAD_MUTEX_INITIALIZER;

int find_extent(struct dl_phdr_info* info, size_t, void*) {
  const uintptr_t inside = reinterpret_cast<uintptr_t>(g_engine.open);
  for (unsigned i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr)& p = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + p.p_vaddr;
    if (p.p_type != PT_LOAD || inside < begin || inside >= begin + p.p_memsz) continue;
    g_engine.end = begin + p.p_memsz;
    g_engine.begin = begin;
    return 1;
  }
  return 0;
}

template <class F>
bool look_up(void* library, const char* name, F* function) {
  *function = reinterpret_cast<F>(::dlsym(library, name));
  return *function != nullptr;
}

bool load() {
  void* library = ::dlopen("libring3.so." RING3_SOVERSION, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  Engine& e = g_engine;
  if (library == nullptr || !look_up(library, "ring3_error", &e.error) || !look_up(library, "ring3_open", &e.open) ||
      !look_up(library, "ring3_create", &e.create) || !look_up(library, "ring3_ioctl", &e.ioctl) ||
      !look_up(library, "ring3_mapping", &e.mapping) || !look_up(library, "ring3_signal", &e.signal) ||
      !look_up(library, "ring3_window_memory", &e.window_memory) || !look_up(library, "ring3_close", &e.close)) {
    ::fprintf(stderr, "ring3-shim: the engine cannot be loaded: %s\n", ::dlerror());
    return false;
  }
  ::dl_iterate_phdr(find_extent, nullptr);
  take_over_signals();
  return true;
}

}  // namespace

int load_engine() {
  if (__atomic_load_n(&g_loaded, __ATOMIC_ACQUIRE)) return 0;
  pthread_mutex_lock(&g_mutex);
  const bool ok = g_loaded || load();
  if (ok) __atomic_store_n(&g_loaded, true, __ATOMIC_RELEASE);
  pthread_mutex_unlock(&g_mutex);
  return ok ? 0 : -ELIBACC;
}

const Engine& engine() { return g_engine; }

bool called_by_engine(const void* return_address) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(return_address);
  return at >= g_engine.begin && at < g_engine.end;
}

}  // namespace ring3::shim
