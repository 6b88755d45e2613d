/// libFuzzer target of the virtio devices: the first bytes choose a device and its variant, the rest is what a hostile driver
/// does with it, request by request, and what happens on the host's side meanwhile. The devices are the real ones, but
/// for their threads (stepped_loops.hpp). What must hold: device_guest.hpp, and the model of each device.
#include <signal.h>
#include <spdlog/spdlog.h>

#include "device_vsock.hpp"

using namespace ring3;
using namespace ring3::virtio;
using namespace ring3::virtio::fuzz;

namespace {

Driver* driver;
test::RecordingTransport transport;

std::unique_ptr<Subject> choose(u8 which, u8 how) {
  driver->names_pages(which % 6 == 4);
  switch (which % 6) {
    case 0: return std::make_unique<Block>(*driver, how);
    case 1: return std::make_unique<Network>(*driver, how);
    case 2: return std::make_unique<Sockets>(*driver);
    case 3: return std::make_unique<Console>(*driver);
    case 4: return std::make_unique<Balloon>(*driver);
    default: return std::make_unique<Random>(*driver);
  }
}

/// Of what the device offers, what the script wants; mostly all.
u64 features_of(Subject& subject, u8 how) {
  const u64 offered = subject.device().features();
  if (how == 0) return offered;
  u64 wanted = 0;
  for (u64 bit = 0, n = 0; bit < 64; bit++) {
    if ((offered >> bit & 1) != 0) wanted |= (how >> (n++ % 8) & 1u) == 0 ? u64{1} << bit : 0;
  }
  return wanted;
}

void turn(Subject& subject) {
  std::vector<Done> done;
  driver->turn([&](u16 queue, Request& r, u32 written) { done.push_back({queue, std::move(r), written}); });
  subject.settled(done);
  driver->settle();
}

void stop(Subject& subject) {
  if (!driver->running()) return;
  turn(subject);
  driver->stop();
  subject.stopped();
}

// A request: where it goes and how it is laid out, its message (a start that the device knows, then bytes of the script),
// and room for the answer.
void request(Subject& subject, Input& in) {
  static constexpr u32 kRoom[] = {1, 12, 44, 513, 1526, 4096, 0, 10, 20, 45, 512, 1025, 0x2000, 65, 0x10000, 0x7fffffff};
  const u8 where = in.byte(), shape = in.byte();
  const u16 queue = static_cast<u16>((where & 7) % driver->queues());
  Request r;
  if ((where & 8) == 0) {
    const u8 kind = in.byte(), a = in.byte(), b = in.byte();
    r.message = subject.message(queue, kind, a, b);
  }
  const std::size_t more = std::min<std::size_t>(in.size, shape & 31);
  r.message.insert(r.message.end(), in.data, in.data + more);
  in.skip(more);
  if ((shape & 32) != 0) r.message.resize(r.message.size() + 8u * in.byte(), shape);
  subject.sized(queue, r.message);
  for (int patches = where >> 6; patches > 0 && !r.message.empty(); patches--) {
    const u8 at = in.byte();
    r.message[at % r.message.size()] = in.byte();
  }
  const u8 layout = in.byte();
  const std::size_t pieces = r.message.empty() ? layout & 1 : 1 + (layout & 3);
  for (std::size_t i = 0, at = 0; i < pieces; i++) {
    const std::size_t n = i + 1 == pieces ? r.message.size() - at : std::min<std::size_t>(r.message.size() - at, in.byte());
    const u64 place = driver->place(i == 0 ? layout >> 2 & 7 : 0, n);
    const test::Buffer b{place, static_cast<u32>(n), false};
    if (place == Driver::kReadOnly && n != 0) std::memset(r.message.data() + at, Driver::kCanary, n);
    driver->put(b, r.message.data() + at);
    r.readable.push_back(b);
    at += n;
  }
  const u8 answer = in.byte();
  for (int i = 0; i < (answer & 7); i++) {
    const u8 size = in.byte();
    const u32 n = kRoom[size & 15];
    r.writable.push_back({driver->place(size >> 4 < 8 ? 0 : size >> 4, n), n, true});
  }
  if (!driver->add(queue, std::move(r), (answer & 8) != 0, (answer & 0xf0) == 0xf0)) return;
  subject.added(queue, driver->last(queue));
  if ((where & 16) == 0) driver->kick(queue);
  if ((where & 32) == 0) turn(subject);
}

void step(Subject& subject, Input& in, u64& features, u8& rings) {
  const u8 op = in.byte();
  if (!driver->running() && (op & 15) <= 9) {
    subject.started(features);
    driver->start(subject.device(), features, rings);
  }
  switch (op & 15) {
    case 7:
      driver->kick(static_cast<u16>((op >> 4) % driver->queues()));
      turn(subject);
      break;
    case 8: turn(subject); break;
    case 9: driver->want_interrupts(static_cast<u16>((op >> 4) % driver->queues()), (op & 0x80) != 0, in.byte() % 4); break;
    case 10: case 11: case 12:
      subject.host(in);
      if ((op & 16) == 0) turn(subject);
      break;
    case 13: {
      u8 bytes[8] = {};
      const u64 offset = in.take((op & 0x80) != 0 ? 8 : 1);
      const std::span<u8> data(bytes, 1 + (op >> 4 & 7u));
      subject.device().read_config(offset, data);
      for (u8& b : data) b = in.byte();
      subject.write_config(offset, data);
      break;
    }
    case 14: {
      const u64 at = in.take(2);
      u8 bytes[8];
      for (u8& b : bytes) b = in.byte();
      if (driver->running()) driver->poke(at, std::span(bytes).first(1 + (op >> 4 & 7u)));
      break;
    }
    case 15:
      if ((op & 16) != 0 && driver->running() && subject.device().can_reset_queues()) {
        turn(subject);
        driver->restart_queue(static_cast<u16>((op >> 5) % driver->queues()));
        turn(subject);
      } else {
        stop(subject);
        features = features_of(subject, in.byte());
        rings = in.byte();
      }
      break;
    default: request(subject, in);
  }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  spdlog::set_level(spdlog::level::off);
  signal(SIGPIPE, SIG_IGN);
  driver = new Driver;
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const u8* data, std::size_t size) {
  if (size < 8) return 0;
  Input in{data, size};
  const u8 which = in.byte(), how = in.byte();
  driver->begin();
  const auto subject = choose(which, how);
  subject->device().attach(transport);
  u64 features = features_of(*subject, in.byte());
  u8 rings = in.byte();
  for (int steps = 0; steps < 96 && in.size != 0; steps++) step(*subject, in, features, rings);
  stop(*subject);
  subject->finish();
  driver->end();
  return 0;
}
