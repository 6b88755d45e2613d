// libring3: the C interface (include/ring3/ring3.h) on the engine's endpoints.
#include "ring3/ring3.h"

#include <cerrno>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "engine/abi/provider.hpp"
#include "kvm/endpoint.hpp"

struct ring3_kvm {
  std::unique_ptr<ring3::kvm::Endpoint> endpoint;
};

namespace {

thread_local char t_error[256];

int fail(int code, const std::string& message) {
  const std::size_t n = message.copy(t_error, sizeof t_error - 1);
  t_error[n] = 0;
  return -code;
}

/// "key=value,key=value" into the map; the word interpreter (translator) is short for engine=interpreter.
int parse(const char* text, ring3::engine::EngineOptions* out) {
  std::string rest = text == nullptr ? "" : text;
  while (!rest.empty()) {
    const std::size_t comma = rest.find(',');
    std::string pair = rest.substr(0, comma);
    rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
    if (pair.empty()) continue;
    if (pair == "interpreter" || pair == "translator") pair = "engine=" + pair;
    const std::size_t equals = pair.find('=');
    if (equals == std::string::npos || equals == 0) return fail(EINVAL, "engine option \"" + pair + "\" is not KEY=VALUE");
    if (!out->values.emplace(pair.substr(0, equals), pair.substr(equals + 1)).second) {
      return fail(EINVAL, "engine option " + pair.substr(0, equals) + " is given twice");
    }
  }
  return 0;
}

/// No exception passes to the caller, who may be written in C.
template <class F>
int guarded(F&& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return fail(ENOMEM, "out of memory");
  } catch (const std::exception& e) {
    return fail(EIO, e.what());
  }
}

int hand_out(ring3::Result<std::unique_ptr<ring3::kvm::Endpoint>>&& made, ring3_kvm** out) {
  if (!made) return fail(made.error().code, made.error().message);
  *out = new ring3_kvm{std::move(*made)};
  return 0;
}

}  // namespace

extern "C" {

const char* ring3_version(void) { return RING3_VERSION; }
const char* ring3_error(void) { return t_error; }

int ring3_open(const char* options, unsigned flags, ring3_kvm** system) {
  return guarded([&] {
    if (flags & ~static_cast<unsigned>(RING3_SIGNALS_ANNOUNCED | RING3_WINDOW_MEMORY_ANNOUNCED)) return fail(EINVAL, "unknown flag of ring3_open");
    ring3::engine::EngineOptions o;
    o.signals_announced = (flags & RING3_SIGNALS_ANNOUNCED) != 0;
    o.announces_window_memory = (flags & RING3_WINDOW_MEMORY_ANNOUNCED) != 0;
    if (const int error = parse(options, &o); error != 0) return error;
    return hand_out(ring3::engine::create_soft_system(o), system);
  });
}

int ring3_create(ring3_kvm* parent, unsigned long request, unsigned long arg, ring3_kvm** object) {
  return guarded([&] { return hand_out(parent->endpoint->create(request, arg), object); });
}

long ring3_ioctl(ring3_kvm* object, unsigned long request, void* arg) {
  try {
    return object->endpoint->ioctl(request, reinterpret_cast<ring3::u64>(arg));
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

void* ring3_mapping(ring3_kvm* vcpu, uint64_t offset, size_t* size) {
  const auto span = vcpu->endpoint->mappable(offset);
  if (size != nullptr) *size = span.size();
  return span.empty() ? nullptr : span.data();
}

struct kvm_run* ring3_run_page(ring3_kvm* vcpu) { return vcpu->endpoint->run_page(); }
void ring3_kick(ring3_kvm* vcpu) { vcpu->endpoint->kick(); }
void ring3_signal(ring3_kvm* vcpu) { vcpu->endpoint->signal_came(); }
void ring3_close(ring3_kvm* object) { delete object; }

int ring3_set_memory(ring3_kvm* vm, uint32_t slot, uint64_t guest_physical, void* host, uint64_t size, uint32_t flags) {
  kvm_userspace_memory_region region{};
  region.slot = slot;
  region.flags = flags;
  region.guest_phys_addr = guest_physical;
  region.memory_size = size;
  region.userspace_addr = reinterpret_cast<ring3::u64>(host);
  return static_cast<int>(ring3_ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
}

int ring3_window_memory(ring3_kvm* vm, void* begin, size_t size, int may) {
  return guarded([&] { return vm->endpoint->window_memory(reinterpret_cast<ring3::u64>(begin), size, may != 0) ? 0 : -EOPNOTSUPP; });
}

int ring3_run(ring3_kvm* vcpu) { return static_cast<int>(ring3_ioctl(vcpu, KVM_RUN, nullptr)); }

}  // extern "C"
